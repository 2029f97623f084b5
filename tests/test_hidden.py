"""State that hardly anything shows; see tests/workloads/hidden.c."""

from __future__ import annotations

import os
import struct

import pytest
from harness import Runner, firn_command
from workloads.table import Workload

from firn.abi import nr
from firn.abi.libc import syscall
from firn.resources.seccomp import Filters

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")

ASKED = Workload("hidden", "asked")


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


@pytest.mark.parametrize(
    ("operation", "value", "asks"),
    [(0x06, 0x7FC00000, True), (0x06, 0x7FC01234, True), (0x06, 0x7FFF0000, False), (0x16, 0, True), (0x20, 0, False)],
)
def test_filters_that_may_ask(operation: int, value: int, asks: bool) -> None:
    filters = Filters()
    filters.entries.append({"filter": struct.pack("<HBBI", operation, 0, 0, value)})
    assert filters.asks() == asks
