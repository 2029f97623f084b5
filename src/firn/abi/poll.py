"""poll(2) of one descriptor. Source: include/uapi/asm-generic/poll.h."""

from __future__ import annotations

from firn.abi import nr
from firn.abi.libc import address_of, syscall

POLLERR, POLLHUP = 8, 16


def state(fd: int) -> int:
    """The conditions that poll(2) reports without being asked: POLLERR, POLLHUP."""
    asked = bytearray(fd.to_bytes(4, "little") + bytes(4))
    syscall(f"poll of descriptor {fd}", nr.poll, address_of(asked), 1, 0)
    return asked[6]
