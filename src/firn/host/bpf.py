"""BPF programs without a compiler: loaded as instructions, attached to what a network device receives (bpf(2)).

Everything ends with the descriptors, so nothing is left if firn is killed.
"""

from __future__ import annotations

import errno
import os

from firn.abi import bpf, nr
from firn.abi.libc import address_of, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Line = tuple[int, int, int, int | str, int] | str

_LOG_SIZE = 1 << 14
_BTF = "/sys/kernel/btf/vmlinux"


def call(what: str, command: int, attr: bytes) -> tuple[int, bytearray]:
    """bpf(2): (its result, *attr* as it is afterwards). Raises :class:`OSError`."""
    buffer = bytearray(attr.ljust(bpf.ATTR_SIZE, b"\0"))
    return syscall(f"bpf: {what}", nr.bpf, command, address_of(buffer), len(buffer)), buffer


class Map:
    """A map with keys of four bytes. ``fd`` is its descriptor."""

    def __init__(self, kind: int, size: int, entries: int = 1) -> None:
        """*size* of a value in bytes. Raises :class:`OSError`."""
        self._size = size
        self.fd: Final = call("making a map", bpf.BPF_MAP_CREATE, bpf.MAP_CREATE.pack(kind, 4, size, entries))[0]

    def _element(self, command: int, number: int, value: bytearray | None) -> None:
        key = bytearray(number.to_bytes(4, "little"))
        where = address_of(value) if value is not None else 0
        call("an element of a map", command, bpf.MAP_ELEM.pack(self.fd, address_of(key), where, 0))

    def __setitem__(self, number: int, value: bytes) -> None:
        self._element(bpf.BPF_MAP_UPDATE_ELEM, number, bytearray(value))

    def __getitem__(self, number: int) -> bytes:
        value = bytearray(self._size)
        self._element(bpf.BPF_MAP_LOOKUP_ELEM, number, value)
        return bytes(value)

    def __delitem__(self, number: int) -> None:
        self._element(bpf.BPF_MAP_DELETE_ELEM, number, None)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def assemble(lines: list[Line]) -> bytes:
    """Instructions from (operation, target, source, jump, constant), where a jump may be to a label: a line that is a
    string. A LOAD_IMM_64 takes two."""
    places: dict[str, int] = {}
    at = 0
    for line in lines:
        if isinstance(line, str):
            places[line] = at
        else:
            at += 1 + (line[0] == bpf.LOAD_IMM_64)
    code = b""
    for line in lines:
        if isinstance(line, str):
            continue
        operation, target, source, jump, constant = line
        if isinstance(jump, str):
            jump = places[jump] - len(code) // bpf.INSTRUCTION.size - 1
        code += bpf.INSTRUCTION.pack(operation, target | source << 4, jump, constant)
        if operation == bpf.LOAD_IMM_64:
            code += bpf.INSTRUCTION.pack(0, 0, 0, 0)
    return code


def load(code: bytes, licence: bytes, name: bytes) -> int:
    """The descriptor of a program for packets that a device receives. Raises :class:`OSError`; if the kernel's
    verifier does not accept it, with the end of what it says."""
    instructions, text, log = bytearray(code), bytearray(licence + b"\0"), bytearray(_LOG_SIZE)
    count = len(code) // bpf.INSTRUCTION.size
    head = bpf.PROG_LOAD.pack(bpf.BPF_PROG_TYPE_SCHED_CLS, count, address_of(instructions), address_of(text))

    def attr(level: int) -> bytes:
        report = (level, len(log), address_of(log)) if level else (0, 0, 0)
        return head + bpf.PROG_LOAD_REST.pack(*report, 0, 0, name, 0, bpf.BPF_TCX_INGRESS)

    try:
        return call("loading a program", bpf.BPF_PROG_LOAD, attr(0))[0]
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        refused = error
    try:
        return call("loading a program", bpf.BPF_PROG_LOAD, attr(1))[0]
    except OSError:
        said = log.rstrip(b"\0").decode("ascii", "replace").strip().splitlines()[-3:]
        raise OSError(refused.errno, f"{refused.strerror}: {' / '.join(said)}") from None


def attach(program: int, device: int) -> int:
    """The descriptor of a link: *program* sees first what *device* (its index) receives, in our network namespace,
    until it is closed. Raises :class:`OSError` (EINVAL before Linux 6.6)."""
    attr = bpf.LINK_CREATE.pack(program, device, bpf.BPF_TCX_INGRESS, bpf.BPF_F_BEFORE, 0, 0)
    return call("attaching a program", bpf.BPF_LINK_CREATE, attr)[0]


def function(name: bytes) -> int:
    """The number by which a program calls the kernel's function *name*; 0 if the kernel does not tell of it.

    Numbers count the types in the kernel's description of itself, so all of them are passed over: 25 ms.
    """
    try:
        with open(_BTF, "rb") as file:
            data = file.read()
    except OSError:
        return 0
    magic, _, _, size, types, length, names, names_length = bpf.BTF_HEADER.unpack_from(data)
    wanted = data.find(b"\0" + name + b"\0", size + names, size + names + names_length) + 1 - size - names
    if magic != bpf.BTF_MAGIC or wanted <= 0:
        return 0
    words = memoryview(data)[size + types : size + types + length].cast("I")
    plain = [(bpf.BTF_TYPE.size + bpf.BTF_EXTRA.get(kind, 0)) // 4 for kind in range(32)]
    each = [bpf.BTF_EACH.get(kind, 0) // 4 for kind in range(32)]
    at, number, end = 0, 1, len(words)
    while at < end:
        info = words[at + 1]
        kind = info >> 24 & 31
        if kind == bpf.BTF_KIND_FUNC and words[at] == wanted:
            return number
        at += plain[kind] + each[kind] * (info & 0xFFFF)
        number += 1
    return 0
