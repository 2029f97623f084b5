"""epoll instances (images: EVENTPOLL entries).

State owned: the targets, each with the descriptor number it was added under, its events and its data. Kernel: the
``tfd:`` lines of fdinfo; kcmp(2) KCMP_EPOLL_TFD tells which descriptor leads to a target, for the number alone does
not: it may have been closed or reused since. The image format has no place for the process that a number belongs to:
it is the process with the lowest pid that has the instance open. That task adds the targets itself when all its
descriptors are in place, because the numbers are its own. Instances may contain each other: all exist before the first
target is added.

What goes wrong: a target that is open under another number comes back under that one, and one that is open nowhere
cannot. Edge-triggered targets that are ready tell so once more after a restore, since nobody can know whether they
have.
"""

from __future__ import annotations

import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.resources.base import EVENTPOLL, Kind
from firn.resources.files.events import set_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, Open, RestoreContext
    from firn.tracee.program import Program

_WORD = (1 << 64) - 1


class Epoll(Kind):
    """epoll(7)."""

    def __init__(self) -> None:
        self._instances: list[tuple[Open, list[dict[str, int]]]] = []
        self._context: RestoreContext
        self._planned: set[int] = set()
        self._owners: dict[int, int] | None = None
        self._tables: dict[int, int] = {}

    # -- dump --------------------------------------------------------------------------------------------------------

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The message, whose targets are found when all descriptors are known."""
        targets: list[dict[str, int]] = []
        self._instances.append((open, targets))
        return {"flags": open.flags, "fown": context.owner(open), "tfd": targets}

    def finish(self, context: DumpContext) -> None:
        """Find the targets."""
        search = _Search(context)
        for open, targets in self._instances:
            search.find(open, targets)

    # -- restore -----------------------------------------------------------------------------------------------------

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """An empty instance."""
        self._context = context
        fd = syscall(f"epoll_create1 {number}", nr.epoll_create1, fc.O_CLOEXEC)
        set_status(fd, message["flags"])
        return fd

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """Have the instance's owner add the targets."""
        number = message["id"]
        if number in self._planned or not self._is_owner(program.runner.pid, number):
            return
        self._planned.add(number)
        targets = message.get("tfd", [])
        # First those that are to be disarmed: nothing else may be ready when it is seen what they tell.
        for target in targets:
            if _is_disarmed(target):
                self._disarm(program, fd, number, target)
        for target in targets:
            if not _is_disarmed(target):
                _control(program, fd, ev.EPOLL_CTL_ADD, target, target["events"])

    def _is_owner(self, pid: int, number: int) -> bool:
        """Whether the descriptor numbers in instance *number* are those of process *pid*."""
        pids = self._context.pids
        if len(pids) == 1:
            return True
        if self._owners is None:
            self._owners = self._read_owners()
        return self._tables[pid] == self._owners.get(number)

    def _read_owners(self) -> dict[int, int]:
        """Instance -> descriptor table of its owner. Processes may share a table."""
        images, owners = self._context.images, dict[int, int]()
        for pid in sorted(self._context.pids):
            if not images.exists("IDS", pid):
                continue
            table = self._tables[pid] = images.read_one("IDS", pid)["files_id"]
            if not images.exists("FDINFO", table):
                continue
            for entry in images.read_all("FDINFO", table):
                if entry["type"] == EVENTPOLL:
                    owners.setdefault(entry["id"], table)
        return owners

    def _disarm(self, program: Program, fd: int, number: int, target: dict[str, int]) -> None:
        """Add a one-shot target that has already fired.

        Only an event disarms it; most files are ready for something. One that is not stays armed for errors and
        hang-ups, which the kernel adds by itself to whatever is asked for.
        """
        _control(program, fd, ev.EPOLL_CTL_ADD, target, ev.EPOLLONESHOT | ev.EPOLL_READINESS)
        program.run()
        event = bytearray(ev.EPOLL_EVENT.size)
        ours = self._context.open(EVENTPOLL, number)
        if not syscall(f"epoll_wait on file {number}", nr.epoll_wait, ours, address_of(event), 1, 0):
            _control(program, fd, ev.EPOLL_CTL_MOD, target, target["events"])


