"""Namespaces, as far as one host goes (images: task_kobj_ids_entry, timens-N.img, NS entries).

State owned: which namespaces a task is in, compared with ours. Kernel: /proc/PID/ns links. A time namespace of its own
is what every restored process has (see :mod:`firn.restore.clocks`); its clocks are saved as it sees them. Tasks in any
other namespace than ours are refused until these are supported.

A single thread may be in namespaces of its own (unshare(2), setns(2)), and children may be meant for others than their
parent is in (``pid_for_children``, ``time_for_children``): both are refused.

Open namespace files (/proc/PID/ns/NAME) lead to one of ours or to the tree's, and are opened again in the same place.
What goes wrong: a file of any other namespace, which may not exist any more. (One that is mounted somewhere, as
ip-netns(8) does, has a path and is an ordinary file by that.)
"""

from __future__ import annotations

import os
import time

from firn.abi import fcntl as fc
from firn.abi import sched
from firn.errors import ImageError, Obstacle
from firn.host import procfs
from firn.resources.base import Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir
    from firn.resources.base import DumpContext, Open, RestoreContext

KINDS = ("pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup")
"""In the order in which ids are given out; ours come first, from 1."""

_FOR_CHILDREN = ("pid", "time")
_OF_THREADS = ("net", "ipc", "uts", "mnt", "cgroup")

_FLAGS = {
    "pid": sched.CLONE_NEWPID, "net": sched.CLONE_NEWNET, "ipc": sched.CLONE_NEWIPC, "uts": sched.CLONE_NEWUTS,
    "time": sched.CLONE_NEWTIME, "mnt": sched.CLONE_NEWNS, "user": sched.CLONE_NEWUSER,
    "cgroup": sched.CLONE_NEWCGROUP,
}  # fmt: skip


def links(pid: int | str) -> dict[str, str]:
    """Kind -> link text of the namespaces of a process; kinds that the kernel lacks are left out."""
    found = {}
    for kind in KINDS:
        try:
            found[kind] = os.readlink(f"/proc/{pid}/ns/{kind}")
        except FileNotFoundError:
            continue
    return found


