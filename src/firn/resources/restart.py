"""Interrupted system calls, so that they go on as if nothing had happened (images: gpregs, firn_restart).

State owned: a call in which a thread was waiting when it was frozen. Kernel: the result register then holds a code of
include/linux/errno.h. 512-514: the same call is simply made again, so the image has the registers stepped back onto the
instruction. 516 (ERESTART_RESTARTBLOCK: nanosleep, clock_nanosleep, poll, futex with a relative timeout): the deadline
is in the kernel's restart block, which nobody can read. The remaining time is taken from where the kernel left it (the
*rmtp* argument), or computed from when the thread went to sleep: just before the freeze, ``se.exec_start`` of
/proc/PID/task/TID/sched is that moment. When neither is known the call waits its full time again: never too short.
EINTR from a call that the freeze alone has ended is made again as well, with its full time: signal(7) lists the calls
that do not go on by themselves. All of them have done nothing yet when they give EINTR, and one that has done a part
gives what it has done, as after SIGSTOP and SIGCONT.

It comes back by letting the restored thread make the call with the remaining time, interrupting it at once, and then
giving it its original registers with code 516: the kernel's own restart block is then as it was. CRIU returns EINTR
from such calls; the image has that in the place where CRIU looks.
"""

from __future__ import annotations

import os
import struct
import time

from firn.abi import nr
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.host import procfs
from firn.tracee import memory, ptrace
from firn.tracee.program import check_fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program, Runner
    from firn.tracee.seize import Thread

EINTR = 4
RESTART_SAME = (512, 513, 514)
RESTART_BLOCK = 516
_WORD = 1 << 64
_TIMESPEC = struct.Struct("<qq")
TIMED = {nr.poll: "poll", nr.nanosleep: "nanosleep", nr.clock_nanosleep: "clock_nanosleep", nr.futex: "futex"}
AGAIN_AFTER_EINTR = frozenset((
    nr.epoll_wait, nr.epoll_pwait, nr.epoll_pwait2, nr.rt_sigtimedwait, nr.semop, nr.semtimedop, nr.io_getevents,
    # Of sockets with SO_RCVTIMEO or SO_SNDTIMEO (sock_intr_errno in include/net/sock.h).
    nr.read, nr.readv, nr.recvfrom, nr.recvmsg, nr.recvmmsg, nr.accept, nr.accept4, nr.connect,
    nr.write, nr.writev, nr.sendto, nr.sendmsg, nr.sendmmsg,
))  # fmt: skip
_IGNORED_BY_DEFAULT = sig.bit(sig.SIGCHLD) | sig.bit(sig.SIGCONT) | sig.bit(sig.SIGURG) | sig.bit(sig.SIGWINCH)
_WAITS = {b"hrtimer_nanosleep": nr.nanosleep, b"do_nanosleep": nr.nanosleep, b"common_nsleep": nr.clock_nanosleep}
_FUTEX_CMD_MASK = 0x7F
_FUTEX_WAIT_BITSET = 9


class Waiting:
    """What a thread was seen waiting in before the freeze: system call and, if known, since when (CLOCK_MONOTONIC
    ns)."""

    __slots__ = ("number", "since")

    def __init__(self, number: int, since: int | None) -> None:
        self.number = number
        self.since = since


def observe(pid: int) -> dict[int, Waiting]:
    """Look at all threads of running process *pid*; cheap, and only a help: nothing depends on its being complete."""
    found: dict[int, Waiting] = {}
    skews = _Skews()
    for tid in procfs.threads(pid):
        try:
            number = int(procfs.read(f"/proc/{pid}/task/{tid}/syscall").split(None, 1)[0])
            if number == nr.restart_syscall:
                number = _waiting_in(pid, tid)
            if number not in TIMED:
                continue
            started = _exec_start(f"/proc/{pid}/task/{tid}/sched")
        except (OSError, ValueError):
            continue
        skew = None if started is None else skews.of(procfs.stat(pid, tid).processor)
        found[tid] = Waiting(number, None if started is None or skew is None else started + skew)
    skews.close()
    return found


def _waiting_in(pid: int, tid: int) -> int:
    wait = procfs.read(f"/proc/{pid}/task/{tid}/wchan")
    for name, number in _WAITS.items():
        if wait.startswith(name):
            return number
    if b"futex" in wait:
        return nr.futex
    return nr.poll if b"poll" in wait or b"select" in wait else -1


def _exec_start(path: str) -> int | None:
    """``se.exec_start`` in ns of the scheduler's clock: when the task last came to or left the processor."""
    text = procfs.read(path)
    at = text.find(b"se.exec_start")
    if at < 0:
        return None
    milliseconds, _, fraction = text[text.index(b":", at) + 1 :].split(None, 1)[0].partition(b".")
    return int(milliseconds) * 1_000_000 + int(fraction.ljust(6, b"0"))


