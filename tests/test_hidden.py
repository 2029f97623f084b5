"""State that hardly anything shows; see tests/workloads/hidden.c."""

from __future__ import annotations

import ctypes
import os
import select
import struct

import pytest
from harness import Runner, Target, firn_command, open_descriptors
from workloads.table import Workload

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.host import procfs
from firn.host.aiorequests import AioRequests
from firn.resources.memory.aio import Watch
from firn.resources.seccomp import Filters

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")

ASKED = Workload("hidden", "asked")


@pytest.mark.xdist_group("seccomp listeners")  # whoever has one may have the other's
@pytest.mark.parametrize("outside", [True, False])
def test_a_listener_that_only_others_have(runner: Runner, outside: bool) -> None:
    """A filter asks somebody outside: refused. Nobody is there any more: nothing is lost."""
    target = runner.start(ASKED)
    assert target.beat
    pidfd = os.pidfd_open(target.pid)
    copy = syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, target.beat.token(0), 0)
    os.close(pidfd)
    runner.assert_right(target, "when it closes its listener")
    if not outside:
        os.close(copy)
        images = runner.dump(target)
        target = runner.restore(images, target)
    else:
        code, text, _ = runner.try_dump(target)
        os.close(copy)
        assert code == 1 and f"asks a listener, which process {os.getpid()}" in text, text
    runner.assert_right(target, "afterwards")
    runner.kill(target)


def test_directories_that_a_thread_shares_with_others(runner: Runner) -> None:
    """Seen from each side."""
    target = runner.start(Workload("apart", "family"))
    assert target.beat
    pid, child, other = target.pid, target.beat.token(0), target.beat.token(1)
    own, second = (
        f"thread {max(procfs.threads(each))}: shares its directories (CLONE_FS) with process" for each in (pid, other)
    )
    for root, *refused in (
        (pid, f"process {pid}: {own} {child}, but not with its own", f"process {other}: {second} {pid}, but not"),
        (child, f"process {child}: shares its directories with its parent {pid}"),
        (other, f"process {other}: {second} {pid}, but not with its own"),
    ):
        code, text, _ = runner.try_dump(Target(root, None))
        assert code == 1 and all(each in text for each in refused), text
        runner.assert_right(target, "after a dump that was refused")
    runner.kill(target)


@pytest.mark.parametrize(
    ("operation", "value", "asks"),
    [(0x06, 0x7FC00000, True), (0x06, 0x7FC01234, True), (0x06, 0x7FFF0000, False), (0x16, 0, True), (0x20, 0, False)],
)
def test_filters_that_may_ask(operation: int, value: int, asks: bool) -> None:
    filters = Filters()
    filters.entries.append({"filter": struct.pack("<HBBI", operation, 0, 0, value)})
    assert filters.asks() == asks


def _submit_polls(context: int, fds: list[int]) -> list[bytearray]:
    """One request for each descriptor, which ends when it can be read."""
    # struct iocb: data, key, rw_flags, opcode (5: IOCB_CMD_POLL), priority, descriptor, events, ... (linux/aio_abi.h)
    requests = [bytearray(struct.pack("<QIIHhIQQqQII", 7, 0, 0, 5, 0, fd, select.POLLIN, 0, 0, 0, 0, 0)) for fd in fds]
    table = bytearray(struct.pack(f"<{len(fds)}Q", *(address_of(each) for each in requests)))
    assert syscall("io_submit", nr.io_submit, context, len(fds), address_of(table)) == len(fds)
    return requests


def test_requests_in_flight_are_counted() -> None:
    """Exactly, whatever the processors keep for themselves and whether or not events have been fetched."""
    try:
        requests = AioRequests()
    except (KernelError, OSError) as error:
        pytest.skip(str(error))
    place = ctypes.c_uint64()
    syscall("io_setup", nr.io_setup, 50, ctypes.addressof(place))
    events, pipes = bytearray(32 * 64), [os.pipe() for _ in range(12)]

    def flying() -> list[tuple[int, bool]]:
        return [(count, waits) for ring, count, waits in requests.of(os.getpid()) if ring == place.value]

    try:
        assert flying() == [(0, False)]
        for rest in range(1, 3):
            kept = _submit_polls(place.value, [end for end, _ in pipes])
            assert flying() == [(12, True)]
            for count, (_, end) in enumerate(pipes[rest:], 1):
                os.write(end, b"x")
                assert flying() == [(12 - count, True)]
            fetched = syscall("io_getevents", nr.io_getevents, place.value, 12 - rest, 64, address_of(events), 0)
            assert fetched == 12 - rest and flying() == [(rest, True)]
            for _, end in pipes[:rest]:
                os.write(end, b"x")
            assert flying() == [(0, False)]
            syscall("io_getevents", nr.io_getevents, place.value, rest, 64, address_of(events), 0)
            for end, _ in pipes:
                os.read(end, 1)
            assert flying() == [(0, False)] and kept
    finally:
        syscall("io_destroy", nr.io_destroy, place.value)
        for pair in pipes:
            os.close(pair[0])
            os.close(pair[1])
        requests.close()


def test_where_nobody_may_look_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firn.host.btf._PATH", "/nonexistent")
    told: list[str] = []
    before = open_descriptors()
    assert Watch.make(told.append) is None
    assert len(told) == 1 and "would be lost" in told[0]
    assert open_descriptors() == before
