"""The collect phase: everything about a frozen process, in records of ours.

Reads from outside what the kernel shows (/proc, ptrace, copies of descriptors) and asks the task itself for the rest: one
program in the leader, one small one in every other thread, all threads at once.
"""

from __future__ import annotations

import os
import stat as st_mode

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import Obstacle
from firn.host import features, procfs
from firn.resources import cgroups, creds, process, restart, seccomp, signals, threads, timers
from firn.resources.files.descriptors import Collector, Descriptor
from firn.resources.files.memfd import MemoryObjects
from firn.resources.files.paths import PathFinder
from firn.resources.base import MEMFD
from firn.resources.files.table import FileTable
from firn.resources.memory import aio, areas, layout
from firn.resources.memory.pages import ProcessPages
from firn.resources.namespaces import Namespaces
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.orchestrator import Dump
    from firn.tracee.program import Program
    from firn.tracee.seize import Task, Thread

FIRST_KCMP_ID = 2
"""Ids of kernel objects: 1 is our own environment's, the first task gets 2."""


class Collected:
    """Everything that a dump has collected. ``cores`` are (tid, core_entry) pairs, the leader's first."""

    def __init__(self, obstacles: list[Obstacle], ghost_limit: int, link_remap: bool) -> None:
        self.table = FileTable()
        self.objects = MemoryObjects()
        self.finder = PathFinder(self.table, obstacles, ghost_limit, link_remap)
        self.filters = seccomp.Filters()
        self.pid = 0
        self.cores: list[tuple[int, dict[str, Any]]] = []
        self.descriptors: list[Descriptor] = []
        self.fs: dict[str, Any] = {}
        self.mm: dict[str, Any] = {}
        self.areas: list[areas.Area] = []
        self.pstree: dict[str, Any] = {}
        self.ids: dict[str, int] = {}
        self.inventory: dict[str, Any] = {}
        self.collector: Collector | None = None
        self.namespaces: Namespaces
        self.cgroups: cgroups.Cgroups
        self.memory: ProcessPages

    def close(self) -> None:
        """Let go of descriptors held for contents."""
        if self.collector is not None:
            self.collector.close()
        self.objects.close()
        self.finder.close()

    def statistics(self) -> dict[str, int]:
        """The page counts of stats_entry.dump."""
        return self.memory.statistics()


def collect(dump: Dump, obstacles: list[Obstacle]) -> Collected:
    """Collect the frozen task of *dump*; what cannot be saved is added to *obstacles*."""
    task = dump.task
    assert task is not None
    pid = task.pid
    options = dump.options
    got = Collected(obstacles, options.ghost_limit, options.link_remap)
    got.pid = pid
    try:
        stat = procfs.stat(pid)
        _check_alone(pid, stat, options.shell_job, obstacles)
        got.namespaces = Namespaces(pid, obstacles)
        got.cgroups = cgroups.Cgroups(pid)
        statuses = {thread.tid: procfs.status(pid, thread.tid) for thread in task.threads}
        _check_seccomp(task, statuses)
        mapped = _collect_maps(dump, obstacles, got)
        got.collector = Collector(got.table, got.finder, got.objects, obstacles, options, [pid])
        got.descriptors = got.collector.collect(pid, dump.pidfd)
        got.collector.finish()
        _collect_fs(pid, statuses[pid], got)
        exe_id = _named_link(got, pid, "exe", os.O_RDONLY)
        if obstacles:
            return got
        answers = _ask(task, got, statuses, dump)
        _add_mapped_files(pid, mapped, got)
        got.areas = mapped
        got.mm = layout.save(pid, stat, answers, exe_id)
        got.mm["aios"] = [aio.save(pid, area.map.start, area.map.end) for area in mapped if area.kind == "aio"]
        future = layout.locks_future(pid, statuses[pid], task)
        if future:
            got.mm["firn"] = {"lock_future": future}
        got.memory = ProcessPages(pid, mapped, features.pagemap_scan())
        _identity(pid, stat, task, got)
    except BaseException:
        got.close()
        raise
    return got


