"""What a restored process has in its memory while its children are cloned, so that siblings share pages again.

A page that several children have and their parent does not (any more) can only come to be shared if the parent has it
for as long as they are born. So a parent with children first gets, at every address, the page that most of them and
itself have; what it had itself is put over that when the tree is complete. Where it does not even have the mapping
(children of a process that is gone, adopted by another one), it gets that as well, as a *guest*, for as long. Which
pages are one is told by the images: the same place of the same pages image (:mod:`firn.resources.memory.shared`). What
goes wrong: a place that the parent uses for something else, or where it has locked or sealed what is there, cannot be
lent; there each child gets pages of its own.
"""

from __future__ import annotations

from firn.abi import mman
from firn.resources.memory import areas, inherit
from firn.resources.memory.rebuild import Run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LEAST = 64 << 10
"""Bytes of shared pages for which a mapping of the parent's own is made."""


class Nursery:
    """The mappings (*guests*, which the process itself does not have, among them) and pages to be born from."""

    __slots__ = ("guests", "runs", "vmas")

    def __init__(self, vmas: list[dict[str, Any]], runs: list[Run], guests: list[dict[str, Any]]) -> None:
        self.vmas = vmas
        self.runs = runs
        self.guests = guests


def plan(vmas: list[dict[str, Any]], runs: list[Run], children: list[Nursery], shared: set[int]) -> Nursery:
    """For a process with *vmas* and *runs*; *children* have been planned already. *shared* are the descriptors of
    pages images in which several processes have pages."""
    if not children or not shared:
        return Nursery(vmas, runs, [])
    guests = _guests(vmas, children)
    everything = _joined(vmas, guests)
    guards = [vma for vma in everything if vma["status"] & areas.GUARD]
    # What is locked or sealed must not change later.
    places = [
        (vma["start"], vma["end"])
        for vma in everything
        if inherit.can_be_inherited(vma, guards)
        and not vma["flags"] & mman.MAP_LOCKED
        and not vma.get("firn", {}).get("sealed")
    ]
    ballot = _Ballot()
    kept_runs: list[Run] = []
    for run, inside in inherit.split(runs, places):
        if inside:
            ballot.add(run, own=True)
        else:
            kept_runs.append(run)
    for child in children:
        common = inherit.common(everything, child.vmas, {})
        for run, inside in inherit.split([run for run in child.runs if run.fd in shared], common):
            if inside:
                for part, allowed in inherit.split([run], places):
                    if allowed:
                        ballot.add(part)
    elected = ballot.elected()
    filled = [guest for guest in guests if _bytes_in(elected, guest) >= _LEAST]
    empty = [(guest["start"], guest["end"]) for guest in guests if guest not in filled]
    kept_runs += [run for run, inside in inherit.split(elected, empty) if not inside]
    return Nursery(_joined(vmas, filled), sorted(kept_runs, key=lambda run: run.address), filled)


def _joined(vmas: list[dict[str, Any]], guests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both as one list; guard regions, which lie in other mappings, stay at its end."""
    if not guests:
        return vmas
    return sorted([*vmas, *guests], key=lambda vma: (bool(vma["status"] & areas.GUARD), vma["start"]))


def _guests(vmas: list[dict[str, Any]], children: list[Nursery]) -> list[dict[str, Any]]:
    """Mappings that two children have alike, at places where the parent has nothing."""
    seen: dict[str, int] = {}
    candidates: dict[tuple[int, int], dict[str, Any]] = {}
    for child in children:
        guards = [vma for vma in child.vmas if vma["status"] & areas.GUARD]
        for vma in child.vmas:
            bad = mman.MAP_LOCKED | mman.MAP_GROWSDOWN
            if not inherit.can_be_inherited(vma, guards) or vma["flags"] & bad or vma.get("firn", {}).get("sealed"):
                continue
            key = repr(sorted(vma.items(), key=lambda item: item[0]))
            seen[key] = seen.get(key, 0) + 1
            if seen[key] == 2:
                candidates.setdefault((vma["start"], vma["end"]), vma)
    taken = sorted((vma["start"], vma["end"]) for vma in vmas)
    guests: list[dict[str, Any]] = []
    index = 0
    for start, end in sorted(candidates):
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        free = index == len(taken) or taken[index][0] >= end
        if free and not (guests and guests[-1]["end"] > start):
            guests.append(candidates[start, end])
    return guests


def _bytes_in(runs: list[Run], vma: dict[str, Any]) -> int:
    return sum(run.size for run, inside in inherit.split(runs, [(vma["start"], vma["end"])]) if inside)


class _Ballot:
    """Finds at each address the page that most processes have. A stretch of memory with a stretch of an image in it is
    a line: descriptor, and offset less address."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, tuple[int, int], bool]] = []

    def add(self, run: Run, own: bool = False) -> None:
        """One process has *run*; *own*: the parent itself."""
        line = run.fd, run.offset - run.address
        self.events.append((run.address, 1, line, own))
        self.events.append((run.address + run.size, -1, line, own))

    def elected(self) -> list[Run]:
        """The parent's own pages, but for those for which another one has more, at least two, that have it."""
        votes: dict[tuple[int, int], int] = {}
        runs: list[Run] = []
        own: tuple[int, int] | None = None
        now: tuple[int, int] | None = None
        start = 0
        self.events.sort(key=lambda event: event[:2])
        last = len(self.events) - 1
        for index, (address, change, line, is_own) in enumerate(self.events):
            votes[line] = votes.get(line, 0) + change
            if not votes[line]:
                del votes[line]
            if is_own:
                own = line if change > 0 else None
            if index < last and self.events[index + 1][0] == address:
                continue
            best = max(votes, key=votes.__getitem__, default=own)
            if best is not None and votes[best] <= (votes[own] if own is not None else 1):
                best = own
            if best != now:
                if now is not None and start < address:
                    runs.append(Run(start, address - start, now[0], now[1] + start))
                now, start = best, address
        return runs
