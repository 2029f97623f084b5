"""System-call programs: lists of calls that a task runs by itself, in one go.

A :class:`Scratch` is the memory in a task (or address space) that holds the interpreter and the programs. A
:class:`Program` is built in Python, sent with one write, run, and its results are read back with one read; when its area
is full it runs what it has so far by itself. A :class:`Runner` is the task that runs programs.
"""

from __future__ import annotations

import os

from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.tracee import memory, ptrace

_MASK = (1 << 64) - 1
STOP_SIGNAL = sig.SIGWINCH


class Runner:
    """A stopped, traced task that can run programs and single calls.

    ``base`` are the registers that every run starts from; ``frame`` is the stack pointer of a signal frame in the task's
    scratch memory through which it goes back to its own work if the controller dies (0: none). ``stop_signal`` must not be
    pending in the task. Foreign signals that arrive meanwhile (only SIGSTOP and ``stop_signal`` are not blocked) are kept
    in ``seen`` for whoever releases the task.
    """

    __slots__ = ("base", "frame", "pid", "seen", "stop_signal", "tid")

    def __init__(self, pid: int, tid: int, base: tuple[int, ...], stop_signal: int = STOP_SIGNAL) -> None:
        self.pid = pid
        self.tid = tid
        self.base = base
        self.frame = 0
        self.stop_signal = stop_signal
        self.seen: list[int] = []

    def mask(self) -> int:
        """What must be blocked while programs run."""
        return sig.ALL & ~sig.bit(self.stop_signal)

    def registers(self, **changes: int) -> list[int]:
        """The base registers with *changes*, marked as being in no system call."""
        regs = list(self.base)
        regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
        for name, value in changes.items():
            regs[cpu.REG_NAMES.index(name)] = value & _MASK
        return regs

    def start(self, code: int, record: int) -> None:
        """Begin the program whose records lie at *record*; *code* is where the interpreter lies."""
        regs = self.registers(ip=code, bx=record, r12=self.frame, r15=self.stop_signal)
        ptrace.set_regs(self.tid, regs)
        ptrace.request("continue", pt.CONT, self.tid)

    def finish(self, code: int) -> int:
        """Wait for the program's end; the address of the record at which it stopped."""
        while True:
            stop = ptrace.wait_stop(self.tid)
            if stop.signal == self.stop_signal and not stop.event:
                regs = ptrace.get_regs(self.tid)
                if regs[cpu.IP] == code + cpu.STOPPED_AT:
                    return regs[cpu.BX]
            self._foreign(stop)
            ptrace.request("continue", pt.CONT, self.tid)

    def _foreign(self, stop: ptrace.Stop) -> None:
        if not stop.event:
            self.seen.append(stop.signal)

    def single(self, site: int, number: int, *args: int) -> int:
        """Make one call by registers alone, at the system-call instruction at *site*; OSError on failure."""
        padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
        di, si, dx, r10, r8, r9 = padded
        regs = self.registers(ip=site, ax=number, di=di, si=si, dx=dx, r10=r10, r8=r8, r9=r9)
        ptrace.set_regs(self.tid, regs)
        for _ in ("entry", "exit"):
            ptrace.request("system call", pt.SYSCALL, self.tid)
            while True:
                stop = ptrace.wait_stop(self.tid)
                if stop.signal == sig.SIGTRAP | 0x80:
                    break
                self._foreign(stop)
                ptrace.request("system call", pt.SYSCALL, self.tid)
        result = ptrace.get_regs(self.tid)[cpu.AX]
        if result > _MASK - 4095:
            error = _MASK + 1 - result
            raise OSError(error, f"system call {number} in task {self.tid}: {os.strerror(error)}")
        return result


class Scratch:
    """The part of a task's memory that belongs to us: the interpreter at ``code``, ``size`` bytes of room at ``data``."""

    __slots__ = ("code", "data", "pid", "size", "used")

    def __init__(self, pid: int, code: int, data: int, size: int) -> None:
        self.pid = pid
        self.code = code
        self.data = data
        self.size = size
        self.used = 0

    def area(self, size: int) -> int:
        """Take *size* bytes (64-byte aligned) for good; their address."""
        address = self.data + self.used
        self.used += (size + 63) & ~63
        if self.used > self.size:
            raise MemoryError(f"scratch area of process {self.pid} is too small")
        return address

    def room(self) -> int:
        """How many bytes are left."""
        return self.size - self.used


