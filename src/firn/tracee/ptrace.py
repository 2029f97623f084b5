"""One traced task: thin, typed calls around ptrace(2), and waiting for its stops.

All requests raise :class:`OSError` with the task in the text; ESRCH means that the task died or is not stopped.
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import nr
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi.libc import address_of, syscall
from firn.abi.x86_64 import REGS
from firn.errors import TargetError

_IOVEC = struct.Struct("<QQ")


def request(name: str, code: int, tid: int, addr: int = 0, data: int = 0) -> int:
    """ptrace(*code*, *tid*, *addr*, *data*); *name* is for the error's text."""
    return syscall(f"ptrace {name} of task {tid}", nr.ptrace, code, tid, addr, data)


def _regset(tid: int, code: int, note: int, buffer: bytearray) -> int:
    iov = bytearray(_IOVEC.pack(address_of(buffer), len(buffer)))
    request("register set", code, tid, note, address_of(iov))
    size: int = _IOVEC.unpack(iov)[1]
    return size


def get_regs(tid: int) -> tuple[int, ...]:
    """The general registers, in the order of :data:`firn.abi.x86_64.REG_NAMES`."""
    buffer = bytearray(REGS.size)
    if _regset(tid, pt.GETREGSET, pt.NT_PRSTATUS, buffer) != REGS.size:
        raise TargetError(f"task {tid} is not a 64-bit x86 task", "32-bit tasks are not supported yet")
    return REGS.unpack(buffer)


def set_regs(tid: int, regs: tuple[int, ...] | list[int]) -> None:
    """Set all general registers."""
    _regset(tid, pt.SETREGSET, pt.NT_PRSTATUS, bytearray(REGS.pack(*regs)))


def get_xstate(tid: int) -> bytes:
    """The XSAVE area in its standard (not compacted) layout."""
    buffer = bytearray(16384)
    size = _regset(tid, pt.GETREGSET, pt.NT_X86_XSTATE, buffer)
    return bytes(buffer[:size])


def set_xstate(tid: int, area: bytes) -> None:
    """Set the XSAVE area (standard layout, exactly the size that :func:`get_xstate` gives)."""
    _regset(tid, pt.SETREGSET, pt.NT_X86_XSTATE, bytearray(area))


def get_sigmask(tid: int) -> int:
    """The blocked signals; bit n-1 is signal n."""
    buffer = bytearray(8)
    request("get mask", pt.GETSIGMASK, tid, 8, address_of(buffer))
    return int.from_bytes(buffer, "little")


def set_sigmask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    buffer = bytearray(mask.to_bytes(8, "little"))
    request("set mask", pt.SETSIGMASK, tid, 8, address_of(buffer))


def pending_signals(tid: int, shared: bool) -> list[bytes]:
    """The queued signals as 128-byte siginfo_t, oldest first: the process's (*shared*) or the thread's own."""
    batch = 32
    buffer = bytearray(128 * batch)
    found: list[bytes] = []
    while True:
        args = bytearray(struct.pack("<QIi", len(found), pt.PEEKSIGINFO_SHARED if shared else 0, batch))
        count = request("peek signals", pt.PEEKSIGINFO, tid, address_of(args), address_of(buffer))
        found += [bytes(buffer[128 * i : 128 * (i + 1)]) for i in range(count)]
        if count < batch:
            return found


def signal_information(tid: int) -> bytes:
    """The siginfo_t of the signal that a task has stopped for."""
    info = bytearray(sig.SIGINFO_SIZE)
    request("signal information", pt.GETSIGINFO, tid, 0, address_of(info))
    return bytes(info)


def rseq_configuration(tid: int) -> tuple[int, int, int]:
    """(address, size, signature) of the registered rseq area; address 0 if there is none (Linux 5.13)."""
    buffer = bytearray(24)
    request("rseq configuration", pt.GET_RSEQ_CONFIGURATION, tid, 24, address_of(buffer))
    address, size, signature, _flags = struct.unpack_from("<QIII", buffer)
    return address, size, signature


def seccomp_filter(tid: int, index: int) -> bytes | None:
    """Filter *index* (0 = installed first) as an array of struct sock_filter, or None past the last one."""
    try:
        count = request("seccomp filter", pt.SECCOMP_GET_FILTER, tid, index, 0)
        buffer = bytearray(8 * count)
        request("seccomp filter", pt.SECCOMP_GET_FILTER, tid, index, address_of(buffer))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return bytes(buffer)


def seccomp_flags(tid: int, index: int) -> int:
    """SECCOMP_FILTER_FLAG_* of filter *index*."""
    buffer = bytearray(struct.pack("<QQ", index, 0))
    request("seccomp metadata", pt.SECCOMP_GET_METADATA, tid, 16, address_of(buffer))
    flags: int = struct.unpack("<QQ", buffer)[1]
    return flags


class Died(TargetError):
    """The task ended while it was waited for; ``status`` is its wait status."""

    def __init__(self, tid: int, status: int) -> None:
        how = f"killed by signal {status & 0x7F}" if status & 0x7F else f"exited with status {status >> 8}"
        super().__init__(f"task {tid} ended meanwhile ({how})")
        self.status = status


class Stop:
    """A ptrace stop: the *signal* and, for PTRACE_EVENT stops, the *event*."""

    __slots__ = ("event", "signal")

    def __init__(self, signal: int, event: int) -> None:
        self.signal = signal
        self.event = event


def wait_stop(tid: int) -> Stop:
    """Wait for the next stop of traced task *tid*. Raises :class:`Died`."""
    while True:
        try:
            _, status = os.waitpid(tid, pt.WALL)
        except ChildProcessError:
            raise TargetError(f"task {tid} is gone") from None
        if status & 0xFF != 0x7F:
            raise Died(tid, status)
        return Stop(status >> 8 & 0xFF, status >> 16)
