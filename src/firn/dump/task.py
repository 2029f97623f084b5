"""Collecting one frozen process of a tree into records.

Reads from outside what the kernel shows (/proc, ptrace, copies of descriptors) and asks the task itself for the rest:
one program in the leader, one small one in every other thread, all threads at once.
"""

from __future__ import annotations

import os
import stat as st_mode

from firn.abi import fcntl as fc
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.errors import Obstacle
from firn.host import features, kcmp, procfs
from firn.resources import (
    cgroups,
    creds,
    keyrings,
    namespaces,
    policies,
    process,
    restart,
    semaphores,
    signals,
    stops,
    threads,
    timers,
)
from firn.resources.base import MEMFD
from firn.resources.files.descriptors import Descriptor
from firn.resources.files.paths import NO_OWNER
from firn.resources.files.procfiles import process_of, thread_of
from firn.resources.memory import aio, areas, layout, numa, pkeys
from firn.resources.memory.pages import ProcessPages
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.collect import Collected
    from firn.tracee.program import Program
    from firn.tracee.seize import Task, Thread

_PROGRAM_SIZE = 65536


class CollectedTask:
    """Everything about one process. ``cores`` are (tid, core_entry) pairs, the leader's first; their thread_info is
    still raw, see :mod:`firn.dump.save`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pid = task.pid
        self.stat = procfs.stat(task.pid, task.pid)
        self.voice_stat = procfs.stat(task.pid, task.voice) if task.headless else self.stat
        """The first has what is the process's, this one what a thread has only while it lives (memory, flags)."""
        self.statuses = {thread.tid: procfs.status(task.pid, thread.tid) for thread in task.threads}
        self.cgroups = cgroups.Cgroups(task.voice)
        self.areas: list[areas.Area] = []
        self.descriptors: list[Descriptor] = []
        self.fs: dict[str, Any] = {}
        self.ids: dict[str, int] = {}
        self.cores: list[tuple[int, dict[str, Any]]] = []
        self.mm: dict[str, Any] = {}
        self.exe_id = 0
        self.memory: ProcessPages
        self.sharer: CollectedTask | None = None
        """The process that is collected before and has the same memory (CLONE_VM)."""

    def trace_options(self) -> int:
        """The PTRACE_O_* under which the task is traced."""
        filtered = any(status.get("Seccomp", "0") != "0" for status in self.statuses.values())
        return pt.O_TRACESYSGOOD | (pt.O_SUSPEND_SECCOMP if filtered else 0)

    def pstree(self, ppid: int) -> dict[str, Any]:
        """The pstree_entry."""
        return {
            "pid": self.pid, "ppid": ppid, "pgid": self.stat.pgrp, "sid": self.stat.session,
            "threads": [tid for tid, _ in self.cores],
        }  # fmt: skip


def look(got: Collected, mine: CollectedTask, early_maps: list[procfs.Map] | None) -> None:
    """First part: what is seen from outside, and with it most obstacles."""
    pid, voice = mine.pid, mine.task.voice
    _suspend_seccomp(mine)
    _leave_critical_sections(mine)
    _check_label(mine, got.obstacles)
    policies.look(pid, mine.statuses, got.obstacles)
    _check_threads(mine, got.obstacles)
    if mine.sharer is None:
        maps = procfs.smaps(voice) if early_maps is None else _current_maps(voice, early_maps)
        mine.areas = areas.classify(pid, maps, got.obstacles)
        areas.find_backing(voice, mine.areas, got.obstacles)
        _add_segments(got, mine)
    cwd, root = _named_link(got, mine, "cwd"), _named_link(got, mine, "root")
    mine.fs = {"cwd_id": cwd, "root_id": root, "umask": int(mine.statuses[voice]["Umask"], 8)}
    mine.exe_id = _named_link(got, mine, "exe")


def _current_maps(pid: int, early: list[procfs.Map]) -> list[procfs.Map]:
    """Mappings with flags. Those read before the freeze are taken if the mappings are still the same."""
    now = procfs.maps(pid)
    return early if [m.identity() for m in now] == [m.identity() for m in early] else procfs.smaps(pid)


def _suspend_seccomp(mine: CollectedTask) -> None:
    """Filters would stop our own calls inside the task: have the kernel suspend them while we are attached."""
    if mine.trace_options() != pt.O_TRACESYSGOOD:
        for thread in mine.task.threads:
            ptrace.request("suspend seccomp", pt.SETOPTIONS, thread.tid, 0, mine.trace_options())