class Program:
    """A list of system calls for one :class:`Runner`; see the module's docstring.

    Records grow upwards from the start of the area, data downwards from its end. Every call gets a number; after
    :meth:`run` its result is ``results[number]``. When the area is full, what is there is run first; so an address from
    :meth:`data` or :meth:`buffer` is only good for calls added before the next overflow: ask for ``reserve`` first when
    several pieces belong together.
    """

    def __init__(self, runner: Runner, scratch: Scratch, area: int, size: int) -> None:
        self.runner = runner
        self.scratch = scratch
        self.area = area
        self.size = size
        self.results: list[int] = []
        self.records = bytearray()
        self.payload: list[bytes] = []
        self.payload_size = 0
        self.labels: list[str] = []
        self._first_record = 0

    # -- building ------------------------------------------------------------------------------------------------

    def reserve(self, calls: int, data: int) -> None:
        """Make sure that *calls* more records and *data* more bytes fit; runs what there is if they would not."""
        need = len(self.records) + self.payload_size + (calls + 1) * cpu.RECORD_SIZE + data + 8 * (calls + 8)
        if need > self.size:
            self.run()
            if (calls + 1) * cpu.RECORD_SIZE + data + 8 * (calls + 8) > self.size:
                raise MemoryError(f"{data} bytes do not fit the program area of task {self.runner.tid}")

    def data(self, content: bytes) -> int:
        """Put *content* into the task's memory with the program; its address (8-byte aligned)."""
        self.reserve(2, len(content))
        padded = (len(content) + 7) & ~7
        self.payload.append(content + b"\0" * (padded - len(content)))
        self.payload_size += padded
        return self.area + self.size - self.payload_size

    def text(self, content: str) -> int:
        """A NUL-terminated string."""
        return self.data(os.fsencode(content) + b"\0")

    def buffer(self, size: int) -> int:
        """Zeroed room for a result; read it with :meth:`read` after :meth:`run`."""
        return self.data(bytes(size))

    def call(
        self,
        label: str,
        number: int,
        *args: int,
        allow: int = 0,
        flags: int = 0,
    ) -> int:
        """Add a call. *label* is for the error's text; *allow* is an errno that is no error."""
        if len(self.records) + self.payload_size + 2 * cpu.RECORD_SIZE > self.size:
            self.run()
        a = [x & _MASK for x in args]
        a += [0] * (6 - len(a))
        self.records += cpu.RECORD.pack(number, flags, allow, *a, 0)
        self.labels.append(label)
        return self._first_record + len(self.labels) - 1

    def copy(self, source: int, target: int) -> None:
        """Copy 8 bytes inside the task from address *source* to address *target*."""
        self.call("copy", 0, source, target, flags=cpu.F_COPY)

    def result_address(self, call: int) -> int:
        """Where the result of *call* will be stored (for :meth:`copy`)."""
        return self.area + (call - self._first_record) * cpu.RECORD_SIZE + cpu.RESULT_OFFSET

    def argument_address(self, call: int, index: int) -> int:
        """Where argument *index* of *call* lies."""
        return self.area + (call - self._first_record) * cpu.RECORD_SIZE + 8 + 8 * index

    def next_call(self) -> int:
        """The number that the next call will get, if nothing has to be run before it."""
        return self._first_record + len(self.labels)

    # -- running ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the program and let the task run it; :meth:`finish` must follow."""
        image = bytes(self.records) + cpu.RECORD.pack(0, cpu.F_END, 0, *[0] * 7)
        if self.payload:
            self.payload.reverse()
            gap = self.size - self.payload_size - len(image)
            tail = b"".join(self.payload)
            if gap < 4096:
                memory.write(self.scratch.pid, self.area, image + bytes(gap) + tail)
            else:
                memory.write(self.scratch.pid, self.area, image)
                memory.write(self.scratch.pid, self.area + self.size - self.payload_size, tail)
        else:
            memory.write(self.scratch.pid, self.area, image)
        self.runner.start(self.scratch.code, self.area)

    def finish(self) -> None:
        """Wait for the end, take the results; OSError for the call that failed."""
        at = self.runner.finish(self.scratch.code)
        self.collect(at)

    def collect(self, at: int) -> None:
        """Take the results of a program that stopped at record address *at*."""
        count = len(self.labels)
        done = (at - self.area) // cpu.RECORD_SIZE
        raw = memory.read(self.scratch.pid, self.area, (min(done, count - 1) + 1) * cpu.RECORD_SIZE) if count else b""
        unpack = cpu.RECORD.iter_unpack(raw)
        self.results += [record[9] - (1 << 64) if record[9] >> 63 else record[9] for record in unpack]
        labels = self.labels
        self._reset()
        if done < count:
            result = self.results[-1]
            error = -result if -4095 <= result < 0 else 0
            raise OSError(error, f"{labels[done]} in task {self.runner.tid}: {os.strerror(error)}")

    def run(self) -> None:
        """Run all calls added since the last run."""
        if self.labels:
            self.start()
            self.finish()

    def read(self, address: int, size: int) -> bytes:
        """Read what the program left at *address*."""
        return memory.read(self.scratch.pid, address, size)

    def _reset(self) -> None:
        self._first_record += len(self.labels)
        self.labels = []
        self.records = bytearray()
        self.payload = []
        self.payload_size = 0
