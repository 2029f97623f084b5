"""The collect phase: everything about a frozen tree, in records of ours, and every obstacle at once."""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import syscall
from firn.dump import task as one
from firn.dump.task import CollectedTask, Questions
from firn.errors import Obstacle
from firn.resources import cgroups, process, seccomp, semaphores
from firn.resources.files.descriptors import Collector
from firn.resources.files.memfd import MemoryObjects
from firn.resources.files.paths import PathFinder
from firn.resources.files.table import FileTable
from firn.resources.namespaces import Namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.orchestrator import Dump
    from firn.dump.tree import FrozenTree, Zombie
    from firn.log import Log

FIRST_KCMP_ID = 2
"""Ids of kernel objects: 1 is our own environment's, the first task gets 2."""
_KCMP = (
    ("vm_id", fc.KCMP_VM, "memory"), ("fs_id", fc.KCMP_FS, "directories"), ("sighand_id", fc.KCMP_SIGHAND, "handlers"),
)  # fmt: skip


class Collected:
    """Everything that a dump has collected; ``tasks`` as in the frozen tree."""

    def __init__(self, tree: FrozenTree, options: Any, obstacles: list[Obstacle], log: Log) -> None:
        self.obstacles = obstacles
        self.table = FileTable()
        self.objects = MemoryObjects()
        self.finder = PathFinder(self.table, obstacles, options)
        self.filters = seccomp.Filters()
        self.cgroup_sets = cgroups.Sets()
        self.collector = Collector(self.table, self.finder, self.objects, obstacles, options, tree.pids(), log.warn)
        self.tasks = [CollectedTask(task) for task in tree.tasks]
        self.zombies: list[tuple[int, dict[str, Any]]] = []
        self.pstree: list[dict[str, Any]] = []
        self.inventory: dict[str, Any] = {}
        self.namespaces = Namespaces([task.pid for task in tree.tasks], obstacles)

    def close(self) -> None:
        """Let go of descriptors held for contents."""
        self.collector.close()
        self.objects.close()
        self.finder.close()

    def statistics(self) -> dict[str, int]:
        """The page counts of stats_entry.dump."""
        total: dict[str, int] = {}
        for task in self.tasks:
            for name, value in task.memory.statistics().items():
                total[name] = total.get(name, 0) + value
        return total | {"shpages_written": self.objects.pages}


def collect(dump: Dump) -> Collected:
    """Collect the frozen tree of *dump*; what cannot be saved is in the obstacles of the result."""
    tree = dump.tree
    got = Collected(tree, dump.options, dump.obstacles, dump.log)
    try:
        _check_borders(tree, got, dump.options.shell_job)
        for mine in got.tasks:
            maps = dump.early_maps.get(mine.pid)
            if maps is not None and len(maps) <= 400 and not dump.options.fork_snapshot:
                maps = None  # reading the flags again costs little here, and is exact
            one.look(got, mine, maps)
        _collect_descriptors(tree, got)
        _check_terminals(got, dump)
        if got.obstacles:
            return got
        for first in range(0, len(got.tasks), _AT_ONCE):
            running = [Questions(mine) for mine in got.tasks[first : first + _AT_ONCE]]
            for questions in running:
                questions.answer(got, dump.waiting, dump.frozen_at)
        _identity(tree, got, dump.options.tcp_close)
    except BaseException:
        got.close()
        raise
    return got


_AT_ONCE = 64


def _collect_descriptors(tree: FrozenTree, got: Collected) -> None:
    """All descriptors; a table that several tasks share (CLONE_FILES) is collected once and gets one id."""
    for index, mine in enumerate(got.tasks):
        shared = next((other for other in got.tasks[:index] if _same(mine.pid, other.pid, fc.KCMP_FILES)), None)
        if shared is not None:
            if tree.parents[mine.pid] != shared.pid and shared.ids["files_id"] not in _ids_of(
                got, tree.parents[mine.pid]
            ):
                got.obstacles.append(
                    Obstacle(
                        f"process {mine.pid}",
                        f"shares its descriptor table with process {shared.pid}, but not with its parent",
                        "not supported yet",
                    )
                )
            mine.ids["files_id"] = shared.ids["files_id"]
            mine.descriptors = shared.descriptors
            continue
        mine.ids["files_id"] = FIRST_KCMP_ID + index
        pidfd = syscall(f"pidfd_open {mine.pid}", nr.pidfd_open, mine.pid, 0)
        try:
            mine.descriptors = got.collector.collect(mine.pid, pidfd)
        finally:
            os.close(pidfd)
    got.collector.finish()


