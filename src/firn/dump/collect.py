"""The collect phase: everything about a frozen tree, in records of ours, and every obstacle at once."""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import signal as sig
from firn.dump import task as one
from firn.dump.task import CollectedTask, Patterns, Questions
from firn.errors import KernelError, Obstacle
from firn.host import kcmp, procfs
from firn.resources import base, births, cgroups, process, seccomp, semaphores
from firn.resources.files.descriptors import Collector, Descriptor
from firn.resources.files.memfd import MemoryObjects
from firn.resources.files.paths import PathFinder
from firn.resources.files.table import FileTable
from firn.resources.memory import areas
from firn.resources.namespaces import Namespaces
from firn.resources.threads import apart
from firn.tracee.steps import alone, together

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.orchestrator import Dump
    from firn.dump.tree import FrozenTree, Zombie
    from firn.host.undolists import UndoLists
    from firn.log import Log
    from firn.resources.files.segments import DumpedSegments

FIRST_KCMP_ID = 2
"""Ids of kernel objects: 1 is our own environment's, the first task gets 2."""
_OF_THREADS = ("files_id", "fs_id")
"""What single threads can have for themselves (unshare(2))."""
_KCMP = {"vm_id": fc.KCMP_VM, "files_id": fc.KCMP_FILES, "fs_id": fc.KCMP_FS, "sighand_id": fc.KCMP_SIGHAND}


class Collected:
    """Everything that a dump has collected; ``tasks`` as in the frozen tree."""

    def __init__(
        self, tree: FrozenTree, options: Any, obstacles: list[Obstacle], log: Log, with_keyrings: bool
    ) -> None:
        self.obstacles = obstacles
        self.table = FileTable()
        self.objects = MemoryObjects()
        self.segments: DumpedSegments | None = None
        self.finder = PathFinder(self.table, obstacles, options)
        self.filters = seccomp.Filters()
        self.cgroup_sets = cgroups.Sets()
        self.thread_groups: dict[int, cgroups.Cgroups] = {}
        self.collector = Collector(self.table, self.finder, self.objects, obstacles, options, tree.pids(), log.warn)
        self.tasks = [CollectedTask(task) for task in tree.tasks]
        self.zombies: list[tuple[int, dict[str, Any]]] = []
        self.patterns = Patterns(with_keyrings)
        self.mapped_stats: dict[tuple[object, ...], os.stat_result] = {}
        self.mapped_files: dict[tuple[object, ...], int] = {}
        """Files behind mappings by what maps tells of them, and their ids."""
        self.keyrings: dict[int, dict[str, Any]] = {}
        """Number -> what is in it; 0: the user's own."""
        self.reported: set[int] = set()
        """Processes whose parents have not yet taken notice that they are stopped, or go on."""
        self.pstree: list[dict[str, Any]] = []
        self.inventory: dict[str, Any] = {}
        self.semaphore_sets = semaphores.all_sets()
        self.undo_lists: UndoLists | None = None
        self.namespaces = Namespaces([(task.pid, task.voice) for task in tree.tasks], obstacles)

    def close(self) -> None:
        """Let go of descriptors held for contents."""
        self.collector.close()
        self.objects.close()
        if self.segments is not None:
            self.segments.close()
        self.finder.close()

    def statistics(self) -> dict[str, int]:
        """The page counts of stats_entry.dump."""
        total: dict[str, int] = {}
        for task in self.tasks:
            for name, value in task.memory.statistics().items():
                total[name] = total.get(name, 0) + value
        shared = self.objects.pages + (self.segments.pages if self.segments is not None else 0)
        return total | {"shpages_written": shared}


