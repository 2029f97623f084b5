"""The private pages of a process (images: pagemap-PID.img, pages-N.img).

State owned: the contents of private mappings: exactly the pages that are the process's own. Kernel: which they are,
:mod:`firn.resources.memory.pagelist`; their contents, :mod:`firn.resources.memory.copyout`. The vdso's code goes with
them, so that a restore can compare it with the running kernel's.
"""

from __future__ import annotations

import os

from firn.abi import mman
from firn.host import features
from firn.images.pages import PE_PARENT, PE_PRESENT, write_pagemap
from firn.resources.memory import areas, copyout, pagelist
from firn.tracee import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.images.store import ImageDir



def _may_have_guards(area: areas.Area) -> bool:
    """Whether a shared mapping may have guard pages. Its contents are saved with what it maps, but not these."""
    flags = area.map.flags or frozenset[str]()
    if not area.map.shared or "ht" in flags or not features.pagemap_scan_guard():
        return False
    return "gu" in flags or not features.guard_flag()


class ProcessPages:
    """What has to be saved of one process's memory, and where it goes.

    With a copy-on-write clone (:mod:`firn.dump.snapshot`) the clone is scanned and read instead of the process, except
    for what a fork leaves out: mappings with MADV_DONTFORK and MADV_WIPEONFORK. ``shareable`` are the pages that other
    processes may have too, ``shared`` those that are stored for all of them (:mod:`firn.resources.memory.shared`).
    """

    def __init__(self, pid: int, mapped: list[areas.Area], use_scan: bool) -> None:
        self.pid = pid
        self.pages_id = 0
        self.held: list[tuple[int, bytes]] = []
        self.use_scan = use_scan
        self.ranges: list[tuple[int, int]] = []
        self.early_ranges: list[tuple[int, int]] = []
        self.guarded_ranges: list[tuple[int, int]] = []
        self.marked: list[tuple[int, int, int]] = []
        self.runs: list[tuple[int, int]] = []
        self.shareable: list[tuple[int, int]] = []
        self.shared: list[tuple[int, int]] = []
        self.guards: list[tuple[int, int]] = []
        for area in mapped:
            m, flags = area.map, area.map.flags or frozenset[str]()
            marks = 0
            if area.kind == "vdso":
                self.runs.append((m.start, m.end))
            elif area.kind == "aio":
                # A fork does not copy the ring (VM_DONTCOPY); it is small and goes along whole.
                marks = copyout.EARLY
                self.runs.append((m.start, m.end))
            elif not area.has_pages:
                if _may_have_guards(area):
                    self.guarded_ranges.append((m.start, m.end))
                continue
            elif flags & {"dc", "wf"}:
                self.early_ranges.append((m.start, m.end))
                marks = copyout.EARLY
            else:
                self.ranges.append((m.start, m.end))
            if not m.prot & mman.PROT_READ:
                marks |= copyout.FORCED
            if marks:
                self.marked.append((m.start, m.end, marks))

    def find(self, pid: int, early: bool) -> None:
        """Add the pages of *pid* (the process or its clone): those that a fork leaves out if *early*, or all others."""
        found = pagelist.find(pid, self.early_ranges if early else self.ranges, self.use_scan)
        self.runs = sorted(self.runs + found.runs)
        if early:
            # A fork need not copy page tables of shared mappings, where such markers are.
            found.guards += pagelist.find_guards(pid, self.guarded_ranges)
        else:
            self.shareable = found.runs
        self.guards = sorted(self.guards + found.guards)

    def guard_entries(self) -> list[dict[str, Any]]:
        """vma_entries of guard regions."""
        return [
            {"start": start, "end": end, "pgoff": 0, "shmid": 0, "prot": 0, "flags": 0, "status": areas.GUARD, "fd": -1}
            for start, end in self.guards
        ]

    def hold_early(self, pid: int) -> None:
        """Take the contents of what a fork of *pid* leaves out: few pages, kept here until the others are copied."""
        early = [(low, high) for low, high, marks in self.marked if marks & copyout.EARLY]
        if not early:
            return
        with memory.Forced(pid) as forced:
            for low, high in early:
                for start, end in self.runs:
                    first, last = max(low, start), min(high, end)
                    for at in range(first, last, 1 << 20):
                        self.held.append((at, forced.read(at, min(last - at, 1 << 20))))

    def copy_pages(self, pid: int, target: int) -> None:
        """Copy the pages out of *pid* (the process or its clone) into file *target*."""
        pieces = copyout.plan(self.runs, self.marked)
        if self.held:
            offsets = self._offsets()
            for at, content in self.held:
                os.pwrite(target, content, offsets(at))
            pieces = [piece for piece in pieces if not piece.marks & copyout.EARLY]
        copyout.copy(pid, pieces, target)

    def share(self, ranges: list[tuple[int, int]]) -> None:
        """Leave out *ranges* of the pages, which are stored for several processes."""
        self.shared = ranges
        self.runs = subtract(self.runs, ranges)

    def _offsets(self) -> Callable[[int], int]:
        """Address -> place in the pages image."""
        table = []
        offset = 0
        for start, end in self.runs:
            table.append((start, end, offset))
            offset += end - start

        def find(address: int) -> int:
            return next(base + address - start for start, end, base in table if start <= address < end)

        return find

    def save(self, images: ImageDir) -> None:
        """Write the pagemap."""
        runs = [(start, end, PE_PRESENT) for start, end in self.runs]
        runs += [(start, end, PE_PARENT) for start, end in self.shared]
        save_list(images, self.pid, self.pages_id, runs)

    def statistics(self) -> dict[str, int]:
        """Page counts for stats-dump."""
        written = sum(end - start for start, end in self.runs) // mman.PAGE
        scanned = sum(end - start for start, end in self.ranges + self.early_ranges) // mman.PAGE
        parent = sum(end - start for start, end in self.shared) // mman.PAGE
        return {"pages_scanned": scanned, "pages_skipped_parent": parent, "pages_written": written, "pages_lazy": 0}


def save_list(images: ImageDir, pid: int, pages_id: int, runs: list[tuple[int, int, int]]) -> None:
    """Write the page list of *pid*: (start, end, flags) in any order; contents in the image number *pages_id*."""
    listed = [(start, (end - start) // mman.PAGE, flags) for start, end, flags in sorted(runs)]
    write_pagemap(images, "PAGEMAP", pid, pages_id, listed)


def subtract(runs: list[tuple[int, int]], gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of *runs* outside of *gone*; both are ascending and disjoint."""
    left: list[tuple[int, int]] = []
    index = 0
    for start, end in runs:
        while index < len(gone) and gone[index][1] <= start:
            index += 1
        at = index
        while at < len(gone) and gone[at][0] < end:
            if start < gone[at][0]:
                left.append((start, gone[at][0]))
            start = gone[at][1]
            at += 1
        if start < end:
            left.append((start, end))
    return left


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending, disjoint *ranges* with those joined that touch."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found
