"""What the kernel tells of its own types: /sys/kernel/btf/vmlinux, linux/btf.h.

A type has a head of three 32-bit words (name, kind and number of members, size or type), then its members. The types
follow each other without an index, so one is found by its name, which stands nowhere else in such a place. Only the
number of a type, and a member inside of one without name, take a walk through the whole list (40 ms).
"""

from __future__ import annotations

from firn.abi import bpf
from firn.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH = "/sys/kernel/btf/vmlinux"
_KIND = 31
_NUMBER = 0xFFFF


class KernelTypes:
    """The types of the running kernel. Raises :class:`KernelError` if it does not describe them; so do all methods for
    what is not there."""

    def __init__(self) -> None:
        try:
            with open(_PATH, "rb") as file:
                self._data = data = file.read()
        except OSError as error:
            raise KernelError(f"{_PATH}: {error.strerror}", "a kernel with CONFIG_DEBUG_INFO_BTF") from None
        magic, _, _, size, types, types_size, names, names_size = bpf.BTF_HEADER.unpack_from(data)
        if magic != bpf.BTF_MAGIC:
            raise KernelError(f"{_PATH} is in another format")
        self._first, self._end = size + types, size + types + types_size
        self._names, self._names_end = size + names, size + names + names_size
        self._places: list[int] = []
        self._known: dict[tuple[str, str], int] = {}
        self._structs: dict[str, int] = {}

    def offset(self, name: str, member: str) -> int:
        """How many bytes into struct *name* its *member* is."""
        key = name, member
        if key not in self._known:
            place = self._struct(name)
            found = self._member(place, member, False)
            if found is None:
                found = self._member(place, member, True)
            if found is None:
                raise KernelError(f"this kernel's struct {name} has no member {member}")
            self._known[key] = found
        return self._known[key]

    def has(self, name: str, member: str) -> bool:
        """Whether struct *name* has a direct *member*."""
        return self._member(self._struct(name), member, False) is not None

    def size(self, name: str) -> int:
        """How many bytes struct *name* takes."""
        _, _, size = bpf.BTF_TYPE.unpack_from(self._data, self._struct(name))
        return int(size)

    def function(self, name: str) -> int:
        """The number of the type of function *name*, by which a program calls it."""
        place = self._find(name, bpf.BTF_KIND_FUNC)
        if place is None:
            raise KernelError(f"this kernel has no function {name}")
        self._walk()
        return self._places.index(place) + 1

    def _struct(self, name: str) -> int:
        if name not in self._structs:
            place = self._find(name, bpf.BTF_KIND_STRUCT)
            if place is None:
                raise KernelError(f"this kernel has no struct {name}")
            self._structs[name] = place
        return self._structs[name]

    def _find(self, name: str, kind: int) -> int | None:
        """Where the type of this *kind* and *name* is, that is no mere declaration."""
        data, start = self._data, self._names
        number = data.find(b"\0" + name.encode() + b"\0", start, self._names_end) + 1 - start
        if number <= 0:
            return None
        wanted = number.to_bytes(4, "little")
        at = data.find(wanted, self._first, self._end)
        while 0 <= at <= self._end - bpf.BTF_TYPE.size:
            if (at - self._first) % 4 == 0:
                info = bpf.BTF_TYPE.unpack_from(data, at)[1]
                if info >> 24 & _KIND == kind and (info & _NUMBER or kind != bpf.BTF_KIND_STRUCT):
                    return at
            at = data.find(wanted, at + 1, self._end)
        return None

    def _member(self, place: int, wanted: str, deep: bool) -> int | None:
        """The offset of a member of the type at *place*; *deep*: also inside of members without a name."""
        for number, kind, start in self._members(place):
            if number and self._data.startswith(wanted.encode() + b"\0", self._names + number):
                return start
            if not number and deep:
                self._walk()
                inner = self._places[kind - 1]
                if bpf.BTF_TYPE.unpack_from(self._data, inner)[1] >> 24 & _KIND in _WITH_MEMBERS:
                    found = self._member(inner, wanted, True)
                    if found is not None:
                        return start + found
        return None

    def _members(self, place: int) -> Iterator[tuple[int, int, int]]:
        """(name, type, offset in bytes) of the members of the type at *place*."""
        info = bpf.BTF_TYPE.unpack_from(self._data, place)[1]
        for index in range(info & _NUMBER):
            at = place + bpf.BTF_TYPE.size + index * bpf.BTF_MEMBER.size
            number, kind, bits = bpf.BTF_MEMBER.unpack_from(self._data, at)
            # With the highest bit, the upper byte is the width of a bit field.
            yield number, kind, (bits & 0xFFFFFF if info >> 31 else bits) // 8

    def _walk(self) -> None:
        """Find the place of every type: the one with number 1 comes first (0 is void)."""
        if self._places:
            return
        words = memoryview(self._data)[self._first : self._end].cast("I")
        plain = [(bpf.BTF_TYPE.size + bpf.BTF_EXTRA.get(kind, 0)) // 4 for kind in range(_KIND + 1)]
        each = [bpf.BTF_EACH.get(kind, 0) // 4 for kind in range(_KIND + 1)]
        places, at, end, first = self._places, 0, len(words), self._first
        while at < end:
            places.append(first + 4 * at)
            info = words[at + 1]
            kind = info >> 24 & _KIND
            at += plain[kind] + each[kind] * (info & _NUMBER)


_WITH_MEMBERS = (bpf.BTF_KIND_STRUCT, bpf.BTF_KIND_UNION)
