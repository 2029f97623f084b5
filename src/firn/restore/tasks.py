"""One task being restored: its memory, descriptors, threads and state, built by programs that it runs itself."""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import mman, nr, prctl
from firn.abi import ptrace as pt
from firn.abi import sched
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import ImageError, RestoreError
from firn.host import features, procfs
from firn.images.pages import PagemapReader
from firn.resources import creds, process, restart, seccomp, signals, threads, timers
from firn.resources.base import MEMFD, REG
from firn.resources.memory import aio, areas, layout, rebuild
from firn.resources.memory.vdso import Own, Placement, place
from firn.resources.threads import xstate
from firn.restore.birth import SYSCALL_SITE
from firn.tracee import memory, ptrace
from firn.tracee.program import Program, Runner, Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.api import RestoreOptions
    from firn.log import Log
    from firn.resources.files.reopen import Opener
    from firn.restore.load import Checkpoint

LEADER_AREA = 1 << 20
THREAD_AREA = 8192
_NONE = (1 << 64) - 1


class RestoredThread:
    """One thread: what the images say of it, and the runner that it is now."""

    __slots__ = ("core", "info", "program", "regs", "runner", "tid")

    def __init__(self, tid: int, core: dict[str, Any]) -> None:
        self.tid = tid
        self.core: dict[str, Any] = core["thread_core"]
        self.info: dict[str, Any] = core["thread_info"]
        self.regs = threads.load_registers(self.info)
        self.runner: Runner
        self.program: Program