class _Skews:
    """CLOCK_MONOTONIC minus the scheduler's clock in ns, per processor: each has its own, which leaves out stolen
    time."""

    def __init__(self) -> None:
        self._known: dict[int, int | None] = {}
        self._home = os.sched_getaffinity(0)

    def of(self, processor: int) -> int | None:
        """Measured there: a task that just woke up has the present in its own exec_start. The clock is read after that,
        so the skew comes out a little too large, and a wait never too short."""
        if processor not in self._known:
            try:
                os.sched_setaffinity(0, {processor})
                time.sleep(1e-6)
                now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                own = _exec_start("/proc/self/sched")
                self._known[processor] = None if own is None else now - own
            except OSError:
                self._known[processor] = None
        return self._known[processor]

    def close(self) -> None:
        """Go back to the processors that we came from."""
        if self._known:
            os.sched_setaffinity(0, self._home)


class Interrupted:
    """How a thread's registers go into the image: ``regs``, and ``entry`` (firn_restart) if a wait has time left."""

    __slots__ = ("entry", "regs")

    def __init__(self, regs: tuple[int, ...], entry: dict[str, Any] | None = None) -> None:
        self.regs = regs
        self.entry = entry


def _code(regs: tuple[int, ...]) -> int:
    """The positive error code in the result register of an interrupted call, else 0."""
    value = _WORD - regs[cpu.AX]
    return value if regs[cpu.ORIG_AX] >> 63 == 0 and value <= RESTART_BLOCK else 0


def _again(regs: tuple[int, ...], number: int) -> tuple[int, ...]:
    changed = list(regs)
    changed[cpu.AX] = number
    changed[cpu.IP] -= 2
    return tuple(changed)


def is_deliverable(status: dict[str, str], mask: int) -> bool:
    """Whether a signal is about to interrupt a thread with *status* (/proc/PID/task/TID/status) and signal *mask*. What
    is ignored does not, but a traced task gets it queued all the same (sig_ignored in kernel/signal.c)."""
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    nothing = int(status["SigIgn"], 16) | _IGNORED_BY_DEFAULT & ~int(status["SigCgt"], 16)
    return bool(pending & ~mask & ~nothing)


def resume_registers(regs: tuple[int, ...], deliverable: bool) -> tuple[int, ...]:
    """The registers for a thread that is let go again here: the kernel restarts what it can by itself; a call that the
    freeze alone has ended with EINTR is made again, unless a signal (*deliverable*) is about to interrupt it anyway."""
    if _code(regs) == EINTR and regs[cpu.ORIG_AX] in AGAIN_AFTER_EINTR and not deliverable:
        changed = list(_again(regs, regs[cpu.ORIG_AX]))
        changed[cpu.ORIG_AX] = cpu.NO_SYSCALL
        return tuple(changed)
    return regs


def save(pid: int, thread: Thread, seen: dict[int, Waiting], deliverable: bool, frozen_at: int) -> Interrupted:
    """What to store for *thread*; *frozen_at* is CLOCK_MONOTONIC in ns at the freeze."""
    regs = thread.regs
    code = _code(regs)
    if code in RESTART_SAME:
        return Interrupted(_again(regs, regs[cpu.ORIG_AX]))
    if code == EINTR and regs[cpu.ORIG_AX] in AGAIN_AFTER_EINTR and not deliverable:
        return Interrupted(_again(regs, regs[cpu.ORIG_AX]))
    if code != RESTART_BLOCK:
        return Interrupted(regs)
    waiting = seen.get(thread.tid)
    number = regs[cpu.ORIG_AX]
    if number == nr.restart_syscall:
        number = _number_in_code(pid, regs) or (waiting.number if waiting else -1)
    changed = list(regs)
    changed[cpu.AX] = _WORD - EINTR
    if number not in TIMED:
        return Interrupted(tuple(changed))
    if number == nr.futex and regs[cpu.SI] & _FUTEX_CMD_MASK == _FUTEX_WAIT_BITSET:
        # Its timeout is absolute: the same call again is exact.
        return Interrupted(_again(regs, number))
    since = waiting.since if waiting and waiting.number == number else None
    remaining, exact = _remaining(pid, number, regs, None if since is None else frozen_at - since)
    entry = {"nr": number, "remaining_ns": remaining, "exact": exact}
    return Interrupted(tuple(changed), entry)


