"""The vdso of a restored process.

State owned: where vvar and vdso lie, and which code the process expects there (its auxv and its C library hold
addresses into it). Kernel: arch_prctl(ARCH_MAP_VDSO_64) maps vvar and vdso of the running kernel together at a chosen
address, after the old ones are gone. If the running kernel's vdso is the one that was dumped, it simply goes to the old
place. If it differs, the old pages stay as ordinary memory at the old place, and every function in them starts with a
jump to the running kernel's, which lies elsewhere. Sources: vdso(7), arch/x86/entry/vdso/vma.c, elf(5).
"""

from __future__ import annotations

import ctypes
import os
import struct

from firn.errors import RestoreError
from firn.host import procfs

_JUMP = b"\x49\xbb"  # movabs r11, imm64; jmp r11: r11 is free at the entry of a function
_JUMP_END = b"\x41\xff\xe3"
JUMP_SIZE = len(_JUMP) + 8 + len(_JUMP_END)
PT_LOAD, PT_DYNAMIC = 1, 2
DT_STRTAB, DT_SYMTAB, DT_STRSZ = 5, 6, 10


class Own:
    """The running kernel's vdso, as this process has it: its code, and the sizes of what is mapped."""

    __slots__ = ("code", "total", "vdso_size", "vvar_size")

    def __init__(self) -> None:
        maps = {m.name: m for m in procfs.maps(os.getpid())}
        vdso = maps.get("[vdso]")
        if vdso is None:
            raise RestoreError("this kernel gives no vdso", "boot it with vdso=1")
        self.vdso_size = vdso.end - vdso.start
        first = min(m.start for name, m in maps.items() if name.startswith("[vvar"))
        self.vvar_size = vdso.start - first
        self.total = self.vdso_size + self.vvar_size
        self.code = ctypes.string_at(vdso.start, self.vdso_size)


def functions(image: bytes) -> dict[str, int]:
    """Name -> offset of the functions that a vdso image exports. Raises RestoreError if it is no such image."""
    try:
        return _functions(image)
    except (struct.error, ValueError, LookupError, OverflowError) as error:
        raise RestoreError(f"the vdso in the checkpoint cannot be read: {error}") from error


def _functions(image: bytes) -> dict[str, int]:
    if image[:4] != b"\x7fELF":
        raise ValueError("no ELF image")
    headers, size, count = struct.unpack_from("<Q", image, 32)[0], *struct.unpack_from("<HH", image, 54)
    base, dynamic = 0, None
    for at in range(headers, headers + size * count, size):
        kind, _, offset, address = struct.unpack_from("<IIQQ", image, at)
        if kind == PT_LOAD:
            base = address - offset
        elif kind == PT_DYNAMIC:
            dynamic = offset
    if dynamic is None:
        raise ValueError("no dynamic section")
    tags = {}
    while True:
        tag, value = struct.unpack_from("<QQ", image, dynamic)
        if not tag:
            break
        tags[tag] = value
        dynamic += 16
    names = image[tags[DT_STRTAB] - base : tags[DT_STRTAB] - base + tags[DT_STRSZ]]
    found = {}
    at, end = tags[DT_SYMTAB] - base, tags[DT_STRTAB] - base
    if end <= at:
        raise ValueError("symbols behind their names")
    while at + 24 <= end:
        name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", image, at)
        if info & 15 == 2 and section:
            found[names[name : names.index(b"\0", name)].decode()] = value - base
        at += 24
    return found


class Placement:
    """How a dumped vdso comes back.

    ``map_at`` is the address for ARCH_MAP_VDSO_64 (of the vvar, which comes first); ``patches`` are (address, bytes) to
    be written over the dumped vdso's own pages, empty if the running kernel's vdso takes their place (``replaces``).
    """

    __slots__ = ("map_at", "patches", "replaces")

    def __init__(self, map_at: int, replaces: bool, patches: list[tuple[int, bytes]]) -> None:
        self.map_at = map_at
        self.replaces = replaces
        self.patches = patches


def place(own: Own, dumped: bytes, vvar_start: int, vdso_start: int, spare: int) -> Placement:
    """Decide: *dumped* is the code in the checkpoint, *spare* an address where vvar and vdso fit beside everything
    else."""
    same_shape = vdso_start - vvar_start == own.vvar_size and len(dumped) == own.vdso_size
    if same_shape and dumped == own.code:
        return Placement(vvar_start, True, [])
    new = functions(own.code)
    patches = []
    for name, offset in functions(dumped).items():
        target = new.get(name)
        if target is None:
            raise RestoreError(
                f"the process uses the vdso function {name}, which this kernel does not have",
                "restore on its own kernel",
            )
        address = spare + own.vvar_size + target
        patches.append((vdso_start + offset, _JUMP + address.to_bytes(8, "little") + _JUMP_END))
    return Placement(spare, False, _without_overlap(patches))


def _without_overlap(patches: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Aliases (clock_gettime and __vdso_clock_gettime) are one function: one patch."""
    unique = dict(patches)
    ordered = sorted(unique.items())
    for index, (at, code) in enumerate(ordered[:-1]):
        if at + len(code) > ordered[index + 1][0]:
            raise RestoreError("the dumped vdso's functions lie too close to be replaced", "restore on its own kernel")
    return ordered
