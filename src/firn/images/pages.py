"""Page lists: which pages of a process or memory object are stored, and where.

A page list (pagemap-N.img, pagemap-shmem-N.img) names runs of pages; their contents lie one after the other in
pages-M.img, or in the page list of the same name of the parent directory.
"""

from __future__ import annotations

import os

from firn.errors import ImageError
from firn.images import catalog
from firn.images.store import ImageDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

PAGE = 4096
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
"""Bits of pagemap_entry.flags: contents are in the parent; may be restored lazily; contents are here."""


class Run:
    """*nr_pages* pages from address *vaddr*, whose contents are at *offset* (bytes) of the pages image open at *fd*."""

    __slots__ = ("fd", "flags", "nr_pages", "offset", "vaddr")

    def __init__(self, vaddr: int, nr_pages: int, flags: int, fd: int, offset: int) -> None:
        self.vaddr = vaddr
        self.nr_pages = nr_pages
        self.flags = flags
        self.fd = fd
        self.offset = offset


def normalise(entry: dict[str, Any]) -> tuple[int, int, int]:
    """(vaddr, nr_pages, flags) of a pagemap_entry, of the present layout or an old one."""
    nr_pages = entry.get("nr_pages", entry["compat_nr_pages"])
    flags = entry.get("flags")
    if entry.get("in_parent"):
        flags = (flags or 0) | PE_PARENT
    return entry["vaddr"], nr_pages, PE_PRESENT if flags is None else flags


