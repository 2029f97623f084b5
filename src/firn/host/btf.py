"""Where the members of the kernel's structures are, by its own description (/sys/kernel/btf/vmlinux, linux/btf.h).

A type has a head of three 32-bit words (name, kind and number of members, size or type), then its members. The types
follow each other without an index, so one structure is found by its name, which stands nowhere else in such a place;
only where a member is inside of one without name, the whole list is walked (0.2 s).
"""

from __future__ import annotations

import struct

from firn.errors import KernelError

_PATH = "/sys/kernel/btf/vmlinux"
_HEAD = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_TYPE, _MEMBER = struct.Struct("<3I"), struct.Struct("<3I")
_STRUCT, _UNION = 4, 5
_MORE = {1: 4, 3: 12, 14: 4, 17: 4}
"""Bytes after the head, by kind: INT, ARRAY, VAR, DECL_TAG."""
_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""... and for each member: STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64."""


class Layouts:
    """The structures of the running kernel. Raises :class:`KernelError` if it does not describe them."""

    def __init__(self) -> None:
        try:
            with open(_PATH, "rb") as file:
                data = file.read()
        except OSError as error:
            raise KernelError(f"{_PATH}: {error.strerror}", "a kernel with CONFIG_DEBUG_INFO_BTF") from None
        magic, _, _, size, types, types_size, names, names_size = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise KernelError(f"{_PATH} is in another format")
        self._types = data[size + types : size + types + types_size]
        self._names = data[size + names : size + names + names_size]
        self._places: list[int] = []
        self._known: dict[tuple[str, str], int] = {}
        self._found: dict[str, int] = {}

    def offset(self, name: str, member: str) -> int:
        """How many bytes into struct *name* its *member* is. Raises :class:`KernelError` if there is none."""
        key = name, member
        if key not in self._known:
            place = self._find(name)
            found = self._member(place, member, False)
            if found is None:
                found = self._member(place, member, True)
            if found is None:
                raise KernelError(f"this kernel's struct {name} has no member {member}")
            self._known[key] = found
        return self._known[key]

    def has(self, name: str, member: str) -> bool:
        """Whether struct *name* has a direct *member*."""
        return self._member(self._find(name), member, False) is not None

    def _member(self, place: int, wanted: str, deep: bool) -> int | None:
        """The offset of a member of the type at *place*; *deep*: also inside of members without a name."""
        _, info, _ = _TYPE.unpack_from(self._types, place)
        for index in range(info & 0xFFFF):
            number, kind, offset = _MEMBER.unpack_from(self._types, place + _TYPE.size + index * _MEMBER.size)
            # With the highest bit, the upper byte is the width of a bit field.
            start: int = (offset & 0xFFFFFF if info >> 31 else offset) // 8
            if number and self._names[number : number + len(wanted) + 1] == wanted.encode() + b"\0":
                return start
            if not number and deep:
                inner = self._place(kind)
                if _TYPE.unpack_from(self._types, inner)[1] >> 24 & 0x1F in (_STRUCT, _UNION):
                    found = self._member(inner, wanted, True)
                    if found is not None:
                        return start + found
        return None

    def _place(self, number: int) -> int:
        """Where type *number* is; 0 is void, and 1 the first."""
        if not self._places:
            at = 0
            while at < len(self._types):
                self._places.append(at)
                _, info, _ = _TYPE.unpack_from(self._types, at)
                kind = info >> 24 & 0x1F
                at += _TYPE.size + _MORE.get(kind, 0) + _EACH.get(kind, 0) * (info & 0xFFFF)
        return self._places[number - 1]

    def _find(self, name: str) -> int:
        if name in self._found:
            return self._found[name]
        number = self._names.find(b"\0" + name.encode() + b"\0") + 1
        if not number:
            raise KernelError(f"this kernel has no struct {name}")
        wanted = number.to_bytes(4, "little")
        at = self._types.find(wanted)
        while at >= 0:
            if at % 4 == 0 and at + _TYPE.size <= len(self._types):
                _, info, _ = _TYPE.unpack_from(self._types, at)
                if info >> 24 & 0x1F == _STRUCT and info & 0xFFFF:
                    self._found[name] = at
                    return at
            at = self._types.find(wanted, at + 1)
        raise KernelError(f"this kernel has no struct {name}")
