"""Looking at the kernel's own structures, for what it shows nowhere else.

A BPF program of a few instructions reads 8 bytes of kernel memory at a time (bpf_probe_read_kernel, which fails where
there is none), and /sys/kernel/btf/vmlinux tells where the members of structures are. Nothing is attached anywhere: the
program is run by BPF_PROG_TEST_RUN. It takes CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN), type information, and no
lockdown for confidentiality; where these are missing, nobody can look.
"""

from __future__ import annotations

import os

from firn.abi import bpf, nr
from firn.abi.libc import address_of, syscall
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_BTF = "/sys/kernel/btf/vmlinux"
_POINTER = 8
Code = tuple[int, int, int, int, int]
"""Code, destination, source, offset, immediate."""

_READ: tuple[Code, ...] = (
    (bpf.MOV, 6, 1, 0, 0), (bpf.STORE_IMM, 10, 0, -8, 0), (bpf.LOAD, 3, 6, 0, 0), (bpf.MOV_IMM, 2, 0, 0, 8),
    (bpf.MOV, 1, 10, 0, 0), (bpf.ADD_IMM, 1, 0, 0, -8), (bpf.CALL, 0, 0, 0, bpf.PROBE_READ_KERNEL),
)  # fmt: skip
"""The word at the address that the first word of the context is, into the stack."""
_CURRENT: tuple[Code, ...] = (
    (bpf.MOV, 6, 1, 0, 0), (bpf.CALL, 0, 0, 0, bpf.GET_CURRENT_TASK), (bpf.STORE, 10, 0, -8, 0),
)  # fmt: skip
_RETURN: tuple[Code, ...] = (
    (bpf.LOAD, 0, 10, -8, 0), (bpf.LOAD, 1, 6, 8, 0), (bpf.SHIFT_RIGHT, 0, 1, 0, 0), (bpf.EXIT, 0, 0, 0, 0),
)  # fmt: skip
"""A program returns 32 bits: those of the word in the stack from the bit on that the second word of the context is."""


def _percpu(map_fd: int) -> tuple[Code, ...]:
    """The address of the map's element for the processor that the first word of the context is. Only a look into the
    stack makes a number of a pointer."""
    return (
        (bpf.MOV, 6, 1, 0, 0), (bpf.STORE_IMM_32, 10, 0, -16, 0), (bpf.STORE_IMM, 10, 0, -8, 0),
        (bpf.LOAD_IMM_64, 1, bpf.PSEUDO_MAP_FD, 0, map_fd), (0, 0, 0, 0, 0), (bpf.MOV, 2, 10, 0, 0),
        (bpf.ADD_IMM, 2, 0, 0, -16), (bpf.LOAD, 3, 6, 0, 0), (bpf.CALL, 0, 0, 0, bpf.MAP_LOOKUP_PERCPU_ELEM),
        (bpf.STORE, 10, 0, -24, 0), (bpf.MOV, 3, 10, 0, 0), (bpf.ADD_IMM, 3, 0, 0, -24), (bpf.MOV_IMM, 2, 0, 0, 8),
        (bpf.MOV, 1, 10, 0, 0), (bpf.ADD_IMM, 1, 0, 0, -8), (bpf.CALL, 0, 0, 0, bpf.PROBE_READ_KERNEL),
    )  # fmt: skip


