"""Which private pages several processes share (copy-on-write), by the kernel's identity of a page, not by contents.

Kernel: a word of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst) names the page frame or the place in
swap. Two stopped processes that show the same one at the same address have one page between them. The words of whole
blocks of pages are compared as bytes, and a block is taken apart only where processes differ. What can go wrong: frame
numbers are zero for whom the kernel does not trust (CAP_SYS_ADMIN in the first user namespace): nothing is known then,
see :func:`are_visible`. Pages move (compaction, swap) also while a process stands still, and a frame that one process
has just left could be seen in another: so everything is looked at twice, and what changed meanwhile counts as unshared.
"""

from __future__ import annotations

import os

from firn.abi import mman
from firn.resources.memory import pagelist

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK, _PART = 64, 8
"""Pages per block, and into how many parts it is cut, twice."""
_BLOCK_BYTES = _BLOCK * mman.PAGE
_STEP = 512 * _BLOCK_BYTES
_PRESENT, _SWAPPED, _EXCLUSIVE = (bit >> 56 for bit in (mman.PAGEMAP_PRESENT, mman.PAGEMAP_SWAPPED, 1 << 56))
_STATE = bytes(top & (_PRESENT | _SWAPPED) for top in range(256))
"""Top byte of a word -> without what may differ between sharers (exclusive, write-protected by userfaultfd, ...)."""
_CANDIDATE = bytes(bool(top & _SWAPPED or top & (_PRESENT | _EXCLUSIVE) == _PRESENT) for top in range(256))
_NO_SOFT_DIRTY = bytes(byte & 0x7F for byte in range(256))
"""The same for the byte below: bit 55 of the word is soft-dirty."""


def are_visible() -> bool:
    """Whether the kernel shows us page frame numbers."""
    return pagelist.zero_frame() != 0


def find(processes: list[tuple[int, list[tuple[int, int]]]]) -> list[tuple[int, int, int]]:
    """The pages that are shared by several *processes* (pid, ascending address ranges to look at), all of which stand
    still.

    Returns (start, end, holders), ascending; bit n of *holders* stands for the nth process. Ranges with the same start
    have the same end; their holders are different processes.
    """
    table: dict[int, dict[bytes, int]] = {}
    seen: list[list[int]] = [[] for _ in processes]
    for index, (pid, runs) in enumerate(processes):
        for at, words in _blocks(pid, runs):
            holders = table.setdefault(at, {})
            holders[words] = holders.get(words, 0) | 1 << index
            seen[index].append(at)
    table = {at: holders for at, holders in table.items() if sum(holders.values()).bit_count() > 1}
    if table:
        _look_again(processes, table, seen)
    found: list[tuple[int, int, int]] = []
    for at in sorted(table):
        _refine(at, _BLOCK, table[at], found)
    return found


def _look_again(
    processes: list[tuple[int, list[tuple[int, int]]]], table: dict[int, dict[bytes, int]], seen: list[list[int]]
) -> None:
    """Take out of *table* what is not the same any more; *seen* are the blocks that each process had."""
    for index, (pid, runs) in enumerate(processes):
        bit = 1 << index
        same = {at for at, words in _blocks(pid, runs) if at in table and table[at].get(words, 0) & bit}
        for at in seen[index]:
            if at in table and at not in same:
                table[at] = {words: others & ~bit for words, others in table[at].items()}


def _blocks(pid: int, runs: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """(address, words) of the aligned blocks in which *runs* have pages that might be shared; words of other pages are
    0."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for low, high, inside in _stretches(runs):
            raw = os.pread(fd, (high - low) // mman.PAGE * 8, low // mman.PAGE * 8)
            words = bytearray((high - low) // mman.PAGE * 8)
            for start, end in inside:
                first, last = (start - low) // mman.PAGE * 8, (end - low) // mman.PAGE * 8
                words[first:last] = raw[first:last]
            tops = words[7::8]
            words[7::8] = tops.translate(_STATE)
            words[6::8] = words[6::8].translate(_NO_SOFT_DIRTY)
            candidates = tops.translate(_CANDIDATE)
            for page in range(0, len(tops), _BLOCK):
                if candidates.find(1, page, page + _BLOCK) >= 0:
                    yield low + page * mman.PAGE, bytes(words[8 * page : 8 * (page + _BLOCK)])
    finally:
        os.close(fd)


def _stretches(runs: list[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """*runs* in (start, end, runs inside): limits are those of blocks, no block is in two of them, none is very
    long."""
    low = high = 0
    inside: list[tuple[int, int]] = []
    for start, end in runs:
        at = start
        while at < end:
            first = at // _BLOCK_BYTES * _BLOCK_BYTES
            if inside and first >= high and (first > high or high - low >= _STEP):
                yield low, high, inside
                inside = []
            if not inside:
                low = first
            stop = min(end, max(first + _BLOCK_BYTES, low + _STEP))
            inside.append((at, stop))
            high = -(-stop // _BLOCK_BYTES) * _BLOCK_BYTES
            at = stop
    if inside:
        yield low, high, inside


def _refine(at: int, pages: int, holders: dict[bytes, int], found: list[tuple[int, int, int]]) -> None:
    """Append what is shared of the *pages* pages at *at* to *found*; *holders*: their words -> who has them."""
    if len(holders) == 1:
        [(words, bits)] = holders.items()
        if bits.bit_count() < 2:
            return
        if 0 not in words[7::8]:
            found.append((at, at + pages * mman.PAGE, bits))
            return
    if pages == 1:
        found += [(at, at + mman.PAGE, bits) for words, bits in holders.items() if words[7] and bits.bit_count() > 1]
        return
    part = pages // _PART
    for index in range(_PART):
        below: dict[bytes, int] = {}
        for words, bits in holders.items():
            piece = words[8 * part * index : 8 * part * (index + 1)]
            below[piece] = below.get(piece, 0) | bits
        _refine(at + index * part * mman.PAGE, part, below, found)
