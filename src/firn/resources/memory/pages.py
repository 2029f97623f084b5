"""The private pages of a process (images: pagemap-PID.img, pages-N.img).

State owned: the contents of private mappings: exactly the pages that are the process's own. Kernel: which they are,
:mod:`firn.resources.memory.pagelist`; their contents, :mod:`firn.resources.memory.copyout`. The vdso's code goes with them,
so that a restore can compare it with the running kernel's.
"""

from __future__ import annotations

from firn.abi import mman
from firn.resources.memory import areas, copyout, pagelist

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

PE_PRESENT = 4
PAGES_ID = 1


class ProcessPages:
    """What has to be saved of one process's memory, and where it goes."""

    def __init__(self, pid: int, mapped: list[areas.Area], use_scan: bool) -> None:
        self.pid = pid
        ranges: list[tuple[int, int]] = []
        self.unreadable: list[tuple[int, int]] = []
        whole: list[tuple[int, int]] = []
        for area in mapped:
            m = area.map
            if area.kind == "vdso":
                whole.append((m.start, m.end))
                self.unreadable.append((m.start, m.end))
            elif area.has_pages:
                ranges.append((m.start, m.end))
                if not m.prot & mman.PROT_READ:
                    self.unreadable.append((m.start, m.end))
        self.scanned = sum(end - start for start, end in ranges)
        self.pages = pagelist.find(pid, ranges, use_scan)
        self.runs = sorted(self.pages.runs + whole)
        self.unreadable.sort()

    def guard_entries(self) -> list[dict[str, Any]]:
        """vma_entries of guard regions."""
        return [
            {"start": start, "end": end, "pgoff": 0, "shmid": 0, "prot": 0, "flags": 0, "status": areas.GUARD, "fd": -1}
            for start, end in self.pages.guards
        ]

    def copy_pages(self, pid: int, target: int) -> None:
        """Copy the pages out of *pid* (the process or its clone) into file *target*."""
        copyout.copy(pid, copyout.plan(self.runs, self.unreadable), target)

    def save(self, images: ImageDir) -> None:
        """Write the pagemap."""
        from firn.images.pages import write_pagemap

        runs = [(start, (end - start) // mman.PAGE, PE_PRESENT) for start, end in self.runs]
        write_pagemap(images, "PAGEMAP", self.pid, PAGES_ID, runs)

    def statistics(self) -> dict[str, int]:
        """Page counts for stats-dump."""
        written = sum(end - start for start, end in self.runs) // mman.PAGE
        return {"pages_scanned": self.scanned // mman.PAGE, "pages_skipped_parent": 0, "pages_written": written, "pages_lazy": 0}
