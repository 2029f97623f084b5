"""Collecting one frozen process of a tree into records.

Reads from outside what the kernel shows (/proc, ptrace, copies of descriptors) and asks the task itself for the rest:
one program in the leader, one small one in every other thread, all threads at once.
"""

from __future__ import annotations

import errno
import os
import stat as st_mode

from firn.abi import fcntl as fc
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.errors import Obstacle, TargetError
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
from firn.tracee.program import Recording
from firn.tracee.seize import THREAD_AREA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.collect import Collected
    from firn.dump.early import EarlyMaps
    from firn.tracee.program import Program
    from firn.tracee.seize import Task, Thread
    from firn.tracee.steps import Steps

_PROGRAM_SIZE = 65536


class CollectedTask:
    """Everything about one process. ``cores`` are (tid, core_entry) pairs, the leader's first; their thread_info is
    still raw, see :mod:`firn.dump.save`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pid = task.pid
        self.stat = task.stat
        self.voice_stat = procfs.stat(task.pid, task.voice) if task.headless else self.stat
        """The first has what is the process's, this one what a thread has only while it lives (memory, flags)."""
        self.statuses = {thread.tid: procfs.status(task.pid, thread.tid) for thread in task.threads}
        self.cgroups = cgroups.Cgroups(task.voice)
        self.maps: list[procfs.Map] | None = None
        self.areas: list[areas.Area] = []
        self.descriptors: list[Descriptor] = []
        self.fs: dict[str, Any] = {}
        self.apart: dict[int, dict[str, Any]] = {}
        """The firn_directories of threads that have their own, by thread id."""
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


def look(got: Collected, mine: CollectedTask, early: EarlyMaps | None, flags_follow: bool) -> None:
    """First part: what is seen from outside, and with it most obstacles. *early*, *flags_follow*: see
    :func:`_find_maps`."""
    pid, voice = mine.pid, mine.task.voice
    maps = _find_maps(mine, early, flags_follow) if mine.sharer is None else None
    _suspend_seccomp(mine)
    _leave_critical_sections(mine)
    _check_label(mine, got.obstacles)
    policies.look(pid, mine.statuses, got.obstacles)
    _look_at_threads(got, mine)
    if maps is not None:
        mine.maps = maps
        mine.areas = areas.classify(pid, maps, got.obstacles)
        areas.find_backing(voice, mine.areas, got.obstacles, got.mapped_stats)
        _add_segments(got, mine)
    mine.fs = _directories(got, mine, voice)
    mine.exe_id = _named_link(got, mine, voice, "exe")


_MANY_MAPS = 400


def _find_maps(mine: CollectedTask, early: EarlyMaps | None, flags_follow: bool) -> list[procfs.Map]:
    """Mappings with flags. Those read *early* are taken where nothing can have changed; also where they are so many
    that to read them all again takes too long, or their flags are to be read later (*flags_follow*): then only that the
    mappings are the same is looked at, not whether an madvise has changed a whole one."""
    voice = mine.task.voice
    if early is not None:
        if early.are_still(mine):
            return early.maps
        if flags_follow or len(early.maps) > _MANY_MAPS:
            now = procfs.maps(voice)
            if [m.identity() for m in now] == [m.identity() for m in early.maps]:
                return early.maps
    return procfs.smaps(voice)


def _suspend_seccomp(mine: CollectedTask) -> None:
    """Filters would stop our own calls inside the task: have the kernel suspend them while we are attached."""
    if mine.trace_options() != pt.O_TRACESYSGOOD:
        for thread in mine.task.threads:
            ptrace.request("suspend seccomp", pt.SETOPTIONS, thread.tid, 0, mine.trace_options())


def _leave_critical_sections(mine: CollectedTask) -> None:
    """Must come before the first program: the kernel forgets a thread's rseq critical section when it runs outside of
    it."""
    for thread in mine.task.threads:
        thread.regs = thread.resume_regs = threads.leave_critical_section(mine.task.voice, thread)


