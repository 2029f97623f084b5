"""Rebuilding an address space inside a restored task (the other half of :mod:`firn.resources.memory.areas`).

Order: everything but the scratch area is unmapped; the vdso is mapped where it was (it can only be placed while none is
mapped); every mapping is made at its place, writable where pages have to be read in; the layout is told to the kernel
(it checks that the old executable is gone); pages are read straight from the image into place; then protection,
madvise(2) state, locks, guard regions. Reading precedes madvise and mlock, so that no page appears that was not there.
"""

from __future__ import annotations

import struct
from bisect import bisect_right

from firn.abi import mman, nr
from firn.abi.prctl import SET_THP_DISABLE
from firn.errors import ImageError
from firn.resources.memory import areas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from firn.tracee.program import Program

TASK_TOP = (1 << 47) - mman.PAGE
_IOV_MAX = 1024
_IOVEC = struct.Struct("<QQ")
_POPULATE = 64 << 10
"""Bytes from which on it pays to make a run's pages before they are read."""
_STEP = 1 << 20
_HUGE = 1 << 21
"""Bytes of a transparent huge page."""
_READ_WRITE, _AS_RECORDED = 2, -1
_KEEP_FLAGS = (
    mman.MAP_SHARED | mman.MAP_PRIVATE | mman.MAP_DROPPABLE | mman.MAP_ANONYMOUS | mman.MAP_GROWSDOWN
    | mman.MAP_NORESERVE | mman.MAP_HUGETLB | 0x3F << mman.MAP_HUGE_SHIFT
)  # fmt: skip
_FIRST_ADVICE = (mman.MADV_HUGEPAGE, mman.MADV_NOHUGEPAGE)
_WITH_FILE = areas.FILE_PRIVATE | areas.FILE_SHARED | areas.MEMFD | areas.ANON_SHARED | areas.SOCKET
PR_SET_VMA = 0x53564D41


class Run:
    """Pages of the image: *size* bytes at *offset* of file *fd* belong at *address*."""

    __slots__ = ("address", "fd", "offset", "size")

    def __init__(self, address: int, size: int, fd: int, offset: int) -> None:
        self.address = address
        self.size = size
        self.fd = fd
        self.offset = offset


def is_special(vma: dict[str, Any]) -> bool:
    """Mappings that are not made by a plain mmap(2)."""
    return bool(vma["status"] & (areas.VSYSCALL | areas.VVAR | areas.VDSO | areas.GUARD | areas.AIORING))


def file_key(vma: dict[str, Any]) -> tuple[int, int]:
    """(file id, access mode) of what a mapping is of: the mode is the mapping's own where it has one. In an old image
    it has none, and the file's own may be less than it needs."""
    needed = _READ_WRITE if vma["flags"] & mman.MAP_SHARED and vma["prot"] & mman.PROT_WRITE else _AS_RECORDED
    return vma["shmid"], vma.get("fdflags", needed)


def with_pages(vmas: list[dict[str, Any]], runs: list[Run]) -> set[int]:
    """The start addresses of the mappings into which pages have to be read; every run must lie in private mappings."""
    found: set[int] = set()
    private = [v for v in vmas if v["flags"] & (mman.MAP_PRIVATE | mman.MAP_DROPPABLE) or v["status"] & areas.AIORING]
    index = 0
    for run in runs:
        at, end = run.address, run.address + run.size
        while at < end:
            while index < len(private) and private[index]["end"] <= at:
                index += 1
            if index == len(private) or private[index]["start"] > at:
                raise ImageError(f"pagemap image: pages at {at:#x} lie outside of every private mapping")
            found.add(private[index]["start"])
            at = min(end, private[index]["end"])
    return found


def plan_maps(
    program: Program,
    vmas: list[dict[str, Any]],
    fds: dict[tuple[int, int], int],
    writable: set[int],
    kept: list[tuple[int, int]],
) -> None:
    """Make all ordinary mappings except the *kept* ranges; *fds* are the task's descriptors by :func:`file_key`.
    System V segments come by shmat(2) instead, see :mod:`firn.resources.memory.attach`."""
    for vma in vmas:
        if is_special(vma) or vma["status"] & areas.SYSVIPC:
            continue
        if vma["status"] & areas.SOCKET:
            _plan_ring(program, vma, vmas, fds[file_key(vma)])
            continue
        flags, prot = vma["flags"], vma["prot"]
        if vma["start"] in writable:
            prot |= mman.PROT_WRITE
        fd, base = -1, 0
        if not flags & mman.MAP_ANONYMOUS or vma["status"] & _WITH_FILE:
            fd, base = fds[file_key(vma)], vma["pgoff"]
            flags &= ~mman.MAP_ANONYMOUS
        for start, end, is_kept in pieces(vma["start"], vma["end"], kept):
            length = end - start
            if is_kept:
                if vma["start"] in writable:
                    program.call(_label("mprotect", start, length), nr.mprotect, start, length, prot)
                continue
            offset = base + start - vma["start"] if fd >= 0 else 0
            how = flags & _KEEP_FLAGS | mman.MAP_FIXED
            program.call(_label("mmap", start, length), nr.mmap, start, length, prot, how, fd, offset)
            for advice in _FIRST_ADVICE:
                if vma.get("madv", 0) >> advice & 1:
                    program.call(_label("madvise", start, length), nr.madvise, start, length, advice)


