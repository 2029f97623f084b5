"""What a restored child takes over from its parent's memory by fork, so that pages they shared stay shared.

A child is cloned when its parent's memory is complete. Where both had the same mapping (same place, protection,
flags, file and advice), the child keeps it, and only pages that differ are read in: those that are not at the same
place of the same pages image or, where the images do not tell what was shared, have other contents; that is found out
before anything is made. Pages that only the parent has are dropped. A mapping that is longer in the child is
lengthened: it must be one to mremap(2), and the kernel joins no new mapping to one that a fork has copied. Everything
else is unmapped and made anew. Mappings that a fork leaves out or empties (MADV_DONTFORK, MADV_WIPEONFORK), huge page
mappings and those with guard regions or protection keys are always made anew.
"""

from __future__ import annotations

import os

from firn.abi import mman
from firn.resources.memory import areas
from firn.resources.memory.rebuild import Run, is_special

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_CHUNK = 1 << 20


class Inheritance:
    """``kept`` (start, end) ranges stay as the fork left them, and reach up to ``ends[start]`` in the child; ``runs``
    are to be read in, ``dropped`` ranges discarded."""

    __slots__ = ("dropped", "ends", "kept", "runs")

    def __init__(
        self, kept: list[tuple[int, int]], ends: dict[int, int], runs: list[Run], dropped: list[tuple[int, int]]
    ) -> None:
        self.kept = kept
        self.ends = ends
        self.runs = runs
        self.dropped = dropped


def nothing(runs: list[Run]) -> Inheritance:
    """For a task that takes over nothing."""
    return Inheritance([], {}, runs, [])


def compare(
    parent_vmas: list[dict[str, Any]],
    parent_runs: list[Run],
    vmas: list[dict[str, Any]],
    runs: list[Run],
    by_content: bool,
) -> Inheritance:
    """What a child with *vmas* and *runs* can take over from a parent; *by_content*: also pages that are stored apart
    and are equal."""
    ends: dict[int, int] = {}
    kept = common(parent_vmas, vmas, ends)
    if not kept:
        return nothing(runs)
    wanted: list[Run] = []
    dropped: list[tuple[int, int]] = []
    theirs = _Cursor(parent_runs)
    for run, inside in split(runs, kept):
        if inside:
            wanted += _different(run, theirs, by_content)
        else:
            wanted.append(run)
    have = _Cursor(runs)
    for run, inside in split(parent_runs, kept):
        if inside:
            dropped += have.gaps(run.address, run.address + run.size)
    return Inheritance(kept, ends, wanted, dropped)


def overlay(there: list[Run], runs: list[Run]) -> tuple[list[Run], list[tuple[int, int]]]:
    """What has to be done to memory with the pages *there* to have *runs* in it: runs to be read in, ranges to be
    discarded."""
    cursor, have = _Cursor(there), _Cursor(runs)
    wanted = [part for run in runs for part in _different(run, cursor, False)]
    return wanted, [gap for run in there for gap in have.gaps(run.address, run.address + run.size)]


def common(
    parent_vmas: list[dict[str, Any]], vmas: list[dict[str, Any]], ends: dict[int, int]
) -> list[tuple[int, int]]:
    """The ranges that a child with *vmas* keeps; *ends* is filled as :class:`Inheritance` says."""
    guards = [vma for vma in [*parent_vmas, *vmas] if vma["status"] & areas.GUARD]
    kept: list[tuple[int, int]] = []
    index = 0
    candidates = [vma for vma in parent_vmas if can_be_inherited(vma, guards)]
    for vma in vmas:
        if not can_be_inherited(vma, guards):
            continue
        while index < len(candidates) and candidates[index]["end"] <= vma["start"]:
            index += 1
        at = index
        while at < len(candidates) and candidates[at]["start"] < vma["end"]:
            if candidates[at]["start"] <= vma["start"] and _same(candidates[at], vma):
                kept.append((vma["start"], min(candidates[at]["end"], vma["end"])))
                ends[vma["start"]] = vma["end"]
            at += 1
    return kept


