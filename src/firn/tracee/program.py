"""System-call programs: lists of calls that a task runs by itself, in one go.

A :class:`Scratch` is the memory in a task (or address space) that holds the interpreter and the programs. A
:class:`Program` is built in Python, sent with one write, run, and its results are read back with one read; when its
area is full it runs what it has so far by itself. A :class:`Runner` is the task that runs programs.
"""

from __future__ import annotations

import errno
import os
import time

from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.abi.libc import address_of
from firn.errors import TargetError
from firn.host import procfs
from firn.tracee import memory, ptrace
from firn.tracee.steps import alone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.tracee.steps import Steps

_MASK = (1 << 64) - 1
STOP_SIGNAL = sig.SIGWINCH
_FORCED = (4, 7, 8, 11, 31)
"""SIGILL, SIGBUS, SIGFPE, SIGSEGV, SIGSYS."""
_SI_CODE = slice(8, 12)
"""Of a siginfo_t; positive if the kernel sent it (siginfo.h)."""
_PATIENCE = 5.0
"""Seconds after which a task that does not stop by itself is interrupted, and again as long until it is given up."""


class Runner:
    """A stopped, traced task that can run programs and single calls.

    ``base`` are the registers that every run starts from. A task with work of its own has a ``home``, the address of
    code that leads back to that work (:func:`firn.abi.x86_64.way_home`), and an ``own_mask``: it has its own registers
    and mask before and after every run, and goes home if the controller dies in between. A task without (own_mask None)
    stays where the program ended, keeps the mask that its owner has set, and exits if the controller dies.

    ``stop_signal`` ends programs; it should not be pending in the task. ``noticed``: the task would notice it (has a
    handler, or blocks it) if it came through. Foreign signals that arrive meanwhile (only SIGSTOP and ``stop_signal``
    are not blocked) are kept in ``seen``, as siginfo_t, for whoever releases the task.
    """

    __slots__ = ("away", "base", "code", "home", "noticed", "own_mask", "pid", "seen", "stop_signal", "tid")

    def __init__(self, pid: int, tid: int, base: tuple[int, ...], stop_signal: int = STOP_SIGNAL) -> None:
        self.pid = pid
        self.tid = tid
        self.base = base
        self.home = 0
        self.own_mask: int | None = None
        self.stop_signal = stop_signal
        self.noticed = False
        self.seen: list[bytes] = []
        self.away = False
        self.code = 0

    def mask(self) -> int:
        """What must be blocked while programs run."""
        return sig.ALL & ~sig.bit(self.stop_signal)

    def registers(self, **changes: int) -> list[int]:
        """The base registers with *changes*, marked as being in no system call, and without the trap flag: its SIGTRAP
        would be forced upon the task, which has it blocked."""
        regs = list(self.base)
        regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
        regs[cpu.FLAGS] &= ~cpu.TRAP_FLAG
        for name, value in changes.items():
            regs[cpu.REG_NAMES.index(name)] = value & _MASK
        return regs

    def start(self, code: int, record: int) -> None:
        """Begin the program whose records lie at *record*; *code* is where the interpreter lies."""
        home = self.home or code + cpu.EXIT_AT
        self.code = code
        self._leave(self.registers(ip=code, bx=record, r12=home, r15=self.stop_signal), self.mask())
        ptrace.request("continue", pt.CONT, self.tid)

    def finish(self, code: int) -> int:
        """Wait for the program's end; the address of the record at which it stopped."""
        while True:
            stop = ptrace.wait_stop(self.tid)
            if stop.signal == self.stop_signal and not stop.event:
                regs = ptrace.get_regs(self.tid)
                if regs[cpu.IP] == code + cpu.STOPPED_AT:
                    self._return()
                    return regs[cpu.BX]
            self._foreign(stop)
            ptrace.request("continue", pt.CONT, self.tid)

    def single(self, site: int, number: int, *args: int) -> int:
        """Make one call by registers alone, at the system-call instruction at *site*; OSError on failure."""
        return alone(self.single_steps(site, number, *args))

    def single_steps(self, site: int, number: int, *args: int) -> Steps[int]:
        """:meth:`single` in steps (:mod:`firn.tracee.steps`)."""
        yield from self._entering(site, number, *args)
        yield from self._to_syscall_stop()
        result = ptrace.get_regs(self.tid)[cpu.AX]
        if self.own_mask is not None:
            self._give_back(self.own_mask)
        if result > _MASK - 4095:
            error = _MASK + 1 - result
            raise OSError(error, f"system call {number} in task {self.tid}: {os.strerror(error)}")
        return result

    def enter(self, site: int, number: int, *args: int) -> None:
        """The first half of :meth:`single`: up to the stop at which the call begins."""
        alone(self._entering(site, number, *args))

    def _entering(self, site: int, number: int, *args: int) -> Steps[None]:
        padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
        di, si, dx, r10, r8, r9 = padded
        regs = self.registers(ip=site, ax=number, di=di, si=si, dx=dx, r10=r10, r8=r8, r9=r9)
        self.code = 0
        self._leave(regs, sig.ALL)
        yield from self._to_syscall_stop()

    def settle(self) -> None:
        """Whatever came in between: give the task its own state again. TargetError if it cannot be stopped.

        A program that has begun is run to its end; one that takes too long is left where it is.
        """
        if not self.away or self.own_mask is None:
            return
        while await_stopped(self.pid, self.tid):
            at = ptrace.get_regs(self.tid)[cpu.IP] - self.code
            if not self.code or not 0 <= at < len(cpu.INTERPRETER) or at == cpu.STOPPED_AT:
                break
            # It may have been stopped before its mask was set; and without that it would not stop at the end.
            ptrace.set_sigmask(self.tid, self.mask())
            ptrace.request("continue", pt.CONT, self.tid)
        info = bytearray(pt.SYSCALL_INFO_SIZE)
        ptrace.request("system call info", pt.GET_SYSCALL_INFO, self.tid, len(info), address_of(info))
        if info[0] == pt.SYSCALL_INFO_ENTRY:
            # Registers set here would be those of the call.
            alone(self._to_syscall_stop())
        self._return()

    def unwanted(self) -> int:
        """The stop signal (as a mask) if it would stay pending in the task when the controller dies, else 0."""
        return sig.bit(self.stop_signal) & (self.own_mask or 0)

    def _leave(self, regs: list[int], mask: int) -> None:
        """Set *regs*, and then *mask*: with the registers the task finds its way home whatever becomes of us."""
        self.away = True
        ptrace.set_regs(self.tid, regs)
        if self.own_mask is not None:
            ptrace.set_sigmask(self.tid, mask)

    def _return(self) -> None:
        if self.own_mask is None:
            return
        if self.noticed:
            # Out of the stop for our signal into one without any, so that it is gone before the way home is left.
            ptrace.request("interrupt", pt.INTERRUPT, self.tid)
            ptrace.request("continue", pt.CONT, self.tid)
            stop = ptrace.wait_stop(self.tid)
            while stop.event != pt.EVENT_STOP:
                self._foreign(stop)
                ptrace.request("continue", pt.CONT, self.tid)
                stop = ptrace.wait_stop(self.tid)
        self._give_back(self.own_mask)

    def _give_back(self, mask: int) -> None:
        """Set the own *mask*, and then the registers: a task on its way home may have its mask already."""
        ptrace.set_sigmask(self.tid, mask)
        ptrace.set_regs(self.tid, self.base)
        self.away = False

    def _to_syscall_stop(self) -> Steps[None]:
        # Not PTRACE_SINGLESTEP: its stop is that of a SIGTRAP, which the task would receive if we died.
        ptrace.request("system call", pt.SYSCALL, self.tid)
        yield
        while (stop := ptrace.wait_stop(self.tid)).signal != sig.SIGTRAP | 0x80:
            self._foreign(stop)
            ptrace.request("system call", pt.SYSCALL, self.tid)

    def _foreign(self, stop: ptrace.Stop) -> None:
        if self.own_mask is None:
            check_fault(self.tid, stop)
        if not stop.event:
            self.seen.append(ptrace.signal_information(self.tid))