def _leave_critical_sections(mine: CollectedTask) -> None:
    """Must come before the first program: the kernel forgets a thread's rseq critical section when it runs outside of
    it."""
    for thread in mine.task.threads:
        thread.regs = thread.resume_regs = threads.leave_critical_section(mine.task.voice, thread.tid, thread.regs)


_TABLES = ((fc.KCMP_FILES, "descriptors"), (fc.KCMP_FS, "directories"))


def _check_threads(mine: CollectedTask, obstacles: list[Obstacle]) -> None:
    """What a thread can have for itself though usually a process has it (unshare(2), setns(2))."""
    voice, others = mine.task.voice, mine.task.threads[1:]
    known = namespaces.links(voice) if others else {}
    for thread in others:
        what = f"process {mine.pid}: thread {thread.tid}"
        if mine.statuses[thread.tid]["Name"].startswith("iou-") and _is_ring_worker(mine.pid, thread.tid):
            reason = "is a worker of an io_uring, whose requests live in the kernel"
            obstacles.append(Obstacle(what, reason, "close its rings before the dump"))
        namespaces.check_thread(mine.pid, thread.tid, known, obstacles)
        for table, name in _TABLES:
            if not kcmp.same(voice, thread.tid, table):
                reason = f"has {name} of its own (unshare), which images cannot hold"
                obstacles.append(Obstacle(what, reason, "use a process for it"))


def _is_ring_worker(pid: int, tid: int) -> bool:
    """Whether the thread is one of io_uring's. Newer kernels let it be traced, but it has no user space to run in."""
    return bool(procfs.stat(pid, tid).flags & procfs.PF_IO_WORKER)


def _check_label(mine: CollectedTask, obstacles: list[Obstacle]) -> None:
    try:
        label = procfs.read(f"/proc/{mine.task.voice}/attr/current").rstrip(b"\0\n").decode()
    except OSError:
        return
    if label and not label.startswith("unconfined"):
        obstacles.append(
            Obstacle(f"process {mine.pid}", f"runs under the security label {label!r}", "labels are not supported yet")
        )


def _named_link(got: Collected, mine: CollectedTask, name: str) -> int:
    """The file id of what /proc/PID/*name* leads to."""
    link = f"/proc/{mine.task.voice}/{name}"
    what = f"process {mine.pid}: {name}"
    number = _plain_file(got, what, link, procfs.link_stat(link), 0)
    pids, target = got.collector.context.pids, os.readlink(link)
    thread = thread_of(target)
    # A thread has its directories before others exist; and who stands in for the dead would be in the tree's way.
    owner = process_of(target)
    if got.finder.dead_process(number) in pids or (thread not in (0, owner) and owner in pids):
        got.obstacles.append(Obstacle(what, f"is {target}, of a single thread of the tree", "change to another folder"))
    return number


def _plain_file(got: Collected, what: str, link: str, st: os.stat_result, mode: int) -> int:
    """The file id of something that is opened anew at restore: shared by object, path and mode."""
    key = ("plain", st.st_dev, st.st_ino, os.readlink(link), mode)
    known = got.table.find(key)
    if known is not None:
        return known
    message = {"flags": mode, "pos": 0}
    if not (st_mode.S_ISREG(st.st_mode) or st_mode.S_ISDIR(st.st_mode)):
        message["pos"] = (1 << 64) - 1
    return got.finder.add(what, link, message, st, key)


def _add_mapped_files(got: Collected, mine: CollectedTask) -> None:
    """Give every mapping the file id of what it maps."""
    known: dict[tuple[object, ...], int] = {}
    for area in mine.areas:
        if area.kind == "file":
            assert area.stat is not None
            key = (area.stat.st_dev, area.stat.st_ino, area.map.name, area.mode)
            if key not in known:
                what = f"process {mine.pid}: mapping {area.map.start:x}-{area.map.end:x}"
                known[key] = _plain_file(got, what, area.link(mine.task.voice), area.stat, area.mode)
            area.shmid = known[key]
        elif area.kind == "shmem":
            area.shmid = _memory_object(got, mine.task.voice, area)