def can_be_inherited(vma: dict[str, Any], guards: list[dict[str, Any]]) -> bool:
    """Whether a fork keeps what *vma* maps, and it can stay; *guards* are guard regions."""
    bad = 1 << mman.MADV_DONTFORK | 1 << mman.MADV_WIPEONFORK
    if vma["status"] & areas.SOCKET:
        return False  # parts of a ring come with its first one
    if is_special(vma) or vma.get("madv", 0) & bad or vma["flags"] & (mman.MAP_HUGETLB | mman.MAP_DROPPABLE):
        return False
    if vma.get("firn", {}).get("pkey"):
        return False
    return not any(guard["start"] < vma["end"] and vma["start"] < guard["end"] for guard in guards)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for field in ("prot", "flags", "status", "shmid", "fdflags", "madv", "firn"):
        if one.get(field) != other.get(field):
            return False
    if (one["flags"] & mman.MAP_GROWSDOWN or one["status"] & areas.SYSVIPC) and (one["start"], one["end"]) != (
        other["start"],
        other["end"],
    ):
        return False
    anonymous = one["flags"] & mman.MAP_ANONYMOUS and not one["status"] & areas.SYSVIPC
    return bool(anonymous or one["pgoff"] - one["start"] == other["pgoff"] - other["start"])


def _part(run: Run, start: int, end: int) -> Run:
    return Run(start, end - start, run.fd, run.offset + start - run.address)


def split(runs: list[Run], ranges: list[tuple[int, int]]) -> Iterator[tuple[Run, bool]]:
    """*runs* cut at the borders of *ranges*, each with whether it lies inside of one."""
    index = 0
    for run in runs:
        at, end = run.address, run.address + run.size
        while at < end:
            while index < len(ranges) and ranges[index][1] <= at:
                index += 1
            if index == len(ranges) or ranges[index][0] >= end:
                yield _part(run, at, end), False
                break
            low, high = ranges[index]
            if at < low:
                yield _part(run, at, low), False
                at = low
            yield _part(run, at, min(end, high)), True
            at = min(end, high)


class _Cursor:
    """Ascending runs, looked at once from low to high addresses."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.index = 0

    def overlaps(self, start: int, end: int) -> Iterator[Run]:
        """The parts of the runs inside [start, end)."""
        while self.index < len(self.runs) and self.runs[self.index].address + self.runs[self.index].size <= start:
            self.index += 1
        at = self.index
        while at < len(self.runs) and self.runs[at].address < end:
            run = self.runs[at]
            yield _part(run, max(start, run.address), min(end, run.address + run.size))
            at += 1

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that no run covers."""
        found = []
        for run in self.overlaps(start, end):
            if start < run.address:
                found.append((start, run.address))
            start = run.address + run.size
        if start < end:
            found.append((start, end))
        return found


def _different(run: Run, theirs: _Cursor, by_content: bool) -> list[Run]:
    """The parts of *run* that the parent does not have at the same place."""
    found: list[Run] = []
    at = run.address
    for other in theirs.overlaps(run.address, run.address + run.size):
        if at < other.address:
            found.append(_part(run, at, other.address))
        at = other.address + other.size
        mine = _part(run, other.address, at)
        if (mine.fd, mine.offset) != (other.fd, other.offset):
            found += _compare_contents(mine, other) if by_content else [mine]
    if at < run.address + run.size:
        found.append(_part(run, at, run.address + run.size))
    return found


def _compare_contents(mine: Run, other: Run) -> Iterator[Run]:
    """The pages of *mine* that differ from *other*, which has the same address and size."""
    for base in range(0, mine.size, _CHUNK):
        size = min(_CHUNK, mine.size - base)
        ours, theirs = os.pread(mine.fd, size, mine.offset + base), os.pread(other.fd, size, other.offset + base)
        if ours == theirs:
            continue
        for page in range(0, size, mman.PAGE):
            if ours[page : page + mman.PAGE] != theirs[page : page + mman.PAGE]:
                address = mine.address + base + page
                yield _part(mine, address, address + mman.PAGE)
