"""Moving pages out: from a process's memory into the page image, without passing through Python objects.

Two workers copy with process_vm_readv(2) into buffers of their own and pwrite(2) from there; the system calls release
the interpreter lock, so both cores are busy. Pages that the process itself may not read come through /proc/PID/mem.
"""

from __future__ import annotations

import _thread
import ctypes
import os

from firn.abi import nr
from firn.abi.libc import address_of, syscall

CHUNK = 1 << 20
"""Bytes per step: what was read is written while it is still in the processor's cache."""
_ALONE = 4 << 20
"""Up to so many bytes a second worker takes longer to start than it saves."""
_MAX_IOV = 512


FORCED, EARLY = 1, 2
"""Marks of address ranges: the process may not read them itself; they must be copied while it stands still even when a
copy-on-write clone of it exists, because the clone does not have them."""


class Piece:
    """Up to CHUNK bytes: where in the image they go, and the (address, size) pairs they come from."""

    __slots__ = ("marks", "offset", "parts", "size")

    def __init__(self, offset: int, marks: int) -> None:
        self.offset = offset
        self.marks = marks
        self.size = 0
        self.parts: list[tuple[int, int]] = []


def plan(runs: list[tuple[int, int]], marked: list[tuple[int, int, int]], offset: int = 0) -> list[Piece]:
    """Cut *runs* into pieces laid out one after the other from *offset*; *marked* (start, end, marks) ranges, ascending
    and disjoint, get pieces of their own."""
    pieces: list[Piece] = []
    ahead = iter([*marked, (1 << 64, 1 << 64, 0)])
    low, high, bits = next(ahead)
    for start, end in runs:
        at = start
        while at < end:
            while high <= at:
                low, high, bits = next(ahead)
            marks = bits if low <= at else 0
            stop = min(end, high if low <= at else low)
            last = pieces[-1] if pieces else None
            if last is None or last.marks != marks or last.size >= CHUNK or len(last.parts) >= _MAX_IOV:
                last = Piece(offset, marks)
                pieces.append(last)
            size = min(stop - at, CHUNK - last.size)
            last.parts.append((at, size))
            last.size += size
            offset += size
            at += size
    return pieces


class _Worker:
    """Copies pieces until there are none left or somebody failed."""

    def __init__(self, pid: int, target: int, size: int, queue: list[Piece], errors: list[BaseException]) -> None:
        self.pid = pid
        self.target = target
        self.queue = queue
        self.errors = errors
        self.buffer = bytearray(size)
        self.address = address_of(self.buffer)
        self.local = (ctypes.c_uint64 * 2)()
        self.remote = (ctypes.c_uint64 * (2 * _MAX_IOV))()
        self.mem = -1

    def run(self) -> None:
        try:
            while not self.errors:
                try:
                    piece = self.queue.pop()
                except IndexError:
                    break
                if piece.marks & FORCED:
                    self._read_forced(piece)
                else:
                    self._read(piece)
                self._write(piece)
        except BaseException as error:
            self.errors.append(error)
        finally:
            if self.mem >= 0:
                os.close(self.mem)

    def _read(self, piece: Piece) -> None:
        remote = self.remote
        for index, (at, size) in enumerate(piece.parts):
            remote[2 * index] = at
            remote[2 * index + 1] = size
        self.local[0], self.local[1] = self.address, piece.size
        got = syscall(
            f"read memory of process {self.pid} at {piece.parts[0][0]:#x}", nr.process_vm_readv, self.pid,
            ctypes.addressof(self.local), 1, ctypes.addressof(remote), len(piece.parts), 0,
        )  # fmt: skip
        if got != piece.size:
            where = f"memory of process {self.pid} at {piece.parts[0][0]:#x}"
            raise OSError(14, f"{where}: only {got} of {piece.size} bytes")

    def _read_forced(self, piece: Piece) -> None:
        if self.mem < 0:
            self.mem = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        view = memoryview(self.buffer)
        done = 0
        for at, size in piece.parts:
            if os.preadv(self.mem, [view[done : done + size]], at) != size:
                raise OSError(14, f"memory of process {self.pid} at {at:#x}: cannot be read")
            done += size

    def _write(self, piece: Piece) -> None:
        done = 0
        while done < piece.size:
            done += syscall(
                "write pages image",
                nr.pwrite64, self.target, self.address + done, piece.size - done, piece.offset + done,
            )  # fmt: skip


def copy(pid: int, pieces: list[Piece], target: int, workers: int = 2) -> None:
    """Copy all *pieces* of *pid*'s memory into file *target*. OSError if memory is gone or the disk is full."""
    if not pieces:
        return
    queue = pieces[::-1]
    errors: list[BaseException] = []
    count = min(workers, len(pieces)) if sum(piece.size for piece in pieces) > _ALONE else 1
    size = max(piece.size for piece in pieces)
    locks = []
    for _ in range(count - 1):
        lock = _thread.allocate_lock()
        lock.acquire()
        locks.append(lock)
        _thread.start_new_thread(_run_worker, (_Worker(pid, target, size, queue, errors), lock))
    _Worker(pid, target, size, queue, errors).run()
    for lock in locks:
        lock.acquire()
    if errors:
        raise errors[0]


def _run_worker(worker: _Worker, lock: _thread.LockType) -> None:
    try:
        worker.run()
    finally:
        lock.release()
