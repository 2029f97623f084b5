"""Freezing a process and letting it go again.

A frozen process has every thread in a ptrace stop, seized (PTRACE_SEIZE), never with a trace of ours in its registers or
signals. Everything done to it afterwards is undone by :meth:`Task.release`; and if the controller dies instead, the kernel
lets a seized task run on by itself (ptrace(2)), which is why registers of ours are in a task only while a program runs,
and why such a program falls through to an rt_sigreturn into the task's own state (see :mod:`firn.abi.x86_64`).
"""

from __future__ import annotations

import errno
import os

from firn.abi import mman, nr
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import FirnError, TargetError
from firn.host import procfs
from firn.tracee import memory, ptrace
from firn.tracee.program import Program, Runner, Scratch

THREAD_AREA = 2048
"""Room for the program of one thread among many."""


class Thread:
    """One frozen thread and the state that the kernel saved for it at the stop."""

    __slots__ = ("frame", "mask", "regs", "resume_regs", "runner", "tid", "touched", "xstate")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.regs: tuple[int, ...] = ()
        self.resume_regs: tuple[int, ...] = ()
        self.mask = 0
        self.xstate = b""
        self.runner: Runner | None = None
        self.touched = False
        self.frame = 0

    def read_state(self) -> None:
        """Registers, extended state and mask as they are now."""
        self.regs = self.resume_regs = ptrace.get_regs(self.tid)
        self.mask = ptrace.get_sigmask(self.tid)
        self.xstate = ptrace.get_xstate(self.tid)


