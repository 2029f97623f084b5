"""Making room for our memory in a process that its resource limits allow no more.

mmap(2) fails with ENOMEM beyond RLIMIT_AS and RLIMIT_DATA, and with EAGAIN beyond RLIMIT_MEMLOCK if future mappings are
locked. What is mapped may stay when the limits are put back. If we are killed in between, they stay raised.
"""

from __future__ import annotations

import struct
from contextlib import contextmanager

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import TargetError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMIT = struct.Struct("<QQ")
_IN_THE_WAY = ((9, "RLIMIT_AS"), (2, "RLIMIT_DATA"), (8, "RLIMIT_MEMLOCK"))
"""include/uapi/asm-generic/resource.h"""
_INFINITY = (1 << 64) - 1


@contextmanager
def raised(pid: int, tid: int) -> Iterator[None]:
    """Raise the soft limits of process *pid*, whose thread *tid* lives, as far as we may. TargetError if what is done
    then fails nevertheless."""
    undo: list[tuple[int, bytes]] = []
    try:
        for which, _ in _IN_THE_WAY:
            old = bytearray(_LIMIT.size)
            # For a process of another user this needs CAP_SYS_RESOURCE, and so does a higher hard limit.
            if not _prlimit(tid, which, None, old):
                continue
            hard = _LIMIT.unpack(old)[1]
            undo.append((which, bytes(old)))
            if not _prlimit(tid, which, bytearray(_LIMIT.pack(_INFINITY, _INFINITY)), None):
                _prlimit(tid, which, bytearray(_LIMIT.pack(hard, hard)), None)
        try:
            yield
        except OSError as error:
            names = ", ".join(name for _, name in _IN_THE_WAY)
            raise TargetError(
                f"process {pid} may not map the memory that a dump needs: {error.strerror}",
                f"raise its limits for the time of the dump (prlimit(1); {names}; or sysctl vm.max_map_count)",
            ) from None
    finally:
        for which, limit in undo:
            _prlimit(tid, which, bytearray(limit), None)


def _prlimit(tid: int, which: int, new: bytearray | None, old: bytearray | None) -> bool:
    """prlimit(2) of resource *which*; whether it was allowed."""
    arguments = [0 if buffer is None else address_of(buffer) for buffer in (new, old)]
    try:
        syscall(f"prlimit {which} of task {tid}", nr.prlimit64, tid, which, *arguments)
    except OSError:
        return False
    return True
