"""Freezing a process and letting it go again.

A frozen process has every thread in a ptrace stop, seized (PTRACE_SEIZE), never with a trace of ours in its registers
or signals. Everything done to it afterwards is undone by :meth:`Task.release`; and if the controller dies instead, the
kernel lets a seized task run on by itself (ptrace(2)), which is why registers of ours are in a task only while a
program runs, and why such a program falls through to code that leads home into the task's own state (see
:mod:`firn.abi.x86_64`).

Mapping and unmapping the memory for programs are calls that cannot be made from it. They are made by one-off code in
bytes that nobody uses, such as the zeros with which the vdso ends, and are followed by the way home as well. The price
is a private copy of that page.
"""

from __future__ import annotations

import errno
import os
import struct
import time

from firn.abi import mman, nr
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import FirnError, TargetError
from firn.host import procfs
from firn.tracee import memory, ptrace
from firn.tracee.program import Program, Runner, Scratch, await_stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

THREAD_AREA = 2048
"""Room for the program of one thread among many."""
_TOP = (1 << 47) - mman.PAGE
_BOTTOM = 1 << 16
_MARGIN = 1 << 25
"""Bytes kept free between the scratch area and the mappings around it: stack and heap may grow if it is ever left."""
_SIGINFO = struct.Struct("<iii")
"""si_signo, si_errno, si_code."""
_SI_TKILL = -6
_STOP_CHOICE = (sig.SIGURG, sig.SIGWINCH, sig.SIGCHLD)
_POLL_S = 0.0002
_SYNCHRONOUS = (4, 5, 7, 8, 11, 31)
"""SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: the kernel forces them on a task even if it ignores them."""


class Thread:
    """One frozen thread and the state that the kernel saved for it at the stop."""

    __slots__ = ("held", "home", "mask", "regs", "resume_regs", "runner", "tid", "xstate")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.regs: tuple[int, ...] = ()
        self.resume_regs: tuple[int, ...] = ()
        self.mask = 0
        self.xstate = b""
        self.runner: Runner | None = None
        self.home = 0
        self.held = True

    def read_state(self) -> None:
        """Registers, extended state and mask as they are now."""
        self.regs = self.resume_regs = ptrace.get_regs(self.tid)
        self.mask = ptrace.get_sigmask(self.tid)
        self.xstate = ptrace.get_xstate(self.tid)


