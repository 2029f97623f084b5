"""Control groups of processes and of single threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runner, firn_command, wait_until

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")

PROGRAM = "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); time.sleep(1000)"


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    """Two new groups of a hierarchy whose threads may be in different ones."""
    top = Path("/sys/fs/cgroup/pids")
    if not (top / "tasks").exists():
        pytest.skip("no hierarchy of cgroup v1 for pids")
    made = [top / f"firn-test-{os.getpid()}-{name}" for name in ("process", "thread")]
    for folder in made:
        folder.mkdir()
    yield made
    for folder in made:
        folder.rmdir()


def threads(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def group_of(pid: int, tid: int) -> str:
    lines = Path(f"/proc/{pid}/task/{tid}/cgroup").read_text().splitlines()
    return next(line.rpartition("/")[2] for line in lines if line.split(":")[1] == "pids")


@pytest.mark.parametrize("places", [(0, 1), (0, None), (None, 1)])
def test_a_thread_in_another_group(runner: Runner, folders: list[Path], places: tuple[int | None, int | None]) -> None:
    target = runner.spawn([sys.executable, "-c", PROGRAM])
    wait_until("it has its thread", lambda: len(threads(target.pid)) == 2)
    for tid, place in zip(threads(target.pid), places, strict=True):
        if place is not None:
            (folders[place] / "tasks").write_text(str(tid))
    before = [group_of(target.pid, tid) for tid in threads(target.pid)]
    assert before[0] != before[1]
    images = runner.dump(target)
    target = runner.restore(images, target)
    assert [group_of(target.pid, tid) for tid in threads(target.pid)] == before
    runner.kill(target)
