"""Writing one image file."""

from __future__ import annotations

import errno
import os

from firn.errors import ImageError
from firn.images import catalog, wire
from firn.images.reader import MAX_ENTRY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Payload = bytes | bytearray | memoryview | tuple[int, int, int]

_BUFFER = 1 << 20
_COPY = 1 << 30
"""sendfile(2) moves less than 2 GiB at a time."""


class ImageWriter:
    """An image file while it is written: entries, each followed by its payload. Use it in a ``with`` statement.

    Every method raises :class:`ImageError`, naming the file, for values that do not fit, a payload of another length
    than its entry says, and data that cannot be written.
    """

    __slots__ = ("_due", "_fd", "_held", "_kind", "_parts", "_written", "name")

    def __init__(self, kind: catalog.Kind, fd: int, name: str) -> None:
        """Takes over *fd*, an empty file called *name*."""
        self.name = name
        self._kind = kind
        self._fd = fd
        self._parts = [] if kind.name == "INVENTORY" else [kind.head.to_bytes(4, "little")]
        self._parts.append(kind.magic.to_bytes(4, "little"))
        self._held = 0
        self._due: tuple[int, int] | None = (0, 0)
        self._written = -1

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._settle()
                self._flush()
        finally:
            try:
                os.close(self._fd)
            except OSError as failure:  # a network file system may tell only now that the disk is full
                raise self._unwritable(failure) from None

    def add(self, entry: dict[str, Any], message: str = "") -> None:
        """Append an entry; *message* only for those that are framed behind another one (ghost_chunk_entry, ipc_msg)."""
        kind = self._kind
        if not message:
            message = kind.message if self._written < 0 else kind.rest
        elif message != catalog.INNER.get(kind.message):
            raise ImageError(f"{self.name}: {message} does not belong into it")
        if kind.payload:
            self._settle()
        try:
            data = wire.encode(message, entry)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error.message}") from None
        if len(data) > MAX_ENTRY:
            raise ImageError(f"{self.name}: an entry of {len(data)} bytes; at most {MAX_ENTRY} can be read back")
        self._parts += (len(data).to_bytes(4, "little"), data)
        self._held += len(data)
        if kind.payload:
            self._due = catalog.payload(message, entry)
        self._written = 0
        if self._held > _BUFFER:
            self._flush()

    def payload(self, data: Payload) -> None:
        """Append bytes that belong to the last entry: a buffer, or (fd, offset, length) of an open file.

        The padding that the format asks for comes by itself.
        """
        length = data[2] if isinstance(data, tuple) else memoryview(data).nbytes
        self._written = max(self._written, 0) + length
        if self._due is not None and self._written > self._due[1]:
            raise self._mismatch()
        if isinstance(data, tuple):
            self._flush()
            self._copy(*data)
        else:
            self._parts.append(bytes(data))
            self._held += length
            if self._held > _BUFFER:
                self._flush()

    def _mismatch(self) -> ImageError:
        due = self._due[0] if self._due else 0
        return ImageError(f"{self.name}: {self._written} bytes of payload where the entry says {due}")

    def _settle(self) -> None:
        """Check that the last entry has got its payload, and pad it."""
        if self._due is None or self._written < 0:
            return
        length, padded = self._due
        if self._written == length:
            self._parts.append(bytes(padded - length))
        elif self._written != padded:
            raise self._mismatch()

    def _unwritable(self, error: OSError) -> ImageError:
        return ImageError(f"{self.name}: cannot be written: {error.strerror}")

    def _flush(self) -> None:
        self._write(b"".join(self._parts))
        self._parts.clear()
        self._held = 0

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def _copy(self, source: int, offset: int, length: int) -> None:
        """Let the kernel move the bytes; read and write them where it cannot (sendfile(2), EINVAL)."""
        end = offset + length
        while offset < end:
            try:
                sent = os.sendfile(self._fd, source, offset, min(end - offset, _COPY))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._unwritable(error) from None
                sent = self._copy_by_hand(source, offset, min(end - offset, _BUFFER))
            if not sent:
                raise ImageError(f"{self.name}: what it is copied from ended {end - offset} bytes early")
            offset += sent

    def _copy_by_hand(self, source: int, offset: int, length: int) -> int:
        try:
            data = os.pread(source, length, offset)
        except OSError as error:
            raise ImageError(f"{self.name}: what it is copied from cannot be read: {error.strerror}") from None
        self._write(data)
        return len(data)
