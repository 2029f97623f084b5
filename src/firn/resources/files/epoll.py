"""epoll instances (images: EVENTPOLL entries).

State owned: the targets, each with the descriptor number it was added under, its events and its data; how it polls
network devices (EPIOCSPARAMS). Kernel: the ``tfd:`` lines of fdinfo; kcmp(2) KCMP_EPOLL_TFD tells which descriptor
leads to a target, for the number alone does not: it may have been closed or reused since. The image format has no place
for the process that a number belongs to: it is the process with the lowest pid that has the instance open. That task
adds the targets itself when all its descriptors are in place, because the numbers are its own. Instances may contain
each other: all exist before the first target is added.

If one of the targets is not open under its number in that process (but under another one, in another process, or in a
queue of a socket), or the instance itself is only in a queue, firn's own fields tell file and number of all targets,
and a child of ours adds them: to the kernel a target is a file and a number, whosoever's. CRIU finds the number under
which the target is open, or one that it must refuse.

What goes wrong: a target that is open nowhere in the tree. Edge-triggered targets that are ready tell so once more
after a restore, since nobody can know whether they have.
"""

from __future__ import annotations

import fcntl
import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError
from firn.host import procfs
from firn.resources.base import EVENTPOLL, Kind, Open, pidfd_for_copies
from firn.resources.files.events import set_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, RestoreContext
    from firn.tracee.program import Program

_WORD = (1 << 64) - 1
_NOBODYS = (1 << 31) - 1
"""The number of a target that the instance's owner does not have open: none that anybody can have."""
_LAST_STANDARD = 2
"""Our own streams may be the target's too, but they are no queued descriptors."""


class Epoll(Kind):
    """epoll(7)."""

    def __init__(self) -> None:
        self._instances: list[tuple[Open, list[dict[str, Any]]]] = []
        self._context: RestoreContext
        self._planned: set[int] = set()
        self._owners: dict[int, int] | None = None
        self._tables: dict[int, int] = {}
        self._made: dict[int, dict[str, Any]] = {}

    # -- dump --------------------------------------------------------------------------------------------------------

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The message, whose targets are found when all descriptors are known."""
        targets: list[dict[str, Any]] = []
        self._instances.append((open, targets))
        message = {"flags": open.flags, "fown": context.owner(open), "tfd": targets}
        params = bytearray(ev.EPOLL_PARAMS.size)
        try:
            syscall("EPIOCGPARAMS", nr.ioctl, open.copy(), ev.EPIOCGPARAMS, address_of(params))
        except OSError:
            return message  # before Linux 6.9
        return message | {"firn": {"params": bytes(params)}} if any(params) else message

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
        params = bytearray(message.get("firn", {}).get("params", b""))
        if params:
            if len(params) != ev.EPOLL_PARAMS.size:
                raise ImageError(f"files image: epoll instance {number} has impossible parameters")
            syscall(f"EPIOCSPARAMS of file {number}", nr.ioctl, fd, ev.EPIOCSPARAMS, address_of(params))
        self._made[number] = message
        return fd

    def complete(self) -> None:
        """Add the targets that no task can add by its own numbers."""
        for number, message in list(self._made.items()):
            targets = message.get("tfd", [])
            if not _is_foreign(message) or not targets:
                continue
            places = [target.get("firn", {}) for target in targets]
            files = [self._context.open(place.get("type", 0), place.get("file", 0)) for place in places]
            instance = self._context.open(EVENTPOLL, number)
            child = os.fork()
            if not child:
                os._exit(_add_all(instance, targets, files))
            _, status = os.waitpid(child, 0)
            if status:
                code = os.waitstatus_to_exitcode(status)
                raise OSError(code, f"targets of epoll instance {number} cannot be added: {os.strerror(code)}")

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """Have the instance's owner add the targets."""
        number = message["id"]
        if number in self._planned or _is_foreign(message) or not self._is_owner(program.runner.pid, number):
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

    def _disarm(self, program: Program, fd: int, number: int, target: dict[str, Any]) -> None:
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


def _is_disarmed(target: dict[str, Any]) -> bool:
    return target["events"] & ev.EPOLLONESHOT != 0 and not target["events"] & ~ev.EPOLL_PRIVATE


def _is_foreign(message: dict[str, Any]) -> bool:
    """Whether the targets are told by file, and not by a task's descriptor."""
    return any("firn" in target for target in message.get("tfd", []))


