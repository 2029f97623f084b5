"""The ``runner`` fixture: a :class:`harness.Runner` per test, a time limit, and a look at what the test left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest
from harness import TIME_LIMIT, Runner, machine_state

FAILED = pytest.StashKey[bool]()
AT_START = machine_state()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes what has failed, for ``make test`` to run it once more, alone."""
    place = os.environ.get("FIRN_FAILED")
    if report.failed and place:
        with open(place, "a") as file:
            file.write(report.nodeid.partition("@")[0] + "\n")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the test took too long")


def _lasting_changes(before: set[str]) -> list[str]:
    """Mounts and cgroups that were not there *before*, or were there at the start and are gone. What tests that run at
    the same time make goes away by itself."""
    deadline = time.monotonic() + TIME_LIMIT
    while (changed := (machine_state() - before) | (AT_START - machine_state())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted(changed)


@pytest.fixture
def runner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(TIME_LIMIT)
    made = Runner(tmp_path)
    before = machine_state()
    try:
        yield made
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        left = made.close()
    changed = _lasting_changes(before)
    # A test that has failed leaves its processes to the runner, which has just ended them.
    assert not left or FAILED in request.node.stash, f"processes are left: {left}"
    assert not changed, "mounts or cgroups have changed:\n" + "\n".join(changed)