def _check_alone(pid: int, stat: procfs.Stat, shell_job: bool, obstacles: list[Obstacle]) -> None:
    """Refuse what would need more than this one process."""
    what = f"process {pid}"
    for child in procfs.children(pid):
        obstacles.append(Obstacle(what, f"has the child process {child}", "process trees are not supported yet"))
    if stat.session != pid and not shell_job:
        obstacles.append(
            Obstacle(what, f"belongs to session {stat.session} of another process", "use --shell-job (-j)")
        )
    parent = stat.ppid
    if parent and parent != os.getpid():
        for kind, name in ((fc.KCMP_VM, "memory"), (fc.KCMP_FILES, "descriptor table"), (fc.KCMP_FS, "working directory")):
            try:
                if syscall("kcmp", nr.kcmp, pid, parent, kind, 0, 0) == 0:
                    obstacles.append(Obstacle(what, f"shares its {name} with its parent {parent}", "dump both"))
            except OSError:
                continue
    for name in ("attr/current",):
        try:
            label = procfs.read(f"/proc/{pid}/{name}").rstrip(b"\0\n").decode()
        except OSError:
            continue
        if label and label != "unconfined" and not label.startswith("unconfined"):
            obstacles.append(Obstacle(what, f"runs under the security label {label!r}", "labels are not supported yet"))


def _check_seccomp(task: Task, statuses: dict[int, dict[str, str]]) -> None:
    """Filters would stop our own calls inside the task: have the kernel suspend them while we are attached."""
    from firn.abi import ptrace as pt

    for thread in task.threads:
        if statuses[thread.tid].get("Seccomp", "0") != "0":
            ptrace.request(
                "suspend seccomp", pt.SETOPTIONS, thread.tid, 0, pt.O_TRACESYSGOOD | pt.O_SUSPEND_SECCOMP
            )


def _collect_maps(dump: Dump, obstacles: list[Obstacle], got: Collected) -> list[areas.Area]:
    """The mappings, with flags. Flags read before the freeze are taken if the maps are the same and reading is dear."""
    pid = dump.pid
    early = dump.early_maps
    if early is not None and (len(early) > 400 or dump.options.fork_snapshot):
        now = procfs.maps(pid)
        maps = early if [m.key() for m in now] == [m.key() for m in early] else procfs.smaps(pid)
    else:
        maps = procfs.smaps(pid)
    mapped = areas.classify(pid, maps, obstacles)
    areas.find_backing(pid, mapped, obstacles)
    return mapped


def _collect_fs(pid: int, status: dict[str, str], got: Collected) -> None:
    cwd = _named_link(got, pid, "cwd", os.O_RDONLY)
    root = _named_link(got, pid, "root", os.O_RDONLY)
    got.fs = {"cwd_id": cwd, "root_id": root, "umask": int(status["Umask"], 8)}


def _named_link(got: Collected, pid: int, name: str, flags: int) -> int:
    """The file id of what /proc/PID/*name* leads to."""
    link = f"/proc/{pid}/{name}"
    st = os.stat(link)
    return _plain_file(got, f"process {pid}: {name}", link, st, 0)


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


def _add_mapped_files(pid: int, mapped: list[areas.Area], got: Collected) -> None:
    """Give every mapping the file id of what it maps."""
    for area in mapped:
        if area.kind == "file":
            assert area.stat is not None
            what = f"process {pid}: mapping {area.map.start:x}-{area.map.end:x}"
            area.shmid = _plain_file(got, what, area.link(pid), area.stat, area.mode)
        elif area.kind == "shmem":
            area.shmid = _memory_object(pid, area, got)


def _memory_object(pid: int, area: areas.Area, got: Collected) -> int:
    assert area.stat is not None
    key = ("memory", area.stat.st_dev, area.stat.st_ino, area.mode)
    known = got.table.find(key)
    if known is not None:
        return known
    inode = got.objects.inode(area.link(pid), area.stat)
    message = {"flags": area.mode, "pos": 0, "fown": {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}}
    return got.table.add(MEMFD, {**message, "inode_id": inode}, key)


# -- asking the task ---------------------------------------------------------------------------------------------------


