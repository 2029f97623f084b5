"""Private pages that several processes share, stored once (images: parent/pagemap-PID.img, parent/pages-N.img).

State owned: the contents of copy-on-write pages with more than one holder (:mod:`firn.resources.memory.frames` finds
them). The image format has no word for sharing, but a page list may leave pages to the list of the same name in the
directory ``parent``, meant for incremental dumps. So shared pages go there: one pages image, to which the page lists
of all its holders refer. The place of a page in a pages image follows from the order of the runs in the list, so each
of those lists names all pages of that image; a page that a process does not share is in its own list too, which is
looked at first. At one address an image holds one page: what most processes have. Where others share another one at
that address, and that saves enough, a second image lies above the first one (``parent`` and ``parent/parent``).

It comes back because the restored child of a fork takes over pages that are at the same place of the same image
(:mod:`firn.resources.memory.inherit`). What goes wrong: whoever copies a checkpoint has to take the directory in it
along. So it is made only where it saves a megabyte or more.
"""

from __future__ import annotations

import os

from firn.images.pages import PE_PARENT, PE_PRESENT
from firn.resources.memory import copyout, frames
from firn.resources.memory.pages import merged, save_list

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.images.store import ImageDir
    from firn.resources.memory.pages import ProcessPages

LEAST = 1 << 20
"""Bytes that the first image, and each further one, has to save."""
_LEVELS = 3


class Segment:
    """Pages [start, end) of a layer, of which the process numbered *source* has one copy; *holders* are the processes
    (bits) that take them from there."""

    __slots__ = ("end", "holders", "source", "start")

    def __init__(self, start: int, end: int, holders: int) -> None:
        self.start = start
        self.end = end
        self.holders = holders
        self.source = (holders & -holders).bit_length() - 1


class Layer:
    """One pages image, for the processes *members* (bits); its segments are ascending and disjoint."""

    __slots__ = ("members", "segments")

    def __init__(self, members: int, segments: list[Segment]) -> None:
        self.members = members
        self.segments = segments


class _Candidate:
    """Shared pages that no layer has yet; *below* are the segments that other processes take there."""

    __slots__ = ("below", "end", "holders", "start")

    def __init__(self, start: int, end: int, holders: int, below: list[Segment]) -> None:
        self.start = start
        self.end = end
        self.holders = holders
        self.below = below


def arrange(groups: list[tuple[int, int, int]]) -> list[list[Layer]]:
    """Layers for *groups* as :func:`firn.resources.memory.frames.find` gives them, the deepest level first."""
    rest = [_Candidate(start, end, holders, []) for start, end, holders in groups]
    levels: list[list[Layer]] = []
    while rest and len(levels) < _LEVELS:
        level: list[Layer] = []
        left: list[_Candidate] = []
        for members in _families({candidate.holders for candidate in rest}):
            layer, others = _choose(members, [one for one in rest if one.holders & members])
            if layer is not None:
                level.append(layer)
                left += others
        if not level:
            break
        levels.append(level)
        rest = sorted(left, key=lambda one: one.start)
    return levels


def _families(holders: set[int]) -> list[int]:
    """Sets of processes none of which shares anything with one of another set."""
    families: list[int] = []
    for bits in holders:
        apart = []
        for family in families:
            if family & bits:
                bits |= family
            else:
                apart.append(family)
        families = [*apart, bits]
    return families