def collect(dump: Dump) -> Collected:
    """Collect the frozen tree of *dump*; what cannot be saved is in the obstacles of the result."""
    tree = dump.tree
    got = Collected(tree, dump.options, dump.obstacles, dump.log, dump.with_keyrings)
    got.collector.context.lock = dump.lock
    got.collector.context.backlogs = dump.backlogs
    got.collector.context.guard = dump.guard
    got.undo_lists = dump.undo_lists
    got.thread_groups = dump.thread_groups
    try:
        _check_borders(got, dump.options.shell_job)
        _number_objects(got, dump.early_sharing)
        _check_births(tree, got)
        for mine in got.tasks:
            one.look(got, mine, dump.early_maps.get(mine.pid), dump.options.fork_snapshot)
            if dump.requests is not None and any(area.kind == "aio" for area in mine.areas):
                dump.requests.check(mine.pid, mine.task.voice, got.obstacles)
        _number_apart(got)
        _collect_descriptors(got)
        _collect_rings(got, dump)
        _check_terminals(got, dump)
        if got.obstacles:
            return got
        children: dict[int, dict[int, bool]] = {}
        for task in tree.tasks:
            children.setdefault(tree.parents[task.pid], {})[task.pid] = bool(task.stop_signal)
        questions = [Questions(mine, children.get(mine.pid, {})) for mine in got.tasks]
        for first in range(0, len(questions), _AT_ONCE):
            _ask(questions[first : first + _AT_ONCE], got, dump)
        _check_listeners(got, tree)
        _check_parent_threads(got, tree, dump.log)
        _identity(tree, got, dump)
    except BaseException:
        got.close()
        raise
    return got


def _ask(questions: list[Questions], got: Collected, dump: Dump) -> None:
    """Ask processes about themselves, all at once."""
    together([each.prepare(got.patterns) for each in questions if not each.mine.task.shares_memory])
    for each in questions:
        if each.mine.task.shares_memory:
            alone(each.prepare(got.patterns))
    for each in questions:
        each.start(dump.partners, got.patterns)
    for each in questions:
        each.answer(got, dump.waiting, dump.frozen_at)


_AT_ONCE = 64
_NO_LOCK = 2
"""network_lock_method of an inventory: skip."""


def _collect_descriptors(got: Collected) -> None:
    """All descriptors; a table that several tasks share (CLONE_FILES) is collected once."""
    tables: dict[int, list[Descriptor]] = {}
    for mine in got.tasks:
        number = mine.ids["files_id"]
        if number not in tables:
            try:
                pidfd = base.pidfd_for_copies(mine.pid, mine.task.voice)
            except KernelError as error:
                got.obstacles.append(Obstacle(f"process {mine.pid}", error.message, error.hint))
                continue
            try:
                tables[number] = got.collector.collect(mine.pid, mine.task.voice, pidfd)
            finally:
                os.close(pidfd)
        mine.descriptors = tables[number]
    got.collector.finish()


def _collect_rings(got: Collected, dump: Dump) -> None:
    """Which packet sockets' rings are mapped. The contents are copied at once: the kernel goes on writing."""
    for mine in got.tasks:
        for parts in areas.whole_rings(mine.areas):
            from firn.resources.sockets import packet, rings

            if dump.ring_places is None:
                dump.ring_places = rings.sight()
            kind = got.collector.kinds.setdefault(base.PACKETSK, packet.PacketSockets())
            assert isinstance(kind, packet.PacketSockets)
            first, last = parts[0].map, parts[-1].map
            what = f"process {mine.pid}: mapping {first.start:x}-{last.end:x} of {first.name}"
            size = last.end - first.start if not first.offset else 0
            number = kind.map_rings(what, first.inode, size, dump.ring_places, got.obstacles)
            for area in parts:
                area.shmid = number


def _check_terminals(got: Collected, dump: Dump) -> None:
    """A session of the tree can take its terminal again only by a descriptor. (One from outside is the caller's, who
    has a terminal of his own.)"""
    sessions = {mine.stat.session: mine for mine in reversed(got.tasks)}
    for session, mine in sessions.items():
        device = mine.stat.tty
        if not device or session not in dump.tree.pids() or got.collector.leads_to(device):
            continue
        name = f"{os.major(device)}:{os.minor(device)}"
        reason = f"has the controlling terminal {name}, to which no descriptor of session {session} leads"
        if dump.options.shell_job:
            dump.log.warn(f"process {mine.pid} {reason}: it comes back without")
        else:
            help = "keep it open, or use --shell-job (-j): then it comes back without"
            got.obstacles.append(Obstacle(f"process {mine.pid}", reason, help))


def _check_listeners(got: Collected, tree: FrozenTree) -> None:
    """A filter of the tree that asks somebody outside (seccomp_unotify(2)) would ask nobody after a restore."""
    if not got.filters.asks():
        return
    from firn.host import holders

    holder = holders.with_link("anon_inode:seccomp notify", set(tree.pids()))
    if holder is not None:
        reason = f"has a seccomp filter that asks a listener, which {holder} may be"
        got.obstacles.append(Obstacle(f"process {tree.tasks[0].pid}", reason, "end it before the dump"))