def check_fault(tid: int, stop: ptrace.Stop) -> None:
    """Raise :class:`TargetError` if *stop* is for a signal that the kernel forces on a restored task, though all are
    blocked: it cannot run, and would fault again and again. An rseq area (rseq(2)) that cannot be written does that.
    """
    if stop.event or stop.signal not in _FORCED:
        return
    info = bytearray(sig.SIGINFO_SIZE)
    ptrace.request("signal information", pt.GETSIGINFO, tid, 0, address_of(info))
    if int.from_bytes(info[_SI_CODE], "little", signed=True) > 0:
        raise TargetError(f"task {tid} cannot run: signal {stop.signal} at once (its memory is not what it needs)")


def await_stopped(pid: int, tid: int, patience: float = _PATIENCE) -> bool:
    """Wait until traced thread *tid* of process *pid* is in a ptrace stop, also one that was reported before.

    False if it had to be interrupted because it took more than *patience* seconds. Raises :class:`TargetError` if it is
    dead or does not stop.
    """
    started = time.monotonic()
    interrupted = False
    while not _is_stopped(tid):
        try:
            dead = procfs.stat(pid, tid).state in "ZX"
        except OSError:
            dead = True
        if dead:
            raise TargetError(f"task {tid} ended meanwhile")
        waited = time.monotonic() - started
        if waited > 2 * patience:
            raise TargetError(f"task {tid} does not stop")
        if waited > patience and not interrupted:
            interrupted = True
            ptrace.request("interrupt", pt.INTERRUPT, tid)
        time.sleep(0.0005)
    return not interrupted