def _add_all(instance: int, targets: list[dict[str, Any]], files: list[int]) -> int:
    """In a child of ours: add *targets*, which are *files*, to *instance*; 0 or an errno. See :meth:`Epoll._disarm`."""
    numbers = [target.get("firn", {}).get("number", 0) for target in targets]
    above = max(*numbers, *files, instance) + 1
    event = bytearray(ev.EPOLL_EVENT.size)

    def control(operation: int, number: int, events: int, data: int) -> None:
        ev.EPOLL_EVENT.pack_into(event, 0, events, data)
        syscall("epoll_ctl", nr.epoll_ctl, instance, operation, number, address_of(event))

    try:
        instance, *files = (fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in (instance, *files))
        order = sorted(range(len(targets)), key=lambda index: not _is_disarmed(targets[index]))
        for index in order:
            target, number = targets[index], numbers[index]
            os.dup2(files[index], number)
            if not _is_disarmed(target):
                control(ev.EPOLL_CTL_ADD, number, target["events"], target["data"])
                continue
            control(ev.EPOLL_CTL_ADD, number, ev.EPOLLONESHOT | ev.EPOLL_READINESS, target["data"])
            if not syscall("epoll_wait", nr.epoll_wait, instance, address_of(event), 1, 0):
                control(ev.EPOLL_CTL_MOD, number, target["events"], target["data"])
    except OSError as error:
        return error.errno or 1
    except BaseException:
        return 1
    return 0


def _control(program: Program, fd: int, operation: int, target: dict[str, Any], events: int) -> None:
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

    def find(self, open: Open, targets: list[dict[str, Any]]) -> None:
        """Fill *targets* with those of instance *open*, or refuse it."""
        seen: dict[int, int] = {}
        taken: set[int] = set()
        owner = self._owner(open)
        foreign = owner not in self.context.pids
        places: list[tuple[int, int]] = []
        numbers: list[int] = []
        for line in open.info["lines"].splitlines():
            if not line.startswith("tfd:"):
                continue
            words = line.replace(":", " ").split()
            item = dict(zip(words[::2], words[1::2], strict=True))
            number = int(item["tfd"])
            slot = bytearray(ev.EPOLL_SLOT.pack(open.fd, number, seen.get(number, 0)))
            seen[number] = seen.get(number, 0) + 1
            inode = int(item["ino"], 16)
            place = self._place(owner, open.tid, slot, number, inode)
            if place is None:
                reason = f"is an epoll instance whose target {number} (inode {inode}) is open nowhere in the tree"
                self.context.refuse(open, reason, "remove it from the instance")
                continue
            tfd = place[1] if place[0] == owner and place[1] not in taken else _NOBODYS
            foreign |= tfd != number
            taken.add(tfd)
            places.append(place)
            numbers.append(number)
            targets.append(
                {
                    "id": 0, "tfd": tfd, "events": int(item["events"], 16), "data": int(item["data"], 16),
                    "dev": int(item["sdev"], 16), "inode": inode, "pos": int(item["pos"]) & _WORD,
                }
            )  # fmt: skip
        if foreign and not self.context.obstacles:
            for target, place, number in zip(targets, places, numbers, strict=True):
                target["firn"] = self._file(*place) | {"number": number}

    def _file(self, pid: int, fd: int) -> dict[str, int]:
        """Type and id of the file that descriptor *fd* of *pid* leads to, which was collected before."""
        speaker = procfs.speaker(pid)
        info = procfs.fdinfo(speaker, fd)
        info.pop("lock", None)
        pidfd = pidfd_for_copies(pid, speaker)
        open = Open(pid, pidfd, fd, info, speaker)
        try:
            added = self.context.add_open(open)
        finally:
            open.close()
            os.close(pidfd)
        return {"type": added[1], "file": added[0]} if added is not None else {}

    def _owner(self, open: Open) -> int:
        """The process with the lowest pid that has the instance open."""
        for pid in self.pids:
            if pid == open.pid:
                break
            for fd in self._by_inode(pid).get(open.stat.st_ino, ()):
                if syscall("kcmp", nr.kcmp, open.tid, procfs.speaker(pid), fc.KCMP_FILE, open.fd, fd) == 0:
                    return pid
        return open.pid

    def _by_inode(self, pid: int) -> dict[int, list[int]]:
        """Inode number -> descriptors of *pid*, ascending."""
        known = self._inodes.get(pid)
        if known is None:
            known = self._inodes[pid] = {}
            try:
                speaker = procfs.speaker(pid)
                names = os.listdir(f"/proc/{speaker}/fd")
            except OSError:
                names = []  # a zombie has none
            for fd in sorted(int(name) for name in names):
                try:
                    known.setdefault(os.stat(f"/proc/{speaker}/fd/{fd}").st_ino, []).append(fd)
                except FileNotFoundError:
                    continue  # our own, of the list
        return known

    def _place(self, owner: int, holder: int, slot: bytearray, number: int, inode: int) -> tuple[int, int] | None:
        """The process and descriptor that lead to the target of *slot* in *holder*'s instance, best of all *number* of
        *owner*. What waits in the queues of sockets, we have open ourselves."""
        for pid in (owner, *(pid for pid in (*self.pids, os.getpid()) if pid != owner)):
            candidates = self._by_inode(pid).get(inode, [])
            if pid == os.getpid():
                candidates = [fd for fd in candidates if fd > _LAST_STANDARD]
            if number in candidates:
                candidates = [number, *candidates]
            speaker = procfs.speaker(pid) if candidates else pid
            for fd in candidates:
                what = f"kcmp of descriptor {fd} of process {pid} and epoll target {number}"
                if not syscall(what, nr.kcmp, speaker, holder, ev.KCMP_EPOLL_TFD, fd, address_of(slot)):
                    return pid, fd
        return None
