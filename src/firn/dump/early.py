"""Mappings that were read before the freeze, and when they may be believed inside it.

The flags of mappings come from smaps, which is dear: it takes a sixth of the time that a small process stands still.
But a process that has slept from that reading to its freeze has changed none of its mappings, and nobody else can (but
the holder of a userfaultfd, which is refused wherever it is seen). That it has slept is told by its threads: each is in
the very system call in which it was seen off the processor then (proc(5), /proc/PID/task/TID/syscall), interrupted by
the freeze, and has left the processor once since, for our stop. (One that woke by itself in between would have slept
again, which counts too, or be elsewhere. Nearly: it can be caught on its way into the same call, before it sleeps.)
"""

from __future__ import annotations

from firn.abi import x86_64 as cpu
from firn.host import procfs
from firn.resources import restart

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.dump.task import CollectedTask

_SHOWN = (cpu.ORIG_AX, cpu.DI, cpu.SI, cpu.DX, cpu.R10, cpu.R8, cpu.R9, cpu.SP, cpu.IP)
"""The registers that the file shows."""


class EarlyMaps:
    """The mappings of a process that runs; ``sleeps``: what its threads showed right before."""

    __slots__ = ("maps", "sleeps")

    def __init__(self, pid: int, speaker: int) -> None:
        self.sleeps = {tid: _sleep(pid, tid) for tid in procfs.threads(pid)}
        self.maps = procfs.smaps(speaker)

    def are_still(self, mine: CollectedTask) -> bool:
        """Whether the frozen process *mine* certainly has the same mappings, with the same flags."""
        threads = mine.task.threads
        if mine.task.shares_memory or len(threads) != len(self.sleeps):
            return False
        return all(
            self.sleeps.get(thread.tid) == (_switches(mine.statuses[thread.tid]) - 1, _call(thread.regs))
            and restart.is_interrupted(thread.regs)
            for thread in threads
        )


def _sleep(pid: int, tid: int) -> tuple[int, tuple[int, ...]] | None:
    """How often the thread has left the processor, and the call that it sleeps in; None if it is in none."""
    try:
        switches = _switches(procfs.status(pid, tid))
        # In this order: what happens in between counts.
        words = procfs.read_record(f"/proc/{pid}/task/{tid}/syscall").split()
    except OSError:
        return None
    if len(words) != len(_SHOWN):
        return None
    return switches, (int(words[0]), *(int(word, 16) for word in words[1:]))


def _switches(status: dict[str, str]) -> int:
    return int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])


def _call(regs: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(regs[index] for index in _SHOWN)
