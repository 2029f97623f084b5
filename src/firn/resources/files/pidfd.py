"""Descriptors of processes: pidfds (images: PIDFD entries).

State owned: which process, and whether it is dead. Kernel: the Pid line of fdinfo (-1: dead and reaped), the inode
number as the identity of the process. A pidfd of a process of the tree is opened when the tree exists; one of a dead
process leads to a child of ours that ends at once. What goes wrong: a process outside of the tree, which the restore
cannot know again. The exit status that the kernel keeps for dead processes (PIDFD_GET_INFO) is not in the images.
"""

from __future__ import annotations

import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import ImageError
from firn.resources.base import PIDFD, Kind
from firn.resources.files.events import set_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, Open, RestoreContext

DEAD = -1


class PidFd(Kind):
    """pidfd_open(2)."""

    def __init__(self) -> None:
        self._dead: dict[int, int] = {}

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The process, by its pid as it sees it itself."""
        pid = int(open.info["Pid"])
        if pid != DEAD and not _belongs(pid, open.flags, context.pids):
            whom = f"process {pid}" if pid else "a process of another pid namespace"
            reason = f"is a pidfd of {whom}, which is not dumped with it"
            context.refuse(open, reason, "close it, or dump the whole tree")
            return None
        nspid = DEAD if pid == DEAD else int(open.info["NSpid"].split()[-1])
        return {
            "ino": open.stat.st_ino & 0xFFFFFFFF, "flags": open.flags & ~fc.O_RDWR, "nspid": nspid,
            "fown": context.owner(open),
        }  # fmt: skip

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether the process lives."""
        return bool(message["nspid"] != DEAD)

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """A pidfd of the restored process, or of one that is dead."""
        pid = message["nspid"]
        if pid == DEAD:
            if number not in self._dead:
                self._make_dead(message["ino"], context)
            return self._dead.pop(number)
        if not _belongs(pid, message["flags"], context.pids):
            raise ImageError(f"files image: pidfd {number} is of process {pid}, which the checkpoint does not hold")
        return _open(number, pid, message)

    def _make_dead(self, ino: int, context: RestoreContext) -> None:
        """Descriptors of one dead process for all entries with the inode number *ino*."""
        child = os.fork()
        if not child:
            os._exit(0)
        try:
            for (kind, number), entry in context.files.items():
                message = entry.get("pidfd", {})
                if kind == PIDFD and message.get("nspid") == DEAD and message["ino"] == ino:
                    self._dead[number] = _open(number, child, message)
        finally:
            os.waitpid(child, 0)

    def close(self) -> None:
        """Close what nobody asked for."""
        while self._dead:
            os.close(self._dead.popitem()[1])


def _open(number: int, pid: int, message: dict[str, Any]) -> int:
    thread = message["flags"] & ev.PIDFD_THREAD
    fd = syscall(f"pidfd_open {pid} for file {number}", nr.pidfd_open, pid, thread)
    set_status(fd, message["flags"])
    return fd


def _belongs(pid: int, flags: int, pids: list[int]) -> bool:
    """Whether the process (with PIDFD_THREAD in *flags*: the thread) *pid* is one of *pids* or in one of them."""
    if pid in pids:
        return True
    return bool(flags & ev.PIDFD_THREAD) and any(os.path.exists(f"/proc/{each}/task/{pid}") for each in pids)
