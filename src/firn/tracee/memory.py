"""Reading and writing another task's memory.

``process_vm_readv(2)`` and ``process_vm_writev(2)`` obey the protection of the pages; ``/proc/PID/mem`` of a traced
task does not, and serves for what they refuse.
"""

from __future__ import annotations

import ctypes
import os

from firn.abi import nr
from firn.abi.libc import address_of, syscall

# One struct iovec for our side and some for the task's, used again for every transfer: only the main thread comes here.
_MOST = 2
_iovecs = (ctypes.c_uint64 * (2 + 2 * _MOST))()
_LOCAL = ctypes.addressof(_iovecs)
_REMOTE = _LOCAL + 16


def _transfer(what: str, number: int, pid: int, buffer: bytearray, parts: list[tuple[int, int]]) -> None:
    """Move *buffer* from or to the one or two *parts* (address, size) of the memory of *pid*."""
    size = len(buffer)
    if not size:
        return
    words: list[ctypes.c_uint64 | int] = [address_of(buffer), size]
    for part in parts:
        words += part
    _iovecs[: len(words)] = words
    where = f"{what} {size} bytes at {parts[0][0]:#x} of process {pid}"
    if syscall(where, number, pid, _LOCAL, 1, _REMOTE, len(parts), 0) != size:
        raise OSError(14, f"{where}: partly unmapped")


def read(pid: int, address: int, size: int) -> bytes:
    """Read *size* bytes at *address* of *pid*. OSError(EFAULT) if any of them cannot be read."""
    return read_parts(pid, [(address, size)])


def read_parts(pid: int, parts: list[tuple[int, int]]) -> bytes:
    """The same for one or two (address, size) in one go; their contents one after the other."""
    buffer = bytearray(sum([size for _, size in parts]))
    _transfer("read", nr.process_vm_readv, pid, buffer, parts)
    return bytes(buffer)


def write(pid: int, address: int, data: bytes | bytearray) -> None:
    """Write *data* at *address* of *pid*."""
    _transfer("write", nr.process_vm_writev, pid, bytearray(data), [(address, len(data))])


def write_two(pid: int, address: int, data: bytes, second: int, following: bytes) -> None:
    """Write *data* at *address* and *following* at address *second* of *pid*, in one go."""
    parts = [(address, len(data)), (second, len(following))]
    _transfer("write", nr.process_vm_writev, pid, bytearray(data) + following, parts)


class Forced:
    """/proc/PID/mem of a traced task: pages that the task itself may not read (PROT_NONE) or write (code)."""

    __slots__ = ("_fd", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Forced:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, address: int, size: int) -> bytes:
        """Up to *size* bytes: what comes before the first that is not there. OSError(EIO) if there is none."""
        return os.pread(self._fd, size, address)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data*."""
        if os.pwrite(self._fd, data, address) != len(data):
            raise OSError(14, f"write {len(data)} bytes at {address:#x} of process {self.pid}")

    def copy(self, address: int, size: int, source: int, offset: int) -> None:
        """Write *size* bytes from *offset* of file *source*. OSError(EIO) if the file has fewer."""
        buffer = memoryview(bytearray(min(size, 1 << 20)))
        done = 0
        while done < size:
            part = buffer[: size - done]
            got = os.preadv(source, [part], offset + done)
            if not got:
                raise OSError(5, f"write {size} bytes at {address:#x} of process {self.pid}")
            self.write(address + done, part[:got])
            done += got


def force_write(pid: int, address: int, data: bytes) -> None:
    """Write into pages that the task itself may not write."""
    with Forced(pid) as forced:
        forced.write(address, data)


def force_copy(pid: int, address: int, size: int, source: int, offset: int) -> None:
    """The same with *size* bytes from *offset* of file *source*. OSError(EIO) if the file has fewer."""
    with Forced(pid) as forced:
        forced.copy(address, size, source, offset)
