"""Which workloads there are, and what is special about some.

A workload is a mode of one of the C programs beside this file. Unless its entry says otherwise it runs plainly, with
sabotage, and through every way of checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_WAYS = ("plain", "break")
CHECKPOINT_WAYS = ("dump", "twice", "leave")


@dataclass(frozen=True)
class Workload:
    """One mode of one program, and how it has to be treated.

    ``needs``: abilities of firn that are not built yet; the checkpoint ways are skipped, with the name.
    ``dump``/``restore``: extra options. ``refused``: patterns which must all be in the output of a dump that must be
    refused. ``ways``: the ways it is run in. ``once``: its check cannot be asked twice of one process.
    ``stop``: the runner stops the program before the dump and continues it after the restore.
    ``unlike``: portrait fields that may differ for this workload (regular expressions).
    ``dynamic``: linked against the shared C library. ``huge``: needs that many huge pages in the machine's pool.
    """

    program: str
    mode: str
    needs: str = ""
    dump: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    ways: tuple[str, ...] = PLAIN_WAYS + CHECKPOINT_WAYS
    once: bool = False
    stop: bool = False
    unlike: tuple[str, ...] = ()
    dynamic: bool = False
    huge: int = 0

    @property
    def name(self) -> str:
        return f"{self.program}-{self.mode}"


def _all(program: str, modes: str, dynamic: bool = False) -> list[Workload]:
    return [Workload(program, mode, dynamic=dynamic) for mode in modes.split()]


TABLE: list[Workload] = [
    *_all("memory_basic", "anon file-private file-offset anon-shared file-shared dev-zero unlinked", dynamic=True),
    *_all("threads", "tls tids robust rseq join", dynamic=True),
    *_all("thread_state", "masks altstack on-altstack names"),
    *_all("registers", "integer bases x87 sse avx avx512 masks pkru all"),
    *_all("signals", "handlers ignored blocked pending-private pending-shared deliver"),
    Workload("signals", "stopped", stop=True),
    *_all("timers", "real virtual prof ticking clocks absolute notify sparse overrun firing"),
    *_all("files", "positions append path directory dup cloexec devices proc owner"),
]
