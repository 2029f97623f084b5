"""Threads that are elsewhere than their process, beyond the ways of tests/test_workloads.py; and callers of firn with
odd settings, which the tree must not inherit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PATIENCE, Runner, Target, firn_command, wait_until
from workloads.table import Workload

from firn.errors import Obstacle
from firn.host import procfs
from firn.resources.memory import areas

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")


def _groups(pid: int, tid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{tid}/cgroup").read_text().splitlines()


@contextmanager
def _folders(*paths: Path) -> Iterator[None]:
    """Control groups for a while."""
    made: list[Path] = []
    try:
        for path in paths:
            path.mkdir()
            made.append(path)
        yield
    finally:
        for path in reversed(made):
            wait_until(f"{path} is empty", lambda path=path: _is_removed(path))  # type: ignore[misc]


def _is_removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _checkpointed(runner: Runner, target: Target) -> None:
    """What threads are in comes back."""
    tids = procfs.threads(target.pid)
    before = [_groups(target.pid, tid) for tid in tids]
    assert len(before) == 2 and before[0] != before[1]
    for _ in range(2):
        target = runner.restore(runner.dump(target), target)
        assert [_groups(target.pid, tid) for tid in tids] == before
    runner.assert_right(target, "after the restores")
    runner.kill(target)


def test_a_thread_in_a_group_of_its_own(runner: Runner) -> None:
    top = Path("/sys/fs/cgroup/freezer")
    if not (top / "tasks").exists():
        pytest.skip("no control groups of version 1")
    group = top / f"firn-apart-{os.getpid()}"
    with _folders(group):
        target = runner.start(Workload("apart", "directories"))
        other = max(procfs.threads(target.pid))
        (group / "tasks").write_text(str(other))
        _checkpointed(runner, target)


@pytest.mark.parametrize("whole", [False, True])
def test_a_thread_in_a_threaded_group(runner: Runner, whole: bool) -> None:
    """... alone, or with all others in another threaded group."""
    top = next((path for path in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"))
                if (path / "cgroup.controllers").exists()), None)  # fmt: skip
    if top is None:
        pytest.skip("no control groups of version 2")
    domain = top / f"firn-apart-{os.getpid()}"
    inner, beside = domain / "inner", domain / "beside"
    with _folders(domain, inner, beside):
        for group in (inner, beside):
            (group / "cgroup.type").write_text("threaded")
        target = runner.start(Workload("apart", "directories"))
        first, other = sorted(procfs.threads(target.pid))
        (domain / "cgroup.procs").write_text(str(target.pid))
        (inner / "cgroup.threads").write_text(str(other))
        if whole:
            (beside / "cgroup.threads").write_text(str(first))
        _checkpointed(runner, target)


def test_a_caller_that_ignores_signals(runner: Runner) -> None:
    """Of ignored SIGCHLD the kernel makes children that nobody can wait for."""
    images = runner.dump(target := runner.start(Workload("signals", "handlers")))
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGCHLD, signal.SIGPIPE)}
    try:
        command = [str(firn_command()), "restore", "-D", str(images)]
        attached = subprocess.Popen(command, cwd=runner.folder, stdin=subprocess.DEVNULL)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    assert target.beat
    beat, before = target.beat, target.beat.get("beats")
    wait_until("it is back", lambda: beat.get("beats") > before)
    os.kill(target.pid, signal.SIGKILL)
    assert attached.wait(timeout=PATIENCE) == 128 + signal.SIGKILL


def test_too_many_mappings() -> None:
    """A process that has all the mappings there may be could not be restored."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    one = procfs.Map(0x10000, 0x11000, "rw-p", 0, (0, 0), 0, "")
    for count, refused in ((limit - 16, False), (limit, True)):
        obstacles: list[Obstacle] = []
        areas.classify(1, [one] * count, obstacles)
        assert ["max_map_count" in str(each) for each in obstacles] == [True] * refused
