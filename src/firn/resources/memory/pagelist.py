"""Which pages of a process have to be saved.

Kernel: the PAGEMAP_SCAN ioctl of /proc/PID/pagemap (Linux 6.7), else the words of /proc/PID/pagemap
(Documentation/admin-guide/mm/pagemap.rst). A page belongs to the process alone, and is saved, if it is present or
swapped and neither page cache nor the kernel's zero page.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from firn.abi import mman
from firn.abi.libc import address_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_REGIONS = 16384


class Pages:
    """Ascending, disjoint byte ranges: ``runs`` to be saved, ``guards`` made by MADV_GUARD_INSTALL, ``huge`` in
    THPs."""

    __slots__ = ("guards", "huge", "runs")

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.guards: list[tuple[int, int]] = []
        self.huge: list[tuple[int, int]] = []

    def total(self) -> int:
        """Bytes to be saved."""
        return sum(end - start for start, end in self.runs)


def _append(runs: list[tuple[int, int]], start: int, end: int) -> None:
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))


def scan(fd: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """PAGEMAP_SCAN of [start, end): (start, end, categories) of own pages and guard pages, over all mappings at
    once."""
    vector = bytearray(mman.PAGE_REGION.size * _REGIONS)
    vector_address = address_of(vector)
    # A guard marker counts as swapped; it is told apart by its own category (Linux 6.15).
    inverted = mman.PAGE_IS_FILE | mman.PAGE_IS_PFNZERO
    wanted = mman.PAGE_IS_PRESENT | mman.PAGE_IS_SWAPPED
    returned = mman.PAGE_IS_PRESENT | mman.PAGE_IS_SWAPPED | mman.PAGE_IS_HUGE | mman.PAGE_IS_GUARD
    while start < end:
        arg = bytearray(
            mman.PM_SCAN_ARG.pack(
                mman.PM_SCAN_ARG.size, 0, start, end, 0, vector_address, _REGIONS, 0,
                inverted, inverted, wanted, returned,
            )
        )  # fmt: skip
        try:
            count = fcntl.ioctl(fd, mman.PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno != 22 or returned & mman.PAGE_IS_GUARD == 0:
                raise
            returned &= ~mman.PAGE_IS_GUARD
            continue
        walked = mman.PM_SCAN_ARG.unpack(arg)[4]
        words = (ctypes.c_uint64 * (3 * count)).from_buffer(vector)
        flat = list(words)
        del words
        # The kernel walks in batches of 512 regions and sets walk_end only for those that ran full (fs/proc/task_mmu.c,
        # seen on 6.18): after a last one that did not, it lies before regions that are already in the vector.
        start = max(walked, flat[-2]) if count else walked
        yield from zip(flat[::3], flat[1::3], flat[2::3], strict=True)


_SWAPPED, _FILE, _GUARD = (bit >> 56 for bit in (mman.PAGEMAP_SWAPPED, mman.PAGEMAP_FILE, mman.PAGEMAP_GUARD))
_OURS = bytes(byte & 0xC0 != 0 and not byte & (_FILE | _GUARD) for byte in range(256))
_GUARDS = bytes(byte & _SWAPPED != 0 and byte & _FILE == 0 and byte & _GUARD != 0 for byte in range(256))
"""Top byte of a word -> 1 for own pages, for guard markers."""


def _words(fd: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The same as :func:`scan` for one mapping, from pagemap words; without page frame numbers zero pages count too.

    Empty mappings of many gigabytes are common, so no word is looked at alone where it does not have to be.
    """
    step = 1 << 30
    for base in range(start, end, step):
        stop = min(base + step, end)
        words = os.pread(fd, (stop - base) // mman.PAGE * 8, base // mman.PAGE * 8)
        tops = words[7::8]
        found = [(at, to, mman.PAGE_IS_PRESENT) for at, to in _without_zero(words, _ones(tops.translate(_OURS)))]
        guards = _ones(tops.translate(_GUARDS))
        if guards:
            found = sorted(found + [(at, to, mman.PAGE_IS_GUARD) for at, to in guards])
        for at, to, category in found:
            yield base + at * mman.PAGE, base + to * mman.PAGE, category


def _ones(flags: bytes) -> list[tuple[int, int]]:
    """The runs of ones."""
    runs = []
    at = flags.find(1)
    while at >= 0:
        to = flags.find(0, at)
        to = len(flags) if to < 0 else to
        runs.append((at, to))
        at = flags.find(1, to)
    return runs


def _without_zero(words: bytes, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """*runs* of words (first, behind the last) without those of the kernel's zero page."""
    zero = zero_frame()
    if not zero:
        return runs
    pattern = zero.to_bytes(8, "little")[:6]
    kept = []
    for first, last in runs:
        at = words.find(pattern, first * 8, last * 8)
        while at >= 0:
            number = at // 8
            word = int.from_bytes(words[number * 8 : number * 8 + 8], "little")
            if at % 8 or not word & mman.PAGEMAP_PRESENT or word & mman.PAGEMAP_PFN != zero:
                at = words.find(pattern, at + 1, last * 8)
                continue
            if first < number:
                kept.append((first, number))
            first = number + 1
            at = words.find(pattern, first * 8, last * 8)
        if first < last:
            kept.append((first, last))
    return kept


_zero: list[int] = []


def zero_frame() -> int:
    """The frame number of the kernel's zero page (0: page frame numbers are hidden from us)."""
    if not _zero:
        import mmap

        probe = mmap.mmap(-1, mman.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        probe[0]  # a read fault maps the zero page
        address = ctypes.addressof(ctypes.c_char.from_buffer(probe))
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            word = int.from_bytes(os.pread(fd, 8, address // mman.PAGE * 8), "little")
        finally:
            os.close(fd)
        _zero.append(word & mman.PAGEMAP_PFN)
    return _zero[0]


def find(pid: int, ranges: list[tuple[int, int]], use_scan: bool) -> Pages:
    """The pages of *pid* inside *ranges* (ascending, disjoint) that must be saved."""
    pages = Pages()
    if not ranges:
        return pages
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if use_scan:
            found = scan(fd, ranges[0][0], ranges[-1][1])
        else:
            found = (region for start, end in ranges for region in _words(fd, start, end))
        _intersect(pages, found, ranges)
    finally:
        os.close(fd)
    return pages


def _intersect(pages: Pages, found: Iterator[tuple[int, int, int]], ranges: list[tuple[int, int]]) -> None:
    """Sort *found* into *pages*, cut to *ranges*."""
    index, count = 0, len(ranges)
    for start, end, category in found:
        while index < count and ranges[index][1] <= start:
            index += 1
        at = index
        while at < count and ranges[at][0] < end:
            low, high = max(start, ranges[at][0]), min(end, ranges[at][1])
            if category & mman.PAGE_IS_GUARD:
                _append(pages.guards, low, high)
            else:
                _append(pages.runs, low, high)
                if category & mman.PAGE_IS_HUGE:
                    _append(pages.huge, low, high)
            at += 1