def _check_parent_threads(got: Collected, tree: FrozenTree, log: Log) -> None:
    """A parent-death signal (PR_SET_PDEATHSIG) comes when the thread ends that made the child. After a restore all
    children are the first thread's; the log says for whom that makes a difference."""
    for mine in got.tasks:
        parent = tree.parents[mine.pid]
        if not parent or not any(core["thread_core"].get("pdeath_sig") for _, core in mine.cores):
            continue
        for tid in procfs.threads(parent):
            if tid != parent and str(mine.pid).encode() in procfs.read(f"/proc/{parent}/task/{tid}/children").split():
                log.warn(
                    f"process {mine.pid} wants a signal when thread {tid} of its parent {parent} ends: after a restore "
                    "it comes when the first thread does"
                )


def _check_borders(got: Collected, shell_job: bool) -> None:
    """What the tree shares with processes outside."""
    root = got.tasks[0]
    if root.stat.session != root.pid and not shell_job:
        got.obstacles.append(
            Obstacle(
                f"process {root.pid}",
                f"belongs to session {root.stat.session} of another process",
                "use --shell-job (-j)",
            )
        )
    parent = _outer_parent(got)
    for field, _, name in births.SHARED if parent else ():
        if _shares_outside(root.task.voice, parent, field):
            got.obstacles.append(
                Obstacle(f"process {root.pid}", f"shares its {name} with its parent {parent}", "dump both")
            )


def _outer_parent(got: Collected) -> int:
    """The parent of the tree; 0 if that is nobody, or we."""
    parent = got.tasks[0].stat.ppid
    return parent if parent != os.getpid() else 0


def _shares_outside(tid: int, other: int, field: str) -> bool:
    """Whether task *tid* shares what *field* of its ids stands for with a thread of process *other*, as far as we may
    know it."""
    try:
        speakers = procfs.threads(other) if field in _OF_THREADS else [procfs.speaker(other)]
    except OSError:
        return False
    for speaker in speakers:
        try:
            if kcmp.same(tid, speaker, _KCMP[field]):
                return True
        except OSError:
            continue  # it has ended, or we may not ask
    return False


Sharing = dict[str, list[list[int]]]
"""By field of a task's ids: the groups of those that share it, in the kernel's order."""


def look_at_sharing(pids: list[int]) -> Sharing:
    """What running processes share. The ids are those of :func:`.procfs.speaker`."""
    try:
        return {field: kcmp.groups(pids, code) for field, code in _KCMP.items()}
    except OSError:
        return {}  # somebody has ended


def _number_objects(got: Collected, early: Sharing) -> None:
    """Give everything that processes can share (CLONE_VM and so on) an id, the same to those that share it. What was
    seen *early* needs only to be confirmed."""
    numbers = {mine.task.voice: number for number, mine in enumerate(got.tasks, FIRST_KCMP_ID)}
    for field, code in _KCMP.items():
        grouped = [[pid for pid in group if pid in numbers] for group in early.get(field, [])]
        grouped = [group for group in grouped if group]
        if not kcmp.are_still(grouped, code):
            grouped = []
        seen = {pid for group in grouped for pid in group}
        for group in kcmp.groups([pid for pid in numbers if pid not in seen], code, grouped):
            first = min(numbers[pid] for pid in group)
            for pid in group:
                got.tasks[numbers[pid] - FIRST_KCMP_ID].ids[field] = first
    for mine in got.tasks:
        mine.task.shares_memory = False
    for number, mine in enumerate(got.tasks, FIRST_KCMP_ID):
        if mine.ids["vm_id"] != number:
            mine.sharer = got.tasks[mine.ids["vm_id"] - FIRST_KCMP_ID]
            mine.task.shares_memory = mine.sharer.task.shares_memory = True


def _number_apart(got: Collected) -> None:
    """Number the directories that single threads have for themselves."""
    own = {tid: entry for mine in got.tasks for tid, entry in mine.apart.items()}
    homes = {tid: mine.pid for mine in got.tasks for tid in (mine.task.voice, *mine.apart)}
    apart.number(own, homes, got.obstacles)
    parent = _outer_parent(got)
    for tid in own if parent else ():
        if _shares_outside(tid, parent, "fs_id"):
            apart.refuse(homes[tid], tid, parent, got.obstacles)