def _ask(task: Task, got: Collected, statuses: dict[int, dict[str, str]], dump: Dump) -> process.Answers:
    """Run the programs, and build the core entries from the answers."""
    pid = task.pid
    posix = procfs.timers(pid)
    task.prepare(extra=65536 + 128 * len(posix))
    program = task.program(size=65536 + 128 * len(posix))
    asked_process = process.ask(program)
    asked_actions = signals.ask(program)
    asked_timers = timers.ask(program, posix)
    asked_threads = [(task.leader, program, threads.ask(program))]
    for thread in task.threads[1:]:
        own = task.program(thread, size=1024)
        asked_threads.append((thread, own, threads.ask(own)))
    for _, own, _ in asked_threads:
        own.start()
    for _, own, _ in asked_threads:
        own.finish()
    answers = process.Answers(program, asked_process)
    tc = process.save(pid, procfs.stat(pid), answers)
    tc["timers"] = timers.answer(program, asked_timers)
    tc["sigactions"] = signals.answer(program, asked_actions)
    thread_answers = [threads.Answers(own, asked) for _, own, asked in asked_threads]
    _settle_timers(task, statuses, asked_threads)
    tc["signals_s"] = signals.queue(ptrace.pending_signals(pid, shared=True))
    tc["task_state"] = process.STOPPED if task.stop_signal else process.ALIVE
    if task.stop_signal:
        tc["stop_signo"] = task.stop_signal
    ignored = int(statuses[pid]["SigIgn"], 16)
    for thread, said in zip(task.threads, thread_answers, strict=True):
        got.cores.append((thread.tid, _thread_core(thread, said, got, statuses[thread.tid], ignored, dump)))
    tc["blk_sigset"] = task.leader.mask
    got.cores[0][1]["tc"] = tc
    return answers


def _settle_timers(task: Task, statuses: dict[int, dict[str, str]], programs: list[tuple[Thread, Program, Any]]) -> None:
    """Pending timer signals must know their overruns before the queues are read."""
    for thread, program, _ in programs:
        status = statuses[thread.tid]
        leader = thread is task.leader
        if int(status["SigPnd"], 16) or (leader and int(status["ShdPnd"], 16)):
            shared = ptrace.pending_signals(task.pid, shared=True) if leader else []
            private = ptrace.pending_signals(thread.tid, shared=False)
            signals.settle_timers(program, task.pid, thread.tid, shared, private)


def _thread_core(
    thread: Thread, answers: threads.Answers, got: Collected, status: dict[str, str], ignored: int, dump: Dump
) -> dict[str, Any]:
    entry = creds.collect(status, answers.securebits)
    core = threads.save_core(thread, answers, entry, procfs.stat(got.pid, thread.tid).comm.decode("utf-8", "surrogateescape"))
    core |= got.filters.collect(thread.tid, int(status.get("Seccomp", "0")))
    core["signals_p"] = signals.queue(ptrace.pending_signals(thread.tid, shared=False))
    core["blk_sigset"] = thread.mask
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    deliverable = bool(pending & ~thread.mask & ~ignored)
    interrupted = restart.save(got.pid, thread, dump.waiting, deliverable, dump.frozen_at)
    thread.resume_regs = restart.resume_registers(thread.regs, deliverable)
    regs = threads.leave_critical_section(got.pid, interrupted.regs, core)
    if interrupted.entry:
        core["firn"]["restart"] = interrupted.entry
    core["cg_set"] = got.cgroups.set_id
    return {"mtype": threads.X86_64, "thread_info": (regs, thread.xstate, answers.tid_address), "thread_core": core}


def _identity(pid: int, stat: procfs.Stat, task: Task, got: Collected) -> None:
    kcmp = {"vm_id": 1, "files_id": 1, "fs_id": 1, "sighand_id": 1}
    got.ids = {name: FIRST_KCMP_ID for name in kcmp} | got.namespaces.task_ids
    got.pstree = {
        "pid": pid, "ppid": 0, "pgid": stat.pgrp, "sid": stat.session, "threads": [thread.tid for thread in task.threads],
    }  # fmt: skip
    got.inventory = {
        "img_version": 2, "fdinfo_per_id": True, "root_ids": kcmp | got.namespaces.root_ids(), "ns_per_id": True,
        "root_cg_set": cgroups.ROOT_SET, "lsmtype": 0, "network_lock_method": 2, "dump_criu_run_id": _run_id(),
    }  # fmt: skip


def _run_id() -> str:
    raw = os.urandom(16).hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
