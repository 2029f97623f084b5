"""What makes the pause of a tree short: what is known before the freeze, work on many tasks at once, programs that are
built once."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.dump.early import EarlyMaps
from firn.dump.task import CollectedTask
from firn.errors import TargetError
from firn.host import kcmp, procfs
from firn.images.store import ImageDir
from firn.tracee import seize
from firn.tracee.program import Program, Recording
from firn.tracee.steps import alone, together

if TYPE_CHECKING:
    from firn.tracee.steps import Steps

SLEEPER = f"""
import mmap, os
room = mmap.mmap(-1, 1 << 20)
while os.read(0, 1):
    room.madvise({mmap.MADV_DONTFORK})
    os.write(1, b".")
"""
"""Sleeps in one and the same read; each byte makes it change the flags of a mapping first."""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    command = [os.path.realpath(sys.executable), "-ISc", SLEEPER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        _answer(process)
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _answer(process: subprocess.Popen[bytes]) -> None:
    """Have it do its work once, and fall asleep again."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b".")
    assert process.stdout.read(1) == b"."
    while procfs.stat(process.pid).state != "S":
        pass


def _are_still(early: EarlyMaps, pid: int) -> bool:
    task = seize.freeze(pid)
    try:
        task.shares_memory = False
        return early.are_still(CollectedTask(task))
    finally:
        task.release()


def test_who_has_slept_has_the_same_mappings(sleeper: subprocess.Popen[bytes]) -> None:
    early = EarlyMaps(sleeper.pid, sleeper.pid)
    assert _are_still(early, sleeper.pid)
    _answer(sleeper)


def test_who_has_run_may_have_others(sleeper: subprocess.Popen[bytes]) -> None:
    early = EarlyMaps(sleeper.pid, sleeper.pid)
    _answer(sleeper)
    assert not _are_still(early, sleeper.pid)


def test_who_shares_its_memory_may_have_others(sleeper: subprocess.Popen[bytes]) -> None:
    early = EarlyMaps(sleeper.pid, sleeper.pid)
    task = seize.freeze(sleeper.pid)
    try:
        assert task.shares_memory  # nobody has said anything else
        assert not early.are_still(CollectedTask(task))
    finally:
        task.release()


def test_a_stopped_thread_is_not_asleep(sleeper: subprocess.Popen[bytes]) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    while procfs.stat(sleeper.pid).state != "T":
        pass
    early = EarlyMaps(sleeper.pid, sleeper.pid)
    os.kill(sleeper.pid, signal.SIGCONT)
    _answer(sleeper)
    assert not _are_still(early, sleeper.pid)


def test_groups_are_confirmed() -> None:
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(5)]
    try:
        pids = [child.pid for child in children]
        grouped = kcmp.groups([*pids, pids[2]], fc.KCMP_FILES)
        assert sorted(map(len, grouped)) == [1, 1, 1, 1, 2]
        assert kcmp.are_still(grouped, fc.KCMP_FILES)
        assert not kcmp.are_still(grouped[::-1], fc.KCMP_FILES)
        assert not kcmp.are_still([grouped[0] + grouped[1]], fc.KCMP_FILES)
        some = [group for group in grouped if pids[0] not in group]
        assert kcmp.groups(pids[:1], fc.KCMP_FILES, some) == grouped
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_steps_take_turns() -> None:
    seen: list[str] = []

    def work(name: str) -> Steps[None]:
        for index in range(2):
            seen.append(f"{name}{index}")
            yield

    together([work("a"), work("b")])
    assert seen == ["a0", "b0", "a1", "b1"]


def test_a_failure_closes_the_others() -> None:
    closed: list[str] = []

    def patient() -> Steps[None]:
        try:
            while True:
                yield
        finally:
            closed.append("patient")

    def failing() -> Steps[None]:
        yield
        raise OSError(errno.EIO, "failing")

    with pytest.raises(OSError, match="failing"):
        together([patient(), failing(), patient()])
    assert closed == ["patient", "patient"]


def test_many_are_frozen_and_prepared_at_once() -> None:
    """The scratch areas lie at one place, so that one program does for all of them."""
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    tasks: list[seize.Task] = []
    try:
        tasks = [seize.freeze(child.pid) for child in children]
        alone(tasks[0].preparing())
        assert tasks[0].scratch is not None
        place = tasks[0].scratch.code
        together([task.preparing(near=place) for task in tasks[1:]])
        assert {task.scratch.code for task in tasks if task.scratch is not None} == {place}
        first = tasks[0].program(size=4096)
        calls = first.call("getpid", nr.getpid), first.buffer(64)
        first.call("getcwd", nr.getcwd, calls[1], 64)
        recording = Recording(first)
        programs: list[Program] = [first]
        for task in tasks[1:]:
            programs.append(task.program(size=4096))
            programs[-1].repeat(recording)
        for program in programs:
            program.start()
        for child, program in zip(children, programs, strict=True):
            program.finish()
            assert program.results[calls[0]] == child.pid
            assert program.read(calls[1], 64).rstrip(b"\0") == os.getcwdb()[:64]
        with pytest.raises(ValueError, match="another place"):
            tasks[0].program(size=4096).repeat(recording)
    finally:
        for task in tasks:
            task.release()
        for child in children:
            assert procfs.status(child.pid)["TracerPid"] == "0"
            child.kill()
            child.wait()


def test_an_area_that_is_taken_is_not_used() -> None:
    maps = [procfs.Map(0x7F0000000000, 0x7F0000001000, "r--p", 0, (0, 0), 0, "")]
    free, margin = 0x200000000000, seize._MARGIN
    assert seize._find_gap(maps, 1 << 20, free) == free
    highest = maps[0].end + margin
    assert seize._find_gap(maps, 1 << 20, 0) == highest
    assert seize._find_gap(maps, 1 << 20, maps[0].start - margin) == highest
    assert seize._find_gap(maps, 1 << 48, free) == 0


def test_freezing_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises((TargetError, OSError)):
        seize.freeze(child.pid)


def test_long_files_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "long"
    for size in (0, 10, 1 << 16, 200_000):
        content = os.urandom(size)
        path.write_bytes(content)
        assert procfs.read_record(str(path)) == procfs.read(str(path)) == content


def test_an_image_that_was_made_for_nothing(tmp_path: Path) -> None:
    with ImageDir.open(str(tmp_path), create_files=True) as images:
        os.close(images.open_raw("pages-1.img", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        images.remove("pages-1.img")
        images.abort()
    assert not list(tmp_path.iterdir())
