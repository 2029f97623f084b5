"""Freezing a whole process tree.

A process that is frozen makes no children, so the tree is complete as soon as every child of every frozen process is
frozen too or known to be a zombie: newcomers are looked for until there are none. A child whose parent died while the
tree was walked turns up again below the subreaper that adopted it, if that is in the tree.
"""

from __future__ import annotations

import os
import time

from firn.abi import nr
from firn.abi import signal as sig
from firn.errors import FirnError, TargetError
from firn.host import procfs
from firn.tracee import seize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_POLL_S = 0.01
_CLONES = tuple(str(number).encode() for number in (nr.vfork, nr.clone, nr.clone3))


class Zombie:
    """A process that has ended and waits for its parent: its ids, name and wait status."""

    __slots__ = ("pid", "stat")

    def __init__(self, stat: procfs.Stat) -> None:
        self.pid = stat.pid
        self.stat = stat


class FrozenTree:
    """The frozen processes (``tasks``), parents before their children, and the zombies among them."""

    __slots__ = ("parents", "tasks", "zombies")

    def __init__(self) -> None:
        self.tasks: list[seize.Task] = []
        self.zombies: list[Zombie] = []
        self.parents: dict[int, int] = {}

    def pids(self) -> list[int]:
        """All pids, those of zombies last."""
        return [task.pid for task in self.tasks] + [zombie.pid for zombie in self.zombies]

    def threads(self) -> int:
        """How many threads are frozen."""
        return sum(len(task.threads) for task in self.tasks)

    def followers(self) -> list[int]:
        """The ids of all threads but the leaders."""
        return [thread.tid for task in self.tasks for thread in task.threads if thread.tid != task.pid]

    def release(self) -> None:
        """Let everything run on; one process's trouble does not keep the others."""
        trouble: list[Exception] = []
        for task in reversed(self.tasks):
            try:
                task.release()
            except (OSError, FirnError) as error:
                trouble.append(error)
        self.tasks = []
        if trouble:
            raise trouble[0]

    def kill(self) -> None:
        """End all processes: all are sent SIGKILL before any is waited for, so none sees another one missing."""
        for task in self.tasks:
            try:
                os.kill(task.pid, sig.SIGKILL)
            except ProcessLookupError:
                continue
        for task in self.tasks:
            task.await_death()
        self.tasks = []

    def stop(self) -> None:
        """Have all processes stopped by SIGSTOP once they are let go; if that fails, none."""
        for task in self.tasks:
            # Nothing of ours may run in the task after this: a program would take the signal.
            task.restore_state()
        for task in self.tasks:
            os.kill(task.pid, sig.SIGSTOP)


def walk(root: int) -> Iterator[int]:
    """The pids of the running tree below *root*, root first; what vanishes meanwhile is left out."""
    queue = [root]
    while queue:
        pid = queue.pop()
        yield pid
        try:
            queue += procfs.children(pid)
        except OSError:
            continue


def freeze(root: int, held: Container[int] = ()) -> FrozenTree:
    """Freeze *root* and all its descendants. Raises TargetError if one of them cannot be traced; then all run on.

    Threads in *held* are seized already.
    """
    tree = FrozenTree()
    try:
        tree.tasks.append(seize.freeze(root, held))
        tree.parents[root] = 0
        while _freeze_newcomers(tree, held):
            pass
    except BaseException:
        tree.release()
        raise
    return tree


def find_vforks(root: int) -> dict[int, tuple[int, list[int]]]:
    """Thread -> (process, its children), of those below *root* that cannot be frozen because they wait in vfork(2).

    The kernel lets such a thread stop for nothing but a deadly signal until its child executes a program or ends (state
    D, wait_for_vfork_done in kernel/fork.c), and until it stops nobody can read its registers.
    """
    found = {}
    for pid in walk(root):
        try:
            children = procfs.children(pid)
            for tid in procfs.threads(pid) if children else []:
                if procfs.stat(pid, tid).state != "D":
                    continue
                if procfs.read(f"/proc/{pid}/task/{tid}/syscall").split()[0] in _CLONES:
                    found[tid] = pid, children
        except (OSError, IndexError):
            continue
    return found


def vfork_error(found: dict[int, tuple[int, list[int]]]) -> TargetError | None:
    """The error that names one of those that wait in vfork(2)."""
    for pid, children in found.values():
        reason = f"process {pid} waits in vfork(2), and cannot be stopped before its child ends or executes a program"
        return TargetError(reason, f"children: {children}; try again later")
    return None


def await_vforks(root: int, seconds: float) -> None:
    """Give those that wait in vfork(2) some time, in which the tree runs. TargetError if the same one waits all the
    time: to wait longer, with a part of the tree frozen, would do nobody any good."""
    deadline = time.monotonic() + seconds
    waiting = find_vforks(root)
    while waiting:
        if time.monotonic() >= deadline:
            raise vfork_error(waiting) or AssertionError
        time.sleep(_POLL_S)
        now = find_vforks(root)
        waiting = {tid: what for tid, what in waiting.items() if now.get(tid) == what}


def _freeze_newcomers(tree: FrozenTree, held: Container[int]) -> bool:
    """One pass over the children of all frozen processes; whether there was a new one."""
    found = False
    for task in list(tree.tasks):
        for child in procfs.children(task.pid):
            if child not in tree.parents:
                found = True
                _take(tree, child, task.pid, held)
    return found


def _take(tree: FrozenTree, child: int, parent: int, held: Container[int]) -> None:
    """Freeze *child*, or note it as a zombie, if no thread of it lives. One that is gone is looked for again: its pid
    may soon be another's."""
    try:
        stat = procfs.stat(child)
        living = stat.state not in "ZX" or _is_running(child)
        if living:
            frozen = seize.freeze(child, held)
            tree.tasks.append(frozen)
            stat = procfs.stat(child)
            if stat.ppid != parent:
                # It was not the child any more when it was frozen, but an orphan, or one that got its pid.
                tree.tasks.remove(frozen)
                frozen.release()
                return
    except (TargetError, OSError) as error:
        if isinstance(error, TargetError) and _is_running(child):
            raise
        return
    tree.parents[child] = parent
    if not living:
        tree.zombies.append(Zombie(stat))


def _is_running(pid: int) -> bool:
    try:
        return procfs.stat(procfs.speaker(pid)).state not in "ZX"
    except OSError:
        return False