def _is_disarmed(target: dict[str, int]) -> bool:
    return target["events"] & ev.EPOLLONESHOT != 0 and not target["events"] & ~ev.EPOLL_PRIVATE


def _control(program: Program, fd: int, operation: int, target: dict[str, int], events: int) -> None:
    size = ev.EPOLL_EVENT.size
    program.reserve(1, size)
    at = program.data(ev.EPOLL_EVENT.pack(events, target["data"]))
    number = target["tfd"]
    program.call(f"epoll_ctl of descriptor {fd}, target {number}", nr.epoll_ctl, fd, operation, number, at)


class _Search:
    """Finds the descriptors that lead to the targets of epoll instances."""

    def __init__(self, context: DumpContext) -> None:
        self.context = context
        self.pids = sorted(context.pids)
        self._inodes: dict[int, dict[int, list[int]]] = {}

    def find(self, open: Open, targets: list[dict[str, int]]) -> None:
        """Fill *targets* with those of instance *open*, or refuse it."""
        seen: dict[int, int] = {}
        taken: set[int] = set()
        owner = self._owner(open)
        for line in open.info["lines"].splitlines():
            if not line.startswith("tfd:"):
                continue
            words = line.replace(":", " ").split()
            item = dict(zip(words[::2], words[1::2], strict=True))
            number = int(item["tfd"])
            slot = bytearray(ev.EPOLL_SLOT.pack(open.fd, number, seen.get(number, 0)))
            seen[number] = seen.get(number, 0) + 1
            inode = int(item["ino"], 16)
            found = self._descriptor(owner, open.pid, slot, number, inode)
            if found < 0:
                why = self._why(owner, open.pid, slot, number, inode)
                self.context.refuse(open, why, "remove it from the instance")
            elif found in taken:
                reason = f"is an epoll instance with several targets that are open as descriptor {found} only"
                self.context.refuse(open, reason, "remove all but one from the instance")
            else:
                taken.add(found)
                targets.append(
                    {
                        "id": 0, "tfd": found, "events": int(item["events"], 16), "data": int(item["data"], 16),
                        "dev": int(item["sdev"], 16), "inode": inode, "pos": int(item["pos"]) & _WORD,
                    }
                )  # fmt: skip

    def _owner(self, open: Open) -> int:
        """The process with the lowest pid that has the instance open."""
        for pid in self.pids:
            if pid == open.pid:
                break
            for fd in self._by_inode(pid).get(open.stat.st_ino, ()):
                if syscall("kcmp", nr.kcmp, open.pid, pid, fc.KCMP_FILE, open.fd, fd) == 0:
                    return pid
        return open.pid

    def _by_inode(self, pid: int) -> dict[int, list[int]]:
        """Inode number -> descriptors of *pid*, ascending."""
        known = self._inodes.get(pid)
        if known is None:
            known = self._inodes[pid] = {}
            try:
                names = os.listdir(f"/proc/{pid}/fd")
            except OSError:
                names = []  # a zombie has none
            for fd in sorted(int(name) for name in names):
                known.setdefault(os.stat(f"/proc/{pid}/fd/{fd}").st_ino, []).append(fd)
        return known

    def _descriptor(self, pid: int, holder: int, slot: bytearray, number: int, inode: int) -> int:
        """The descriptor of *pid* that leads to the target of *slot* in *holder*'s instance; -1 if there is none."""
        candidates = self._by_inode(pid).get(inode, [])
        if number in candidates:
            candidates = [number, *candidates]
        for fd in candidates:
            what = f"kcmp of descriptor {fd} of process {pid} and epoll target {number}"
            if not syscall(what, nr.kcmp, pid, holder, ev.KCMP_EPOLL_TFD, fd, address_of(slot)):
                return fd
        return -1

    def _why(self, owner: int, holder: int, slot: bytearray, number: int, inode: int) -> str:
        """What is wrong with a target that *owner* does not have open."""
        for pid in self.pids:
            fd = -1 if pid == owner else self._descriptor(pid, holder, slot, number, inode)
            if fd >= 0:
                return f"is an epoll instance whose target {number} is open in process {pid} but not in process {owner}"
        return f"is an epoll instance whose target {number} (inode {inode}) has been closed but lives on somewhere else"
