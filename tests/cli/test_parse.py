"""getopt's rules: permutation, prefixes, glued values, complaints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firn.api import TABLE, Option
from firn.cli.parse import Names, parse, prescan, takes
from firn.cli.values import ShortUsage, ShowHelp, ShowVersion
from firn.errors import UsageError

if TYPE_CHECKING:
    from firn.cli.values import Values

# A good value for each kind of option, and what it is read as.
GOOD: dict[str, tuple[str, object]] = {
    "text": ("some text", "some text"),
    "list": ("item", ["item"]),
    "number": ("12x", 12),
    "pid": ("4711", 4711),
    "port": ("80", 80),
    "fd": ("9", 9),
    "size": ("3M", 3 << 20),
    "verbosity": ("4", 4),
    "file-validation": ("filesize", "filesize"),
    "pre-dump-mode": ("read", "read"),
    "network-lock": ("none", "skip"),
    "cpu-cap": ("none", 0),
    "manage-cgroups": ("full", "full"),
    "empty-ns": ("net", True),
    "join-ns": ("net:/proc/self/ns/net", ["net:/proc/self/ns/net"]),
    "veth-pair": ("a=b", ["veth[a]:b"]),
    "ext-mount-map": ("k:/v", ["mnt[k]:/v"]),
    "external": ("file[1:2]", ["file[1:2]"]),
    "inherit-fd": ("fd[0]:key", ["fd[0]:key"]),
    "lsm-profile": ("none:x", "none:x"),
}


def values_of(*words: str, program: str = "firn") -> Values:
    return parse([program, *words], program)[1]


def valued() -> list[Option]:
    return [row for row in TABLE if row.kind in GOOD]


@pytest.mark.parametrize("row", valued(), ids=lambda row: row.long)
def test_values(row: Option) -> None:
    text, value = GOOD[row.kind]
    assert values_of(f"--{row.long}={text}") == {row.attribute: value}
    if takes(row) == ":":
        assert values_of(f"--{row.long}", text) == {row.attribute: value}
    if row.short:
        assert values_of(f"-{row.short}{text}") == {row.attribute: value}
        if takes(row) == ":":
            assert values_of(f"-{row.short}", text) == {row.attribute: value}


@pytest.mark.parametrize("row", [row for row in TABLE if row.kind == "flag"], ids=lambda row: row.long)
def test_flags(row: Option) -> None:
    assert values_of(f"--{row.long}") == {row.attribute: True}
    if row.short:
        assert values_of(f"-{row.short}") == {row.attribute: True}
    if row.no:
        assert values_of(f"--{row.long}", f"--no-{row.long}") == {row.attribute: False}
    elif row.long != "all":  # --no-all is the beginning of --no-allow-uprobes
        with pytest.raises(ShortUsage):
            values_of(f"--no-{row.long}")
    with pytest.raises(ShortUsage, match="doesn't allow an argument"):
        values_of(f"--{row.long}=1")


@pytest.mark.parametrize("row", [row for row in TABLE if takes(row) == ":"], ids=lambda row: row.long)
def test_a_missing_value(row: Option) -> None:
    with pytest.raises(ShortUsage, match=f"^firn: option '--{row.long}' requires an argument$"):
        values_of(f"--{row.long}")
    if row.short:
        with pytest.raises(ShortUsage, match=f"^firn: option requires an argument -- '{row.short}'$"):
            values_of(f"-{row.short}")


@pytest.mark.parametrize("program", ["firn", "criu"])
def test_every_unique_prefix_stands_for_its_option(program: str) -> None:
    names = Names(program)
    for full in names.long:
        for length in range(1, len(full)):
            prefix = full[:length]
            fitting = {other for other in names.long if other.startswith(prefix)}
            if fitting == {full}:
                assert names.find(prefix, program)[0] is names.long[full][0]
            elif prefix not in names.long:
                with pytest.raises(ShortUsage, match="is ambiguous"):
                    names.find(prefix, program)


def test_prefixes() -> None:
    assert values_of("--fea", "uffd", program="criu") == {"feature": "uffd"}
    assert values_of("--no-all", program="criu") == {"allow_uprobes": False}
    assert values_of("--all", program="criu") == {"all": True}
    with pytest.raises(ShortUsage, match=r"^criu: option '--tr' is ambiguous; possibilities: '--tree' '--track-mem'$"):
        values_of("--tr", "5", program="criu")
    with pytest.raises(ShortUsage, match=r"^criu: unrecognized option '--zork'$"):
        values_of("--zork=5", program="criu")
    with pytest.raises(ShortUsage, match=r"^criu: invalid option -- 'q'$"):
        values_of("-jq", program="criu")


def test_what_is_firns_own_does_not_exist_for_criu() -> None:
    assert values_of("--fork-snapshot") == {"fork_snapshot": True}
    with pytest.raises(ShortUsage, match="unrecognized"):
        values_of("--fork-snapshot", program="criu")
    # and is in nobody's way
    assert values_of("--fo", program="criu") == {"force_irmap": True}


def test_letters_in_one_word() -> None:
    assert values_of("-dSt5", "-jl") == {
        "restore_detached": True,
        "restore_sibling": True,
        "tree": 5,
        "shell_job": True,
        "file_locks": True,
    }


def test_two_dashes_end_the_options() -> None:
    words, values = parse(["firn", "restore", "--exec-cmd", "-d", "--", "ls", "-h", "--config=x"], "firn")
    assert words == ["restore", "ls", "-h", "--config=x"]
    assert values == {"exec_cmd": True, "restore_detached": True}


def test_one_dash_is_a_word() -> None:
    assert parse(["firn", "-", "dump"], "firn")[0] == ["-", "dump"]


@given(st.data())
def test_words_may_stand_anywhere(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(valued()), unique_by=lambda row: row.attribute, max_size=6))
    options = [f"--{row.long}={GOOD[row.kind][0]}" for row in rows]
    mixed = data.draw(st.permutations([*options, "dump", "extra"]))
    words, values = parse(["firn", *mixed], "firn")
    assert words == [word for word in mixed if not word.startswith("--")]
    assert values == {row.attribute: GOOD[row.kind][1] for row in rows}


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12), max_size=5))
def test_no_words_make_it_crash(words: list[str]) -> None:
    try:
        parse(["firn", *words], "firn")
    except (UsageError, ShowHelp, ShowVersion):
        pass


@pytest.mark.parametrize(
    ("words", "final"),
    [
        (["-R"], (True, False)),
        (["-s"], (False, True)),
        (["-R", "-s"], (False, True)),
        (["--leave-stopped", "--leave-running"], (True, False)),
    ],
)
def test_the_last_final_state_wins(words: list[str], final: tuple[bool, bool]) -> None:
    values = values_of(*words)
    assert (values["leave_running"], values["leave_stopped"]) == final


def test_single_values_and_lists() -> None:
    assert values_of("-D", "a", "-D", "b")["images_dir"] == "b"
    assert values_of("--action-script", "a", "--action-script", "b")["action_script"] == ["a", "b"]
    # -d and --daemon are one thing
    assert values_of("--daemon", "--no-restore-detached")["restore_detached"] is False
    assert values_of("-d", "--no-daemon")["restore_detached"] is False


def test_help_and_version() -> None:
    with pytest.raises(ShowHelp):
        parse(["firn", "--zork", "-h"], "firn")
    with pytest.raises(ShowVersion):
        parse(["firn", "-V", "--zork"], "firn")
    with pytest.raises(ShortUsage):
        parse(["firn", "--zork", "-V"], "firn")
    # CRIU looks for help in the words of a command to run, too
    with pytest.raises(ShowHelp):
        parse(["criu", "restore", "--exec-cmd", "--", "ls", "-h"], "criu")


def test_prescan() -> None:
    assert prescan(["dump"]) == (True, None)
    assert prescan(["--no-default-config"]) == (False, None)
    assert prescan(["--config", "a", "--config=b"]) == (False, "b")
    assert prescan(["--config=b", "--config", "a"]) == (False, "a")
    assert prescan(["x--config=c"]) == (False, "c")
    assert prescan(["--config"]) == (True, None)


def test_deprecated_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIU_DEPRECATED", "")
    assert values_of() == {"deprecated": True}
    assert values_of("--no-deprecated") == {"deprecated": False}
