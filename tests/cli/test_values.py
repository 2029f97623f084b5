"""The values of options: what is read, and what is refused."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firn.cli.parse import parse
from firn.cli.values import ShortUsage, atoi, atol
from firn.errors import UsageError

if TYPE_CHECKING:
    from firn.cli.values import Values

LIBC = ctypes.CDLL(None)
LIBC.atol.restype = ctypes.c_long


def values_of(*words: str) -> Values:
    return parse(["criu", *words], "criu")[1]


@given(st.text("0123456789+- \tx", max_size=30) | st.integers().map(str))
def test_numbers_are_read_as_the_c_library_does(text: str) -> None:
    assert atol(text) == LIBC.atol(text.encode())
    assert atoi(text) == LIBC.atoi(text.encode())


def test_digits_without_end() -> None:
    assert atol("9" * 100_000) == (1 << 63) - 1
    assert atol("0" * 100_000 + "7") == 7


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["-v"], 3),
        (["-v", "-v"], 4),
        (["-vv"], 4),
        (["-vvv"], 5),
        (["-v4"], 4),
        (["-v0"], 0),
        (["--verbosity"], 3),
        (["--verbosity=1"], 1),
        (["-v0", "-v"], 1),
        (["-verbosity=0"], 0),
        (["-vx"], 0),
    ],
)
def test_verbosity(words: list[str], level: int) -> None:
    assert values_of(*words) == {"verbosity": level}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("2K", 2048),
        ("3M", 3 << 20),
        ("1G", 1 << 30),
        ("1.5G", 1 << 30),
        ("xM", 0),
        ("5k", 5),
        ("-3", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert values_of("--ghost-limit", text) == {"ghost_limit": size}


IMAGE = 8


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        (["--cpu-cap"], 7 | IMAGE),
        (["--cpu-cap=all"], 7 | IMAGE),
        (["--cpu-cap=none"], 0),
        (["--cpu-cap=fpu"], 5 | IMAGE),
        (["--cpu-cap=cpu"], 7 | IMAGE),
        (["--cpu-cap=none,cpu"], 2 | IMAGE),
        (["--cpu-cap=nonecpuins"], 6 | IMAGE),
        (["--cpu-cap=^fpu"], 4 | IMAGE),
        (["--cpu-cap=^fpu,cpu"], 6 | IMAGE),
        (["--cpu-cap=^fpuins"], 0),
        (["--cpu-cap=^none"], 7 | IMAGE),
        (["--cpu-cap=^^cpu"], 7 | IMAGE),
        (["--cpu-cap=none", "--cpu-cap=ins"], 4 | IMAGE),
        (["--cpu-cap="], 5 | IMAGE),
    ],
)
def test_cpu_cap(words: list[str], mask: int) -> None:
    assert values_of(*words) == {"cpu_cap": mask}


@pytest.mark.parametrize("text", ["zork", "fpu,zork", "al"])
def test_bad_cpu_cap(text: str) -> None:
    with pytest.raises(ShortUsage, match="processor capability"):
        values_of(f"--cpu-cap={text}")


def test_optional_values_must_be_glued() -> None:
    words, values = parse(["criu", "dump", "--manage-cgroups", "full"], "criu")
    assert words == ["dump", "full"] and values == {"manage_cgroups": "soft"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-t", "0"], r"^invalid argument for -t: 0$"),
        (["--tree=-7"], r"^invalid argument for --tree: -7$"),
        (["-t", "x5"], "invalid argument for -t: x5"),
        (["--port", "a"], "^invalid argument for --port: a$"),
        (["--status-fd", "x"], "--status-fd"),
        (["--pre-dump-mode", "zork"], "pre-dump mode"),
        (["--network-lock", "zork"], "^Invalid value for --network-lock: zork$"),
        (["--empty-ns", "mnt"], "^Unsupported empty namespace: mnt$"),
        (["--veth-pair", "a"], "^invalid argument for --veth-pair: a$"),
        (["-M", "a"], "^invalid argument for -M: a$"),
        (["-x0"], "inode"),
        (["-x5,"], "inode"),
        (["-x5,y"], "inode"),
        (["-J", "net"], "^invalid argument for -J: net$"),
        (["-J", "pid:1"], "invalid argument for -J"),
        (["-J", "zork:1"], "invalid argument for -J"),
        (["-J", "net:/nonexistent/ns"], "invalid argument for -J"),
        (["-J", "user:/proc/self/ns/user,1"], "invalid argument for -J"),
        (["-J", "user:/proc/self/ns/user,1,70000"], "invalid argument for -J"),
        (["-J", "net:/proc/self/ns/net,1,1"], "invalid argument for -J"),
        (["--external", "mnt[]:x"], "external mounts"),
        (["--external", "macvlan[eth0]:no-such-device"], "no such network device"),
        (["--external", "macvlan[eth0]:../../../etc"], "no such network device"),
        (["--inherit-fd", "zork"], "^Invalid inherit fd argument: zork$"),
        (["--inherit-fd", "fd[x]:k"], "^Invalid inherit fd argument"),
        (["--inherit-fd", "fd[4000]:k"], "descriptor 4000 is not open"),
        (["--lsm-profile", "zork"], "^invalid argument for --lsm-profile: zork$"),
        (["--ms"], "--ms"),
    ],
)
def test_refused_values(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        values_of(*words)
    assert not isinstance(caught.value, ShortUsage)


@pytest.mark.parametrize(
    "words", [["--file-validation", "zork"], ["--manage-cgroups=zork"], ["--manage-cgroups="], ["--cpu-cap=zork"]]
)
def test_refused_with_usage(words: list[str]) -> None:
    with pytest.raises(ShortUsage):
        values_of(*words)


def test_accepted_values(tmp_path: Path) -> None:
    assert values_of("-J", f"user:{os.getpid()},0,65535")["join_ns"] == [f"user:{os.getpid()},0,65535"]
    assert values_of("-J", f"net:{tmp_path}")["join_ns"] == [f"net:{tmp_path}"]
    assert values_of("-M", "auto")["external"] == ["mnt[]"]
    assert values_of("-M", "k:v:w", "--external", "unix[3]")["external"] == ["mnt[k]:v:w", "unix[3]"]
    assert values_of("--external", "mnt[]:ms", "--external", "zork[1]")["external"] == ["mnt[]:ms", "zork[1]"]
    assert values_of("--external", "macvlan[eth0]:lo")["external"] == ["macvlan[eth0]:lo"]
    assert values_of("-x12,34")["external"] == ["unix[12]", "unix[34]"]
    assert values_of("-x") == {"ext_unix_sk": True}
    assert values_of("--pre-dump-mode", "read", "--pre-dump-mode=splice") == {"pre_dump_mode": "read"}
    assert values_of("--timeout", "zork") == {"timeout": 0}


def test_a_debug_text_is_written_at_once(tmp_path: Path) -> None:
    with (tmp_path / "text").open("wb") as file:
        assert values_of("--inherit-fd", f"debug[{file.fileno()}]:hello") == {}
    assert (tmp_path / "text").read_text() == "hello"


def test_close_acts_at_once() -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    assert values_of("--close", str(descriptor)) == {}
    with pytest.raises(OSError):
        os.fstat(descriptor)
    # what is not open is no error
    values_of("--close", str(descriptor), "--close", "-5", "--close", "4000")