def _add_segments(got: Collected, mine: CollectedTask) -> None:
    """Give every mapping of a System V segment that one's id."""
    for area in mine.areas:
        if area.kind != "sysv" or area.stat is None:
            continue
        if got.segments is None:
            from firn.resources.files.segments import DumpedSegments

            got.segments = DumpedSegments(got.objects.numbers)
        what = f"process {mine.pid}: mapping {area.map.start:x}-{area.map.end:x}"
        area.shmid = got.segments.add(what, area.link(mine.task.voice), area.stat, got.obstacles)


def _memory_object(got: Collected, pid: int, area: areas.Area) -> int:
    assert area.stat is not None
    key = ("memory", area.stat.st_dev, area.stat.st_ino, area.mode)
    known = got.table.find(key)
    if known is not None:
        return known
    inode = got.objects.inode(area.link(pid), area.stat)
    return got.table.add(MEMFD, {"flags": area.mode, "pos": 0, "fown": NO_OWNER, "inode_id": inode}, key)


# -- asking the task ---------------------------------------------------------------------------------------------------


class Questions:
    """The programs of one process while they run."""

    def __init__(
        self, mine: CollectedTask, partners: policies.Partners, children: dict[int, bool], with_keyrings: bool
    ) -> None:
        task = mine.task
        self.mine = mine
        posix = procfs.timers(task.voice)
        size = _PROGRAM_SIZE + 128 * len(posix) + stops.SIZE * len(children)
        task.prepare(extra=size)
        self.program = task.program(size=size)
        self.process = process.ask(self.program)
        self.actions = signals.ask(self.program)
        self.timers = timers.ask(self.program, posix)
        self.keys = pkeys.ask(self.program)
        self.children = stops.ask(self.program, children)
        self.threads: list[tuple[Thread, Program, threads.Asked]] = [
            (task.leader, self.program, threads.ask(self.program))
        ]
        for thread in task.threads[1:]:
            own = task.program(thread, size=1024 + policies.SIZE + keyrings.SIZE, status=mine.statuses[thread.tid])
            self.threads.append((thread, own, threads.ask(own)))
        self.keyrings = {thread.tid: keyrings.ask(own) for thread, own, _ in self.threads} if with_keyrings else {}
        self.policies = {
            thread.tid: policies.ask(own, task.voice, partners.of(mine.statuses[thread.tid]))
            for thread, own, _ in self.threads
        }
        for _, own, _ in self.threads:
            own.start()

    def answer(self, got: Collected, waiting: dict[int, restart.Waiting], frozen_at: int) -> None:
        """Second part: wait for the programs, and build the records from what they brought."""
        mine, pid, program, voice = self.mine, self.mine.pid, self.program, self.mine.task.voice
        for _, own, _ in self.threads:
            own.finish()
        answers = process.Answers(program, self.process)
        tc = process.save(voice, mine.voice_stat, answers)
        if mine.stat.exit_signal != sig.SIGCHLD:
            tc["firn"]["exit_signal"] = mine.stat.exit_signal
        if mine.stat.session == mine.pid and (nice := process.session_nice(voice)):
            tc["firn"]["session_nice"] = nice
        tc["timers"] = timers.answer(program, self.timers)
        got.reported |= stops.answer(program, self.children)
        tc["sigactions"] = signals.answer(program, self.actions)
        said = [threads.Answers(own, asked) for _, own, asked in self.threads]
        rare = [
            policies.answer(own, self.policies[thread.tid], pid, thread.tid, mine.statuses[thread.tid], got.obstacles)
            for thread, own, _ in self.threads
        ]
        self._find_undo(got)
        self._find_keyrings(got)
        self._settle_timers()
        tc["signals_s"] = signals.queue(ptrace.pending_signals(voice, shared=True))
        stopped = mine.task.stop_signal
        tc["task_state"] = process.STOPPED if stopped else process.ALIVE
        if stopped:
            tc["stop_signo"] = stopped
        for thread, one, fields in zip(mine.task.threads, said, rare, strict=True):
            core = _thread_core(got, mine, thread, one, waiting, frozen_at)
            core["thread_core"]["firn"] |= fields
            mine.cores.append((thread.tid, core))
        numa.collect(voice, mine.areas, (rare[0].get("numa_mode", 0), rare[0].get("numa_nodes", b"")))
        tc["blk_sigset"] = mine.task.leader.mask
        if mine.task.headless:
            mine.cores.insert(0, (pid, self._exited_core(got, tc)))
        mine.cores[0][1]["tc"] = tc
        self._collect_memory(got, answers)

    def _exited_core(self, got: Collected, tc: dict[str, Any]) -> dict[str, Any]:
        """The core_entry of a first thread that has exited."""
        from firn.resources.threads import exited

        mine, voice = self.mine, self.mine.cores[0][1]["thread_core"]
        own = creds.collect(procfs.status(mine.pid, mine.pid), voice["creds"]["secbits"])
        return exited.save_core(mine.task, tc, own, got.cgroup_sets.number(mine.cgroups))

    def _collect_memory(self, got: Collected, answers: process.Answers) -> None:
        mine, pid, voice = self.mine, self.mine.pid, self.mine.task.voice
        if mine.sharer is not None:
            mine.mm = mine.sharer.mm
            mine.memory = ProcessPages(pid, [], False)
            return
        _add_mapped_files(got, mine)
        mine.mm = layout.save(voice, mine.voice_stat, answers, mine.exe_id)
        mine.mm["aios"] = [aio.save(voice, area.map.start, area.map.end) for area in mine.areas if area.kind == "aio"]
        future = layout.locks_future(voice, mine.statuses[voice], mine.task)
        keys = pkeys.answer(self.program, self.keys)
        if future or keys:
            mine.mm["firn"] = {"lock_future": future, "pkeys": keys}
        mine.memory = ProcessPages(pid, mine.areas, features.pagemap_scan())

    def _find_undo(self, got: Collected) -> None:
        if not got.semaphore_sets:
            return
        holders = semaphores.holders([thread.tid for thread, _, _ in self.threads])
        for thread, program, _ in self.threads:
            if thread.tid in holders:
                status = self.mine.statuses[thread.tid]
                got.obstacles += semaphores.find_undo(program, self.mine.pid, status, got.semaphore_sets)

    def _find_keyrings(self, got: Collected) -> None:
        """The session keyrings: each is read by the first thread that has it, as is that there is none."""
        for thread, program, _ in self.threads if self.keyrings else []:
            number = keyrings.answer(program, self.keyrings[thread.tid])
            what = f"process {self.mine.pid}: thread {thread.tid}"
            if number not in got.keyrings:
                if got.keyrings:
                    reason = "has another session keyring than the rest of the tree, which images cannot hold"
                    got.obstacles.append(Obstacle(what, reason, "start all of it in one session"))
                got.keyrings[number] = keyrings.read(program, number, what, got.obstacles) if number else {}

    def _settle_timers(self) -> None:
        """Pending timer signals must know their overruns before the queues are read."""
        mine = self.mine
        for thread, program, _ in self.threads:
            status, leader = mine.statuses[thread.tid], thread is mine.task.leader
            if int(status["SigPnd"], 16) or (leader and int(status["ShdPnd"], 16)):
                shared = ptrace.pending_signals(thread.tid, shared=True) if leader else []
                private = ptrace.pending_signals(thread.tid, shared=False)
                signals.settle_timers(program, mine.pid, thread.tid, shared, private)