def _is_stopped(tid: int) -> bool:
    try:
        ptrace.get_regs(tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


class Scratch:
    """The part of a task's memory that is ours: the interpreter at ``code``, ``size`` bytes of room at ``data``."""

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


class Recording:
    """The calls of a program, for other tasks that shall make the same ones."""

    __slots__ = ("labels", "payload", "payload_size", "place", "read_from", "records")

    def __init__(self, program: Program) -> None:
        self.place = program.area, program.size
        self.records = bytes(program.records)
        self.payload = tuple(program.payload)
        self.payload_size = program.payload_size
        self.read_from = program.read_from
        self.labels = tuple(program.labels)


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
        self.read_from = 0
        """How far below the end of the area the results begin that lie in buffers; 0: there are none."""
        self.labels: list[str] = []
        self._first_record = 0
        self._told = b""
        self._told_at = 0

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
        at = self.data(bytes(size))
        self.read_from = self.payload_size
        return at

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

    def pass_on(self, call: int, index: int) -> None:
        """Make the result of *call* argument *index* of the next call that is added. (Reserve room for all of them.)"""
        self.copy(self.result_address(call), self.argument_address(self.next_call() + 1, index))

    def next_call(self) -> int:
        """The number that the next call will get, if nothing has to be run before it."""
        return self._first_record + len(self.labels)

    def repeat(self, recording: Recording) -> None:
        """Add to this program, which is still empty, the calls of one that lies at the same place in another task."""
        if (self.area, self.size) != recording.place or self.labels:
            raise ValueError("the recorded program is for another place")
        self.records += recording.records
        self.payload += recording.payload
        self.payload_size = recording.payload_size
        self.read_from = recording.read_from
        self.labels += recording.labels

    # -- running ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the program and let the task run it; :meth:`finish` must follow."""
        image = bytes(self.records) + cpu.RECORD.pack(0, cpu.F_END, 0, *[0] * 7)
        tail = b"".join(reversed(self.payload))
        memory.write_two(self.scratch.pid, self.area, image, self.area + self.size - len(tail), tail)
        self.runner.start(self.scratch.code, self.area)

    def finish(self) -> None:
        """Wait for the end, take the results; OSError for the call that failed."""
        at = self.runner.finish(self.scratch.code)
        self.collect(at)

    def collect(self, at: int) -> None:
        """Take the results of a program that stopped at record address *at*."""
        count = len(self.labels)
        done = (at - self.area) // cpu.RECORD_SIZE
        self._told_at = self.area + self.size - self.read_from
        wanted = [(self.area, (min(done, count - 1) + 1) * cpu.RECORD_SIZE if count else 0)]
        if self.read_from:
            wanted.append((self._told_at, self.read_from))
        both = memory.read_parts(self.scratch.pid, wanted)
        raw, self._told = both[: wanted[0][1]], both[wanted[0][1] :]
        self.results += memoryview(raw).cast("q")[cpu.RESULT_OFFSET // 8 :: cpu.RECORD_SIZE // 8].tolist()
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
        at = address - self._told_at
        if at >= 0 and at + size <= len(self._told):
            return self._told[at : at + size]
        return memory.read(self.scratch.pid, address, size)

    def _reset(self) -> None:
        self._first_record += len(self.labels)
        self.labels = []
        self.records = bytearray()
        self.payload = []
        self.payload_size = self.read_from = 0