def _ids_of(got: Collected, pid: int) -> list[int]:
    return [task.ids["files_id"] for task in got.tasks if task.pid == pid]


def _check_sessions(tree: FrozenTree, got: Collected) -> None:
    """Every process must be in its own session, its parent's, or the one that its parent was born in: nothing else
    comes back by being cloned (:mod:`firn.restore.family`)."""
    stats = {mine.pid: mine.stat for mine in got.tasks} | {zombie.pid: zombie.stat for zombie in tree.zombies}
    root = got.tasks[0].pid
    born_in = {root: stats[root].session}
    for pid, stat in stats.items():
        parent = tree.parents[pid]
        if pid == root:
            continue
        left = born_in.get(parent, 0)
        born_in[pid] = left if stat.session == left else stats[parent].session
        if stat.session not in (pid, stats[parent].session, left):
            got.obstacles.append(
                Obstacle(
                    f"process {pid}", f"belongs to session {stat.session}, whose leader is gone", "not supported yet"
                )
            )


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


def _same(pid: int, other: int, what: int) -> bool:
    """Whether two tasks share a kernel object."""
    return syscall(f"kcmp of processes {pid} and {other}", nr.kcmp, pid, other, what, 0, 0) == 0


def _check_borders(tree: FrozenTree, got: Collected, shell_job: bool) -> None:
    """What the tree shares with processes outside, or in a way that cannot be made again."""
    root = got.tasks[0]
    if root.stat.session != root.pid and not shell_job:
        got.obstacles.append(
            Obstacle(
                f"process {root.pid}",
                f"belongs to session {root.stat.session} of another process",
                "use --shell-job (-j)",
            )
        )
    parent = root.stat.ppid
    if parent and parent != os.getpid():
        for _, code, name in (*_KCMP, ("files_id", fc.KCMP_FILES, "descriptor table")):
            if _same_outside(root.pid, parent, code):
                got.obstacles.append(
                    Obstacle(f"process {root.pid}", f"shares its {name} with its parent {parent}", "dump both")
                )
    _check_sessions(tree, got)
    for index, mine in enumerate(got.tasks):
        semaphores.find_undo(mine.pid, [thread.tid for thread in mine.task.threads], got.obstacles)
        for field, code, name in _KCMP:
            mine.ids[field] = FIRST_KCMP_ID + index
            other = next((task for task in got.tasks[:index] if _same(mine.pid, task.pid, code)), None)
            if other is not None:
                got.obstacles.append(
                    Obstacle(f"process {mine.pid}", f"shares its {name} with process {other.pid}", "not supported yet")
                )


def _same_outside(pid: int, other: int, what: int) -> bool:
    try:
        return _same(pid, other, what)
    except OSError:
        return False


def _identity(tree: FrozenTree, got: Collected, tcp_close: bool) -> None:
    for mine in got.tasks:
        mine.ids |= got.namespaces.task_ids
    entries = {mine.pid: mine.pstree(tree.parents[mine.pid]) for mine in got.tasks}
    for zombie in tree.zombies:
        entries[zombie.pid] = _zombie_entry(zombie, tree.parents[zombie.pid])
        got.zombies.append((zombie.pid, _zombie_core(zombie)))
    got.pstree = _depth_first(entries)
    kcmp = {"vm_id": 1, "files_id": 1, "fs_id": 1, "sighand_id": 1}
    got.inventory = {"tcp_close": True} if tcp_close else {}
    got.inventory |= {
        "img_version": 2, "fdinfo_per_id": True, "root_ids": kcmp | got.namespaces.root_ids(), "ns_per_id": True,
        "root_cg_set": cgroups.ROOT_SET, "lsmtype": 0, "network_lock_method": 2, "dump_criu_run_id": _run_id(),
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
    return {"mtype": 1, "tc": tc}


def _run_id() -> str:
    raw = os.urandom(16).hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