def _check_births(tree: FrozenTree, got: Collected) -> None:
    """Whether the tree can be born again, with its sessions and with what it shares."""
    members = [
        births.Member(
            mine.pid, tree.parents[mine.pid], mine.stat.session, shares=mine.ids, exit_signal=mine.stat.exit_signal
        )
        for mine in got.tasks
    ]
    for zombie in tree.zombies:
        stat = zombie.stat
        members.append(
            births.Member(stat.pid, tree.parents[stat.pid], stat.session, dead=True, exit_signal=stat.exit_signal)
        )
    plan = births.Plan(members)
    for pid, reason in plan.trouble:
        got.obstacles.append(Obstacle(f"process {pid}", reason, "end it, or have the others left by it too"))
    leaderless = set(plan.helpers())
    if leaderless:
        _check_outsiders(plan, leaderless, got.obstacles)


def _check_outsiders(plan: births.Plan, sessions: set[int], obstacles: list[Obstacle]) -> None:
    """Sessions whose leader is not in the tree must be all ours."""
    for pid in procfs.processes():
        try:
            session = procfs.stat(pid).session if pid not in plan.members or plan.members[pid].helper else 0
        except OSError:
            continue
        if session in sessions:
            member = next(m.pid for m in plan.members.values() if m.sid == session and not m.helper)
            obstacles.append(
                Obstacle(
                    f"process {member}",
                    f"belongs to session {session}, as does process {pid} outside of the tree",
                    "dump a tree that has both",
                )
            )
            sessions.discard(session)


def _identity(tree: FrozenTree, got: Collected, dump: Dump) -> None:
    for mine in got.tasks:
        mine.ids |= got.namespaces.task_ids
        own, reported = mine.cores[0][1]["tc"]["firn"], mine.pid in got.reported
        if mine.task.stop_signal and tree.parents[mine.pid] and not reported:
            own["stop_told"] = True
        elif reported and not mine.task.stop_signal:
            own["continued"] = True
    entries = {mine.pid: mine.pstree(tree.parents[mine.pid]) for mine in got.tasks}
    for zombie in tree.zombies:
        entries[zombie.pid] = _zombie_entry(zombie, tree.parents[zombie.pid])
        got.zombies.append((zombie.pid, _zombie_core(zombie)))
    got.pstree = _depth_first(entries)
    kcmp = {"vm_id": 1, "files_id": 1, "fs_id": 1, "sighand_id": 1}
    got.inventory = {"firn": {}} | ({"tcp_close": True} if dump.options.tcp_close else {})
    for ring in got.keyrings.values():
        if ring:
            got.inventory["firn"]["session_keyring"] = ring
    lock = dump.lock if dump.lock is not None and dump.lock.used else None
    got.inventory |= {
        "img_version": 2, "fdinfo_per_id": True, "root_ids": kcmp | got.namespaces.root_ids(), "ns_per_id": True,
        "root_cg_set": cgroups.ROOT_SET, "lsmtype": 0,
        "network_lock_method": lock.method if lock is not None else _NO_LOCK,
        "dump_criu_run_id": dump.run_id,
    }  # fmt: skip


def _depth_first(entries: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Parents before children, as the image wants it."""
    children: dict[int, list[int]] = {}
    for pid, entry in entries.items():
        children.setdefault(entry["ppid"], []).append(pid)
    ordered: list[dict[str, Any]] = []
    stack = children[0]
    while stack:
        pid = stack.pop()
        ordered.append(entries[pid])
        stack += reversed(children.get(pid, []))
    return ordered


def _zombie_entry(zombie: Zombie, ppid: int) -> dict[str, Any]:
    stat = zombie.stat
    return {"pid": zombie.pid, "ppid": ppid, "pgid": stat.pgrp, "sid": stat.session, "threads": [zombie.pid]}


def _zombie_core(zombie: Zombie) -> dict[str, Any]:
    none = {"isec": 0, "iusec": 0, "vsec": 0, "vusec": 0}
    tc = {
        "task_state": process.DEAD, "exit_code": zombie.stat.exit_code, "personality": 0, "flags": 0, "blk_sigset": 0,
        "comm": zombie.stat.comm.decode("utf-8", "surrogateescape"),
        "timers": {"real": none, "virt": none, "prof": none},
        "rlimits": {"rlimits": []}, "sigactions": [],
    }  # fmt: skip
    if zombie.stat.exit_signal != sig.SIGCHLD:
        tc["firn"] = {"exit_signal": zombie.stat.exit_signal}
    return {"mtype": 1, "tc": tc}
