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

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.host import nftables
from firn.resources.network import lock

FAILED = pytest.StashKey[bool]()
AT_START = machine_state()


def pytest_configure() -> None:
    """All programs of the tests begin with default actions. In the background and under nohup(1), some signals are
    ignored; and make(1) ignores the two that the C library keeps for itself, and lets nobody change."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    action = bytearray(32)
    for number in (32, 33):
        syscall("rt_sigaction", nr.rt_sigaction, number, address_of(action), 0, 8)


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


def _remove_locks(folder: Path) -> list[str]:
    """Remove what is left in our network namespace of locks of connections whose images are below *folder*, so of no
    other test; their names. (A namespace that a test has made goes with it.)"""
    try:
        channel = nftables.open_channel()
    except OSError:
        return []
    try:
        notes = {table.name: lock.Note.read(table.comment) for table in nftables.tables(channel) if not table.owned}
        left = [name for name, note in notes.items() if note is not None and _is_below(note.directory, folder)]
        lock.remove_tables(channel, left)
    except OSError:
        return []  # not root, or somebody else was quicker
    finally:
        channel.close()
    return left


def _is_below(noted: str, folder: Path) -> bool:
    """A long path is noted without its beginning."""
    return noted.startswith(f"{folder}/") or (noted.startswith("...") and f"/{folder.name}/" in noted)


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
        locks = _remove_locks(tmp_path)
    changed = _lasting_changes(before)
    # A test that has failed leaves its processes to the runner, which has just ended them.
    assert not left or FAILED in request.node.stash, f"processes are left: {left}"
    assert not locks or FAILED in request.node.stash, f"locks of connections are left: {locks}"
    assert not changed, "mounts or cgroups have changed:\n" + "\n".join(changed)
