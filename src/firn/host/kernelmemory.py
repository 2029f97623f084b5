"""Looks at the kernel's own memory: for state that no call tells, such as the queue of a socket that nobody has opened.

bpf(2) runs a program of a few instructions at once, without attaching it to anything; it reads (bpf_probe_read_kernel
cannot harm, and fails where nothing is mapped) and writes nothing. Needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, a
kernel that describes its structures (:mod:`btf`), and no lockdown for confidentiality (kernel_lockdown(7)).

To open it takes 15 ms, and to look for a member may take 40: both belong before a freeze.
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import bpf as b
from firn.errors import KernelError
from firn.host import bpf, procfs
from firn.host.btf import KernelTypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn.host.bpf import Line

_MOST = 4096
_TWO = struct.Struct("<2Q")
_WORD = 1 << 64


def _reader(values: int) -> bytes:
    """Context: an address and a count of bytes. They go into the value of map *values*; for address 0 that of our own
    task_struct does."""
    lines: list[Line] = [
        (b.LOAD, 3, 1, 0, 0),
        (b.LOAD, 2, 1, 8, 0),
        (b.LOAD_IMM_64, 6, b.PSEUDO_MAP_VALUE, 0, values),
        (b.JUMP_UNEQUAL_IMM, 3, 0, "address", 0),
        (b.CALL, 0, 0, 0, b.GET_CURRENT_TASK),
        (b.STORE, 6, 0, 0, 0),
        (b.MOV_IMM, 0, 0, 0, 0),
        (b.EXIT, 0, 0, 0, 0),
        "address",
        (b.JUMP_GREATER_IMM, 2, 0, "too many", _MOST),
        (b.MOV, 1, 6, 0, 0),
        (b.CALL, 0, 0, 0, b.PROBE_READ_KERNEL),
        (b.EXIT, 0, 0, 0, 0),
        "too many",
        (b.MOV_IMM, 0, 0, 0, -1),
        (b.EXIT, 0, 0, 0, 0),
    ]
    return bpf.assemble(lines)


def _finder(values: int, table: int) -> bytes:
    """Context: the number of a processor. The address of its element of the map *table* goes into the value of map
    *values*. Only a look into the stack makes a number of a pointer."""
    lines: list[Line] = [
        (b.LOAD, 3, 1, 0, 0),
        (b.STORE_IMM_32, 10, 0, -4, 0),
        (b.LOAD_IMM_64, 1, b.PSEUDO_MAP_FD, 0, table),
        (b.MOV, 2, 10, 0, 0),
        (b.ADD_IMM, 2, 0, 0, -4),
        (b.CALL, 0, 0, 0, b.MAP_LOOKUP_PERCPU_ELEM),
        (b.STORE, 10, 0, -16, 0),
        (b.LOAD_IMM_64, 1, b.PSEUDO_MAP_VALUE, 0, values),
        (b.MOV_IMM, 2, 0, 0, 8),
        (b.MOV, 3, 10, 0, 0),
        (b.ADD_IMM, 3, 0, 0, -16),
        (b.CALL, 0, 0, 0, b.PROBE_READ_KERNEL),
        (b.EXIT, 0, 0, 0, 0),
    ]
    return bpf.assemble(lines)


class KernelMemory:
    """A view of the kernel's memory, open until :meth:`close`. Raises :class:`KernelError` if there can be none."""

    def __init__(self) -> None:
        self.types = KernelTypes()
        self._fds: list[int] = []
        try:
            self._values = bpf.Map(b.BPF_MAP_TYPE_ARRAY, _MOST)
            self._fds.append(self._values.fd)
            self._reader = self._load(_reader(self._values.fd))
            self.task = self.number(0)
        except OSError as error:
            self.close()
            text = f"the kernel's memory cannot be looked at: {error.strerror}"
            raise KernelError(text, "CAP_BPF and CAP_PERFMON") from None

    def _load(self, code: bytes) -> int:
        self._fds.append(bpf.load(b.BPF_PROG_TYPE_RAW_TRACEPOINT, code, b"firn"))
        return self._fds[-1]

    def _run(self, program: int, context: bytes) -> bytes:
        """What *program* leaves in the value of the map."""
        if bpf.run(program, context):
            raise OSError(errno.EFAULT, "an address of the kernel's memory leads nowhere")
        return self._values[0]

    def read(self, address: int, count: int) -> bytes:
        """*count* bytes at *address*. Raises :class:`OSError` (EFAULT) where nothing is."""
        found = b""
        while len(found) < count:
            part = min(count - len(found), _MOST)
            found += self._run(self._reader, _TWO.pack(address and address + len(found), part))[:part]
        return found

    def number(self, address: int, size: int = 8) -> int:
        """The number of *size* bytes at *address*."""
        return int.from_bytes(self.read(address, size), "little")

    def field(self, address: int, structure: str, *members: str, size: int = 8) -> int:
        """The number in a member of the *structure* at *address*; of several *members*, all but the last are pointers,
        written as "member>structure"."""
        for member in members[:-1]:
            name, _, following = member.partition(">")
            address = self.number(address + self.types.offset(structure, name))
            structure = following
        return self.number(address + self.types.offset(structure, members[-1]), size)

    def file(self, fd: int) -> int:
        """The address of the struct file of descriptor *fd* of ours."""
        table = self.field(self.task, "task_struct", "files>files_struct", "fdt>fdtable", "fd")
        return self.number(table + 8 * fd)

    def object(self, fd: int) -> int:
        """The address of what is behind descriptor *fd* of ours (its file's private_data)."""
        return self.field(self.file(fd), "file", "private_data")

    def task_of(self, tid: int) -> int:
        """The address of the task_struct of thread *tid*. Raises :class:`OSError` if there is none.

        The inode of /proc/TID leads to a struct pid, and that one to its task: its first list (PIDTYPE_PID) has no more
        than one."""
        fd = os.open(f"/proc/{tid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            inode = self.field(self.file(fd), "file", "f_inode")
            inode -= self.types.offset("proc_inode", "vfs_inode")
            link = self.field(inode, "proc_inode", "pid>pid", "tasks")
        finally:
            os.close(fd)
        if not link:
            raise ProcessLookupError(errno.ESRCH, f"thread {tid} has ended")
        return link - self.types.offset("task_struct", "pid_links")

    def percpu(self) -> dict[int, int]:
        """Processor -> what has to be added to the address of something that each processor has for itself.

        Told by a map of ours, whose elements are such things: the kernel's own table has no symbol that all kernels
        show. Raises :class:`OSError` where there is no such helper (before Linux 5.19)."""
        table = bpf.Map(b.BPF_MAP_TYPE_PERCPU_ARRAY, 8)
        self._fds.append(table.fd)
        place = self.field(self.object(table.fd), "bpf_array", "pptrs")
        program = self._load(_finder(self._values.fd, table.fd))
        found = {}
        for cpu in _possible_cpus():
            seen = self._run(program, _TWO.pack(cpu, 0))
            found[cpu] = (int.from_bytes(seen[:8], "little") - place) % _WORD
        return found

    def close(self) -> None:
        """Let go of it."""
        while self._fds:
            os.close(self._fds.pop())


def _possible_cpus() -> Iterator[int]:
    for part in procfs.read("/sys/devices/system/cpu/possible").decode().strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