class Task:
    """A frozen process."""

    __slots__ = ("pid", "scratch", "site", "stop_signal", "threads")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.threads: list[Thread] = []
        self.stop_signal = 0
        self.scratch: Scratch | None = None
        self.site = 0

    @property
    def leader(self) -> Thread:
        """The thread-group leader."""
        return self.threads[0]

    # -- programs ------------------------------------------------------------------------------------------------

    def runner(self, thread: Thread, status: dict[str, str] | None = None) -> Runner:
        """Make *thread* ready to run programs: everything blocked but the signal that ends a program.

        *status* is the thread's status file, as read since the freeze (default: it is read now).
        """
        if thread.runner is None:
            pending = status or procfs.status(self.pid, thread.tid)
            stop_signal = self._stop_signal(thread, int(pending["SigPnd"], 16) | int(pending["ShdPnd"], 16))
            thread.runner = Runner(self.pid, thread.tid, thread.regs, stop_signal)
            thread.touched = True
            ptrace.set_sigmask(thread.tid, thread.runner.mask())
            if self.scratch is not None:
                self._arm_frame(thread)
        return thread.runner

    def _stop_signal(self, thread: Thread, taken: int) -> int:
        """A signal that is not among those pending (*taken*)."""
        free = [s for s in (sig.SIGWINCH, sig.SIGURG, sig.SIGCHLD) if not taken & sig.bit(s)]
        if not free:
            raise TargetError(
                f"task {thread.tid}: SIGWINCH, SIGURG and SIGCHLD are all pending", "let it handle one of them"
            )
        # The leader's choice was made later than this thread's status was read, if that was handed in.
        leader = self.leader.runner
        return leader.stop_signal if leader is not None and leader.stop_signal in free else free[0]

    def prepare(self, extra: int = 0) -> Scratch:
        """Map the scratch area (room for *extra* bytes beyond the programs) and make every thread a runner."""
        if self.scratch is None:
            runner = self.runner(self.leader)
            frame = cpu.FRAME_SIZE + len(self.leader.xstate) + 256
            size = 65536 + extra + len(self.threads) * (THREAD_AREA + frame)
            self.scratch = self._map_scratch(runner, (size + 4095) & ~4095)
            self._arm_frame(self.leader)
        return self.scratch

    def _map_scratch(self, runner: Runner, size: int) -> Scratch:
        self.site = find_syscall(self.pid)
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
        rx, rw = mman.PROT_READ | mman.PROT_EXEC, mman.PROT_READ | mman.PROT_WRITE
        try:
            code = runner.single(self.site, nr.mmap, 0, size + 4096, rx | rw, flags, -1 & (1 << 64) - 1, 0)
            data = code + 4096
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            # Memory that is writable and executable is forbidden here (PR_SET_MDWE, SELinux execmem).
            code = runner.single(self.site, nr.mmap, 0, 4096, rx, flags, -1 & (1 << 64) - 1, 0)
            data = runner.single(self.site, nr.mmap, 0, size, rw, flags, -1 & (1 << 64) - 1, 0)
        memory.force_write(self.pid, code, cpu.INTERPRETER)
        return Scratch(self.pid, code, data, size)

    def _arm_frame(self, thread: Thread) -> None:
        """Lay down the way back into the thread's own work, for the case that the controller dies."""
        assert self.scratch is not None and thread.runner is not None
        xstate = cpu.xstate_for_frame(thread.xstate)
        at_xstate = self.scratch.area(len(xstate))
        thread.frame = self.scratch.area(cpu.FRAME_SIZE)
        regs = kernel_restart(thread.resume_regs)
        memory.write(self.pid, at_xstate, xstate)
        memory.write(self.pid, thread.frame, cpu.signal_frame(regs, thread.mask, at_xstate))
        thread.runner.frame = thread.frame + 8

    def program(
        self, thread: Thread | None = None, size: int = 49152, status: dict[str, str] | None = None
    ) -> Program:
        """A new program for *thread* (default: the leader) in an area of *size* bytes; *status* as in :meth:`runner`."""
        thread = thread or self.leader
        scratch = self.prepare()
        runner = self.runner(thread, status)
        program = Program(runner, scratch, scratch.area(size), size)
        # rt_sigreturn sets the alternate stack too: the way back needs the thread's own.
        program.call("sigaltstack", nr.sigaltstack, 0, thread.frame + cpu.FRAME_STACK_OFFSET)
        return program

    # -- the way out -----------------------------------------------------------------------------------------------

    def restore_state(self) -> None:
        """Take our memory out of the task and give every thread its own registers and mask back."""
        if self.scratch is not None:
            scratch, self.scratch = self.scratch, None
            runner = self.runner(self.leader)
            if scratch.data == scratch.code + 4096:
                runner.single(self.site, nr.munmap, scratch.code, scratch.size + 4096)
            else:
                runner.single(self.site, nr.munmap, scratch.data, scratch.size)
                runner.single(self.site, nr.munmap, scratch.code, 4096)
        for thread in self.threads:
            if thread.touched:
                ptrace.set_regs(thread.tid, thread.resume_regs)
                ptrace.set_sigmask(thread.tid, thread.mask)
                thread.touched = False

    def release(self) -> None:
        """Let the process run on as if nothing had happened. Dead threads are passed over."""
        try:
            self.restore_state()
        except (OSError, FirnError):
            if self.alive():
                raise
        for thread in self.threads:
            seen = thread.runner.seen if thread.runner else []
            detach(thread.tid)
            for signal in seen:
                if signal != sig.SIGTRAP:
                    resend(self.pid, thread.tid, signal)

    def alive(self) -> bool:
        """Whether the process is still there and no zombie."""
        try:
            return procfs.stat(self.pid).state not in "ZX"
        except OSError:
            return False

    def await_death(self) -> None:
        """After a SIGKILL: wait until the process is dead. Its parent sees a child killed by signal 9.

        A traced thread's death is reported to its tracer first, and the leader's only after all other threads' were taken;
        then the real parent is told.
        """
        for thread in [*self.threads[1:], self.leader]:
            try:
                while os.waitpid(thread.tid, pt.WALL)[1] & 0xFF == 0x7F:
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