class KernelView:
    """A view of the running kernel's memory. OSError if there is none for us."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        """*wanted* are the structures whose members will be asked for."""
        self._fds: list[int] = []
        self._reader = self._current = -1
        try:
            self._reader, self._current = self._load(_READ), self._load(_CURRENT)
            self._members = _members(procfs.read(_BTF), {"task_struct", "files_struct", "fdtable", "file", *wanted})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the programs."""
        while self._fds:
            os.close(self._fds.pop())

    def read(self, address: int) -> int:
        """The 64-bit word at *address*; 0 where there is no memory."""
        return self._run(self._reader, address)

    def read32(self, address: int) -> int:
        """The 32-bit word at *address*."""
        return self.read(address) & 0xFFFFFFFF

    def offset(self, name: str, member: str) -> int:
        """Where *member* is in structure *name*, in bytes. OSError if this kernel has no such member."""
        try:
            return self._members[name][member]
        except KeyError:
            raise OSError(0, f"the kernel's structure {name} has no {member}") from None

    def follow(self, address: int, name: str, member: str) -> int:
        """The pointer *member* of the structure *name* at *address*."""
        return self.read(address + self.offset(name, member))

    def of_descriptor(self, fd: int) -> int:
        """The object behind our own descriptor *fd* (its file's private_data)."""
        files = self.follow(self._run(self._current, 0), "task_struct", "files")
        table = self.follow(self.follow(files, "files_struct", "fdt"), "fdtable", "fd")
        return self.follow(self.read(table + _POINTER * fd), "file", "private_data")

    def percpu(self) -> dict[int, int]:
        """Processor -> what has to be added to the address of something that each processor has for itself.

        Told by a map of ours, whose elements are such things: the kernel's own table has no symbol that all kernels
        show."""
        attr = bpf.MAP_CREATE.pack(bpf.BPF_MAP_TYPE_PERCPU_ARRAY, 4, 8, 1)
        table = _bpf("bpf map", bpf.BPF_MAP_CREATE, attr)[0]
        self._fds.append(table)
        place = self.follow(self.of_descriptor(table), "bpf_array", "pptrs")
        program = self._load(_percpu(table))
        return {cpu: (self._run(program, cpu) - place) & (1 << 64) - 1 for cpu in _possible_cpus()}

    def _load(self, codes: tuple[Code, ...]) -> int:
        code = bytearray()
        for operation, target, source, offset, value in (*codes, *_RETURN):
            code += bpf.INSTRUCTION.pack(operation, source << 4 | target, offset, value)
        license = bytearray(b"GPL\0")  # the helper is only for programs that say so; it binds nobody else
        attr = bpf.PROG_LOAD.pack(
            bpf.BPF_PROG_TYPE_RAW_TRACEPOINT, len(code) // bpf.INSTRUCTION.size, address_of(code), address_of(license)
        )
        self._fds.append(_bpf("bpf program", bpf.BPF_PROG_LOAD, attr)[0])
        return self._fds[-1]

    def _run(self, program: int, argument: int) -> int:
        halves = []
        for shift in (0, 32):
            context = bytearray(argument.to_bytes(8, "little") + shift.to_bytes(8, "little"))
            attr = bpf.TEST_RUN.pack(program, 0, 0, 0, 0, 0, 0, 0, len(context), 0, address_of(context))
            halves.append(bpf.TEST_RUN.unpack_from(_bpf("bpf run", bpf.BPF_PROG_TEST_RUN, attr)[1])[1])
        low, high = halves
        return int(low | high << 32)


def _bpf(what: str, command: int, attr: bytes) -> tuple[int, bytearray]:
    """Call bpf(2): (its result, *attr* as it is afterwards)."""
    buffer = bytearray(attr.ljust(bpf.ATTR_SIZE, b"\0"))
    return syscall(what, nr.bpf, command, address_of(buffer), len(buffer)), buffer


def _possible_cpus() -> Iterator[int]:
    for part in procfs.read("/sys/devices/system/cpu/possible").decode().strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _members(raw: bytes, wanted: set[str]) -> dict[str, dict[str, int]]:
    """Structure -> member -> offset in bytes, of the *wanted* structures of type information *raw*; the members of
    nameless structures and unions inside are taken for their own."""
    magic, _, _, size, types_at, types_size, names_at, _ = bpf.BTF_HEADER.unpack_from(raw)
    if magic != bpf.BTF_MAGIC:
        raise OSError(0, f"{_BTF} is of a form that firn does not know")
    names, at, end = size + names_at, size + types_at, size + types_at + types_size
    offsets = {raw.index(b"\0" + name.encode() + b"\0", names) + 1 - names: name for name in wanted}
    places, found = [0], dict[str, int]()
    unpack, extra, each = bpf.BTF_TYPE.unpack_from, bpf.BTF_EXTRA, bpf.BTF_EACH
    while at < end:
        name, info, _ = unpack(raw, at)
        places.append(at)
        kind = info >> 24 & 31
        if name in offsets and kind == bpf.BTF_KIND_STRUCT:
            found.setdefault(offsets[name], at)
        at += bpf.BTF_TYPE.size + extra.get(kind, 0) + each.get(kind, 0) * (info & 0xFFFF)

    def members(place: int, base: int) -> Iterator[tuple[str, int]]:
        info = unpack(raw, place)[1]
        for index in range(info & 0xFFFF):
            member = place + bpf.BTF_TYPE.size + index * bpf.BTF_MEMBER.size
            name, kind, bits = bpf.BTF_MEMBER.unpack_from(raw, member)
            offset = base + ((bits & 0xFFFFFF if info >> 31 else bits) >> 3)
            if name:
                yield raw[names + name : raw.index(b"\0", names + name)].decode(), offset
            elif unpack(raw, places[kind])[1] >> 24 & 31 in (bpf.BTF_KIND_STRUCT, bpf.BTF_KIND_UNION):
                yield from members(places[kind], offset)

    return {name: dict(members(place, 0)) for name, place in found.items()}
