"""File locks and leases: the workloads, locks that somebody else has at the restore, damaged images."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, Target, firn_command
from hypothesis import given
from hypothesis import strategies as st
from test_workloads import test_workload as run_workload
from workloads.table import PLAIN_WAYS, REFUSED_FIRST, REFUSED_WAY, Workload

from firn.images.store import ImageDir
from firn.resources.files import locks

ONCE = ("lease-read", "lease-write", "breaking-read", "breaking-all", "breaking-shared", "waiter-posix", "waiter-flock")
MODES = ("flock", "posix", "ofd", "tree", "table", "gone", *ONCE)
# The link of a pipe's descriptor is its new inode.
TABLE = [
    Workload(
        "locks",
        mode,
        dump=("--file-locks",),
        refused=(r"holds a \w+ (lease|flock|POSIX lock|open-file-description lock)", r"--file-locks \(-l\)"),
        ways=REFUSED_FIRST,
        once=mode in ONCE,
        unlike=(r"fd\.\d+",) if mode == "flock" else (),
    )
    for mode in MODES
]
TABLE.append(
    Workload(
        "locks",
        "lease-nameless",
        refused=("holds a write lease on the unlinked file .*data",),
        ways=(*PLAIN_WAYS, REFUSED_WAY),
    )
)
needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def started(runner: Runner, mode: str) -> tuple[Target, Path]:
    """A workload that has been dumped, and its images."""
    target = runner.start(next(workload for workload in TABLE if workload.mode == mode))
    return target, runner.dump(target, "-l")


def failed_restore(runner: Runner, images: Path, target: Target) -> str:
    code, text = runner.try_restore(images)
    assert code and "Traceback" not in text, text[-3000:]
    assert not Path(f"/proc/{target.pid}").exists()
    return text


def lock(kind: str, path: Path) -> int:
    """Somebody else's write lock: ours."""
    fd = os.open(path, os.O_RDWR)
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    elif kind == "posix":
        fcntl.lockf(fd, fcntl.LOCK_EX, 5, 1000)
    else:
        fcntl.fcntl(fd, 37, struct.pack("<hh4xqqi4x", fcntl.F_WRLCK, 0, 55, 1, 0))
    return fd


@needs_firn
@pytest.mark.parametrize(("mode", "name"), [("flock", "alone"), ("posix", "data"), ("ofd", "data")])
def test_a_lock_that_somebody_else_has_is_named(runner: Runner, mode: str, name: str) -> None:
    target, images = started(runner, mode)
    fd = lock(mode, runner.folder / name)
    try:
        text = failed_restore(runner, images, target)
        holder = "an open file description" if mode == "ofd" else f"process {os.getpid()} ("
        assert f"on {runner.folder / name} cannot be taken: the file is locked by {holder}" in text, text[-3000:]
    finally:
        os.close(fd)
    back = runner.restore(images, target)
    runner.assert_right(back, "when the lock is free again")
    runner.kill(back)


@needs_firn
def test_a_lease_on_a_file_that_is_open_elsewhere_is_named(runner: Runner) -> None:
    target, images = started(runner, "lease-write")
    with (runner.folder / "data").open("rb"):
        text = failed_restore(runner, images, target)
    assert f"write lease on {runner.folder / 'data'} cannot be taken: somebody else has the file open" in text
    back = runner.restore(images, target)
    runner.assert_right(back, "when the file is closed")
    runner.kill(back)


@needs_firn
def test_locks_of_a_queued_description_are_refused(runner: Runner) -> None:
    """A description that is nobody's descriptor, only part of a message."""
    path = runner.folder / "locked"
    path.write_bytes(b"x")
    left, right = socket.socketpair()
    with left, right, path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        socket.send_fds(left, [b"m"], [file.fileno()])
        command = ["/bin/sleep", "1000"]
        process = subprocess.Popen(
            command,
            stdin=right.fileno(),
            stdout=left.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=runner.folder,
        )
    process.returncode = 0
    target = Target(process.pid, None)
    code, text, _ = runner.try_dump(target, "-l")
    assert code and f"a write flock on {path}, which no process has open" in text, text[-3000:]
    assert target.state() == "S"
    runner.kill(target)


