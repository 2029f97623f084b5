"""Processes whose first thread has exited while others live, beyond the ways of tests/test_workloads.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command
from workloads.forest import children
from workloads.table import Workload

from firn.abi import events, libc, nr
from firn.abi.ptrace import WALL
from firn.errors import ImageError, KernelError
from firn.host import procfs
from firn.images.store import ImageDir
from firn.resources.base import pidfd_for_copies
from firn.resources.threads import exited
from firn.tracee import seize

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")
OPTIONS = ("--file-locks",)


@pytest.fixture
def target(runner: Runner) -> Target:
    return runner.start(Workload("leader", "whole"))


def _reap(clones: int) -> None:
    """Orphans are ours: reap the *clones* that a snapshot has left, or, if there are none, everybody."""
    dead = [pid for pid in children(os.getpid()) if not clones or procfs.stat(procfs.speaker(pid)).state == "Z"]
    assert len(dead) == clones or not clones
    for pid in dead:
        assert os.waitpid(pid, WALL)[0] == pid


@needs_firn
def test_snapshot(runner: Runner, target: Target) -> None:
    images = runner.dump(target, *OPTIONS, "--leave-running", "--fork-snapshot")
    _reap(2)
    runner.assert_right(target, "the original")
    runner.kill(target)
    back = runner.restore(images, target, *OPTIONS)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


@needs_firn
def test_faults(runner: Runner, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump that fails leaves it running, a restore that fails leaves nothing."""
    for fault in ("fail:dump.contents.done", "kill:dump.collect.done"):
        monkeypatch.setenv("FIRN_FAULT", fault)
        assert runner.try_dump(target, *OPTIONS)[0]
        runner.assert_right(target, f"after {fault}")
    monkeypatch.delenv("FIRN_FAULT")
    images = runner.dump(target, *OPTIONS)
    for fault in ("fail:restore.threads.done", "fail:restore.finish", "kill:restore.state.done"):
        monkeypatch.setenv("FIRN_FAULT", fault)
        assert runner.try_restore(images, *OPTIONS)[0]
        # Without firn they are ours.
        _reap(0)
        assert not Path(f"/proc/{target.pid}").exists(), f"something is left after {fault}"


@needs_firn
def test_without_the_mark(runner: Runner) -> None:
    """A program that does not know the mark brings back a first thread which exits at once."""
    target = runner.start(Workload("leader", "gone"))
    made = runner.dump(target)
    with ImageDir.open(str(made)) as images:
        core = images.read_one("CORE", target.pid)
    assert core["tc"]["exit_code"] == 42 << 8
    for name in ("leader_exited", "leader_mask"):
        del core["tc"]["firn"][name]
    (made / f"core-{target.pid}.img").unlink()
    with ImageDir.open(str(made), create_files=True) as images:
        images.write_one("CORE", core, target.pid)
    back = runner.restore(made, target)
    runner.wait_beats(back)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


@pytest.mark.parametrize(("code", "tids"), [(42, [7, 8]), (0x10000, [7, 8]), (0, [7])])
def test_damage(code: int, tids: list[int]) -> None:
    with pytest.raises(ImageError, match=r"core-7\.img"):
        exited.load(7, {"exit_code": code, "firn": {"leader_exited": True}}, tids)


@needs_firn
def test_old_kernel(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no pidfds of threads, it is said what is missing."""
    target = runner.start(Workload("leader", "gone"))
    monkeypatch.setattr(events, "PIDFD_THREAD", 1 << 20)
    assert procfs.speaker(target.pid) != target.pid
    with pytest.raises(KernelError, match=r"Linux 6\.9"):
        pidfd_for_copies(target.pid, procfs.speaker(target.pid))
    with pytest.raises(ProcessLookupError):
        libc.syscall("pidfd_getfd", nr.pidfd_getfd, libc.syscall("pidfd_open", nr.pidfd_open, target.pid, 0), 0, 0)
    runner.kill(target)


RACE = r"""
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static void *outlive(void *ready) { write(1, ready, 1); pause(); return NULL; }
int main(int count, char **words)
{
    pthread_t thread;
    char go;
    pthread_create(&thread, NULL, outlive, "r");
    read(0, &go, 1);
    for (volatile int left = atoi(words[count - 1]); left; left--);
    syscall(SYS_exit, 0);
}
"""


def test_freeze_while_it_exits(tmp_path: Path) -> None:
    """A first thread that exits between being seized and being stopped: nobody is told of it."""
    (tmp_path / "race.c").write_text(RACE)
    made = ["gcc", "-O1", "-pthread", "-w", "-o", str(tmp_path / "race"), str(tmp_path / "race.c")]
    subprocess.run(made, check=True, timeout=60)
    for turn in range(60):
        words = [str(tmp_path / "race"), str(20000 + 300 * turn)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin and process.stdout and process.stdout.read(1) == b"r"
        os.write(process.stdin.fileno(), b"g")
        task = seize.freeze(process.pid)
        assert len(task.threads) == 2 - task.headless
        task.release()
        process.kill()
        process.communicate(timeout=60)
