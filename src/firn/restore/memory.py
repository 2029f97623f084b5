"""The memory of one task being restored: what :mod:`firn.resources.memory` plans, put in order for a task with a
parent."""

from __future__ import annotations

import os

from firn.abi import mman, nr, prctl
from firn.errors import RestoreError
from firn.images.pages import PagemapReader
from firn.resources.base import MEMFD, PACKETSK, REG
from firn.resources.files.reopen import AS_RECORDED
from firn.resources.memory import aio, areas, attach, inherit, layout, numa, nursery, pkeys, rebuild
from firn.resources.memory.vdso import Own, Placement, place
from firn.tracee import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.pages import PagesFiles
    from firn.images.store import ImageDir
    from firn.resources.files.reopen import Opener
    from firn.restore.load import Process
    from firn.tracee.program import Program, Scratch

_NONE = (1 << 64) - 1
SPARE = 1 << 20
"""Room below the scratch area, where this kernel's vdso goes if another one was dumped."""


class TaskMemory:
    """The mappings and pages of one process of the checkpoint, or of several that share them.

    *parent* is the memory that it is copied from at birth; *segments*: id -> bytes that an attachment
    covers, of System V segments; *files* are the pages images.
    ``nursery`` is what the process has while its children are born; see :func:`plan_sharing`.
    """

    def __init__(
        self,
        process: Process,
        images: ImageDir,
        parent: TaskMemory | None,
        segments: dict[int, int],
        files: PagesFiles,
    ) -> None:
        self.process = process
        self.pid = process.pid
        self.mm = process.mm
        self.vmas: list[dict[str, Any]] = process.mm["vmas"]
        self.parent = parent
        self.segments = segments
        pagemap = PagemapReader(images, "PAGEMAP", self.pid, files)
        runs = [rebuild.Run(run.vaddr, run.nr_pages * mman.PAGE, run.fd, run.offset) for run in pagemap]
        self.pages = sum(run.size for run in runs) // mman.PAGE
        self.rings: dict[int, bytes] = {}
        self.all_runs = self._take_rings(runs)
        self.mapped: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.exe = (REG, process.mm["exe_file_id"])
        self.keys = pkeys.Keys(self.mm, self.pid)
        self.placement: Placement | None = None
        self.inherited = inherit.nothing(self.all_runs)
        self.nursery = nursery.Nursery(self.vmas, self.all_runs, [])

    def take_over(self, by_content: bool) -> None:
        """Find out what the parent's memory brings along; both are planned."""
        self.mapped = self._mapped()
        mine = self.nursery
        if self.parent is None:
            self.inherited = inherit.nothing(mine.runs)
        else:
            theirs = self.parent.nursery
            self.inherited = inherit.compare(theirs.vmas, theirs.runs, mine.vmas, mine.runs, by_content)

    def wanted(self) -> list[tuple[int, ...]]:
        """The files that are mapped, for the opener."""
        return [*self.mapped.values(), self.exe]

    def _mapped(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """(File id, access mode) -> (type, id, mode) of everything that is mapped."""
        found = {}
        for vma in self.nursery.vmas:
            status = vma["status"]
            if rebuild.is_special(vma):
                continue
            if status & areas.SYSVIPC:
                continue
            if status & areas.SOCKET:
                found[rebuild.file_key(vma)] = (PACKETSK, vma["shmid"], AS_RECORDED)
            elif status & areas.MEMFD:
                found[rebuild.file_key(vma)] = (MEMFD, *rebuild.file_key(vma))
            elif status & (areas.FILE_PRIVATE | areas.FILE_SHARED):
                found[rebuild.file_key(vma)] = (REG, *rebuild.file_key(vma))
        return found

    # -- inside the task ---------------------------------------------------------------------------------------------

    def replace(self, program: Program, scratch: Scratch, opener: Opener, own: Own) -> None:
        """Replace what the task has by what it had, or has to have for its children. It has no descriptor open, and
        none afterwards."""
        vmas = self.nursery.vmas
        spare = scratch.code - SPARE
        self.placement = self._place_vdso(own, spare)
        runs = self.inherited.runs
        if self.placement is None or self.placement.replaces:
            runs = self._without_vdso(runs)
        keeps_vdso = self._keeps_vdso()
        if keeps_vdso:
            runs = self._without_vdso(runs)
        writable = self._writable(runs)
        kept = self._kept(scratch, spare if keeps_vdso and not self._replaces() else 0, keeps_vdso)
        self._plan_clear(program, kept)
        self._plan_growth(program)
        if self.placement is not None and not keeps_vdso:
            program.call("map vdso", nr.arch_prctl, prctl.ARCH_MAP_VDSO_64, self.placement.map_at)
            self._plan_dumped_vdso(program)
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        table = take_files(program, opener, self.wanted())
        fds = {number: table[opener.open(*key)] for number, key in self.mapped.items()}
        has_keys = bool(self.keys) or bool(self.parent and self.parent.keys)
        if has_keys:
            self.keys.plan_before(program)
        rebuild.plan_maps(program, vmas, fds, writable, list(self.inherited.ends.items()))
        if self.segments:
            in_use = [*kept, (spare, scratch.data + scratch.size)]
            attach.plan(program, vmas, self.segments, self.inherited.kept, in_use)
        numa.plan(program, vmas)
        same_exe = self.parent is not None and self.parent.exe == self.exe
        layout.plan(program, self.mm, -1 if same_exe else table[opener.open(*self.exe)])
        page_fds = take_fds(program, sorted({run.fd for run in runs}), max(table.values()) + 1)
        for start, end in self.inherited.dropped:
            program.call(f"drop {start:#x}-{end:#x}", nr.madvise, start, end - start, mman.MADV_DONTNEED)
        checks = rebuild.plan_pages(program, runs, page_fds)
        rebuild.plan_finish(program, vmas, writable, rebuild.present_bytes(vmas, self.all_runs))
        if has_keys:
            self.keys.plan_after(program)
        if not keeps_vdso:
            self._plan_vdso_protection(program)
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        program.run()
        rebuild.check_reads(program, checks)
        self.keys.check(program)
        for ring in self.mm.get("aios", []):
            aio.rebuild(program, ring, aio.unfetched(self.rings.get(ring["id"], b"")))
        program.run()
        if self.placement is not None and not keeps_vdso:
            for address, code in self.placement.patches:
                memory.force_write(program.runner.pid, address, code)

    def settle(self, program: Program) -> None:
        """All children are born: what was there for them goes, what they do not share with the process comes."""
        mine = self.nursery
        if mine.runs is self.all_runs:
            return
        runs, dropped = inherit.overlay(mine.runs, self.all_runs)
        for guest in mine.guests:
            start, size = guest["start"], guest["end"] - guest["start"]
            program.call(f"munmap guest {start:#x}", nr.munmap, start, size)
        guests = [(guest["start"], guest["end"]) for guest in mine.guests]
        for start, end, is_guest in (piece for part in dropped for piece in rebuild.pieces(*part, guests)):
            if not is_guest:
                program.call(f"drop {start:#x}-{end:#x}", nr.madvise, start, end - start, mman.MADV_DONTNEED)
        program.run()
        for run in runs:
            memory.force_copy(self.pid, run.address, run.size, run.fd, run.offset)

    def _plan_clear(self, program: Program, kept: list[tuple[int, int]]) -> None:
        """Unmap everything outside *kept*."""
        at = 0
        for start, end in [*kept, (rebuild.TASK_TOP, rebuild.TASK_TOP)]:
            if at < start:
                program.call(f"munmap {at:#x}-{start:#x}", nr.munmap, at, start - at)
            at = max(at, end)

    def _plan_growth(self, program: Program) -> None:
        for start, end in self.inherited.kept:
            wanted = self.inherited.ends[start]
            if end < wanted:
                program.call(f"mremap {start:#x}-{end:#x}", nr.mremap, start, end - start, wanted - start, 0)

    def _kept(self, scratch: Scratch, spare: int, vdso: bool) -> list[tuple[int, int]]:
        ranges = [*self.inherited.kept, (scratch.code, scratch.data + scratch.size)]
        if vdso:
            for bit in (areas.VDSO, areas.VVAR):
                area = self._special(bit)
                assert area is not None
                ranges.append((area["start"], area["end"]))
        if spare:
            ranges.append((spare, scratch.code))
        return sorted(ranges)

    # -- the vdso ------------------------------------------------------------------------------------------------------

    def _special(self, bit: int) -> dict[str, Any] | None:
        return next((vma for vma in self.vmas if vma["status"] & bit), None)

    def _replaces(self) -> bool:
        return self.placement is None or self.placement.replaces

    def _keeps_vdso(self) -> bool:
        """Whether the parent's vdso is already what this task needs."""
        if self.parent is None:
            return False
        mine, theirs = self._special(areas.VDSO), self.parent._special(areas.VDSO)
        if mine is None or theirs is None:
            return False
        same: bool = mine["start"] == theirs["start"] and mine["end"] == theirs["end"]
        if not same and not self._replaces():
            raise RestoreError(f"process {self.pid} has a vdso of another kernel at a place of its own")
        return same

    def _place_vdso(self, own: Own, spare: int) -> Placement | None:
        """Where this kernel's vdso goes; None for a process that has none."""
        vdso, vvar = self._special(areas.VDSO), self._special(areas.VVAR)
        if vdso is None or vvar is None:
            return None
        code = bytearray(vdso["end"] - vdso["start"])
        for run in self.all_runs:
            if run.address < vdso["end"] and run.address + run.size > vdso["start"]:
                low, high = max(run.address, vdso["start"]), min(run.address + run.size, vdso["end"])
                part = os.pread(run.fd, high - low, run.offset + low - run.address)
                code[low - vdso["start"] : high - vdso["start"]] = part
        if not any(code):
            code = bytearray(own.code)
        return place(own, bytes(code), vvar["start"], vdso["start"], spare)

    def _without_vdso(self, runs: list[rebuild.Run]) -> list[rebuild.Run]:
        """The runs without the vdso's pages, which are there already."""
        vdso = self._special(areas.VDSO)
        if vdso is None:
            return runs
        return [run for run, inside in inherit.split(runs, [(vdso["start"], vdso["end"])]) if not inside]

    def _plan_dumped_vdso(self, program: Program) -> None:
        """A vdso of another kernel stays as ordinary memory; its data pages are gone, but its functions never run."""
        vdso = self._special(areas.VDSO)
        if self._replaces() or vdso is None:
            return
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED
        size = vdso["end"] - vdso["start"]
        program.call("map old vdso", nr.mmap, vdso["start"], size, mman.PROT_READ | mman.PROT_WRITE, flags, _NONE, 0)

    def _plan_vdso_protection(self, program: Program) -> None:
        vdso = self._special(areas.VDSO)
        if self._replaces() or vdso is None:
            return
        size = vdso["end"] - vdso["start"]
        program.call("protect old vdso", nr.mprotect, vdso["start"], size, mman.PROT_READ | mman.PROT_EXEC)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _writable(self, runs: list[rebuild.Run]) -> set[int]:
        """The read-only mappings that have to be writable for a while."""
        candidates = [v for v in self.nursery.vmas if not v["status"] & areas.VVAR]
        if self._replaces() or self._keeps_vdso():
            candidates = [v for v in candidates if not v["status"] & areas.VDSO]
        filled = rebuild.with_pages(candidates, runs)
        return {
            v["start"]
            for v in candidates
            if not v["prot"] & mman.PROT_WRITE and (v["start"] in filled or v.get("firn", {}).get("account"))
        }

    def _take_rings(self, runs: list[rebuild.Run]) -> list[rebuild.Run]:
        """The runs without those of AIO rings, whose contents are kept aside."""
        limits = sorted((ring["id"], ring["id"] + ring["ring_len"]) for ring in self.mm.get("aios", []))
        if not limits:
            return runs
        kept: list[rebuild.Run] = []
        for run, inside in inherit.split(runs, limits):
            if not inside:
                kept.append(run)
                continue
            start = next(at for at, end in limits if at <= run.address < end)
            self.rings[start] = self.rings.get(start, b"") + os.pread(run.fd, run.size, run.offset)
        return kept


def plan_sharing(memories: list[TaskMemory], known: bool) -> None:
    """Plan for *memories*, parents first, who takes over what; *known*: the images tell which pages were shared."""
    seen: set[int] = set()
    shared: set[int] = set()
    for mine in memories:
        fds = {run.fd for run in mine.all_runs}
        shared |= seen & fds
        seen |= fds
    children: dict[int, list[nursery.Nursery]] = {}
    for mine in reversed(memories):
        mine.nursery = nursery.plan(mine.vmas, mine.all_runs, children.pop(mine.pid, []), shared)
        if mine.parent is not None:
            children.setdefault(mine.parent.pid, []).append(mine.nursery)
    for mine in memories:
        mine.take_over(not known)


def take_files(program: Program, opener: Opener, keys: list[tuple[int, ...]]) -> dict[int, int]:
    """Copies of our descriptors of files *keys* in the task: ours -> the task's. It must have none open."""
    return take_fds(program, sorted({opener.open(*key) for key in keys}), 0)


def take_fds(program: Program, ours: list[int], first: int) -> dict[int, int]:
    """The task copies *ours* to its lowest free numbers, from *first* on, which is known to be free."""
    program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
    for fd in ours:
        program.call(f"take descriptor {fd}", nr.pidfd_getfd, first, fd, 0)
    return {fd: first + 1 + index for index, fd in enumerate(ours)}
