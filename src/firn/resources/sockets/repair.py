"""TCP sockets of running programs in repair mode, in which they neither send nor take what their program says.

One that a dump is just reading is put right by the dump's guard (:mod:`firn.tracee.guard`) if the dump is killed:
before that it has been noted which one it is and how it was. If there was no guard, it stays so, until a further dump
or ``firn unlock``. Nothing lists such sockets; each is asked. What SO_REUSEADDR was is lost then: repair mode takes its
place (do_tcp_setsockopt in the kernel's net/ipv4/tcp.c). It is set, as servers have it: then they can be started again.
"""

from __future__ import annotations

import os
import struct

from firn.abi import nr
from firn.abi.libc import syscall
from firn.host import procfs
from firn.resources.base import pidfd_for_copies

_SOL_SOCKET, _SO_REUSEADDR, _SO_PEEK_OFF = 1, 2, 42
_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF_NO_WP = 6, 19, -1
_NOTE = struct.Struct("<?i?i")


def note(fd: int, reuse: bool, peek_offset: int | None) -> bytes:
    """What a guard has to know of the socket that is our descriptor *fd* before it is read: its SO_REUSEADDR and its
    SO_PEEK_OFF (None: none is in use)."""
    return _NOTE.pack(True, fd, reuse, -1 if peek_offset is None else peek_offset)


def mend(text: bytes, pidfd: int) -> None:
    """For a guard: the socket of which a :func:`note` tells, if there is one, a descriptor of process *pidfd*, is as it
    was."""
    import _socket

    noted, fd, reuse, peek_offset = _NOTE.unpack_from(text)
    if not noted:
        return
    copy = _socket.socket(fileno=syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, fd, 0))
    if copy.getsockopt(_TCP, _TCP_REPAIR):
        copy.setsockopt(_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF_NO_WP)
    copy.setsockopt(_SOL_SOCKET, _SO_REUSEADDR, reuse)
    if peek_offset >= 0:
        copy.setsockopt(_SOL_SOCKET, _SO_PEEK_OFF, peek_offset)


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
