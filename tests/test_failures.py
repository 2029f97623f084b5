"""What happens when something goes wrong: the target of a dump is never harmed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import Steady, dump_cut_off
from harness import Runner


def _cut_everywhere(runner: Runner, cut: Callable[[], None], left: bool) -> list[str]:
    """Cut off a dump before every one of its calls; what was wrong afterwards. *left*: a mapping may be left behind."""
    found = []
    images = Path(runner.folder) / "cut"
    target = Steady(runner.folder)
    try:
        status, calls = dump_cut_off(target.pid, images, 0, cut)
        assert not status and not target.trouble()
        assert calls > 50
        for at in range(1, calls + 1):
            areas = target.areas()
            status, _ = dump_cut_off(target.pid, images, at, cut)
            trouble = target.trouble()
            if trouble:
                found.append(f"call {at} of {calls}: {trouble}")
                target.end()
                target = Steady(runner.folder)
            elif not left and target.areas() != areas:
                found.append(f"call {at} of {calls}: a mapping is left")
            if status and not left and os.listdir(images):
                found.append(f"call {at} of {calls}: files are left: {os.listdir(images)}")
    finally:
        target.end()
    return found


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("cut", "left"), [(_kill, True), (_terminate, False)], ids=["SIGKILL", "SIGTERM"])
def test_dump_ends_before_any_call(runner: Runner, cut: Callable[[], None], left: bool) -> None:
    found = _cut_everywhere(runner, cut, left)
    assert not found, "\n".join(found)