def changed(images: Path, to: Path, **values: int) -> Path:
    """A copy of *images* whose first lock has other *values*."""
    shutil.copytree(images, to)
    with ImageDir.open(str(to), create_files=True) as folder:
        entries = folder.read_all("FILE_LOCKS")
        entries[0].update(values)
        folder.write_all("FILE_LOCKS", entries)
    return to


IMPOSSIBLE: list[tuple[dict[str, int], str]] = [
    ({"pid": 1 << 29}, "there is no process 536870912"),
    ({"fd": 1000}, "has no descriptor 1000"),
    ({"flag": 3}, "unknown kind 3"),
    ({"type": 2}, "or type 0x2"),
    ({"type": 33}, "or type 0x21"),
    ({"start": -1}, "impossible range -1"),
    ({"len": -1}, "impossible range"),
    ({"start": (1 << 63) - 1, "len": 2}, "impossible range"),
]


@needs_firn
def test_impossible_locks(runner: Runner) -> None:
    target, images = started(runner, "posix")
    for number, (values, message) in enumerate(IMPOSSIBLE):
        text = failed_restore(runner, changed(images, runner.folder / f"changed-{number}", **values), target)
        assert "filelocks.img" in text and message in text, f"{values}: {text[-2000:]}"
    cut = images / "filelocks.img"
    cut.write_bytes(cut.read_bytes()[:-3])
    assert "filelocks.img" in failed_restore(runner, images, target)


@needs_firn
@pytest.mark.skipif(not Path("/usr/bin/crit").exists(), reason="no crit")
def test_the_image_is_what_others_read(runner: Runner) -> None:
    target, images = started(runner, "posix")
    done = subprocess.run(["/usr/bin/crit", "show", images / "filelocks.img"], capture_output=True, check=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout)["entries"]
    assert {(entry["flag"], entry["pid"]) for entry in entries} == {(1, target.pid)}
    ranges = [(entry["type"], entry["start"], entry["len"]) for entry in entries]
    assert ranges == [(1, 0, 10), (0, 10, 10), (0, 100, 1), (1, 1000, 0), (1, 200, 100)]


@needs_firn
def test_without_locks_there_is_no_image(runner: Runner) -> None:
    target = runner.spawn(["/bin/sleep", "1000"])
    assert not (runner.dump(target, "-l") / "filelocks.img").exists()


# ---- lines of the kernel


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1: POSIX  ADVISORY  WRITE 12 fe:00:5 0 9", (1, 1, 12, 0, 10)),
        ("2: FLOCK  ADVISORY  READ 0 fe:00:5 0 EOF", (2, 0, 0, 0, 0)),
        ("3: OFDLCK ADVISORY  READ -1 00:2b:77 50 EOF", (4, 0, -1, 50, 0)),
        ("4: LEASE  ACTIVE    READ 12 fe:00:5 0 EOF", (8, 0, 12, 0, 0)),
        ("4: LEASE  BREAKING  UNLCK 12 fe:00:5 0 EOF", (8, 6, 12, 0, 0)),
        ("4: LEASE  BREAKING  READ 12 fe:00:5 0 EOF", (8, 4, 12, 0, 0)),
        ("1: -> POSIX  ADVISORY  WRITE 13 fe:00:5 0 9", None),
        ("5: DELEG  ACTIVE    READ 0 fe:00:5 0 EOF", None),
        ("5: LEASE  BREAKER   READ 0 fe:00:5 0 EOF", None),
        ("6: ACCESS *NOINODE* READ 0 <none>:0 0 EOF", None),
    ],
)
def test_lines(line: str, expected: tuple[int, ...] | None) -> None:
    found = locks.parse(line)
    assert (found and (found[0].kind, found[0].type, found[0].pid, found[0].start, found[0].length)) == expected


@given(st.integers(0, (1 << 63) - 2), st.integers(0, (1 << 63) - 2))
def test_ranges_come_back(start: int, end: int) -> None:
    start, end = sorted((start, end))
    found = locks.parse(f"1: POSIX  ADVISORY  READ 7 00:01:2 {start} {end}")
    assert found and found[1] == "00:01:2" and found[0].start + found[0].length - 1 == end
    assert str(found[0]) == f"read POSIX lock from byte {start} to {end}"
    assert str(locks.Lock(found[0].kind, found[0].type, 7, start, 0)) == f"read POSIX lock from byte {start} to the end"