def _look_at_threads(got: Collected, mine: CollectedTask) -> None:
    """What a thread can have for itself though usually a process has it (unshare(2), setns(2))."""
    voice, others, obstacles = mine.task.voice, mine.task.threads[1:], got.obstacles
    known = namespaces.links(voice) if others else {}
    for thread in others:
        what = f"process {mine.pid}: thread {thread.tid}"
        if mine.statuses[thread.tid]["Name"].startswith("iou-") and _is_ring_worker(mine.pid, thread.tid):
            reason = "is a worker of an io_uring, whose requests live in the kernel"
            obstacles.append(Obstacle(what, reason, "close its rings before the dump"))
        namespaces.check_thread(mine.pid, thread.tid, known, obstacles)
        if not kcmp.same(voice, thread.tid, fc.KCMP_FILES):
            reason = "has descriptors of its own (unshare), which images cannot hold"
            obstacles.append(Obstacle(what, reason, "use a process for it"))
        if not kcmp.same(voice, thread.tid, fc.KCMP_FS):
            mine.apart[thread.tid] = {"fs": _directories(got, mine, thread.tid)}


def _is_ring_worker(pid: int, tid: int) -> bool:
    """Whether the thread is one of io_uring's. Newer kernels let it be traced, but it has no user space to run in."""
    return bool(procfs.stat(pid, tid).flags & procfs.PF_IO_WORKER)


def _check_label(mine: CollectedTask, obstacles: list[Obstacle]) -> None:
    label = _label(mine.task.voice)
    if label and not label.startswith("unconfined"):
        obstacles.append(
            Obstacle(f"process {mine.pid}", f"runs under the security label {label!r}", "labels are not supported yet")
        )


_unlabelled: list[OSError] = []
"""Why nobody has a label: no security module gives any (security_getprocattr in security/security.c)."""


def _label(pid: int) -> str:
    if not _unlabelled:
        try:
            return procfs.read_record(f"/proc/{pid}/attr/current").rstrip(b"\0\n").decode()
        except OSError as error:
            if error.errno == errno.EINVAL:
                _unlabelled.append(error)
    return ""


def _directories(got: Collected, mine: CollectedTask, tid: int) -> dict[str, Any]:
    """The fs_entry of thread *tid*."""
    cwd, root = _named_link(got, mine, tid, "cwd"), _named_link(got, mine, tid, "root")
    return {"cwd_id": cwd, "root_id": root, "umask": int(mine.statuses[tid]["Umask"], 8)}


def _named_link(got: Collected, mine: CollectedTask, tid: int, name: str) -> int:
    """The file id of what /proc/TID/*name* of thread *tid* leads to."""
    link = f"/proc/{tid}/{name}"
    what = f"process {mine.pid}: {name}" if tid == mine.task.voice else f"process {mine.pid}: thread {tid}: {name}"
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
    try:
        path = os.readlink(link)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        got.obstacles.append(Obstacle(what, "has a path that is longer than the kernel tells (4095 bytes)"))
        return 0
    key = ("plain", st.st_dev, st.st_ino, path, mode)
    known = got.table.find(key)
    if known is not None:
        return known
    message = {"flags": mode, "pos": 0}
    if not (st_mode.S_ISREG(st.st_mode) or st_mode.S_ISDIR(st.st_mode)):
        message["pos"] = (1 << 64) - 1
    return got.finder.add(what, link, message, st, key)


def _add_mapped_files(got: Collected, mine: CollectedTask) -> None:
    """Give every mapping the file id of what it maps."""
    known = got.mapped_files
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


class Asked:
    """Where the answers lie to what a process's leader was asked."""

    __slots__ = ("actions", "children", "keyrings", "keys", "locked", "policies", "process", "thread", "timers")

    def __init__(
        self,
        program: Program,
        posix: list[procfs.PosixTimer],
        children: dict[int, bool],
        partner: int,
        with_keyrings: bool,
    ) -> None:
        self.process = process.ask(program)
        self.actions = signals.ask(program)
        self.timers = timers.ask(program, posix)
        self.keys = pkeys.ask(program)
        self.locked = layout.ask(program)
        self.children = stops.ask(program, children)
        self.thread = threads.ask(program)
        self.keyrings = keyrings.ask(program) if with_keyrings else None
        self.policies = policies.ask(program, partner)


