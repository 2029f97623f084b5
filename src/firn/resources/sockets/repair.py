"""TCP sockets that a killed firn has left in repair mode, in which they neither send nor take what their program says.

Nothing lists such sockets; each is asked. What SO_REUSEADDR was is lost: repair mode takes its place
(do_tcp_setsockopt in the kernel's net/ipv4/tcp.c). It is set, as servers have it: then they can be started again.
"""

from __future__ import annotations

import os

from firn.abi import nr
from firn.abi.libc import syscall
from firn.host import procfs
from firn.resources.base import pidfd_for_copies

_SOL_SOCKET, _SO_REUSEADDR, _SO_PROTOCOL = 1, 2, 38
_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF_NO_WP = 6, 19, -1


def end_repair(pid: int) -> int:
    """Switch repair mode off in all sockets of process *pid*, and its descendants'; how many there were."""
    ended, pids = 0, [pid]
    while pids:
        each = pids.pop()
        try:
            pids += procfs.children(each)
            ended += _end_repair(each)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return ended


def _end_repair(pid: int) -> int:
    import _socket

    ended = 0
    speaker = procfs.speaker(pid)
    pidfd = pidfd_for_copies(pid, speaker)
    try:
        for name in os.listdir(f"/proc/{speaker}/fd"):
            if not os.readlink(f"/proc/{speaker}/fd/{name}").startswith("socket:"):
                continue
            fd = syscall(f"descriptor {name} of process {pid}", nr.pidfd_getfd, pidfd, int(name), 0)
            copy = _socket.socket(fileno=fd)
            try:
                inet = copy.family in (_socket.AF_INET, _socket.AF_INET6)
                if inet and copy.proto == _TCP and copy.getsockopt(_TCP, _TCP_REPAIR):
                    copy.setsockopt(_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF_NO_WP)
                    copy.setsockopt(_SOL_SOCKET, _SO_REUSEADDR, 1)
                    ended += 1
            finally:
                copy.close()
    finally:
        os.close(pidfd)
    return ended
