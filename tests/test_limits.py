"""Callers of firn with odd settings, and what a machine's limits leave no room for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from harness import PATIENCE, Runner, firn_command, wait_until
from workloads.table import Workload

from firn.errors import Obstacle
from firn.host import procfs
from firn.resources.memory import areas

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")


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
