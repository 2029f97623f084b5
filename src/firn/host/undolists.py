"""What processes give back to System V semaphores when they end (ipc/sem.c), in the kernel's memory.

A task_struct leads to its list, if it has one, and that to an entry for each set that was used with SEM_UNDO: the
set's id (-1 if it is gone) and an amount for each semaphore. Until Linux 6.6 the amounts were behind a pointer.
"""

from __future__ import annotations

import _thread
import struct

from firn.errors import KernelError
from firn.host.kernelmemory import KernelMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_SETS = 1 << 20
_GONE = 0xFFFFFFFF


class UndoLists:
    """Looks at undo lists, until :meth:`close`. Raises :class:`KernelError` or :class:`OSError` if nobody may."""

    def __init__(self) -> None:
        self._memory = memory = KernelMemory()
        try:
            at = memory.types.offset
            self._list = at("task_struct", "sysvsem") + at("sysv_sem", "undo_list")
            self._head = at("sem_undo_list", "list_proc")
            self._link = at("sem_undo", "list_proc")
            self._set = at("sem_undo", "semid")
            self._amounts = at("sem_undo", "semadj")
            self._apart = self._amounts + 8 <= memory.types.size("sem_undo")
            if memory.task_of(_thread.get_native_id()) != memory.task:
                raise KernelError("the kernel's tasks are in an order that is not known")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the kernel's memory."""
        self._memory.close()

    def of(self, tid: int, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Set -> amounts that thread *tid* gives back to its semaphores, if there are any but zeros; *counts*: how many
        semaphores each set has. The thread stands still. Raises :class:`KernelError`, :class:`OSError`."""
        memory, found = self._memory, dict[int, list[int]]()
        undo_list = memory.number(memory.task_of(tid) + self._list)
        if not undo_list:
            return found
        head = undo_list + self._head
        at = memory.number(head)
        for _ in range(_MOST_SETS):
            if at == head:
                return found
            entry = at - self._link
            number = memory.number(entry + self._set, 4)
            if number != _GONE:
                if number not in counts:
                    raise KernelError(f"semaphore set {number} is none of those to be seen here")
                place = memory.number(entry + self._amounts) if self._apart else entry + self._amounts
                count = counts[number]
                amounts = list(struct.unpack(f"<{count}h", memory.read(place, 2 * count)))
                if any(amounts):
                    found[number] = amounts
            at = memory.number(at)
        raise KernelError(f"the undo list of thread {tid} does not end")
