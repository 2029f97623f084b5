"""Making room for our memory in a process that its resource limits allow no more.

mmap(2) fails with ENOMEM beyond RLIMIT_AS and RLIMIT_DATA, and with EAGAIN beyond RLIMIT_MEMLOCK if future mappings are
locked. What is mapped may stay when the limits are put back. If we are killed in between, they stay raised.
"""

from __future__ import annotations

import os
import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import TargetError

_LIMIT = struct.Struct("<QQ")
_IN_THE_WAY = ((9, "RLIMIT_AS"), (2, "RLIMIT_DATA"), (8, "RLIMIT_MEMLOCK"))
"""include/uapi/asm-generic/resource.h"""
_INFINITY = (1 << 64) - 1


class Raised:
    """For a while the soft limits of process *pid*, whose thread *tid* lives, are as high as we may set them. What
    fails inside with OSError nevertheless is a TargetError."""

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        self._undo: list[tuple[int, bytes]] = []

    def __enter__(self) -> None:
        for which, _ in _IN_THE_WAY:
            old = bytearray(_LIMIT.size)
            # For a process of another user this needs CAP_SYS_RESOURCE, and so does a higher hard limit.
            if not _prlimit(self.tid, which, None, old):
                continue
            self._undo.append((which, bytes(old)))
            hard = _LIMIT.unpack(old)[1]
            if not _prlimit(self.tid, which, bytearray(_LIMIT.pack(_INFINITY, _INFINITY)), None):
                _prlimit(self.tid, which, bytearray(_LIMIT.pack(hard, hard)), None)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for which, limit in self._undo:
            _prlimit(self.tid, which, bytearray(limit), None)
        if isinstance(error, OSError):
            names = ", ".join(name for _, name in _IN_THE_WAY)
            raise TargetError(
                f"process {self.pid} may not map the memory that a dump needs: {os.strerror(error.errno or 0)}",
                f"raise its limits for the time of the dump (prlimit(1): {names}; or sysctl vm.max_map_count)",
            ) from None


def _prlimit(tid: int, which: int, new: bytearray | None, old: bytearray | None) -> bool:
    """prlimit(2) of resource *which*; whether it was allowed."""
    arguments = [0 if buffer is None else address_of(buffer) for buffer in (new, old)]
    try:
        syscall(f"prlimit {which} of task {tid}", nr.prlimit64, tid, which, *arguments)
    except OSError:
        return False
    return True