class PagesFiles:
    """The pages images of a checkpoint, each opened once: what has the same descriptor is the same file."""

    def __init__(self) -> None:
        self._fds: dict[tuple[int, int], int] = {}

    def open(self, images: ImageDir, name: str) -> int:
        """The descriptor of pages image *name*, until :meth:`close`. Raises :class:`ImageError`."""
        fd = images.open_raw(name, os.O_RDONLY)
        status = os.fstat(fd)
        known = self._fds.setdefault((status.st_dev, status.st_ino), fd)
        if known != fd:
            os.close(fd)
        return known

    def close(self) -> None:
        """Close all of them."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class _Level:
    """One page list of an incremental chain, without its parents."""

    __slots__ = ("_runs", "fd", "name")

    def __init__(self, images: ImageDir, kind: str, index: int, files: PagesFiles) -> None:
        self.fd = -1
        self.name = f"{images.path}/{catalog.kind(kind).file(index)}"
        self._runs: list[tuple[int, int, int, int]] = []
        """(vaddr, address behind it, flags, offset in the pages image)"""
        entries = images.read_all(kind, index)
        if not entries:
            raise ImageError(f"{self.name}: missing, or without its head")
        size = self._load(entries[1:])
        if size:
            pages = catalog.kind("PAGES").file(entries[0]["pages_id"])
            self.fd = files.open(images, pages)
            has = os.fstat(self.fd).st_size
            if has < size:
                raise ImageError(f"{self.name}: {pages} has {has} bytes of {size}")

    def _load(self, entries: list[dict[str, Any]]) -> int:
        """Check and take over the runs; returns the bytes that they have in the pages image."""
        end = size = 0
        for entry in entries:
            vaddr, nr_pages, flags = normalise(entry)
            _check_run(self.name, vaddr, nr_pages, end)
            end = vaddr + nr_pages * PAGE
            self._runs.append((vaddr, end, flags, size))
            if flags & PE_PRESENT:
                size += nr_pages * PAGE
            elif not flags & PE_PARENT:
                raise ImageError(f"{self.name}: the contents of the pages at {vaddr:#x} are not in the images")
        return size

    def all(self) -> list[tuple[int, int]]:
        """(vaddr, address behind it) of every run."""
        return [(start, end) for start, end, _, _ in self._runs]

    def pick(self, wanted: list[tuple[int, int]], found: list[Run]) -> list[tuple[int, int]]:
        """Append what is stored here of *wanted*, ascending ranges, to *found*; returns what the parent has to supply.

        Raises :class:`ImageError` for a page that is not in the list.
        """
        elsewhere = []
        runs = iter(self._runs)
        start = stop = flags = offset = 0
        for vaddr, end in wanted:
            while vaddr < end:
                while stop <= vaddr:
                    start, stop, flags, offset = next(runs, (end, 1 << 65, 0, 0))
                if vaddr < start:
                    raise ImageError(f"{self.name}: the page at {vaddr:#x} is missing")
                upto = min(end, stop)
                if flags & PE_PRESENT:
                    found.append(Run(vaddr, (upto - vaddr) // PAGE, flags, self.fd, offset + vaddr - start))
                else:
                    elsewhere.append((vaddr, upto))
                vaddr = upto
        return elsewhere


class PagemapReader:
    """The runs of a page list, the contents of parents included: iterate over it for :class:`Run` objects, ascending.

    The descriptors in the runs live until :meth:`close`, or as long as those *files* that they are taken from.
    """

    def __init__(self, images: ImageDir, kind: str, index: int, files: PagesFiles | None = None) -> None:
        """Read the list and those of the parent directories that it needs; *kind* is PAGEMAP or PAGEMAP_SHMEM.

        Raises :class:`ImageError` for a missing or damaged list: runs that are empty, out of order or overlap, a pages
        image that is too short, pages that no parent has, a chain of parents that leads back into itself.
        """
        self._files = files or PagesFiles()
        self._owned = files is None
        self._runs: list[Run] = []
        try:
            self._resolve(images, kind, index)
        except BaseException:
            self.close()
            raise
        self._runs.sort(key=lambda run: run.vaddr)

    def _resolve(self, images: ImageDir, kind: str, index: int) -> None:
        wanted: list[tuple[int, int]] | None = None
        seen: set[tuple[int, int]] = set()
        directory = images
        try:
            while True:
                place = os.fstat(directory.fd)
                if (place.st_dev, place.st_ino) in seen:
                    raise ImageError(f"{directory.path}: the chain of parent directories leads back into itself")
                seen.add((place.st_dev, place.st_ino))
                level = _Level(directory, kind, index, self._files)
                wanted = level.pick(level.all() if wanted is None else wanted, self._runs)
                if not wanted:
                    return
                parent = directory.parent()
                if parent is None:
                    raise ImageError(f"{level.name}: pages are in a parent directory, and there is none")
                if directory is not images:
                    directory.close()
                directory = parent
        finally:
            if directory is not images:
                directory.close()

    def __enter__(self) -> PagemapReader:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pages images, unless they are somebody else's."""
        if self._owned:
            self._files.close()

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)


def _check_run(name: str, vaddr: int, nr_pages: int, end: int) -> None:
    """Refuse a run that is empty, crooked, or does not follow the one that ends at *end*."""
    if nr_pages <= 0 or vaddr % PAGE or vaddr < end or vaddr + nr_pages * PAGE > 1 << 64:
        raise ImageError(f"{name}: the run of {nr_pages} pages at {vaddr:#x} is empty or out of order")


def write_pagemap(images: ImageDir, kind: str, index: int, pages_id: int, runs: Iterable[tuple[int, int, int]]) -> None:
    """Write a page list of *runs* (vaddr, nr_pages, flags); *kind* is PAGEMAP or PAGEMAP_SHMEM.

    Raises :class:`ImageError` for runs that are empty, out of order or overlap, and for what cannot be written.
    """
    end = 0
    with images.writer(kind, index) as writer:
        writer.add({"pages_id": pages_id})
        for vaddr, nr_pages, flags in runs:
            _check_run(writer.name, vaddr, nr_pages, end)
            end = vaddr + nr_pages * PAGE
            writer.add({"vaddr": vaddr, "compat_nr_pages": 0, "flags": flags, "nr_pages": nr_pages})
