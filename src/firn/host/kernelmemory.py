"""Looks at the kernel's own memory: for state that no call tells, such as the queue of a socket that nobody has opened.

bpf(2) runs a program of a few instructions at once, without attaching it to anything; it reads (bpf_probe_read_kernel
cannot harm, and fails where nothing is mapped) and writes nothing. Needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, a
kernel that describes its structures (:mod:`btf`), and no lockdown for confidentiality (kernel_lockdown(7)).
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import bpf_run as bpf
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.host.btf import Layouts

_MOST = 4096
_TWO = struct.Struct("<2Q")
_LICENCE = b"Dual MIT/GPL\0"
"""Of the program below: the kernel lets only such ones call the helpers."""


def _program(values: int) -> bytes:
    """Context: an address and a count of bytes. They go into the value of map *values*; for address 0 that of our own
    task_struct does."""
    line = bpf.instruction
    return b"".join((
        line(bpf.LOAD, 3, 1),
        line(bpf.LOAD, 2, 1, 8),
        line(bpf.LOAD_WIDE, 6, bpf.BPF_PSEUDO_MAP_VALUE, 0, values), bytes(8),
        line(bpf.IF_NOT, 3, 0, 4),
        line(bpf.CALL, value=bpf.BPF_FUNC_get_current_task),
        line(bpf.STORE, 6, 0),
        line(bpf.SET, 0),
        line(bpf.EXIT),
        line(bpf.IF_GREATER, 2, 0, 3, _MOST),
        line(bpf.MOVE, 1, 6),
        line(bpf.CALL, value=bpf.BPF_FUNC_probe_read_kernel),
        line(bpf.EXIT),
        line(bpf.SET, 0, value=-1),
        line(bpf.EXIT),
    ))  # fmt: skip


class KernelMemory:
    """A view of the kernel's memory, open until :meth:`close`. Raises :class:`KernelError` if there can be none."""

    def __init__(self) -> None:
        self.layouts = Layouts()
        self._fds: list[int] = []
        self._key = bytearray(4)
        self._value = bytearray(_MOST)
        self._context = bytearray(16)
        try:
            self._values = self._bpf(bpf.BPF_MAP_CREATE, bpf.map_create(bpf.BPF_MAP_TYPE_ARRAY, 4, _MOST, 1))
            self._fds.append(self._values)
            code, licence = bytearray(_program(self._values)), bytearray(_LICENCE)
            wanted = bpf.prog_load(
                bpf.BPF_PROG_TYPE_RAW_TRACEPOINT, len(code) // 8, address_of(code), address_of(licence), b"firn"
            )
            self._run = self._bpf(bpf.BPF_PROG_LOAD, wanted)
            self._fds.append(self._run)
            self.task = int.from_bytes(self.read(0, 8), "little")
        except OSError as error:
            self.close()
            text = f"the kernel's memory cannot be looked at: {error.strerror}"
            raise KernelError(text, "CAP_BPF and CAP_PERFMON") from None

    @staticmethod
    def _bpf(command: int, attributes: bytes) -> int:
        buffer = bytearray(attributes.ljust(bpf.ATTRIBUTE_SIZE, b"\0"))
        return syscall("bpf", nr.bpf, command, address_of(buffer), len(buffer))

    def read(self, address: int, count: int) -> bytes:
        """*count* bytes at *address*. Raises :class:`OSError` (EFAULT) where nothing is."""
        found = b""
        while len(found) < count:
            part = min(count - len(found), _MOST)
            self._context[:] = _TWO.pack(address and address + len(found), part)
            request = bytearray(bpf.prog_test_run(self._run, len(self._context), address_of(self._context)))
            request += bytes(bpf.ATTRIBUTE_SIZE - len(request))
            syscall("bpf", nr.bpf, bpf.BPF_PROG_TEST_RUN, address_of(request), len(request))
            if any(request[bpf.RESULT]):
                raise OSError(errno.EFAULT, "an address of the kernel's memory leads nowhere")
            key, value = address_of(self._key), address_of(self._value)
            self._bpf(bpf.BPF_MAP_LOOKUP_ELEM, bpf.map_lookup(self._values, key, value))
            found += self._value[:part]
        return found

    def number(self, address: int, size: int = 8) -> int:
        """The number of *size* bytes at *address*."""
        return int.from_bytes(self.read(address, size), "little")

    def field(self, address: int, structure: str, *members: str, size: int = 8) -> int:
        """The number in a member of the *structure* at *address*; of several *members*, all but the last are pointers,
        written as "member>structure"."""
        for member in members[:-1]:
            name, _, following = member.partition(">")
            address = self.number(address + self.layouts.offset(structure, name))
            structure = following
        return self.number(address + self.layouts.offset(structure, members[-1]), size)

    def file(self, fd: int) -> int:
        """The address of the struct file of descriptor *fd* of ours."""
        table = self.field(self.task, "task_struct", "files>files_struct", "fdt>fdtable", "fd")
        return self.number(table + 8 * fd)

    def close(self) -> None:
        """Let go of it."""
        while self._fds:
            os.close(self._fds.pop())