def _choose(members: int, candidates: list[_Candidate]) -> tuple[Layer | None, list[_Candidate]]:
    """A layer with the best of *candidates* at each address, and the others; None if it is not worth while."""
    chosen: list[Segment] = []
    rest: list[_Candidate] = []
    overridden: list[tuple[Segment, _Candidate]] = []
    saved = index = 0
    while index < len(candidates):
        end = index + 1
        while end < len(candidates) and candidates[end].start == candidates[index].start:
            end += 1
        best = max(candidates[index:end], key=lambda one: one.holders.bit_count())
        # Members who have another page at this address, from a level below, will have to store it themselves.
        cost = 1 + sum((segment.holders & members).bit_count() for segment in best.below)
        gain = best.holders.bit_count() - cost
        if gain > 0:
            saved += gain * (best.end - best.start)
            segment = Segment(best.start, best.end, best.holders)
            chosen.append(segment)
            overridden += [(below, best) for below in best.below]
            for one in candidates[index:end]:
                if one is not best:
                    rest.append(_Candidate(one.start, one.end, one.holders, [*one.below, segment]))
        index = end
    if saved < LEAST:
        return None, []
    for segment, _ in overridden:
        segment.holders &= ~members
    return Layer(members, chosen), rest


class SharedPages:
    """The layers of one dump. ``complete``: pages that the images hold apart are not shared."""

    def __init__(self, members: list[tuple[ProcessPages, int]]) -> None:
        """Look at *members*: the pages of each process, found, and the pid (its own or that of its clone) that has
        them. Afterwards they know what they need not store."""
        groups = frames.find([(pid, pages.shareable) for pages, pid in members])
        self.members = members
        self.levels = arrange(groups)
        self.complete = bool(self.levels) or not groups
        self.directories: list[ImageDir] = []

    def copy(self, images: ImageDir) -> bool:
        """Copy the pages out, and take them from what the processes have to store. False if nothing has been done:
        nothing is shared, or the name ``parent`` is in use in *images*."""
        directory: ImageDir | None = images
        for _ in self.levels:
            assert directory is not None
            directory = directory.make_parent()
            if directory is None:
                self.levels, self.directories, self.complete = [], [], False
                return False
            self.directories.insert(0, directory)
        for level, into in zip(self.levels, self.directories, strict=True):
            for number, layer in enumerate(level, 1):
                target = into.open_raw(f"pages-{number}.img", os.O_RDWR | os.O_CREAT | os.O_EXCL)
                try:
                    self._copy_layer(layer, target)
                finally:
                    os.close(target)
        for index, (pages, _) in enumerate(self.members):
            pages.share(self._taken(index, self.levels))
        return bool(self.levels)

    def _copy_layer(self, layer: Layer, target: int) -> None:
        pieces: dict[int, list[copyout.Piece]] = {}
        offset = 0
        ahead = iter([*layer.segments, None])
        runs: list[tuple[int, int]] = []
        source = layer.segments[0].source
        for segment in ahead:
            if segment is None or segment.source != source:
                pages, _ = self.members[source]
                pieces.setdefault(source, []).extend(copyout.plan(merged(runs), pages.marked, offset))
                offset += sum(end - start for start, end in runs)
                runs = []
            if segment is not None:
                source = segment.source
                runs.append((segment.start, segment.end))
        for number, mine in pieces.items():
            copyout.copy(self.members[number][1], mine, target)

    def _taken(self, index: int, levels: list[list[Layer]]) -> list[tuple[int, int]]:
        """What process *index* takes from *levels*."""
        found = [
            (segment.start, segment.end)
            for level in levels
            for layer in level
            if layer.members >> index & 1
            for segment in layer.segments
            if segment.holders >> index & 1
        ]
        return merged(sorted(found))

    def save(self) -> None:
        """Write the page lists."""
        for depth, (level, directory) in enumerate(zip(self.levels, self.directories, strict=True)):
            stored = [merged([(one.start, one.end) for one in layer.segments]) for layer in level]
            for index, (pages, _) in enumerate(self.members):
                runs = [(start, end, PE_PARENT) for start, end in self._taken(index, self.levels[:depth])]
                number = 1
                for at, layer in enumerate(level, 1):
                    if layer.members >> index & 1:
                        number = at
                        runs += [(start, end, PE_PRESENT) for start, end in stored[at - 1]]
                if runs:
                    save_list(directory, pages.pid, number, runs)

