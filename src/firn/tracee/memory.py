"""Reading and writing another task's memory.

``process_vm_readv(2)`` and ``process_vm_writev(2)`` obey the protection of the pages; ``/proc/PID/mem`` of a traced task
does not, and serves for what they refuse.
"""

from __future__ import annotations

import os
import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall

_IOVEC = struct.Struct("<QQ")


def _transfer(what: str, number: int, pid: int, buffer: bytearray, address: int) -> int:
    local = bytearray(_IOVEC.pack(address_of(buffer), len(buffer)))
    remote = bytearray(_IOVEC.pack(address, len(buffer)))
    return syscall(
        f"{what} {len(buffer)} bytes at {address:#x} of process {pid}",
        number, pid, address_of(local), 1, address_of(remote), 1, 0,
    )  # fmt: skip


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


def force_read(pid: int, address: int, size: int) -> bytes:
    """Read pages that the task itself may not read (PROT_NONE), through /proc/PID/mem."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, address)
    finally:
        os.close(fd)
