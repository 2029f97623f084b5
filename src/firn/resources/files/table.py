"""The file table of a checkpoint: every open file description once, under one id (images: files.img).

State: descriptions opened by descriptors, executables, working and root directories, mapped files. Identity comes from
the kernel: descriptors are compared with kcmp(2); things that are opened anew at restore anyway (mappings, directories,
the executable) are shared by device, inode, path and mode.
"""

from __future__ import annotations

from firn.resources.base import FIELD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

class FileTable:
    """The entries of files.img under construction."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._by_key: dict[object, int] = {}
        self._next = 1

    def new_id(self) -> int:
        """A fresh file id."""
        self._next += 1
        return self._next - 1

    def find(self, key: object) -> int | None:
        """The id of what was added under *key*."""
        return self._by_key.get(key)

    def add(self, kind: int, message: dict[str, Any], key: object = None) -> int:
        """Add a file of *kind*; *message* gets its id, unless it shares that of another kind. Returns the id. What is
        changed in *message* until the entries are written is changed in the images."""
        if "id" not in message:
            message["id"] = self.new_id()
        number: int = message["id"]
        self.entries.append({"type": kind, "id": number, FIELD[kind]: message})
        if key is not None:
            self._by_key[key] = number
        return number
