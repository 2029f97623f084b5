"""The ``runner`` fixture: a :class:`harness.Runner` per test, a time limit, and a look at what the test left behind."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest
from harness import Runner, machine_state

TIME_LIMIT = 90  # seconds
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the test took too long")


@pytest.fixture
def runner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    before = machine_state()
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(TIME_LIMIT)
    made = Runner(tmp_path)
    try:
        yield made
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        left = made.close()
    changed = sorted(before ^ machine_state())
    # A test that has failed leaves its processes to the runner, which has just ended them.
    assert not left or FAILED in request.node.stash, f"processes are left: {left}"
    assert not changed, "mounts or cgroups have changed:\n" + "\n".join(changed)
