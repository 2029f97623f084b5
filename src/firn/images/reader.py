"""Reading one image file."""

from __future__ import annotations

import os

from firn.errors import ImageError
from firn.images import catalog, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

VERSION = 2
"""inventory_entry.img_version of what firn writes: files begin with a head magic and a type magic."""

MAX_ENTRY = 1 << 26
"""Bytes of one entry: the memory map of a million mappings fits."""

_WINDOW = 1 << 16


class PayloadRef:
    """Where the payload of an entry is: *length* bytes from *offset* of the file *name* of the directory."""

    __slots__ = ("length", "name", "offset")

    def __init__(self, name: str, offset: int, length: int) -> None:
        self.name = name
        self.offset = offset
        self.length = length


class ImageReader:
    """An image file that is read piece by piece, never beyond its real size. Use it in a ``with`` statement.

    Every method raises :class:`ImageError`, naming the file, for what is cut short or malformed.
    """

    __slots__ = ("_base", "_fd", "_kind", "_start", "_window", "name", "size")

    def __init__(self, kind: catalog.Kind, fd: int, name: str, version: int) -> None:
        """Takes over *fd* and checks the magics.

        *version* is inventory_entry.img_version; 0: either framing will do.
        """
        self.name = name
        self._kind = kind
        self._fd = fd
        self._window = b""
        self._base = 0
        try:
            self.size = os.fstat(fd).st_size
            self._start = self._check_magics(version)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        os.close(self._fd)

    def first(self) -> dict[str, Any]:
        """The first entry."""
        return self._entry(self._kind.message, self._start)[0]

    def all(self) -> list[dict[str, Any]]:
        """Every entry; payload is passed over."""
        if self._kind.payload:
            return [entry for entry, _ in self.with_payload()]
        if self._kind.shape == catalog.SINGLE:
            return [self.first()]
        entries = []
        message, at = self._kind.message, self._start
        while at < self.size:
            entry, at = self._entry(message, at)
            entries.append(entry)
            message = self._kind.rest
        return entries

    def with_payload(self) -> Iterator[tuple[dict[str, Any], PayloadRef]]:
        """Every entry with its payload; those that are framed inside another one follow it."""
        message, at = self._kind.message, self._start
        while at < self.size:
            entry, ref, at = self._entry_with_payload(message, at)
            yield entry, ref
            inner, count = catalog.inner(message, entry)
            while at < self.size if count is None else count > 0:
                entry, ref, at = self._entry_with_payload(inner, at)
                yield entry, ref
                if count is not None:
                    count -= 1
            if self._kind.shape == catalog.SINGLE:
                return
            message = self._kind.rest

    def _check_magics(self, version: int) -> int:
        """Returns the offset of the first entry."""
        kind = self._kind
        first = self._word(0)
        if kind.name == "INVENTORY" or (first == kind.magic and version != VERSION):
            if first != kind.magic:
                raise ImageError(f"{self.name}: not an inventory: it begins with {first:#010x}")
            return 4
        if first != kind.head or version == 1:
            raise ImageError(f"{self.name}: not an image of this directory's version: it begins with {first:#010x}")
        second = self._word(4)
        if second != kind.magic:
            raise ImageError(f"{self.name}: another kind of image: its magic is {second:#010x}")
        return 8

    def _entry_with_payload(self, message: str, at: int) -> tuple[dict[str, Any], PayloadRef, int]:
        """(the entry at *at*, its payload, the offset behind both)."""
        entry, at = self._entry(message, at)
        sizes = catalog.payload(message, entry)
        length, padded = (self.size - at,) * 2 if sizes is None else sizes
        if padded > self.size - at:
            raise ImageError(f"{self.name}: cut short: a payload of {padded} bytes at {at}, but it has {self.size}")
        return entry, PayloadRef(self.name, at, length), at + padded

    def _entry(self, message: str, at: int) -> tuple[dict[str, Any], int]:
        """(the framed entry at *at*, the offset behind it)."""
        size = self._word(at)
        if size > MAX_ENTRY:
            raise ImageError(f"{self.name}: an entry of {size} bytes at {at}")
        data = self._take(at + 4, size)
        try:
            return wire.decode(message, data), at + 4 + size
        except ImageError as error:
            raise ImageError(f"{self.name}: {error.message}") from None

    def _word(self, at: int) -> int:
        return int.from_bytes(self._take(at, 4), "little")

    def _take(self, at: int, count: int) -> bytes:
        """*count* bytes from offset *at*."""
        start = at - self._base
        if start + count > len(self._window):
            if count > self.size - at:
                raise ImageError(f"{self.name}: cut short: {count} bytes wanted at {at}, but it has {self.size}")
            try:
                self._window = os.pread(self._fd, max(count, _WINDOW), at)
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read: {error.strerror}") from None
            if len(self._window) < count:
                raise ImageError(f"{self.name}: shrank while it was read")
            self._base = at
            start = 0
        return self._window[start : start + count]