def _thread_core(
    got: Collected,
    mine: CollectedTask,
    thread: Thread,
    answers: threads.Answers,
    waiting: dict[int, restart.Waiting],
    frozen_at: int,
) -> dict[str, Any]:
    """The core_entry of one thread."""
    status = mine.statuses[thread.tid]
    comm = procfs.stat(mine.pid, thread.tid).comm.decode("utf-8", "surrogateescape")
    core = threads.save_core(thread, answers, creds.collect(status, answers.securebits), comm)
    core |= got.filters.collect(thread.tid, int(status.get("Seccomp", "0")))
    core["signals_p"] = signals.queue(ptrace.pending_signals(thread.tid, shared=False))
    core["blk_sigset"] = thread.mask
    deliverable = restart.is_deliverable(status, thread.mask)
    interrupted = restart.save(mine.task.voice, thread, waiting, deliverable, frozen_at)
    thread.resume_regs = restart.resume_registers(thread.regs, deliverable)
    if interrupted.entry:
        core["firn"]["restart"] = interrupted.entry
    core["cg_set"] = got.cgroup_sets.number(mine.cgroups.of_thread(thread.tid, got.thread_groups))
    return {
        "mtype": threads.X86_64,
        "thread_info": (interrupted.regs, thread.xstate, answers.tid_address),
        "thread_core": core,
    }
