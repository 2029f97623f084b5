"""Requests of AIO contexts that are in flight (fs/aio.c), in the kernel's memory: no call and no file shows them.

They are those of the slots of a context that are neither free, nor kept for a processor, nor taken by an event that
nobody has fetched. An open /proc/PID/mem leads to the mm_struct that has the contexts.
"""

from __future__ import annotations

import os

from firn.host.kernelmemory import KernelMemory

_WORD = 1 << 64
_MEMBERS = {
    "mm_struct": ("ioctx_table",),
    "kioctx_table": ("nr", "table"),
    "kioctx": ("cpu", "nr_events", "reqs_available", "completed_events", "active_reqs", "user_id"),
    "kioctx_cpu": ("reqs_available",),
}


class AioRequests:
    """Looks at contexts, until :meth:`close`. Raises :class:`KernelError` or :class:`OSError` if nobody may."""

    def __init__(self) -> None:
        self._memory = KernelMemory()
        try:
            for name, members in _MEMBERS.items():
                for member in members:
                    self._memory.types.offset(name, member)
            self._processors = self._memory.percpu()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the kernel's memory."""
        self._memory.close()

    def of(self, pid: int) -> list[tuple[int, int, bool]]:
        """(ring, requests, whether some of them may wait for ever) of each context of the memory of *pid*."""
        memory, found = self._memory, []
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = memory.field(memory.object(fd), "mm_struct", "ioctx_table")
        finally:
            os.close(fd)
        count = memory.field(table, "kioctx_table", "nr", size=4) if table else 0
        for index in range(count):
            context = memory.number(table + memory.types.offset("kioctx_table", "table") + 8 * index)
            if context:
                found.append(self._look_at(context))
        return found

    def _look_at(self, context: int) -> tuple[int, int, bool]:
        memory = self._memory

        def number(member: str) -> int:
            return memory.field(context, "kioctx", member, size=4)

        parts = memory.field(context, "kioctx", "cpu")
        kept = sum(
            memory.field((parts + each) % _WORD, "kioctx_cpu", "reqs_available", size=4)
            for each in self._processors.values()
        )
        flying = number("nr_events") - 1 - number("reqs_available") - kept - number("completed_events")
        waiting = context + memory.types.offset("kioctx", "active_reqs")
        return memory.field(context, "kioctx", "user_id"), flying, memory.number(waiting) != waiting