def resend(pid: int, tid: int, signal: int) -> None:
    """Send *signal* again that we took from a thread."""
    from firn.abi.libc import syscall

    try:
        syscall(f"tgkill {signal} to task {tid}", nr.tgkill, pid, tid, signal)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise


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


def find_syscall(pid: int) -> int:
    """The address of a system-call instruction in an executable mapping of *pid*: the vdso has one."""
    vdso = procfs.named_map(pid, "[vdso]")
    at = _syscall_in(pid, vdso) if vdso is not None else 0
    if at:
        return at
    for area in procfs.maps(pid):
        if area.perms[2] == "x" and area.name not in ("[vdso]", "[vsyscall]"):
            at = _syscall_in(pid, area)
            if at:
                return at
    raise TargetError(f"process {pid} has no system-call instruction in its memory")


def _syscall_in(pid: int, area: procfs.Map) -> int:
    """The address of a system-call instruction in *area*, 0 if there is none."""
    at = memory.force_read(pid, area.start, min(area.end - area.start, 1 << 20)).find(cpu.SYSCALL_INSTRUCTION)
    return area.start + at if at >= 0 else 0


def _seize(pid: int, tid: int) -> bool:
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
        raise TargetError(f"process {pid} may not be traced: {os.strerror(error.errno or 0)}") from None
    return True


def _await_freeze(task: Task, tid: int) -> bool:
    """Wait until *tid* sits in its stop; signals that come first are delivered. False if it died."""
    while True:
        try:
            stop = ptrace.wait_stop(tid)
        except ptrace.Died:
            return False
        if stop.event == pt.EVENT_STOP:
            if stop.signal in sig.STOP_SIGNALS:
                task.stop_signal = stop.signal
            return True
        ptrace.request("continue", pt.CONT, tid, 0, stop.signal)


def check_target(pid: int) -> procfs.Stat:
    """Refuse what can never be dumped: no such process, a kernel thread, a zombie, ourselves or an ancestor of ours."""
    try:
        stat = procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise TargetError(f"no process with pid {pid}") from None
    if stat.flags & procfs.PF_KTHREAD:
        raise TargetError(f"{pid} ({stat.comm.decode(errors='replace')}) is a kernel thread", "it has no state to save")
    ancestor = os.getpid()
    while ancestor > 0:
        if ancestor == pid:
            what = "firn itself" if pid == os.getpid() else "an ancestor of firn"
            raise TargetError(f"process {pid} is {what}: The criu itself is within dumped tree", "start firn elsewhere")
        ancestor = procfs.stat(ancestor).ppid
    if int(procfs.status(pid)["Tgid"]) != pid:
        raise TargetError(f"{pid} is a thread, not a process", "give the pid of its process")
    return stat


def freeze(pid: int) -> Task:
    """Freeze all threads of process *pid*, also those that are born meanwhile."""
    task = Task(pid)
    known: set[int] = set()
    try:
        while True:
            fresh = [tid for tid in procfs.threads(pid) if tid not in known]
            if not fresh:
                break
            known.update(fresh)
            seized = [Thread(tid) for tid in fresh if _seize(pid, tid)]
            for thread in seized:
                task.threads.append(thread)
            for thread in seized:
                if not _await_freeze(task, thread.tid):
                    task.threads.remove(thread)
        if not task.threads or task.threads[0].tid != pid:
            if not task.threads:
                raise TargetError(f"process {pid} ended before it could be frozen")
            raise TargetError(
                f"process {pid}: its first thread has exited while others live", "such processes are not supported yet"
            )
        for thread in task.threads:
            thread.read_state()
    except BaseException:
        for thread in task.threads:
            detach(thread.tid)
        raise
    return task


def same_process(pid: int, pidfd: int) -> bool:
    """Whether *pid* still is the process that *pidfd* was opened for (and not one that took its number)."""
    for line in procfs.read(f"/proc/self/fdinfo/{pidfd}").splitlines():
        if line.startswith(b"Pid:"):
            return int(line[4:]) == pid
    return False
