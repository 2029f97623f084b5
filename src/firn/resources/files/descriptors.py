"""The descriptors of a process (images: fdinfo-N.img and the files behind them).

State owned: which number leads to which open file description, close-on-exec, and of the description its flags, position
and SIGIO owner. Kernel: /proc/PID/fd, /proc/PID/fdinfo, kcmp(2) for identity, a copy by pidfd_getfd(2) for F_GETOWN_EX.
It comes back by opening each description once, in the controller, and by the task's own pidfd_getfd(2) and dup3(2).
What goes wrong: kinds that cannot be opened again by a path; they are refused, all at once, each with its reason.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import Obstacle
from firn.host import procfs
from firn.resources.files.memfd import MemoryObjects
from firn.resources.files.paths import NO_OWNER, NO_SEEK, PathFinder
from firn.resources.files.table import MEMFD, REG, FileTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHARACTER_DEVICES = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9, 11))
"""null, zero, full, random, urandom, kmsg (Documentation/admin-guide/devices.txt): opening them again is the same."""

KINDS = (
    ("pipe:", "is a pipe", "pipes are not supported yet; close it or redirect it to a file"),
    ("socket:", "is a socket", "sockets are not supported yet; close it before the dump"),
    ("anon_inode:[eventfd]", "is an eventfd", "not supported yet; close it before the dump"),
    ("anon_inode:[eventpoll]", "is an epoll instance", "not supported yet; close it before the dump"),
    ("anon_inode:[signalfd]", "is a signalfd", "not supported yet; close it before the dump"),
    ("anon_inode:[timerfd]", "is a timerfd", "not supported yet; close it before the dump"),
    ("anon_inode:inotify", "is an inotify instance", "not supported yet; close it before the dump"),
    ("anon_inode:[fanotify]", "is a fanotify group", "not supported yet; close it before the dump"),
    ("anon_inode:[pidfd]", "is a pidfd", "not supported yet; close it before the dump"),
    ("anon_inode:[userfaultfd]", "is a userfaultfd", "its faults are served by a process outside; close it"),
    ("anon_inode:[io_uring]", "is an io_uring", "its requests live in the kernel; close it before the dump"),
    ("anon_inode:[perf_event]", "is a performance counter", "close it before the dump"),
    ("anon_inode:seccomp notify", "is a seccomp notifier", "close it before the dump"),
    ("anon_inode:bpf", "is a BPF object", "close it before the dump"),
    ("anon_inode:", "is a kernel object that cannot be opened again", "close it before the dump"),
    ("mnt:[", "is a namespace", "namespace files are not supported yet; close it"),
    ("net:[", "is a namespace", "namespace files are not supported yet; close it"),
)


def _why_refused(link: str, st: os.stat_result) -> tuple[str, str]:
    for prefix, reason, help in KINDS:
        if link.startswith(prefix):
            return reason, help
    if stat.S_ISCHR(st.st_mode):
        major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        if major in (4, 5) or 136 <= major <= 143 or link.startswith(("/dev/tty", "/dev/pts/", "/dev/ptmx")):
            return f"is a terminal ({link})", "terminals are not supported yet; redirect it to a file or /dev/null"
        return f"is the character device {major}:{minor} ({link}), whose state only its driver knows", "close it"
    if stat.S_ISBLK(st.st_mode):
        return f"is the block device {link}", "close it before the dump"
    if stat.S_ISFIFO(st.st_mode):
        return f"is the FIFO {link}", "FIFOs are not supported yet; close it"
    return f"is of a kind that firn does not know ({link})", "close it before the dump"


class Descriptor:
    """One descriptor of a process and its place in the file table."""

    __slots__ = ("cloexec", "fd", "id", "type")

    def __init__(self, fd: int, cloexec: bool, number: int, kind: int) -> None:
        self.fd = fd
        self.cloexec = cloexec
        self.id = number
        self.type = kind

    def save(self) -> dict[str, Any]:
        """The fdinfo_entry."""
        return {"id": self.id, "flags": 1 if self.cloexec else 0, "type": self.type, "fd": self.fd}


class Descriptions:
    """Finds out which descriptors lead to one open file description, by kcmp(2)'s total order: n log n questions."""

    def __init__(self) -> None:
        self._groups: dict[object, list[tuple[int, int, int]]] = {}

    def find(self, key: object, pid: int, fd: int) -> tuple[int | None, int]:
        """(file id, 0) of a known description equal to (pid, fd) or (None, where to insert it)."""
        group = self._groups.setdefault(key, [])
        low, high = 0, len(group)
        while low < high:
            middle = (low + high) // 2
            other_pid, other_fd, number = group[middle]
            order = syscall(
                f"kcmp of descriptor {fd} of process {pid}", nr.kcmp, pid, other_pid, fc.KCMP_FILE, fd, other_fd
            )
            if order == 0:
                return number, 0
            if order == 1:
                high = middle
            else:
                low = middle + 1
        return None, low

    def insert(self, key: object, place: int, pid: int, fd: int, number: int) -> None:
        """Remember a new description at the *place* that :meth:`find` gave."""
        self._groups[key].insert(place, (pid, fd, number))