def _plan_ring(program: Program, vma: dict[str, Any], vmas: list[dict[str, Any]], fd: int) -> None:
    """Map the rings of a packet socket: the kernel does it only whole (packet_mmap in net/packet/af_packet.c). Parts
    with another protection come with the first one."""
    start, length = vma["start"], vma["end"] - vma["start"]
    if vma["pgoff"]:
        program.call(_label("mprotect ring", start, length), nr.mprotect, start, length, vma["prot"])
        return
    end = vma["end"]
    for part in vmas:
        if part["start"] == end and part["pgoff"] == end - start and is_part(part, vma):
            end = part["end"]
    how = vma["flags"] & _KEEP_FLAGS | mman.MAP_FIXED
    program.call(_label("map ring", start, end - start), nr.mmap, start, end - start, vma["prot"], how, fd, 0)


def is_part(vma: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both mappings are of rings of one packet socket."""
    return bool(vma["status"] & other["status"] & areas.SOCKET) and vma["shmid"] == other["shmid"]


def _from(kept: list[tuple[int, int]], start: int) -> Iterator[tuple[int, int]]:
    """The ranges of *kept* from the last one that begins before *start* on."""
    for index in range(max(bisect_right(kept, (start, 0)) - 1, 0), len(kept)):
        yield kept[index]


def pieces(start: int, end: int, kept: list[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """[start, end) cut at the borders of the ascending *kept* ranges, each piece with whether it is kept."""
    for low, high in _from(kept, start):
        if high <= start:
            continue
        if low >= end:
            break
        if start < low:
            yield start, low, False
        yield max(start, low), min(end, high), True
        start = min(end, high)
    if start < end:
        yield start, end, False


def _label(what: str, start: int, length: int) -> str:
    return f"{what} {start:#x}-{start + length:#x}"


class _Reads:
    """The calls that read pages into place. Small parts that follow each other in one file are read by one
    preadv(2)."""

    __slots__ = ("batch", "checks", "fds", "first", "program", "size")

    def __init__(self, program: Program, fds: dict[int, int]) -> None:
        self.program = program
        self.fds = fds
        self.checks: list[tuple[int, int]] = []
        self.batch: list[tuple[int, int]] = []
        self.first = Run(0, 0, -1, 0)
        self.size = 0

    def add(self, run: Run) -> None:
        """Read *run*."""
        if run.size >= _POPULATE:
            self.flush()
            for done in range(0, run.size, _STEP):
                self._populated(run.address + done, min(_STEP, run.size - done), run.fd, run.offset + done)
            return
        first = self.first
        follows = run.fd == first.fd and run.offset == first.offset + self.size
        if not self.batch or not follows or len(self.batch) == _IOV_MAX:
            self.flush()
            self.first = run
        self.batch.append((run.address, run.size))
        self.size += run.size

    def _populated(self, at: int, size: int, fd: int, offset: int) -> None:
        # To make the pages first, in the kernel, is cheaper than one fault for each; in steps that stay in the cache.
        # Where it cannot be done (before Linux 5.14, or files that got shorter), the read says what is wrong, if
        # anything.
        self.program.call(_label("populate", at, size), nr.madvise, at, size, mman.MADV_POPULATE_WRITE, flags=1)
        self._read(at, size, nr.pread64, fd, at, size, offset)

    def _read(self, at: int, size: int, number: int, fd: int, *args: int) -> None:
        self.checks.append((self.program.call(_label("read pages", at, size), number, self.fds[fd], *args), size))

    def flush(self) -> None:
        """Read what has been gathered."""
        first, batch, size = self.first, self.batch, self.size
        if len(batch) == 1:
            self._read(first.address, size, nr.pread64, first.fd, first.address, size, first.offset)
        elif batch:
            self.program.reserve(3, _IOVEC.size * len(batch))
            vector = self.program.data(b"".join([_IOVEC.pack(*part) for part in batch]))
            self._read(first.address, size, nr.preadv, first.fd, vector, len(batch), first.offset, 0)
        self.batch, self.size = [], 0


def plan_pages(program: Program, runs: list[Run], fds: dict[int, int]) -> list[tuple[int, int]]:
    """Read the pages into place; returns (call, bytes it must have read). *fds*: our descriptor -> the task's.

    Where the machine gives huge pages to everybody (transparent_hugepage/enabled: always), the first small page that is
    read would bring one, and a process with little here and there would grow to many times its size. So they are
    allowed only for what fills them.
    """
    reads = _Reads(program, fds)
    filling: list[Run] = []
    program.call("prctl THP disable", nr.prctl, SET_THP_DISABLE, 1, 0, 0, 0)
    for run in runs:
        first = run.address + -run.address % _HUGE
        last = (run.address + run.size) // _HUGE * _HUGE
        if first >= last:
            reads.add(run)
            continue
        filling.append(_part(run, first, last))
        for start, end in ((run.address, first), (last, run.address + run.size)):
            if start < end:
                reads.add(_part(run, start, end))
    reads.flush()
    program.call("prctl THP enable", nr.prctl, SET_THP_DISABLE, 0, 0, 0, 0)
    for run in filling:
        reads.add(run)
    reads.flush()
    return reads.checks


def _part(run: Run, start: int, end: int) -> Run:
    return Run(start, end - start, run.fd, run.offset + start - run.address)


def plan_finish(program: Program, vmas: list[dict[str, Any]], writable: set[int], present: dict[int, int]) -> None:
    """Protection, advice, locks, guards, names; *present* are the bytes read in per mapping."""
    for vma in vmas:
        start, length = vma["start"], vma["end"] - vma["start"]
        if vma["status"] & areas.GUARD:
            program.call(_label("madvise guard", start, length), nr.madvise, start, length, mman.MADV_GUARD_INSTALL)
            continue
        if is_special(vma):
            continue
        if start in writable:
            program.call(_label("mprotect", start, length), nr.mprotect, start, length, vma["prot"])
        _plan_advice(program, vma, start, length)
        if vma["flags"] & mman.MAP_LOCKED:
            whole = present.get(start, 0) == length or vma["flags"] & mman.MAP_SHARED
            if "locked" in vma.get("firn", {}):
                whole = vma["firn"]["locked"] == areas.LOCKED_WHOLE
            flags = 0 if whole else mman.MLOCK_ONFAULT
            program.call(_label("mlock", start, length), nr.mlock2, start, length, flags)


def _plan_advice(program: Program, vma: dict[str, Any], start: int, length: int) -> None:
    mask = vma.get("madv", 0)
    if vma["flags"] & mman.MAP_DROPPABLE:
        mask &= ~(1 << mman.MADV_DONTDUMP | 1 << mman.MADV_WIPEONFORK)  # come with the mapping, cannot be set
    for advice in range(64):
        if mask >> advice & 1 and advice not in _FIRST_ADVICE:
            program.call(_label(f"madvise {advice} of", start, length), nr.madvise, start, length, advice)
    own = vma.get("firn", {})
    if own.get("anon_name"):
        program.reserve(2, 256)
        name = program.text(own["anon_name"])
        program.call("name mapping", nr.prctl, PR_SET_VMA, 0, start, length, name, flags=1)


def plan_seal(program: Program, vmas: list[dict[str, Any]]) -> None:
    """mseal(2) what was sealed: the very last change to a mapping."""
    for vma in vmas:
        if vma.get("firn", {}).get("sealed") and not is_special(vma):
            start, length = vma["start"], vma["end"] - vma["start"]
            program.call(_label("mseal", start, length), nr.mseal, start, length, 0)


def check_reads(program: Program, checks: list[tuple[int, int]]) -> None:
    """Raise if a read brought less than it should: the pages image is cut."""
    for call, size in checks:
        if program.results[call] != size:
            raise ImageError(f"pages image: only {program.results[call]} of {size} bytes could be read")


def present_bytes(vmas: list[dict[str, Any]], runs: list[Run]) -> dict[int, int]:
    """Start of a mapping -> bytes of the image in it."""
    found: dict[int, int] = {}
    index = 0
    for run in runs:
        at, end = run.address, run.address + run.size
        while at < end and index < len(vmas):
            vma = vmas[index]
            if vma["end"] <= at:
                index += 1
                continue
            stop = min(end, vma["end"])
            found[vma["start"]] = found.get(vma["start"], 0) + stop - max(at, vma["start"])
            at = stop
    return found