class Patterns:
    """Programs of leaders that were asked before: most processes are asked the same, at the same place."""

    def __init__(self, with_keyrings: bool) -> None:
        self.with_keyrings = with_keyrings
        """Whether session keyrings are asked for, of everybody."""
        self.place = 0
        """Where the last scratch area was put."""
        self._known: dict[tuple[int, int], tuple[Recording, Asked]] = {}

    def ask(
        self, program: Program, posix: list[procfs.PosixTimer], children: dict[int, bool], partner: int
    ) -> Asked:
        """Fill *program*, which is empty."""
        if posix or children:
            return Asked(program, posix, children, partner, self.with_keyrings)
        key = program.area, partner
        if key not in self._known:
            asked = Asked(program, [], {}, partner, self.with_keyrings)
            self._known[key] = Recording(program), asked
            return asked
        recording, asked = self._known[key]
        program.repeat(recording)
        return asked


class Questions:
    """The programs of one process: :meth:`prepare` makes room for them, :meth:`start` has them run, and :meth:`answer`
    waits for their end."""

    def __init__(self, mine: CollectedTask, children: dict[int, bool]) -> None:
        self.mine = mine
        self.children = children
        self.posix = procfs.timers(mine.task.voice)
        self.size = _PROGRAM_SIZE + timers.SIZE * len(self.posix) + stops.SIZE * len(children)
        self.asked: Asked
        self.keyrings: list[tuple[Thread, Program, tuple[int, int]]] = []
        self.threads: list[tuple[Thread, Program, threads.Asked, policies.Asked]] = []

    def prepare(self, patterns: Patterns) -> Steps[None]:
        """Map the scratch area."""
        task = self.mine.task
        for _ in task.preparing(self.size, self.mine.maps, patterns.place, self.mine.statuses[task.voice]):
            if task.scratch is not None:
                patterns.place = task.scratch.code
            yield

    def start(self, partners: policies.Partners, patterns: Patterns) -> None:
        """Build the programs and let them run."""
        task, statuses = self.mine.task, self.mine.statuses
        program = task.program(size=self.size)
        partner = partners.of(statuses[task.voice])
        asked = patterns.ask(program, self.posix, self.children, partner)
        self.asked = asked
        self.threads = [(task.leader, program, asked.thread, asked.policies)]
        if asked.keyrings is not None:
            self.keyrings.append((task.leader, program, asked.keyrings))
        for thread in task.threads[1:]:
            own = task.program(thread, size=THREAD_AREA, status=statuses[thread.tid])
            asked_thread = threads.ask(own)
            if patterns.with_keyrings:
                self.keyrings.append((thread, own, keyrings.ask(own)))
            partner = partners.of(statuses[thread.tid])
            self.threads.append((thread, own, asked_thread, policies.ask(own, partner)))
        for _, own, _, _ in self.threads:
            if own.results:
                # A part was run to make room for the rest, which overwrites its answers.
                raise TargetError(f"process {self.mine.pid}: the questions to it do not fit their area")
            own.start()

    def answer(self, got: Collected, waiting: dict[int, restart.Waiting], frozen_at: int) -> None:
        """Wait for the programs, and build the records from what they brought."""
        mine, pid, voice = self.mine, self.mine.pid, self.mine.task.voice
        for _, own, _, _ in self.threads:
            own.finish()
        program = self.threads[0][1]
        answers = process.Answers(program, self.asked.process)
        process.check_segments(pid, [thread.regs for thread in mine.task.threads], answers, got.obstacles)
        tc = process.save(voice, mine.voice_stat, answers)
        if mine.stat.exit_signal != sig.SIGCHLD:
            tc["firn"]["exit_signal"] = mine.stat.exit_signal
        if mine.stat.session == mine.pid and (nice := process.session_nice(voice)):
            tc["firn"]["session_nice"] = nice
        tc["timers"] = timers.answer(program, self.asked.timers)
        got.reported |= stops.answer(program, self.asked.children)
        tc["sigactions"] = signals.answer(program, self.asked.actions)
        said = {thread.tid: threads.Answers(own, asked) for thread, own, asked, _ in self.threads}
        rare = {
            thread.tid: policies.answer(own, asked, pid, thread.tid, mine.statuses[thread.tid], got.obstacles)
            for thread, own, _, asked in self.threads
        }
        self._find_undo(got)
        self._find_keyrings(got)
        self._settle_timers(said)
        tc["signals_s"] = signals.queue(_queued(mine.task, mine.task.leader, said[voice], shared=True))
        stopped = mine.task.stop_signal
        tc["task_state"] = process.STOPPED if stopped else process.ALIVE
        if stopped:
            tc["stop_signo"] = stopped
        for thread in mine.task.threads:
            core = _thread_core(got, mine, thread, said[thread.tid], waiting, frozen_at)
            core["thread_core"]["firn"] |= rare[thread.tid]
            mine.cores.append((thread.tid, core))
        numa.collect(voice, mine.areas, (rare[voice].get("numa_mode", 0), rare[voice].get("numa_nodes", b"")))
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
        program = self.threads[0][1]
        future = layout.locks_future(voice, program, self.asked.locked)
        keys = pkeys.answer(program, self.asked.keys)
        if future or keys:
            mine.mm["firn"] = {"lock_future": future, "pkeys": keys}
        mine.memory = ProcessPages(pid, mine.areas, features.pagemap_scan())

    def _find_undo(self, got: Collected) -> None:
        pid, used = self.mine.pid, [each for each in got.semaphore_sets if each.used]
        if not used:
            return
        holders = semaphores.holders([thread.tid for thread, *_ in self.threads])
        for thread, program, *_ in self.threads:
            if thread.tid not in holders:
                continue
            found = None
            if got.undo_lists is not None:
                found = semaphores.see_undo(got.undo_lists, thread.tid, pid, got.semaphore_sets)
            if found is None:
                found = semaphores.ask_undo(program, pid, self.mine.statuses[thread.tid], used)
            got.obstacles += found

    def _find_keyrings(self, got: Collected) -> None:
        """The session keyrings: each is read by the first thread that has it, as is that there is none."""
        for thread, program, asked in self.keyrings:
            number = keyrings.answer(program, asked)
            what = f"process {self.mine.pid}: thread {thread.tid}"
            if number not in got.keyrings:
                if got.keyrings:
                    reason = "has another session keyring than the rest of the tree, which images cannot hold"
                    got.obstacles.append(Obstacle(what, reason, "start all of it in one session"))
                got.keyrings[number] = keyrings.read(program, number, what, got.obstacles) if number else {}

    def _settle_timers(self, said: dict[int, threads.Answers]) -> None:
        """Pending timer signals must know their overruns before the queues are read."""
        for thread, program, *_ in self.threads:
            if said[thread.tid].pending:
                leader = thread is self.mine.task.leader
                shared = ptrace.pending_signals(thread.tid, shared=True) if leader else []
                private = ptrace.pending_signals(thread.tid, shared=False)
                signals.settle_timers(program, self.mine.pid, thread.tid, shared, private)


