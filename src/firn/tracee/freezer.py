"""Stopping a tree by the freezer of its control group (``--freeze-cgroup``), so that no task of it gets away meanwhile.

State owned: whether the group was frozen, and the processes in it that are not of the tree. Kernel: v1
``freezer.state``, v2 ``cgroup.freeze`` and ``cgroup.events`` (Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/freezer-subsystem.rst). A frozen task can be seized by ptrace(2) and told to stop, and does so before anything
else once the group is thawed; so the group is frozen, everything in it seized, and the group thawed again. What was
frozen when the dump began is frozen again at the end, as soon as it needs not run for us any more. What goes wrong: a
group that does not freeze; processes in it that somebody else traces.
"""

from __future__ import annotations

import os
import time

from firn.errors import TargetError, UsageError
from firn.host import procfs
from firn.tracee import seize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_POLL_S = 0.005
_PATIENCE_S = 10
"""How long a group may take to freeze if there is no other limit."""


class Freezer:
    """The control group in folder *path*. Raises UsageError if it has no freezer."""

    def __init__(self, path: str) -> None:
        self.path = path
        for name, told, words in (("freezer.state", "freezer.state", (b"THAWED", b"FROZEN")),
                                  ("cgroup.freeze", "cgroup.events", (b"0", b"1"))):  # fmt: skip
            if os.path.exists(f"{path}/{name}"):
                self._file, self._told, self._words = f"{path}/{name}", f"{path}/{told}", words
                break
        else:
            raise UsageError(f"--freeze-cgroup: {path} is no control group with a freezer")
        self.was_frozen = procfs.read(self._file).strip() != self._words[0]
        self.strangers: list[seize.Task] = []
        self._thaw_again = False

    def _set(self, frozen: bool) -> None:
        fd = os.open(self._file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, self._words[frozen])
        finally:
            os.close(fd)

    def _is_frozen(self) -> bool:
        words = procfs.read(self._told).split()
        return words == [b"FROZEN"] or words[words.index(b"frozen") + 1 :][:1] == [b"1"] if words else False

    def pids(self) -> list[int]:
        """All processes in the group and the groups below it."""
        found = []
        for folder, _, _ in os.walk(self.path):
            found += [int(word) for word in procfs.read(f"{folder}/cgroup.procs").split()]
        return found

    def hold(self, timeout: int) -> set[int]:
        """Seize every thread in the group, and have it stop before anything else: their ids. *timeout* in seconds."""
        if os.getpid() in self.pids():
            raise UsageError(f"--freeze-cgroup: firn itself is in {self.path}")
        limit = time.monotonic() + (timeout or _PATIENCE_S)
        held: set[int] = set()
        try:
            self._thaw_again = True
            self._set(True)
            while not self._is_frozen():
                if time.monotonic() > limit:
                    raise TargetError(f"the control group {self.path} does not freeze", "a task hangs in it")
                time.sleep(_POLL_S)
            for pid in self.pids():
                if not procfs.stat(pid).flags & procfs.PF_KTHREAD:
                    held |= {tid for tid in procfs.threads(pid) if seize.ask_to_stop(pid, tid)}
        finally:
            self.thaw()
        return held

    def thaw(self) -> None:
        """Let what was seized come to its stop."""
        if self._thaw_again:
            self._set(False)
            self._thaw_again = False

    def take_strangers(self, tree: Iterable[int], held: set[int]) -> list[int]:
        """Freeze what was seized and is not of the *tree*, until :meth:`let_go`; their pids."""
        for pid in sorted(set(self.pids()) - set(tree)):
            try:
                mine = held.intersection(procfs.threads(pid))
            except OSError:
                continue  # it has ended
            if mine:
                self.strangers.append(seize.freeze(pid, held))
        return [task.pid for task in self.strangers]

    def freeze_again(self) -> None:
        """What was frozen before the dump is frozen again. Nothing of ours may run in a task after this."""
        if self.was_frozen:
            self._set(True)

    def let_go(self) -> None:
        """Release the processes that are not of the tree."""
        while self.strangers:
            self.strangers.pop().release()