class Task:
    """A frozen process."""

    __slots__ = ("pid", "room", "scratch", "stop_again", "stop_signal", "threads")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.threads: list[Thread] = []
        self.stop_signal = 0
        self.scratch: Scratch | None = None
        self.room = 0
        self.stop_again = False

    @property
    def leader(self) -> Thread:
        """The thread that stands for the process: the thread-group leader, or another one if that has exited."""
        return self.threads[0]

    @property
    def voice(self) -> int:
        """Its id, under which the kernel knows memory and files of the process (:func:`firn.host.procfs.speaker`)."""
        return self.threads[0].tid

    @property
    def headless(self) -> bool:
        """Whether the first thread has exited while others live (pthread_exit(3)). It cannot be traced any more."""
        return self.threads[0].tid != self.pid

    # -- programs ------------------------------------------------------------------------------------------------

    def runner(self, thread: Thread, status: dict[str, str] | None = None) -> Runner:
        """Make *thread* ready to run programs: everything blocked but the signal that ends a program.

        *status* is the thread's status file, as read since the freeze (default: it is read now).
        """
        if thread.runner is None:
            stop_signal, noticed = self._stop_signal(thread, status or procfs.status(self.pid, thread.tid))
            runner = Runner(self.pid, thread.tid, thread.regs, stop_signal)
            runner.noticed = noticed
            runner.own_mask = thread.mask
            runner.home = thread.home
            thread.runner = runner
            if runner.home and runner.unwanted():
                memory.force_write(self.voice, runner.home, self._way_home(thread))
        return thread.runner

    def _way_home(self, thread: Thread) -> bytes:
        unwanted = thread.runner.unwanted() if thread.runner is not None else 0
        return cpu.way_home(kernel_restart(thread.regs), thread.mask, unwanted)

    def _stop_signal(self, thread: Thread, status: dict[str, str]) -> tuple[int, bool]:
        """A signal that is not pending, and whether the thread would notice it: preferably not, for if we die between
        sending it and taking it away, it comes through."""
        pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
        ignored = int(status["SigIgn"], 16) & ~sum(sig.bit(s) for s in (sig.SIGCONT, *sig.STOP_SIGNALS, *_SYNCHRONOUS))
        others = [s for s in range(1, sig.LAST + 1) if ignored & sig.bit(s)] if ignored else []
        free = [s for s in (*_STOP_CHOICE, *others) if not pending & sig.bit(s)]
        if not free:
            raise TargetError(
                f"task {thread.tid}: SIGWINCH, SIGURG and SIGCHLD are all pending", "let it handle one of them"
            )
        caught = int(status["SigCgt"], 16)
        silent = [s for s in free if not caught & sig.bit(s)]
        quiet = [s for s in silent if not thread.mask & sig.bit(s)]
        choice = quiet or silent or free
        # The leader's choice was made later than this thread's status was read, if that was handed in.
        leader = self.leader.runner
        return leader.stop_signal if leader is not None and leader.stop_signal in choice else choice[0], not quiet

    def prepare(self, extra: int = 0) -> Scratch:
        """Map the scratch area (room for *extra* bytes beyond the programs), with a way home for every thread."""
        if self.scratch is None:
            homes = len(cpu.INTERPRETER) + -len(cpu.INTERPRETER) % 64
            code_size = _pages(homes + len(self.threads) * cpu.HOME_SIZE)
            data_size = _pages(65536 + extra + len(self.threads) * THREAD_AREA)
            code, self.room = self._places(code_size + data_size)
            # Known before it is there, so that it goes whatever happens meanwhile.
            self.scratch = Scratch(self.voice, code, code + code_size, data_size)
            self._map_scratch(self.scratch, code_size)
            content = bytearray(homes + len(self.threads) * cpu.HOME_SIZE)
            content[: len(cpu.INTERPRETER)] = cpu.INTERPRETER
            for index, thread in enumerate(self.threads):
                way = self._way_home(thread)
                at = homes + index * cpu.HOME_SIZE
                content[at : at + len(way)] = way
                thread.home = code + at
                if thread.runner is not None:
                    thread.runner.home = thread.home
            memory.force_write(self.voice, code, bytes(content))
        return self.scratch

    def _map_scratch(self, scratch: Scratch, code_size: int) -> None:
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE
        rx, rw = mman.PROT_READ | mman.PROT_EXEC, mman.PROT_READ | mman.PROT_WRITE

        def mmap(start: int, size: int, protection: int) -> None:
            self._lone(self.leader, nr.mmap, start, size, protection, flags, -1, 0)

        try:
            mmap(scratch.code, code_size + scratch.size, rx | rw)
        except OSError as error:
            if error.errno == errno.EEXIST:
                self.scratch = None
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            # Memory that is writable and executable is forbidden here (PR_SET_MDWE, SELinux execmem).
            mmap(scratch.code, code_size, rx)
            mmap(scratch.data, scratch.size, rw)

    def _places(self, size: int) -> tuple[int, int]:
        """Two addresses: of a gap for *size* bytes, and of room for one-off code."""
        lines = procfs.read(f"/proc/{self.voice}/maps").splitlines()
        gap, room = _find_gap(lines, size), self._find_room(lines)
        if not gap or not room:
            raise TargetError(f"process {self.pid} has no room for system calls of ours in its memory")
        return gap, room

    def _find_room(self, lines: list[bytes]) -> int:
        """Room for one-off code at the end of a private executable mapping, best of the vdso; 0 if there is none."""
        executable = [line for line in lines if line.split(None, 2)[1][2:] == b"xp"]
        executable.sort(key=lambda line: not line.endswith(b"[vdso]"))
        for line in executable:
            address = int(line[line.index(b"-") + 1 : line.index(b" ")], 16) - cpu.HOME_SIZE
            if address < _TOP and self._is_room(address):
                return address
        return 0

    def _is_room(self, address: int) -> bool:
        """Whether nobody uses the code at *address*: there are zeros, or what a firn that was killed has left."""
        try:
            there = memory.force_read(self.voice, address, cpu.HOME_SIZE)
        except OSError:
            return False
        if any(address <= thread.regs[cpu.IP] < address + cpu.HOME_SIZE for thread in self.threads):
            return False
        return there == bytes(cpu.HOME_SIZE) or cpu.is_one_call(there)

    def _lone(self, thread: Thread, number: int, *args: int) -> int:
        """Make one call outside the scratch area; OSError if it fails."""
        runner = self.runner(thread)
        memory.force_write(self.voice, self.room, cpu.one_call(kernel_restart(thread.regs), thread.mask))
        try:
            return runner.single(self.room, number, *args)
        finally:
            runner.settle()
            memory.force_write(self.voice, self.room, bytes(cpu.HOME_SIZE))

    def program(
        self, thread: Thread | None = None, size: int = 49152, status: dict[str, str] | None = None
    ) -> Program:
        """A program for *thread* (default: the leader) in an area of *size* bytes; *status* as for :meth:`runner`."""
        thread = thread or self.leader
        scratch = self.prepare()
        runner = self.runner(thread, status)
        return Program(runner, scratch, scratch.area(size), size)

    # -- the way out -----------------------------------------------------------------------------------------------

    def restore_state(self) -> None:
        """Take our memory out of the task and give every thread its own state back; what is done is not done again."""
        for thread in self.threads:
            if thread.runner is not None:
                thread.runner.settle()
        for thread in self.threads:
            if thread.runner is not None:
                self._send_again(thread, thread.runner)
        if self.scratch is not None:
            start, end = self.scratch.code, self.scratch.data + self.scratch.size
            self._lone(self.leader, nr.munmap, start, end - start)
            self.scratch = None
        for thread in self.threads:
            if thread.resume_regs is not thread.regs:
                ptrace.set_regs(thread.tid, thread.resume_regs)

    def _send_again(self, thread: Thread, runner: Runner) -> None:
        """Queue the foreign signals that came while programs ran: only the receiver may use any siginfo."""
        while runner.seen:
            info = runner.seen[0]
            number, _, code = _SIGINFO.unpack_from(info)
            if number == sig.SIGSTOP:
                self.stop_again = True
            elif self.scratch is not None:
                memory.write(self.voice, self.scratch.data, info)
                if code == _SI_TKILL:
                    self._lone(thread, nr.rt_tgsigqueueinfo, self.pid, thread.tid, number, self.scratch.data)
                else:
                    # To its own id: nobody may send such a siginfo to another one, be it that of its process.
                    self._lone(thread, nr.rt_sigqueueinfo, thread.tid, number, self.scratch.data)
            del runner.seen[0]

    def release(self) -> None:
        """Let the process run on as if nothing had happened. May be called again if it was interrupted.

        Dead threads are passed over. OSError, FirnError if the process is alive but cannot be given its state back.
        """
        trouble: Exception | None = None
        for _ in range(2):
            try:
                self.restore_state()
                trouble = None
                break
            except (OSError, FirnError) as error:
                trouble = error
        for thread in self.threads:
            if thread.held:
                try:
                    detach(thread.tid)
                    thread.held = False
                except OSError as error:
                    trouble = error
        if self.stop_again:
            self.stop_again = False
            resend(self.pid, sig.SIGSTOP)
        if trouble is not None and self.alive():
            raise trouble

    def alive(self) -> bool:
        """Whether the process is still there and no zombie."""
        try:
            return procfs.stat(self.pid, self.voice).state not in "ZX"
        except OSError:
            return False

    def await_death(self) -> None:
        """After a SIGKILL: wait until the process is dead. Its parent sees a child killed by signal 9.

        A traced thread's death is reported to its tracer first, and the leader's only after all other threads' were
        taken; then the real parent is told. A leader that had exited before is traced only if it did so just then.
        """
        for tid in [*(thread.tid for thread in self.threads if thread.tid != self.pid), self.pid]:
            try:
                while os.waitpid(tid, pt.WALL)[1] & 0xFF == 0x7F:
                    pass
            except ChildProcessError:
                pass


