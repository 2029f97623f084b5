"""Reading and writing another task's memory.

``process_vm_readv(2)`` and ``process_vm_writev(2)`` obey the protection of the pages; ``/proc/PID/mem`` of a traced
task does not, and serves for what they refuse.
"""

from __future__ import annotations

import ctypes
import os

from firn.abi import nr
from firn.abi.libc import address_of, syscall

# One struct iovec for our side and one for the task's, used again for every transfer: only the main thread comes here.
_iovecs = (ctypes.c_uint64 * 4)()
_LOCAL = ctypes.addressof(_iovecs)
_REMOTE = _LOCAL + 16


def _transfer(what: str, number: int, pid: int, buffer: bytearray, address: int) -> int:
    size = len(buffer)
    _iovecs[:] = [address_of(buffer), size, address, size]
    return syscall(f"{what} {size} bytes at {address:#x} of process {pid}", number, pid, _LOCAL, 1, _REMOTE, 1, 0)


def read(pid: int, address: int, size: int) -> bytes:
    """Read *size* bytes at *address* of *pid*. OSError(EFAULT) if any of them cannot be read."""
    buffer = bytearray(size)
    if size and _transfer("read", nr.process_vm_readv, pid, buffer, address) != size:
        raise OSError(14, f"read {size} bytes at {address:#x} of process {pid}: partly unmapped")
    return bytes(buffer)


def write(pid: int, address: int, data: bytes | bytearray) -> None:
    """Write *data* at *address* of *pid*."""
    if data and _transfer("write", nr.process_vm_writev, pid, bytearray(data), address) != len(data):
        raise OSError(14, f"write {len(data)} bytes at {address:#x} of process {pid}: partly unmapped")


def force_write(pid: int, address: int, data: bytes) -> None:
    """Write into pages that the task itself may not write (code), through /proc/PID/mem."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pwrite(fd, data, address) != len(data):
            raise OSError(14, f"write {len(data)} bytes at {address:#x} of process {pid}")
    finally:
        os.close(fd)


def force_copy(pid: int, address: int, size: int, source: int, offset: int) -> None:
    """The same with *size* bytes from *offset* of file *source*. OSError(EIO) if the file has fewer."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        buffer = memoryview(bytearray(min(size, 1 << 20)))
        done = 0
        while done < size:
            part = buffer[: size - done]
            got = os.preadv(source, [part], offset + done)
            if not got or os.pwrite(fd, part[:got], address + done) != got:
                raise OSError(5, f"write {size} bytes at {address:#x} of process {pid}")
            done += got
    finally:
        os.close(fd)


def force_read(pid: int, address: int, size: int) -> bytes:
    """Read pages that the task itself may not read (PROT_NONE), through /proc/PID/mem."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, address)
    finally:
        os.close(fd)
