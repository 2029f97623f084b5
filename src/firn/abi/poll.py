"""poll(2) of one descriptor. Source: include/uapi/asm-generic/poll.h."""

from __future__ import annotations

from firn.abi import nr
from firn.abi.libc import address_of, syscall

POLLIN, POLLPRI, POLLERR, POLLHUP, POLLRDHUP = 1, 2, 8, 16, 0x2000


def state(fd: int, wanted: int = 0) -> int:
    """The conditions of *wanted* that hold now; without it those that poll(2) reports unasked: POLLERR, POLLHUP."""
    asked = bytearray(fd.to_bytes(4, "little") + wanted.to_bytes(2, "little") + bytes(2))
    syscall(f"poll of descriptor {fd}", nr.poll, address_of(asked), 1, 0)
    return int.from_bytes(asked[6:], "little") & (wanted or POLLERR | POLLHUP)
