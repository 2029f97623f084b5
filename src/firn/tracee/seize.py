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
from firn.tracee.steps import alone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

    from firn.tracee.steps import Steps

THREAD_AREA = 2560
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

    __slots__ = ("held", "home", "mask", "regs", "resume_regs", "rseq", "runner", "taken", "tid", "xstate")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.regs: tuple[int, ...] = ()
        self.resume_regs: tuple[int, ...] = ()
        self.mask = 0
        self.xstate = b""
        self.taken: list[tuple[bool, bytes]] = []
        """Pending signals that were taken away, (whether the process's, siginfo_t)."""
        self.rseq = (0, 0, 0)
        """Address, size and signature of its registration for restartable sequences; filled in by the collection."""
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

    __slots__ = ("pid", "room", "scratch", "shares_memory", "stat", "stop_again", "stop_signal", "threads")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stat: procfs.Stat
        """What the process was when it stood still."""
        self.shares_memory = True
        """Whether another process may have the same memory (CLONE_VM)."""
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
                with memory.Forced(self.voice) as forced:
                    forced.write(runner.home, self._way_home(thread))
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
            self._take_pending(thread, _STOP_CHOICE[0])
            free = [_STOP_CHOICE[0]]
        caught = int(status["SigCgt"], 16)
        silent = [s for s in free if not caught & sig.bit(s)]
        quiet = [s for s in silent if not thread.mask & sig.bit(s)]
        choice = quiet or silent or free
        # The leader's choice was made later than this thread's status was read, if that was handed in.
        leader = self.leader.runner
        return leader.stop_signal if leader is not None and leader.stop_signal in choice else choice[0], not quiet

    def _take_pending(self, thread: Thread, number: int) -> None:
        """Take the pending signals *number* of a thread and its process: each is reported to us on its way to delivery,
        and then dropped. The thread stops again before it is back in its own code."""
        for shared in (False, True):
            waiting = [info for info in ptrace.pending_signals(thread.tid, shared) if info[0] == number]
            for _ in waiting:
                ptrace.set_sigmask(thread.tid, sig.ALL & ~sig.bit(number))
                ptrace.request("continue", pt.CONT, thread.tid)
                while (stop := ptrace.wait_stop(thread.tid)).event or stop.signal != number:
                    self.stop_again |= stop.signal == sig.SIGSTOP and not stop.event
                    ptrace.request("continue", pt.CONT, thread.tid)
                thread.taken.append((shared, ptrace.signal_information(thread.tid)))
                ptrace.request("interrupt", pt.INTERRUPT, thread.tid)
                ptrace.request("continue", pt.CONT, thread.tid)
                while ptrace.wait_stop(thread.tid).event != pt.EVENT_STOP:
                    ptrace.request("continue", pt.CONT, thread.tid)
                ptrace.set_sigmask(thread.tid, thread.mask)

    def pending(self, thread: Thread, shared: bool) -> list[bytes]:
        """The pending signals as siginfo_t, also those taken away: the process's if *shared*, else the *thread*'s."""
        threads = self.threads if shared else [thread]
        taken = [info for each in threads for whose, info in each.taken if whose == shared]
        return taken + ptrace.pending_signals(thread.tid, shared)

    def prepare(self) -> Scratch:
        """The scratch area; it is mapped if it is not there yet."""
        return alone(self.preparing())

    def preparing(
        self, extra: int = 0, maps: list[procfs.Map] | None = None, near: int = 0, status: dict[str, str] | None = None
    ) -> Steps[Scratch]:
        """Map the scratch area (room for *extra* bytes beyond the programs), with a way home for every thread.

        *maps* and *status* (the leader's) spare to read them again. The area lies at *near* if that is free: programs
        that are the same for many processes need to be built only once if they lie at the same place in all of them.
        Of processes that share their memory only one may be prepared at a time: there is one room for one-off code.
        """
        if self.scratch is None:
            homes = len(cpu.INTERPRETER) + -len(cpu.INTERPRETER) % 64
            code_size = _pages(homes + len(self.threads) * cpu.HOME_SIZE)
            data_size = _pages(65536 + extra + len(self.threads) * THREAD_AREA)
            self.runner(self.leader, status)
            with memory.Forced(self.voice) as forced:
                maps = maps or procfs.maps(self.voice)
                code, self.room = _find_gap(maps, code_size + data_size, near), self._find_room(maps, forced)
                if not code or not self.room:
                    raise TargetError(f"process {self.pid} has no room for system calls of ours in its memory")
                # Known before it is there, so that it goes whatever happens meanwhile.
                self.scratch = Scratch(self.voice, code, code + code_size, data_size)
                yield from self._mapping_scratch(self.scratch, code_size, forced)
                content = bytearray(homes + len(self.threads) * cpu.HOME_SIZE)
                content[: len(cpu.INTERPRETER)] = cpu.INTERPRETER
                for index, thread in enumerate(self.threads):
                    way = self._way_home(thread)
                    at = homes + index * cpu.HOME_SIZE
                    content[at : at + len(way)] = way
                    thread.home = code + at
                    if thread.runner is not None:
                        thread.runner.home = thread.home
                forced.write(code, content)
        return self.scratch

    def _mapping_scratch(self, scratch: Scratch, code_size: int, forced: memory.Forced) -> Steps[None]:
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE
        rx, rw = mman.PROT_READ | mman.PROT_EXEC, mman.PROT_READ | mman.PROT_WRITE

        def mmap(start: int, size: int, protection: int) -> Steps[int]:
            arguments = nr.mmap, start, size, protection, flags, -1, 0
            try:
                return (yield from self._lone(forced, self.leader, *arguments))
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.EAGAIN):
                    raise
            from firn.tracee.limits import Raised

            with Raised(self.pid, self.voice):
                return (yield from self._lone(forced, self.leader, *arguments))

        try:
            yield from mmap(scratch.code, code_size + scratch.size, rx | rw)
        except OSError as error:
            if error.errno == errno.EEXIST:
                self.scratch = None
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            # Memory that is writable and executable is forbidden here (PR_SET_MDWE, SELinux execmem).
            yield from mmap(scratch.code, code_size, rx)
            yield from mmap(scratch.data, scratch.size, rw)

    def _find_room(self, maps: list[procfs.Map], forced: memory.Forced) -> int:
        """Room for one-off code at the end of a private executable mapping, best of the vdso; 0 if there is none."""
        executable = [m for m in maps if m.perms[2:] == "xp"]
        executable.sort(key=lambda m: m.name != "[vdso]")
        for m in executable:
            address = m.end - cpu.HOME_SIZE
            if address < _TOP and self._is_room(address, forced):
                return address
        return 0

    def _is_room(self, address: int, forced: memory.Forced) -> bool:
        """Whether nobody uses the code at *address*: there are zeros, or what a firn that was killed has left."""
        try:
            there = forced.read(address, cpu.HOME_SIZE)
        except OSError:
            return False
        if any(address <= thread.regs[cpu.IP] < address + cpu.HOME_SIZE for thread in self.threads):
            return False
        return there == bytes(cpu.HOME_SIZE) or cpu.is_one_call(there)

    def _lone(self, forced: memory.Forced, thread: Thread, number: int, *args: int) -> Steps[int]:
        """Make one call outside the scratch area; OSError if it fails."""
        runner = self.runner(thread)
        forced.write(self.room, cpu.one_call(kernel_restart(thread.regs), thread.mask))
        try:
            return (yield from runner.single_steps(self.room, number, *args))
        finally:
            runner.settle()
            forced.write(self.room, bytes(cpu.HOME_SIZE))

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
        alone(self.restoring())

    def restoring(self) -> Steps[None]:
        """:meth:`restore_state` in steps; as with :meth:`preparing`, one at a time of those that share their memory."""
        for thread in self.threads:
            if thread.runner is not None:
                thread.runner.settle()
                self._note_stop(thread.runner)
        if self.scratch is not None:
            with memory.Forced(self.voice) as forced:
                for thread in self.threads:
                    if thread.runner is not None:
                        yield from self._sending_again(forced, thread, thread.runner, self.scratch.data)
                start, end = self.scratch.code, self.scratch.data + self.scratch.size
                yield from self._lone(forced, self.leader, nr.munmap, start, end - start)
                self.scratch = None
        for thread in self.threads:
            if thread.resume_regs is not thread.regs:
                ptrace.set_regs(thread.tid, thread.resume_regs)

    def _note_stop(self, runner: Runner) -> None:
        """Whether the process was stopped or continued last while programs ran. As in the kernel, a stop does away with
        a SIGCONT that nobody has seen."""
        numbers = [_SIGINFO.unpack_from(info)[0] for info in runner.seen]
        changes = [number for number in numbers if number in (sig.SIGSTOP, sig.SIGCONT)]
        if changes:
            self.stop_again = changes[-1] == sig.SIGSTOP
            gone = (sig.SIGSTOP, sig.SIGCONT) if self.stop_again else (sig.SIGSTOP,)
            runner.seen = [info for info in runner.seen if _SIGINFO.unpack_from(info)[0] not in gone]

    def _sending_again(self, forced: memory.Forced, thread: Thread, runner: Runner, room: int) -> Steps[None]:
        """Queue the foreign signals that came while programs ran, and what we took: only the receiver may use any
        siginfo. There is *room* in its memory."""
        while runner.seen:
            info = runner.seen[0]
            yield from self._queueing(forced, thread, _SIGINFO.unpack_from(info)[2] != _SI_TKILL, info, room)
            del runner.seen[0]
        while thread.taken:
            yield from self._queueing(forced, thread, *thread.taken[0], room)
            del thread.taken[0]

    def _queueing(
        self, forced: memory.Forced, thread: Thread, shared: bool, info: bytes, room: int
    ) -> Steps[None]:
        number = info[0]
        memory.write(self.voice, room, info)
        if shared:
            # To its own id: nobody may send such a siginfo to another one, be it that of its process.
            yield from self._lone(forced, thread, nr.rt_sigqueueinfo, thread.tid, number, room)
        else:
            yield from self._lone(forced, thread, nr.rt_tgsigqueueinfo, self.pid, thread.tid, number, room)

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
        if self.stop_again and self._was_continued():
            self.stop_again = False
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

    def _was_continued(self) -> bool:
        """Whether a SIGCONT is pending: then it came after the last stop signal, which would have thrown it away."""
        try:
            return bool(int(procfs.status(self.pid, self.voice)["ShdPnd"], 16) & sig.bit(sig.SIGCONT))
        except OSError:
            return False

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


def _find_gap(maps: list[procfs.Map], size: int, near: int) -> int:
    """The start of *size* bytes between *maps*: *near* if that is possible, 0 if there are none."""
    above, highest = _TOP, 0
    for m in reversed([*_BELOW_ALL, *maps]):
        if m.start >= _TOP:
            continue
        if above - m.end >= size + 2 * _MARGIN:
            highest = highest or m.end + _MARGIN
            if m.end + _MARGIN <= near <= above - _MARGIN - size:
                return near
        above = m.start
        if highest and not 0 < near < above:
            break
    return highest


_BELOW_ALL = (procfs.Map(0, _BOTTOM, "---p", 0, (0, 0), 0, ""),)


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
    return alone(freezing(pid, held))


def freezing(pid: int, held: Container[int] = ()) -> Steps[Task]:
    """:func:`freeze` in steps (:mod:`firn.tracee.steps`)."""
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
            yield
            # The first thread last: it may have to be asked more than once.
            for thread in reversed(task.threads[seized:]):
                if not _await_freeze(task, thread.tid):
                    task.threads.remove(thread)
            if task.threads:
                task.stat = procfs.stat(pid, pid)
                if len(task.threads) == task.stat.num_threads:
                    break  # nobody is left who could make another one
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
