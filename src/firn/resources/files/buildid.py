"""The GNU build-id of ELF files (elf(5)), with which a restore notices that a program or library was replaced."""

from __future__ import annotations

import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PT_NOTE = 4
NT_GNU_BUILD_ID = 3
_LIMIT = 1 << 20


def read_build_id(path: str) -> bytes | None:
    """The build-id of the ELF file *path*; None if it is none, has none, or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        head = os.pread(fd, 4096, 0)
        if head[:4] != b"\x7fELF" or len(head) < 64 or head[4] != 2 or head[5] != 1:
            return None
        table, entry_size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        if entry_size < 56 or count > 1024:
            return None
        headers = os.pread(fd, entry_size * count, table)
        for at in range(0, len(headers) - 55, entry_size):
            kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", headers, at)
            if kind == PT_NOTE and size <= _LIMIT:
                found = _in_notes(os.pread(fd, size, offset))
                if found is not None:
                    return found
    except (OSError, struct.error, OverflowError):
        return None
    finally:
        os.close(fd)
    return None


def _in_notes(notes: bytes) -> bytes | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        at += 12 + (name_size + 3 & ~3)
        if kind == NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[at : at + size]
        at += size + 3 & ~3
    return None


def to_words(build_id: bytes) -> list[int]:
    """As the images have it: little-endian words, zero padded."""
    padded = build_id + bytes(-len(build_id) % 4)
    return list(struct.unpack(f"<{len(padded) // 4}I", padded))


def add_build_ids(entries: list[dict[str, Any]], nameless: set[int]) -> None:
    """Fill in the build-id of every REG entry that is an ELF file; *nameless* ids have no file at their name."""
    for entry in entries:
        reg = entry.get("reg")
        if reg and entry["id"] not in nameless and "size" in reg and stat.S_ISREG(reg["mode"]) and reg["size"] >= 64:
            build_id = read_build_id(reg["name"])
            if build_id:
                reg["build_id"] = to_words(build_id)