def _number_in_code(pid: int, regs: tuple[int, ...]) -> int:
    """The call's number where the code loads it right before the instruction (``mov eax, N; syscall``), else 0."""
    try:
        before = memory.read(pid, regs[cpu.IP] - 7, 7)
    except OSError:
        return 0
    return int.from_bytes(before[1:5], "little") if before[:1] == b"\xb8" and before[5:] == b"\x0f\x05" else 0


def _remaining(pid: int, number: int, regs: tuple[int, ...], elapsed: int | None) -> tuple[int, bool]:
    """(ns that the wait still has, whether that is exact rather than computed or the full time)."""
    if number == nr.poll:
        whole = (regs[cpu.DX] & 0xFFFFFFFF) * 1_000_000
    else:
        asked, left = {
            nr.nanosleep: (regs[cpu.DI], regs[cpu.SI]),
            nr.clock_nanosleep: (regs[cpu.DX], regs[cpu.R10]),
            nr.futex: (regs[cpu.R10], 0),
        }[number]
        if left:
            return _timespec(pid, left), True
        whole = _timespec(pid, asked)
    if elapsed is None:
        return whole, False
    return min(max(whole - elapsed, 0), whole), False


def _timespec(pid: int, address: int) -> int:
    try:
        seconds, nanoseconds = _TIMESPEC.unpack(memory.read(pid, address, _TIMESPEC.size))
    except OSError:
        return 0
    return max(int(seconds), 0) * 1_000_000_000 + int(nanoseconds)


# -- coming back ---------------------------------------------------------------------------------------------------


def stored(pid: int, core: dict[str, Any], gpregs: dict[str, int], regs: tuple[int, ...]) -> dict[str, Any] | None:
    """The wait in which a thread of the checkpoint was interrupted, or None.

    An image of CRIU's has EINTR for such a call. Ending a sleep early is worse than letting it last: the call gets what
    the kernel left in its *rmtp* argument, or its full time.
    """
    own = core.get("firn")
    if own is not None:
        entry: dict[str, Any] | None = own.get("restart")
        return entry if entry and entry["nr"] in TIMED else None
    number = gpregs["orig_ax"]
    if gpregs["ax"] != _WORD - EINTR or number not in TIMED:
        return None
    timeout = {nr.poll: cpu.DX, nr.nanosleep: cpu.DI, nr.clock_nanosleep: cpu.DX, nr.futex: cpu.R10}[number]
    forever = regs[timeout] >> 31 & 1 if number == nr.poll else not regs[timeout]
    if forever:
        return None
    remaining, exact = _remaining(pid, number, regs, None)
    return {"nr": number, "remaining_ns": remaining, "exact": exact}


def prime(runner: Runner, program: Program, site: int, regs: tuple[int, ...], entry: dict[str, Any]) -> tuple[int, ...]:
    """Put *runner*'s thread back into the wait of *entry* and interrupt it; the registers to let it go with.

    *site* is a system-call instruction. An interrupt that is pending at the entry of the call ends the wait as soon as
    it begins, with its restart block set; if the wait was over at once, its result stays.
    """
    number, remaining = entry["nr"], entry["remaining_ns"]
    spec = program.area + program.size - 64
    memory.write(program.scratch.pid, spec, _TIMESPEC.pack(remaining // 10**9, remaining % 10**9))
    changes = {"ip": site, "ax": number}
    for name in ("di", "si", "dx", "r10", "r8", "r9"):
        changes[name] = regs[cpu.REG_NAMES.index(name)]
    changes[{nr.poll: "dx", nr.nanosleep: "di", nr.clock_nanosleep: "dx", nr.futex: "r10"}[number]] = (
        min(-(-remaining // 1_000_000), 0x7FFFFFFF) if number == nr.poll else spec
    )
    ptrace.set_regs(runner.tid, runner.registers(**changes))
    ptrace.request("system call", pt.SYSCALL, runner.tid)
    while (stop := ptrace.wait_stop(runner.tid)).signal != sig.SIGTRAP | 0x80:
        check_fault(runner.tid, stop)
        ptrace.request("system call", pt.SYSCALL, runner.tid)
    ptrace.request("interrupt", pt.INTERRUPT, runner.tid)
    ptrace.request("continue", pt.CONT, runner.tid)
    while (stop := ptrace.wait_stop(runner.tid)).event != pt.EVENT_STOP:
        check_fault(runner.tid, stop)
        ptrace.request("continue", pt.CONT, runner.tid)
    result = ptrace.get_regs(runner.tid)[cpu.AX]
    final = list(regs)
    final[cpu.AX] = result
    final[cpu.ORIG_AX] = number if result == _WORD - RESTART_BLOCK else cpu.NO_SYSCALL
    return tuple(final)