class RestoredTask:
    """A process of the checkpoint on its way back."""

    def __init__(self, checkpoint: Checkpoint, opener: Opener, options: RestoreOptions, log: Log) -> None:
        self.checkpoint = checkpoint
        self.opener = opener
        self.options = options
        self.log = log
        self.pid = checkpoint.pid
        self.vmas: list[dict[str, Any]] = checkpoint.mm["vmas"]
        self.threads = [
            RestoredThread(tid, core) for tid, core in zip(checkpoint.tids, checkpoint.cores, strict=True)
        ]
        self.pagemap = PagemapReader(checkpoint.images, "PAGEMAP", self.pid)
        self.runs = [
            rebuild.Run(run.vaddr, run.nr_pages * mman.PAGE, run.fd, run.offset) for run in self.pagemap
        ]
        self.pages = sum(run.size for run in self.runs) // mman.PAGE
        tc = checkpoint.tc
        self.stop_signal = signals.free_stop_signal(
            [tc.get("signals_s"), *(thread.core.get("signals_p") for thread in self.threads)]
        )

    # -- open --------------------------------------------------------------------------------------------------------

    def _mapped(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """(File id, access mode) -> (type, id, mode) of everything that is mapped."""
        found = {}
        for vma in self.vmas:
            status = vma["status"]
            if rebuild.is_special(vma):
                continue
            if status & areas.SYSVIPC or status & areas.SOCKET:
                raise RestoreError(f"mapping {vma['start']:#x} is of a kind that is not supported yet")
            if status & areas.MEMFD:
                found[rebuild.file_key(vma)] = (MEMFD, *rebuild.file_key(vma))
            elif status & (areas.FILE_PRIVATE | areas.FILE_SHARED):
                found[rebuild.file_key(vma)] = (REG, *rebuild.file_key(vma))
            elif status & areas.ANON_SHARED:
                raise ImageError(f"mapping {vma['start']:#x}: shared memory in the old form is not supported yet")
        return found

    def open_files(self) -> None:
        """Open everything that does not have to wait for the task."""
        checkpoint = self.checkpoint
        self.mapped = self._mapped()
        self.exe = (REG, checkpoint.mm["exe_file_id"])
        self.cwd, self.root = (REG, checkpoint.fs["cwd_id"]), (REG, checkpoint.fs["root_id"])
        self.descriptors = sorted(checkpoint.fdinfo, key=lambda entry: int(entry["fd"]))
        wanted: list[tuple[int, ...]] = [*self.mapped.values(), self.exe, self.cwd, self.root]
        wanted += [(entry["type"], entry["id"]) for entry in self.descriptors]
        for key in wanted:
            if not self.opener.is_late(*key[:2]):
                self.opener.open(*key)

    # -- rebuild -----------------------------------------------------------------------------------------------------

    def rebuild_memory(self) -> None:
        """Replace the stub's memory by the process's."""
        self._make_scratch()
        program = self.leader.program
        runs, own = self.runs, Own()
        runs, rings = self._split_rings(runs)
        placement = self._place_vdso(own, runs)
        if placement is None or placement.replaces:
            runs = self._without_vdso(runs)
        writable = self._writable(runs, placement)
        rebuild.plan_clear(program, self.scratch)
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        if placement is not None:
            program.call("map vdso", nr.arch_prctl, prctl.ARCH_MAP_VDSO_64, placement.map_at)
        table = self._take_files(program, [*self.mapped.values(), self.exe])
        fds = {number: table[self.opener.open(*key)] for number, key in self.mapped.items()}
        self._plan_dumped_vdso(program, placement)
        rebuild.plan_maps(program, self.vmas, fds, writable)
        layout.plan(program, self.checkpoint.mm, table[self.opener.open(*self.exe)])
        page_fds = self._take_fds(program, sorted({run.fd for run in runs}), max(table.values()) + 1)
        checks = rebuild.plan_pages(program, runs, page_fds)
        present = rebuild.present_bytes(self.vmas, runs)
        rebuild.plan_finish(program, self.vmas, writable, present)
        if placement is not None and not placement.replaces:
            self._plan_vdso_protection(program)
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        program.run()
        rebuild.check_reads(program, checks)
        for ring in self.checkpoint.mm.get("aios", []):
            aio.rebuild(program, ring, aio.unfetched(rings.get(ring["id"], b"")))
        program.run()
        for address, code in placement.patches if placement else []:
            memory.force_write(self.pid, address, code)
        self.opener.seal()

    @property
    def leader(self) -> RestoredThread:
        """The thread-group leader."""
        return self.threads[0]

    def _make_scratch(self) -> None:
        """Map the scratch area where neither the stub nor the process has anything."""
        data = LEADER_AREA + THREAD_AREA * len(self.threads)
        taken = [(vma["start"], vma["end"]) for vma in self.vmas if not vma["status"] & areas.VSYSCALL]
        taken += [(m.start, m.end) for m in procfs.maps(self.pid) if m.end < 1 << 47]
        self.spare = layout.holes(sorted(taken), data + mman.PAGE + (1 << 20))
        code = self.spare + (1 << 20)
        leader = self.leader
        leader.runner = Runner(self.pid, self.pid, ptrace.get_regs(self.pid), self.stop_signal)
        ptrace.set_sigmask(self.pid, leader.runner.mask())
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE
        single = leader.runner.single
        single(SYSCALL_SITE, nr.mmap, code, mman.PAGE, mman.PROT_READ | mman.PROT_EXEC, flags, _NONE, 0)
        single(SYSCALL_SITE, nr.mmap, code + mman.PAGE, data, mman.PROT_READ | mman.PROT_WRITE, flags, _NONE, 0)
        memory.force_write(self.pid, code, cpu.INTERPRETER)
        self.scratch = Scratch(self.pid, code, code + mman.PAGE, data)
        leader.program = Program(leader.runner, self.scratch, self.scratch.area(LEADER_AREA), LEADER_AREA)

    def _special(self, bit: int) -> dict[str, Any] | None:
        return next((vma for vma in self.vmas if vma["status"] & bit), None)

    def _place_vdso(self, own: Own, runs: list[rebuild.Run]) -> Placement | None:
        """Where this kernel's vdso goes; None for a process that has none."""
        vdso, vvar = self._special(areas.VDSO), self._special(areas.VVAR)
        if vdso is None or vvar is None:
            return None
        size = vdso["end"] - vdso["start"]
        code = bytearray(size)
        for run in runs:
            if run.address < vdso["end"] and run.address + run.size > vdso["start"]:
                low, high = max(run.address, vdso["start"]), min(run.address + run.size, vdso["end"])
                part = os.pread(run.fd, high - low, run.offset + low - run.address)
                code[low - vdso["start"] : high - vdso["start"]] = part
        if not any(code):
            code = bytearray(own.code)
        return place(own, bytes(code), vvar["start"], vdso["start"], self.spare)

    def _split_rings(self, runs: list[rebuild.Run]) -> tuple[list[rebuild.Run], dict[int, bytes]]:
        """The runs without those of AIO rings, and the contents of these by address."""
        limits = {ring["id"]: ring["id"] + ring["ring_len"] for ring in self.checkpoint.mm.get("aios", [])}
        if not limits:
            return runs, {}
        kept: list[rebuild.Run] = []
        rings: dict[int, bytes] = {}
        for run in runs:
            start = next((at for at, end in limits.items() if at <= run.address < end), None)
            if start is None:
                kept.append(run)
            else:
                rings[start] = rings.get(start, b"") + os.pread(run.fd, run.size, run.offset)
        return kept, rings

    def _without_vdso(self, runs: list[rebuild.Run]) -> list[rebuild.Run]:
        """The runs without the vdso's pages: the kernel's own take their place."""
        vdso = self._special(areas.VDSO)
        if vdso is None:
            return runs
        kept = []
        for run in runs:
            end = run.address + run.size
            if end <= vdso["start"] or run.address >= vdso["end"]:
                kept.append(run)
                continue
            if run.address < vdso["start"]:
                kept.append(rebuild.Run(run.address, vdso["start"] - run.address, run.fd, run.offset))
            if end > vdso["end"]:
                kept.append(
                    rebuild.Run(vdso["end"], end - vdso["end"], run.fd, run.offset + vdso["end"] - run.address)
                )
        return kept

    def _writable(self, runs: list[rebuild.Run], placement: Placement | None) -> set[int]:
        """The read-only mappings that have to be writable for a while."""
        candidates = [v for v in self.vmas if not v["status"] & areas.VVAR]
        if placement is not None and placement.replaces:
            candidates = [v for v in candidates if not v["status"] & areas.VDSO]
        filled = rebuild.with_pages(candidates, runs)
        return {
            v["start"]
            for v in candidates
            if not v["prot"] & mman.PROT_WRITE and (v["start"] in filled or v.get("firn", {}).get("account"))
        }

    def _plan_dumped_vdso(self, program: Program, placement: Placement | None) -> None:
        """A vdso of another kernel stays as ordinary memory; its data pages are gone, so nothing may read them."""
        if placement is None or placement.replaces:
            return
        vdso = self._special(areas.VDSO)
        assert vdso is not None
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED
        size = vdso["end"] - vdso["start"]
        program.call("map old vdso", nr.mmap, vdso["start"], size, mman.PROT_READ | mman.PROT_WRITE, flags, _NONE, 0)

    def _plan_vdso_protection(self, program: Program) -> None:
        vdso = self._special(areas.VDSO)
        assert vdso is not None
        size = vdso["end"] - vdso["start"]
        program.call("protect old vdso", nr.mprotect, vdso["start"], size, mman.PROT_READ | mman.PROT_EXEC)

    # -- taking descriptors of ours ------------------------------------------------------------------------------------

    def _take_files(self, program: Program, keys: list[tuple[int, ...]]) -> dict[int, int]:
        """Copies of our descriptors of files *keys* in the task: ours -> the task's. It must have none open."""
        return self._take_fds(program, sorted({self.opener.open(*key) for key in keys}), 0)

    def _take_fds(self, program: Program, ours: list[int], first: int) -> dict[int, int]:
        """The task copies *ours* to its lowest free numbers, from *first* on, which is known to be free."""
        program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
        for fd in ours:
            program.call(f"take descriptor {fd}", nr.pidfd_getfd, first, fd, 0)
        return {fd: first + 1 + index for index, fd in enumerate(ours)}

    # -- join ----------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Session, process group, directories, descriptors."""
        checkpoint, program = self.checkpoint, self.leader.program
        item = checkpoint.item
        if item["sid"] == self.pid:
            program.call("setsid", nr.setsid)
        elif item["pgid"] == self.pid:
            program.call("setpgid", nr.setpgid, 0, 0)
        process.plan_early(program, checkpoint.tc, checkpoint.fs.get("umask", 0o22))
        process.plan_loginuid(program, checkpoint.tc)
        table = self._take_files(program, [self.cwd, self.root])
        program.call("fchdir to root", nr.fchdir, table[self.opener.open(*self.root)])
        if self.opener.message(*self.root)["name"] != "/":
            program.call("chroot", nr.chroot, program.text("."))
        program.call("fchdir", nr.fchdir, table[self.opener.open(*self.cwd)])
        program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
        program.run()
        if not any(self.opener.is_late(entry["type"], entry["id"]) for entry in self.descriptors):
            self._install_descriptors()

    def _install_descriptors(self) -> None:
        """Every descriptor to its number. The task's table is known, so is the number that each copy gets first."""
        program = self.leader.program
        if not self.descriptors:
            return
        top = self.descriptors[-1]["fd"] + 1
        program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
        program.call("dup", nr.dup3, 0, top, fc.O_CLOEXEC)
        program.call("close", nr.close, 0)
        taken: set[int] = set()
        lowest = 0
        for entry in self.descriptors:
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
        for entry in self.descriptors:
            kind = entry["type"]
            if kind not in (MEMFD, REG):
                self.opener.kind(kind).plan(program, entry["fd"], self.opener.message(kind, entry["id"]))
        program.run()

    # -- threads -------------------------------------------------------------------------------------------------------

    def make_threads(self) -> None:
        """Clone all other threads; each stops at once and gets a program area of its own."""
        program = self.leader.program
        others = self.threads[1:]
        flags = (
            sched.CLONE_VM | sched.CLONE_FS | sched.CLONE_FILES | sched.CLONE_SIGHAND | sched.CLONE_THREAD | sched.CLONE_SYSVSEM
        )
        for thread in others:
            program.reserve(1, sched.CLONE_ARGS.size + 16)
            wanted = program.data(thread.tid.to_bytes(8, "little"))
            args = program.data(sched.CLONE_ARGS.pack(flags, 0, 0, 0, 0, 0, 0, 0, wanted, 1, 0))
            program.call(
                f"clone3 with tid {thread.tid}", nr.clone3, args, sched.CLONE_ARGS.size, flags=cpu.F_CHILD
            )
        program.run()
        for thread in others:
            self._await_birth(thread)
        if any(self.opener.is_late(entry["type"], entry["id"]) for entry in self.descriptors):
            self._install_descriptors()

    def _await_birth(self, thread: RestoredThread) -> None:
        """A new thread first stops because it is traced, then at the end of its part of the program."""
        while ptrace.wait_stop(thread.tid).event != pt.EVENT_STOP:
            ptrace.request("continue", pt.CONT, thread.tid)
        ptrace.request("continue", pt.CONT, thread.tid)
        thread.runner = Runner(self.pid, thread.tid, ptrace.get_regs(self.pid), self.stop_signal)
        thread.runner.finish(self.scratch.code)
        thread.program = Program(thread.runner, self.scratch, self.scratch.area(THREAD_AREA), THREAD_AREA)

    # -- state ---------------------------------------------------------------------------------------------------------

    def set_state(self) -> None:
        """Everything that is not memory, files or registers, credentials last."""
        tc, program = self.checkpoint.tc, self.leader.program
        process.set_outside(self.pid, tc, self.log)
        self._suspend_seccomp()
        signals.plan_actions(program, tc["sigactions"])
        signals.plan_queue(program, self.pid, None, tc.get("signals_s"))
        timers.plan(program, tc["timers"], features.timer_restore_ids())
        self._plan_mlock_future(program)
        for thread in self.threads:
            self._plan_thread(thread)
        self._run_all()
        last = features.cap_last_cap()
        for thread in self.threads:
            if thread is self.leader:
                process.plan_limits(thread.program, tc)
            creds.plan(
                thread.program, thread.core["creds"], last,
                lambda p, core=thread.core: seccomp.plan(p, core, self.checkpoint.filters),
            )  # fmt: skip
            threads.plan_last(thread.program, thread.core)
        self._run_all()
        process.plan_late(program, tc, self.checkpoint.mm)
        self._plan_owners(program)
        rebuild.plan_seal(program, self.vmas)
        program.run()
        for thread in self.threads:
            threads.set_scheduling(thread.tid, thread.core)

    def _plan_thread(self, thread: RestoredThread) -> None:
        program = thread.program
        comm = thread.core.get("comm", self.checkpoint.tc["comm"])
        threads.plan_own(program, thread.core, comm)
        program.call("set_tid_address", nr.set_tid_address, thread.info["clear_tid_addr"])
        signals.plan_queue(program, self.pid, thread.tid, thread.core.get("signals_p"))

    def _plan_mlock_future(self, program: Program) -> None:
        future = self.checkpoint.mm.get("firn", {}).get("lock_future", 0)
        if future:
            program.call("mlockall", nr.mlockall, future)

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
            owner = self.opener.message(entry["type"], entry["id"]).get("fown", {})
            if entry["id"] in done or not (owner.get("pid") or owner.get("signum")):
                continue
            done.add(entry["id"])
            fd = entry["fd"]
            if owner.get("pid"):
                at = program.data(owner["pid_type"].to_bytes(4, "little") + owner["pid"].to_bytes(4, "little"))
                program.call(f"F_SETOWN_EX of descriptor {fd}", nr.fcntl, fd, fc.F_SETOWN_EX, at, allow=3)
            if owner.get("signum"):
                program.call(f"F_SETSIG of descriptor {fd}", nr.fcntl, fd, fc.F_SETSIG, owner["signum"])
            flags = self.opener.message(entry["type"], entry["id"])["flags"]
            if flags & fc.FASYNC:
                program.call(f"F_SETFL of descriptor {fd}", nr.fcntl, fd, fc.F_SETFL, flags)

    # -- resume --------------------------------------------------------------------------------------------------------

    def resume(self, stop: bool) -> None:
        """Take the scratch area away, set registers and masks, let everything go."""
        site = self.scratch.code + cpu.SYSCALL_AT
        for thread in self.threads:
            waiting = thread.core.get("firn", {}).get("restart")
            if waiting and waiting["nr"] in restart.TIMED:
                thread.regs = restart.prime(thread.runner, thread.program, site, thread.regs, waiting)
        runner = self.leader.runner
        runner.single(site, nr.munmap, self.scratch.code, mman.PAGE + self.scratch.size)
        if self.leader.regs[cpu.ORIG_AX] != cpu.NO_SYSCALL:
            self._leave_syscall_exit()
        stop_signal = self._final_stop(stop)
        masks = [self.checkpoint.tc["blk_sigset"], *(t.core.get("blk_sigset", 0) for t in self.threads[1:])]
        for thread, mask in zip(self.threads, masks, strict=True):
            ptrace.set_xstate(
                thread.tid, xstate.load(thread.info["fpregs"], thread.core.get("firn", {}).get("xsave", b""), ptrace.get_xstate(thread.tid))
            )
            ptrace.set_regs(thread.tid, thread.regs)
            ptrace.set_sigmask(thread.tid, mask)
        if stop_signal:
            os.kill(self.pid, stop_signal)
        for thread in [*self.threads[1:], self.leader]:
            ptrace.request("detach", pt.DETACH, thread.tid)

    def _final_stop(self, stop: bool) -> int:
        """The signal that stops the task at the end, 0 if it shall run."""
        tc = self.checkpoint.tc
        if stop:
            return sig.SIGSTOP
        if tc["task_state"] != process.STOPPED:
            return 0
        number: int = tc.get("stop_signo", sig.SIGSTOP)
        blocked = tc["blk_sigset"] >> (number - 1) & 1
        return number if number in sig.STOP_SIGNALS and not blocked else sig.SIGSTOP

    def _leave_syscall_exit(self) -> None:
        """From the stop after a call into one where the kernel looks at restart codes again."""
        regs = list(self.leader.regs)
        regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
        ptrace.set_regs(self.pid, regs)
        ptrace.request("interrupt", pt.INTERRUPT, self.pid)
        ptrace.request("continue", pt.CONT, self.pid)
        while ptrace.wait_stop(self.pid).event != pt.EVENT_STOP:
            ptrace.request("continue", pt.CONT, self.pid)

    def close(self) -> None:
        """Close the page images."""
        self.pagemap.close()
