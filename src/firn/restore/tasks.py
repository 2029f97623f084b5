"""One task being restored: descriptors, threads and state, built by programs that it runs itself."""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import mman, nr, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.abi.libc import syscall
from firn.host import features, procfs
from firn.resources import creds, policies, process, restart, seccomp, signals, stops, threads, timers
from firn.resources.base import MEMFD, REG
from firn.resources.memory import rebuild
from firn.resources.threads import apart, xstate
from firn.restore.memory import TaskMemory, take_files
from firn.tracee import ptrace
from firn.tracee.program import Program, Runner, Scratch, check_fault
from firn.tracee.seize import detach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.log import Log
    from firn.resources.files.reopen import Opener
    from firn.restore.load import Process

LEADER_AREA = 1 << 20
_THREAD_FLAGS = (
    sched.CLONE_VM | sched.CLONE_FS | sched.CLONE_FILES | sched.CLONE_SIGHAND | sched.CLONE_THREAD | sched.CLONE_SYSVSEM
)
_THREAD_AREA = 8192
"""Without what may be large: groups and seccomp filters."""


class RestoredThread:
    """One thread: what the images say of it, and the runner that it is now."""

    __slots__ = ("area", "core", "directories", "info", "mask", "program", "regs", "runner", "tid")

    def __init__(self, tid: int, core: dict[str, Any], mask: int, longest_filter: int) -> None:
        self.tid = tid
        self.core: dict[str, Any] = core["thread_core"]
        groups = len(self.core["creds"].get("groups", ()))
        large = 4 * groups + (longest_filter if self.core.get("seccomp_mode") else 0)
        self.area = _THREAD_AREA + -(-large // mman.PAGE) * mman.PAGE
        self.info: dict[str, Any] = core["thread_info"]
        self.directories: dict[str, Any] = self.core.get("firn", {}).get("directories", {})
        """Its own ones, as in its image; none if they are those of its process."""
        self.mask = mask
        self.regs = threads.load_registers(self.info)
        self.runner: Runner
        self.program: Program

    def places(self) -> list[tuple[int, int]]:
        """Root and working directory, as the opener knows them, if they are its own."""
        fs = self.directories.get("fs")
        return [(REG, fs["root_id"]), (REG, fs["cwd_id"])] if fs else []


class Stub:
    """A restored process as long as it is only a runner with a program: all there ever is of a zombie."""

    def __init__(self, pid: int, runner: Runner, scratch: Scratch, area: int = 0) -> None:
        self.pid = pid
        self.runner = runner
        self.scratch = scratch
        self.program = Program(runner, scratch, area or scratch.area(LEADER_AREA), LEADER_AREA)


class RestoredTask:
    """A living process of the checkpoint on its way back."""

    def __init__(self, process: Process, memory: TaskMemory, opener: Opener, longest_filter: int) -> None:
        self.process = process
        self.pid = process.pid
        self.tc = process.tc
        self.memory = memory
        self.opener = opener
        self.descriptors = process.fdinfo
        masks = [process.tc["blk_sigset"], *(core["thread_core"].get("blk_sigset", 0) for core in process.cores[1:])]
        self.threads = [
            RestoredThread(tid, core, mask, longest_filter)
            for tid, core, mask in zip(process.tids, process.cores, masks, strict=True)
        ]
        self.bereaved = False
        self.cwd, self.root = (REG, process.fs["cwd_id"]), (REG, process.fs["root_id"])
        self.scratch: Scratch

    @property
    def leader(self) -> RestoredThread:
        """The thread that stands for the process: the thread-group leader, until that exits (:meth:`end_leader`)."""
        return self.threads[0]

    def wanted(self) -> list[tuple[int, ...]]:
        """The files that this task needs, for the opener."""
        return [
            *self.memory.wanted(),
            self.cwd,
            self.root,
            *self.places(),
            *((entry["type"], entry["id"]) for entry in self.descriptors),
        ]

    def places(self) -> list[tuple[int, int]]:
        """The directories that single threads have for themselves."""
        return [place for thread in self.threads for place in thread.places()]

    def adopt(self, stub: Stub) -> None:
        """Take over the runner that the newborn process is."""
        self.scratch = stub.scratch
        self.leader.runner, self.leader.program = stub.runner, stub.program

    # -- join ----------------------------------------------------------------------------------------------------------

    def enter(self, log: Log) -> None:
        """Directories and what is set early. Nobody has descriptors yet: a table may be shared with a relative."""
        program = self.leader.program
        process.set_outside(self.pid, self.tc, log)
        process.plan_early(program, self.tc, self.process.fs.get("umask", 0o22))
        process.plan_loginuid(program, self.tc)
        if not self.process.shared & sched.CLONE_FS:
            self._enter_directories(program)
        program.run()

    def join(self) -> None:
        """Descriptors, except for tables that have some which must wait."""
        if not self._shares_files() and not self._has_late():
            self.install_descriptors()

    def _enter_directories(self, program: Program) -> None:
        table = take_files(program, self.opener, [self.cwd, self.root])
        program.call("fchdir to root", nr.fchdir, table[self.opener.open(*self.root)])
        if self.opener.message(*self.root)["name"] != "/":
            program.call("chroot", nr.chroot, program.text("."))
        program.call("fchdir", nr.fchdir, table[self.opener.open(*self.cwd)])
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        program.run()

    def _shares_files(self) -> bool:
        """Whether the descriptor table is another task's, who looks after it."""
        return bool(self.process.shared & sched.CLONE_FILES)

    def _has_late(self) -> bool:
        return any(self.opener.is_late(entry["type"], entry["id"]) for entry in self.descriptors)

    def install_late(self) -> None:
        """The descriptors of a table that had to wait, and was not installed by :meth:`join`."""
        if self._has_late() and not self._shares_files():
            self.install_descriptors()

    def install_descriptors(self) -> None:
        """Every descriptor to its number. The task's table is known, so is the number that each copy gets first. Those
        that show other descriptors are left for :meth:`finish_descriptors`."""
        self._install([entry for entry in self.descriptors if not self._looks_at_others(entry)], set())

    def _looks_at_others(self, entry: dict[str, Any]) -> bool:
        return self.opener.looks_at_descriptors(entry["type"], entry["id"])

    def _install(self, entries: list[dict[str, Any]], taken: set[int]) -> None:
        """Install *entries*; the numbers in *taken* are in use."""
        program = self.leader.program
        if not entries:
            return
        top = self.descriptors[-1]["fd"] + 1
        lowest = 0
        while lowest in taken:
            lowest += 1
        program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
        program.call("dup", nr.dup3, lowest, top, fc.O_CLOEXEC)
        program.call("close", nr.close, lowest)
        for entry in entries:
            fd, cloexec = entry["fd"], bool(entry["flags"] & 1)
            source = self.opener.open(entry["type"], entry["id"])
            while lowest in taken:
                lowest += 1
            program.call(f"take descriptor {fd}", nr.pidfd_getfd, top, source, 0)
            if lowest == fd:
                if not cloexec:
                    program.call("fcntl", nr.fcntl, fd, fc.F_SETFD, 0)
            else:
                program.call(f"dup to {fd}", nr.dup3, lowest, fd, fc.O_CLOEXEC if cloexec else 0)
                program.call("close", nr.close, lowest)
            taken.add(fd)
        program.call("close", nr.close, top)
        program.run()

    def finish_descriptors(self) -> None:
        """What the task does with its descriptors when all of them are there (epoll)."""
        if self._shares_files():
            return
        program = self.leader.program
        last = [entry for entry in self.descriptors if self._looks_at_others(entry)]
        self._install(last, {entry["fd"] for entry in self.descriptors if entry not in last})
        for entry in self.descriptors:
            kind = entry["type"]
            if kind not in (MEMFD, REG):
                self.opener.kind(kind).plan(program, entry["fd"], self.opener.message(kind, entry["id"]))
        program.run()

    # -- threads -------------------------------------------------------------------------------------------------------

    def make_threads(self) -> None:
        """Clone all other threads; each stops at once and gets a program area of its own. One of those with other
        directories than the process's goes there, and clones the rest of them."""
        groups = {0: [self.leader]}
        for thread in self.threads[1:]:
            groups.setdefault(thread.directories.get("number", 0), []).append(thread)
        firsts = [group[0] for number, group in groups.items() if number]
        self._clone_threads(self.leader, firsts, _THREAD_FLAGS & ~sched.CLONE_FS)
        for thread in firsts:
            self._enter_own(thread)
        for first, *others in groups.values():
            self._clone_threads(first, others, _THREAD_FLAGS)

    def _clone_threads(self, cloner: RestoredThread, born: list[RestoredThread], flags: int) -> None:
        for thread in born:
            plan_clone(cloner.program, thread.tid, flags, 0)
        cloner.program.run()
        for thread in born:
            thread.runner = await_birth(thread.tid, self.pid, cloner.runner, self.scratch)
            thread.program = Program(thread.runner, self.scratch, self.scratch.area(thread.area), thread.area)

    def _enter_own(self, thread: RestoredThread) -> None:
        """Have a thread enter its own directories. Those that it has now are its process's."""
        root, cwd = thread.places()
        taken = self.opener.open(*root) if root != self.root else None
        apart.plan(thread.program, taken, self.opener.open(*cwd), thread.directories["fs"].get("umask", 0o22))
        thread.program.run()

    def end_leader(self) -> None:
        """The first thread exits, as it had before the dump; from here on the next one stands for the process."""
        from firn.resources.threads import exited

        first = self.threads[0]
        threads.plan_own(first.program, first.core, first.core.get("comm", self.tc["comm"]))
        creds.plan(first.program, first.core["creds"], features.cap_last_cap())
        first.program.run()
        threads.set_scheduling(first.tid, first.core)
        self.threads = self.threads[1:]
        self.scratch.pid = self.leader.tid
        exited.leave(first.runner, self.scratch.code + cpu.SYSCALL_AT, self.tc)

    # -- state ---------------------------------------------------------------------------------------------------------

    def set_state(self, filters: list[dict[str, Any]]) -> None:
        """Everything that is not memory, files or registers, credentials last."""
        tc, program = self.tc, self.leader.program
        self._suspend_seccomp()
        self._plan_reaping(program)
        signals.plan_actions(program, tc["sigactions"])
        # Alone: an action that ignores a signal discards it where it is pending (do_sigaction in kernel/signal.c), and
        # with the signal that ends a program another thread would never stop.
        program.run()
        signals.plan_queue(program, self.pid, self.leader.tid, True, tc.get("signals_s"))
        timers.plan(program, tc["timers"], features.timer_restore_ids())
        future = self.process.mm.get("firn", {}).get("lock_future", 0)
        if future:
            program.call("mlockall", nr.mlockall, future)
        for thread in self.threads:
            self._plan_thread(thread)
        self._run_all()
        last = features.cap_last_cap()
        for thread in self.threads:
            if thread is self.leader:
                process.plan_limits(thread.program, tc)
            creds.plan(
                thread.program, thread.core["creds"], last, lambda p, core=thread.core: seccomp.plan(p, core, filters)
            )
            threads.plan_last(thread.program, thread.core)
        self._run_all()
        process.plan_late(program, tc, self.process.mm)
        if not self._shares_files():
            self._plan_owners(program)
        rebuild.plan_seal(program, self.process.mm["vmas"])
        program.run()
        for thread in self.threads:
            threads.set_scheduling(thread.tid, thread.core)

    def _plan_reaping(self, program: Program) -> None:
        """Children that ended while they were restored (zombies, helpers) have sent a SIGCHLD that nobody is to see."""
        if not self.bereaved and not any(child.zombie for child in self.process.children):
            return
        stops.plan_no_sigchld(program)

    def _plan_thread(self, thread: RestoredThread) -> None:
        program = thread.program
        comm = thread.core.get("comm", self.tc["comm"])
        threads.plan_own(program, thread.core, comm)
        policies.plan(program, thread.core)
        if thread is not self.leader:
            policies.plan_switches(program, thread.core, self.leader.core)
        program.call("set_tid_address", nr.set_tid_address, thread.info["clear_tid_addr"])
        signals.plan_queue(program, self.pid, thread.tid, False, thread.core.get("signals_p"))

    def _run_all(self) -> None:
        """Run the programs of all threads at once."""
        running = [thread.program for thread in self.threads if thread.program.labels]
        for program in running:
            program.start()
        for program in running:
            program.finish()

    def _suspend_seccomp(self) -> None:
        if not any(thread.core.get("seccomp_mode") for thread in self.threads):
            return
        options = pt.O_TRACESYSGOOD | pt.O_EXITKILL | pt.O_SUSPEND_SECCOMP
        for thread in self.threads:
            ptrace.request("suspend seccomp", pt.SETOPTIONS, thread.tid, 0, options)

    def _plan_owners(self, program: Program) -> None:
        """F_SETOWN and F_SETSIG of descriptors: the kernel records who sets them, so the task does it itself."""
        done: set[int] = set()
        for entry in self.descriptors:
            message = self.opener.message(entry["type"], entry["id"])
            owner = message.get("fown", {})
            if entry["id"] in done or not (owner.get("pid") or owner.get("signum")):
                continue
            done.add(entry["id"])
            fd = entry["fd"]
            if owner.get("pid"):
                program.reserve(1, 16)
                at = program.data(owner["pid_type"].to_bytes(4, "little") + owner["pid"].to_bytes(4, "little"))
                program.call(f"F_SETOWN_EX of descriptor {fd}", nr.fcntl, fd, fc.F_SETOWN_EX, at, allow=3)
            if owner.get("signum"):
                program.call(f"F_SETSIG of descriptor {fd}", nr.fcntl, fd, fc.F_SETSIG, owner["signum"])
            if message["flags"] & fc.FASYNC:
                program.call(f"F_SETFL of descriptor {fd}", nr.fcntl, fd, fc.F_SETFL, message["flags"])

    # -- resume --------------------------------------------------------------------------------------------------------

    def prime(self) -> None:
        """Have threads that were interrupted in a call begin it again: the last of what needs the scratch area."""
        site = self.scratch.code + cpu.SYSCALL_AT
        for thread in self.threads:
            waiting = restart.stored(self.leader.tid, thread.core, thread.info["gpregs"], thread.regs)
            if waiting:
                thread.regs = restart.prime(thread.runner, thread.program, site, thread.regs, waiting)

    def make_ready(self, last: bool) -> None:
        """Set registers and masks: only letting go is left. The *last* of those who share its memory takes the scratch
        area away."""
        if last:
            site, size = self.scratch.code + cpu.SYSCALL_AT, mman.PAGE + self.scratch.size
            self.leader.runner.single(site, nr.munmap, self.scratch.code, size)
        if self.leader.regs[cpu.ORIG_AX] != cpu.NO_SYSCALL:
            self._leave_syscall_exit()
        for thread in self.threads:
            raw = thread.core.get("firn", {}).get("xsave", b"")
            ptrace.set_xstate(thread.tid, xstate.load(thread.info["fpregs"], raw, ptrace.get_xstate(thread.tid)))
            ptrace.set_regs(thread.tid, thread.regs)
            ptrace.set_sigmask(thread.tid, thread.mask)

    def is_stopped(self) -> bool:
        """Whether the task is a stopped one."""
        return bool(self.tc["task_state"] == process.STOPPED)

    def notice_stops(self, children: list[RestoredTask]) -> None:
        """These *children* have stopped: know of it as far as it was known before."""
        known = [child.pid for child in children if child.tc.get("firn", {}).get("stop_told")]
        pending = [signals.info_number(info) for info in signals.infos(self.tc.get("signals_s"))]
        stops.plan(self.leader.program, known, sig.SIGCHLD in pending)
        self.leader.program.run()

    def stop(self) -> None:
        """Stop all threads as they were stopped, still traced. Nothing may run in the task afterwards."""
        number = self._stop_signal()
        if not self._stop_by(number):
            self._stop_by(sig.SIGSTOP)
        for thread in self.threads:
            ptrace.set_sigmask(thread.tid, thread.mask)

    def _stop_by(self, number: int) -> bool:
        """Send the leader a stop signal; whether that stops it. It does not if the signal is handled, or ignored in an
        orphaned group."""
        leader = self.leader.tid
        for thread in self.threads:
            ptrace.set_sigmask(thread.tid, sig.ALL & ~sig.bit(number))
        syscall(f"tgkill {leader}", nr.tgkill, self.pid, leader, number)
        ptrace.request("continue", pt.CONT, leader)
        while (stop := ptrace.wait_stop(leader)).event or stop.signal != number:
            check_fault(leader, stop)
            ptrace.request("continue", pt.CONT, leader)
        # Whatever the signal does, the task stops before it is back in its own code.
        ptrace.request("interrupt", pt.INTERRUPT, leader)
        ptrace.request("continue", pt.CONT, leader, 0, number)
        if ptrace.wait_stop(leader).signal != number:
            return False
        for thread in self.threads[1:]:
            ptrace.request("continue", pt.CONT, thread.tid)
            while (stop := ptrace.wait_stop(thread.tid)).event != pt.EVENT_STOP:
                check_fault(thread.tid, stop)
                ptrace.request("continue", pt.CONT, thread.tid)
        return True

    def process_state(self) -> str:
        """The letter of proc(5): t in a stop under our trace, Z or X if it has ended."""
        try:
            return str(procfs.stat(self.pid, self.leader.tid).state)
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def outlive_us(self) -> None:
        """The task is ready: from now on it runs if we die. Until now it would have died with us."""
        for thread in self.threads:
            ptrace.request("no longer end with us", pt.SETOPTIONS, thread.tid, 0, pt.O_TRACESYSGOOD)

    def let_go(self, stop: bool) -> None:
        """Detach; the task runs, or stops if it was stopped or is to be."""
        if stop and not self.is_stopped():
            os.kill(self.pid, sig.SIGSTOP)
        for thread in [*self.threads[1:], self.leader]:
            detach(thread.tid)

    def _stop_signal(self) -> int:
        """The signal that a stopped task was stopped by."""
        number: int = self.tc.get("stop_signo", sig.SIGSTOP)
        blocked = self.leader.mask >> (number - 1) & 1
        return number if number in sig.STOP_SIGNALS and not blocked else sig.SIGSTOP

    def _leave_syscall_exit(self) -> None:
        """From the stop after a call into one where the kernel looks at restart codes again."""
        regs, leader = list(self.leader.regs), self.leader.tid
        regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
        ptrace.set_regs(leader, regs)
        ptrace.request("interrupt", pt.INTERRUPT, leader)
        ptrace.request("continue", pt.CONT, leader)
        while (stop := ptrace.wait_stop(leader)).event != pt.EVENT_STOP:
            check_fault(leader, stop)
            ptrace.request("continue", pt.CONT, leader)


def plan_clone(program: Program, tid: int, flags: int, exit_signal: int) -> None:
    """Add a clone3(2) that makes a task with id *tid*, which stops at once."""
    program.reserve(1, sched.CLONE_ARGS.size + 16)
    wanted = program.data(tid.to_bytes(8, "little"))
    args = program.data(sched.CLONE_ARGS.pack(flags, 0, 0, 0, exit_signal, 0, 0, 0, wanted, 1, 0))
    program.call(f"clone3 with id {tid}", nr.clone3, args, sched.CLONE_ARGS.size, flags=cpu.F_CHILD)


def await_birth(tid: int, pid: int, parent: Runner, scratch: Scratch) -> Runner:
    """A new task first stops because it is traced, then at the end of its part of the program."""
    while ptrace.wait_stop(tid).event != pt.EVENT_STOP:
        ptrace.request("continue", pt.CONT, tid)
    ptrace.request("continue", pt.CONT, tid)
    runner = Runner(pid, tid, ptrace.get_regs(parent.tid), parent.stop_signal)
    runner.finish(scratch.code)
    return runner