def _queued(task: Task, thread: Thread, answers: threads.Answers, shared: bool) -> list[bytes]:
    """The signals that are queued for *thread*; the kernel is asked only if it has some, or had some that we took."""
    asks = answers.pending or any(each.taken for each in task.threads)
    return task.pending(thread, shared) if asks else []


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
    stat = mine.voice_stat if thread.tid == mine.task.voice else procfs.stat(mine.pid, thread.tid)
    comm = stat.comm.decode("utf-8", "surrogateescape")
    core = threads.save_core(thread, answers, creds.collect(status, answers.securebits), comm)
    core |= got.filters.collect(thread.tid, int(status.get("Seccomp", "0")))
    core["signals_p"] = signals.queue(_queued(mine.task, thread, answers, shared=False))
    core["blk_sigset"] = thread.mask
    deliverable = restart.is_deliverable(status, thread.mask)
    interrupted = restart.save(mine.task.voice, thread, waiting, deliverable, frozen_at)
    thread.resume_regs = restart.resume_registers(thread.regs, deliverable)
    if interrupted.entry:
        core["firn"]["restart"] = interrupted.entry
    if thread.tid in mine.apart:
        core["firn"]["directories"] = mine.apart[thread.tid]
    core["cg_set"] = got.cgroup_sets.number(mine.cgroups.of_thread(thread.tid, got.thread_groups))
    return {
        "mtype": threads.X86_64,
        "thread_info": (interrupted.regs, thread.xstate, answers.tid_address),
        "thread_core": core,
    }