class Namespaces:
    """Ours and the tree's, whose tasks must all be in the same ones."""

    __slots__ = ("clocks", "own", "task_ids")

    def __init__(self, pids: list[tuple[int, int]], obstacles: list[Obstacle]) -> None:
        """*pids* are (pid, :func:`.procfs.speaker`)."""
        self.own = links("self")
        self.task_ids = self.root_ids()
        pid, voice = pids[0]
        root = links(voice)
        offsets = (0, 0)
        for kind, link in root.items():
            if link == self.own.get(kind):
                continue
            if kind == "time":
                self.task_ids["time_ns_id"] = len(self.own) + 1
                offsets = _relative_offsets(voice)
            else:
                obstacles.append(
                    Obstacle(f"process {pid}", f"is in a {kind} namespace of its own ({link})", "not supported yet")
                )
        for pid, voice in pids:
            found = root if voice == pids[0][1] else links(voice)
            obstacles += [
                Obstacle(
                    f"process {pid}", f"is in another {kind} namespace than the root of the tree", "not supported yet"
                )
                for kind, link in found.items()
                if link != root[kind]
            ]
            _check_children(f"process {pid}", voice, found, obstacles)
        now = (time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self.clocks = [clock + offset for clock, offset in zip(now, offsets, strict=True)]

    def root_ids(self) -> dict[str, int]:
        """The namespace ids of our own environment."""
        return {f"{kind}_ns_id": number for number, kind in enumerate(self.own, 1)}

    def save(self, images: ImageDir) -> None:
        """Write timens-N.img: the clocks as the task saw them when it was collected."""
        number = self.task_ids.get("time_ns_id")
        if number is None:
            return
        index = number if number != self.root_ids()["time_ns_id"] else 0
        monotonic, boottime = ({"tv_sec": now // 10**9, "tv_nsec": now % 10**9} for now in self.clocks)
        images.write_one("TIMENS", {"monotonic": monotonic, "boottime": boottime}, index)


def _check_children(what: str, pid: int, own: dict[str, str], obstacles: list[Obstacle]) -> None:
    """Note it if children of task *pid* would be born into other namespaces than its *own*."""
    for kind in _FOR_CHILDREN:
        if kind not in own:
            continue
        try:
            theirs = os.readlink(f"/proc/{pid}/ns/{kind}_for_children")
        except FileNotFoundError:
            theirs = ""  # a pid namespace has no name before somebody is in it
        if theirs != own[kind]:
            reason = f"has its children born into another {kind} namespace than it is in (unshare)"
            obstacles.append(Obstacle(what, reason, "not supported yet"))


def check_thread(pid: int, tid: int, known: dict[str, str], obstacles: list[Obstacle]) -> None:
    """Note it if thread *tid* of *pid* is in other namespaces than the process, whose :func:`links` are *known*. (Not
    of every kind: for a user namespace of its own a process must have a single thread, and nobody leaves its pid
    namespace.)"""
    folder = f"/proc/{tid}/ns/"
    for kind in _OF_THREADS:
        if kind in known and os.readlink(folder + kind) != known[kind]:
            reason = f"is in another {kind} namespace than its process, which images cannot hold"
            obstacles.append(Obstacle(f"process {pid}: thread {tid}", reason, "have it leave that before the dump"))
    _check_children(f"process {pid}: thread {tid}", tid, known, obstacles)


def clock_offsets(pid: int | str) -> tuple[int, int]:
    """The offsets of CLOCK_MONOTONIC and CLOCK_BOOTTIME of a process's time namespace, in ns (time_namespaces(7))."""
    found = {}
    for line in procfs.read(f"/proc/{pid}/timens_offsets").decode().splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = int(seconds) * 10**9 + int(nanoseconds)
    return found.get("monotonic", found.get("1", 0)), found.get("boottime", found.get("7", 0))


def _relative_offsets(pid: int) -> tuple[int, int]:
    """What to add to our clocks to get those of *pid*."""
    theirs, ours = clock_offsets(pid), clock_offsets("self")
    return theirs[0] - ours[0], theirs[1] - ours[1]


class NamespaceFiles(Kind):
    """Open files of namespaces, by the ids that the namespaces have in a checkpoint."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, str]] = {}
        self._ids: tuple[dict[str, Any], dict[str, Any]] | None = None

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The ns_file_entry."""
        if not self._known:
            root = context.pids[0]
            tree = Namespaces([(root, procfs.speaker(root))], [])
            self._known = {link: (number, kind) for number, (kind, link) in enumerate(tree.own.items(), 1)}
            own_clock = links(procfs.speaker(root)).get("time", "")
            self._known.setdefault(own_clock, (tree.task_ids.get("time_ns_id", 0), "time"))
        if open.link not in self._known:
            context.refuse(open, f"is the namespace {open.link}, in which neither firn nor the tree is", "close it")
            return None
        number, kind = self._known[open.link]
        return {"ns_id": number, "ns_cflag": _FLAGS[kind], "flags": open.flags}

    def _of_root(self, message: dict[str, Any], context: RestoreContext) -> tuple[str, bool]:
        """(kind of the namespace, whether it is the restored root's). Only the time namespace can be another than
        ours."""
        if self._ids is None:
            images = context.images
            self._ids = images.read_one("INVENTORY").get("root_ids", {}), images.read_one("IDS", context.pids[0])
        own, root = self._ids
        kind = next((kind for kind, flag in _FLAGS.items() if flag == message["ns_cflag"]), "")
        ids = [ids.get(f"{kind}_ns_id", 0) for ids in (root, own)]
        if not message["ns_id"] or message["ns_id"] not in ids:
            raise ImageError(f"files image: there is no {kind or 'such'} namespace {message['ns_id']}")
        return kind, kind == "time" and message["ns_id"] == ids[0]

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether the root task must exist."""
        return self._of_root(message, context)[1]

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The file of the same namespace."""
        kind, of_root = self._of_root(message, context)
        flags = message["flags"] & (fc.O_ACCMODE | fc.O_PATH | fc.O_NONBLOCK)
        return os.open(f"/proc/{context.pids[0] if of_root else 'self'}/ns/{kind}", flags | fc.O_CLOEXEC)