class Collector:
    """Collects the descriptors of processes into one file table."""

    def __init__(self, table: FileTable, finder: PathFinder, objects: MemoryObjects, obstacles: list[Obstacle]) -> None:
        self.table = table
        self.finder = finder
        self.objects = objects
        self.obstacles = obstacles
        self.descriptions = Descriptions()
        self._kinds: dict[int, int] = {}

    def collect(self, pid: int, pidfd: int) -> list[Descriptor]:
        """All descriptors of *pid*, ascending; what cannot be saved is added to the obstacles."""
        found: list[Descriptor] = []
        for fd in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
            descriptor = self._one(pid, pidfd, fd)
            if descriptor is not None:
                found.append(descriptor)
        return found

    def _one(self, pid: int, pidfd: int, fd: int) -> Descriptor | None:
        path = f"/proc/{pid}/fd/{fd}"
        info = procfs.fdinfo(pid, fd)
        flags = int(info["flags"], 8)
        cloexec = bool(flags & fc.O_CLOEXEC)
        flags &= ~fc.O_CLOEXEC
        st = os.stat(path)
        position = int(info["pos"])
        key = (st.st_dev, st.st_ino, flags, position)
        known, place = self.descriptions.find(key, pid, fd)
        if known is not None:
            return Descriptor(fd, cloexec, known, self._kinds[known])
        what = f"process {pid}: descriptor {fd}"
        if "lock" in info:
            self.obstacles.append(Obstacle(what, f"holds a file lock on {os.readlink(path)}", "locks are not supported yet"))
            return None
        message: dict[str, Any] = {"flags": flags, "pos": position}
        if not flags & fc.O_PATH:
            message["fown"] = self._owner(what, pidfd, fd, info)
        added = self._add(what, path, st, message)
        if added is None:
            return None
        number, kind = added
        self._kinds[number] = kind
        self.descriptions.insert(key, place, pid, fd, number)
        return Descriptor(fd, cloexec, number, kind)

    def _add(self, what: str, path: str, st: os.stat_result, message: dict[str, Any]) -> tuple[int, int] | None:
        """Add the description to the table: (file id, type), or None if it is refused."""
        link = os.readlink(path)
        mode = st.st_mode
        if link.startswith("/memfd:") and stat.S_ISREG(mode):
            if message["flags"] & fc.O_PATH:
                self.obstacles.append(Obstacle(what, "is an O_PATH descriptor of a memfd", "close it before the dump"))
                return None
            message.setdefault("fown", NO_OWNER)
            return self.table.add(MEMFD, {**message, "inode_id": self.objects.inode(path, st)}), MEMFD
        plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (stat.S_ISCHR(mode) and st.st_rdev in CHARACTER_DEVICES)
        openable = message["flags"] & fc.O_PATH and link.startswith("/") and not stat.S_ISLNK(mode)
        if not (plain or openable) or not link.startswith("/"):
            self.obstacles.append(Obstacle(what, *_why_refused(link, st)))
            return None
        if stat.S_ISCHR(mode):
            message["pos"] = NO_SEEK
        return self.finder.add(what, path, message, st, None), REG

    def _owner(self, what: str, pidfd: int, fd: int, info: dict[str, str]) -> dict[str, int]:
        """fown_entry of the description: who gets its signals, and which."""
        copy = syscall(f"pidfd_getfd of {what}", nr.pidfd_getfd, pidfd, fd, 0)
        try:
            kind, pid = struct.unpack("<ii", fcntl.fcntl(copy, fc.F_GETOWN_EX, bytes(8)))
            signal = fcntl.fcntl(copy, fc.F_GETSIG)
            if not pid and not signal:
                return NO_OWNER
            uid, euid = struct.unpack("<II", fcntl.fcntl(copy, fc.F_GETOWNER_UIDS, bytes(8)))
            return {"uid": uid, "euid": euid, "signum": signal, "pid_type": kind, "pid": pid}
        finally:
            os.close(copy)