def detach(tid: int) -> None:
    """PTRACE_DETACH; a task that is dead already is passed over."""
    try:
        ptrace.request("detach", pt.DETACH, tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise


def resend(pid: int, signal: int) -> None:
    """Send *signal* to the process again that we took from it."""
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        return


def _let_go(task: Task, tid: int) -> None:
    """Detach a thread that may still be on its way into its stop. One that cannot stop is let go when firn ends."""
    try:
        await_stopped(task.pid, tid, patience=0.1)
        detach(tid)
    except (OSError, TargetError):
        return


def _find_gap(lines: list[bytes], size: int) -> int:
    """The start of *size* bytes between the mappings of *lines* (a maps file), 0 if there are none."""
    above = _TOP
    for line in reversed(lines):
        start, end = (int(word, 16) for word in line[: line.index(b" ")].split(b"-"))
        if start < _TOP:
            if above - end >= size + 2 * _MARGIN:
                return end + _MARGIN
            above = start
    return _BOTTOM + _MARGIN if above - _BOTTOM >= size + 2 * _MARGIN else 0


def _pages(size: int) -> int:
    return size + -size % mman.PAGE


def kernel_restart(regs: tuple[int, ...]) -> tuple[int, ...]:
    """*regs* as the kernel would set them to restart the interrupted system call, if there is one.

    Codes of include/linux/errno.h: 512 ERESTARTSYS, 513 ERESTARTNOINTR, 514 ERESTARTNOHAND restart the same call; 516
    ERESTART_RESTARTBLOCK becomes restart_syscall(2).
    """
    r = list(regs)
    code = (1 << 64) - r[cpu.AX]
    if r[cpu.ORIG_AX] >> 63 == 0 and code in (512, 513, 514, 516):
        r[cpu.AX] = nr.restart_syscall if code == 516 else r[cpu.ORIG_AX]
        r[cpu.IP] -= 2
    r[cpu.ORIG_AX] = cpu.NO_SYSCALL
    return tuple(r)


def ask_to_stop(pid: int, tid: int) -> bool:
    """Seize one thread and ask it to stop; False if it died meanwhile."""
    try:
        ptrace.request("seize", pt.SEIZE, tid, 0, pt.O_TRACESYSGOOD)
        ptrace.request("interrupt", pt.INTERRUPT, tid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
        try:
            tracer = procfs.status(pid, tid)["TracerPid"]
            state = procfs.stat(pid, tid).state
        except OSError:
            return False
        if state in "ZX":
            return False
        if tracer != "0":
            raise TargetError(f"process {pid} is traced by process {tracer}", "end the debugger first") from None
        if procfs.stat(pid, tid).flags & procfs.PF_IO_WORKER:
            raise TargetError(f"process {pid} has a worker of an io_uring ({tid})", "close its rings first") from None
        raise TargetError(f"process {pid} may not be traced: {os.strerror(error.errno or 0)}") from None
    return True


def _await_freeze(task: Task, tid: int) -> bool:
    """Wait until *tid* sits in its stop; signals that come first are delivered. False if it died."""
    while True:
        if tid == task.pid and len(task.threads) > 1 and not _tells(tid):
            return False
        try:
            stop = ptrace.wait_stop(tid)
        except ptrace.Died:
            return False
        if stop.event == pt.EVENT_STOP:
            if stop.signal in sig.STOP_SIGNALS:
                task.stop_signal = stop.signal
            return True
        ptrace.request("continue", pt.CONT, tid, 0, stop.signal)


def _tells(pid: int) -> bool:
    """Wait until the first thread of *pid* has something to tell its tracer. False if it has exited: that is told only
    when all others have ended (delay_group_leader in kernel/exit.c)."""
    try:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None:
            if procfs.stat(pid, pid).state in "ZX":
                return False
            time.sleep(_POLL_S)
    except OSError:
        pass  # it is gone, which the next wait tells
    return True


def check_target(pid: int) -> procfs.Stat:
    """Refuse what can never be dumped: no such process, a kernel thread, a zombie, ourselves or an ancestor of ours."""
    try:
        stat = procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise TargetError(f"no process with pid {pid}") from None
    if stat.flags & procfs.PF_KTHREAD:
        raise TargetError(f"{pid} ({stat.comm.decode(errors='replace')}) is a kernel thread", "it has no state to save")
    if stat.state in "ZX" and procfs.threads(pid) in ([], [pid]):
        raise TargetError(f"process {pid} has ended already and waits for its parent (a zombie)")
    ancestor = os.getpid()
    while ancestor > 0:
        if ancestor == pid:
            what = "firn itself" if pid == os.getpid() else "an ancestor of firn"
            raise TargetError(f"process {pid} is {what}: The criu itself is within dumped tree", "start firn elsewhere")
        ancestor = procfs.stat(ancestor).ppid
    if int(procfs.status(pid)["Tgid"]) != pid:
        raise TargetError(f"{pid} is a thread, not a process", "give the pid of its process")
    return stat


def freeze(pid: int, held: Container[int] = ()) -> Task:
    """Freeze all threads of process *pid*, also those that are born meanwhile; *held* threads are asked already."""
    task = Task(pid)
    known: set[int] = set()
    try:
        while True:
            fresh = [tid for tid in procfs.threads(pid) if tid not in known]
            if not fresh:
                break
            known.update(fresh)
            seized = len(task.threads)
            for tid in fresh:
                if tid in held or ask_to_stop(pid, tid):
                    task.threads.append(Thread(tid))
            # The first thread last: it may have to be asked more than once.
            for thread in reversed(task.threads[seized:]):
                if not _await_freeze(task, thread.tid):
                    task.threads.remove(thread)
        if not task.threads:
            raise TargetError(f"process {pid} ended before it could be frozen")
        for thread in task.threads:
            thread.read_state()
    except BaseException:
        for thread in task.threads:
            _let_go(task, thread.tid)
        raise
    return task


def same_process(pid: int, pidfd: int) -> bool:
    """Whether *pid* still is the process that *pidfd* was opened for (and not one that took its number)."""
    for line in procfs.read(f"/proc/self/fdinfo/{pidfd}").splitlines():
        if line.startswith(b"Pid:"):
            return int(line[4:]) == pid
    return False
