"""The descriptors of a process (images: fdinfo-N.img and the files behind them).

State owned: which number leads to which open file description, close-on-exec, and of the description its flags,
position and SIGIO owner. Kernel: /proc/PID/fd, /proc/PID/fdinfo, kcmp(2) for identity, a copy by pidfd_getfd(2) for
F_GETOWN_EX. It comes back by opening each description once, in the controller, and by the task's own pidfd_getfd(2) and
dup3(2). What goes wrong: kinds that cannot be opened again by a path; they are refused, all at once, each with its
reason.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from firn.abi import fcntl as fc
from firn.errors import Obstacle
from firn.host import kcmp, procfs
from firn.resources import base
from firn.resources.files import locks
from firn.resources.files.external import ExternalFiles
from firn.resources.files.memfd import MemoryObjects
from firn.resources.files.paths import NO_OWNER, NO_SEEK, PathFinder
from firn.resources.files.procfiles import process_of
from firn.resources.files.table import FileTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.images.store import ImageDir

_MEMORY, _MISC, _MSR, _CPUID, _LOOP = 1, 10, 202, 203, 7
_POSITIONED = ((_MEMORY, 1), (_MEMORY, 4))
"""mem, port."""
_STATELESS = (
    *((_MEMORY, minor) for minor in (3, 5, 7, 8, 9, 11)), *((_MISC, minor) for minor in (183, 234, 235, 237)),
)  # fmt: skip
"""null, zero, full, random, urandom, kmsg; hwrng, btrfs-control, autofs, loop-control."""

KINDS = (
    ("anon_inode:[userfaultfd]", "is a userfaultfd", "its faults are served by a process outside; close it"),
    ("anon_inode:[io_uring]", "is an io_uring", "its requests live in the kernel; close it before the dump"),
    ("anon_inode:[perf_event]", "is a performance counter", "close it before the dump"),
    ("anon_inode:seccomp notify", "is a seccomp notifier", "close it before the dump"),
    ("anon_inode:bpf", "is a BPF object", "close it before the dump"),
    ("anon_inode:", "is a kernel object that cannot be opened again", "close it before the dump"),
)


def _is_plain_device(st: os.stat_result) -> bool:
    """Whether opening the device again is the same, but for the position: its driver keeps nothing for each opener.
    (Documentation/admin-guide/devices.txt; msr and cpuid have one device for each processor.)"""
    device = os.major(st.st_rdev), os.minor(st.st_rdev)
    if stat.S_ISCHR(st.st_mode):
        return device in _STATELESS or device in _POSITIONED or device[0] in (_MSR, _CPUID)
    return stat.S_ISBLK(st.st_mode) and not _goes_with_its_opener(device)


def _goes_with_its_opener(device: tuple[int, int]) -> bool:
    """Whether it is a loop device that is taken down when nobody has it open any more (LO_FLAGS_AUTOCLEAR)."""
    if device[0] != _LOOP:
        return False
    try:
        return procfs.read(f"/sys/dev/block/{device[0]}:{device[1]}/loop/autoclear").strip() != b"0"
    except FileNotFoundError:
        return False  # no file behind it


def _why_refused(open: base.Open) -> tuple[str, str]:
    link, st = open.link, open.stat
    if link.startswith("socket:"):
        from firn.host.families import why_refused

        return why_refused(open.copy())
    for prefix, reason, help in KINDS:
        if link.startswith(prefix):
            return reason, help
    if stat.S_ISCHR(st.st_mode):
        major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        if major in (4, 5) or 136 <= major <= 143 or link.startswith(("/dev/tty", "/dev/pts/", "/dev/ptmx")):
            return f"is a terminal ({link})", "terminals are not supported yet; redirect it to a file or /dev/null"
        return f"is the character device {major}:{minor} ({link}), whose state only its driver knows", _DEVICE_HELP
    if stat.S_ISBLK(st.st_mode):
        return f"is the loop device {link}, which is taken down when it is closed (autoclear)", _DEVICE_HELP
    return f"is of a kind that firn does not know ({link})", "close it before the dump"


_DEVICE_HELP = "close it, or have the caller of the restore supply it: --external file[MNT_ID:INODE]"


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
        return kcmp.search(self._groups.setdefault(key, []), fc.KCMP_FILE, pid, fd)

    def insert(self, key: object, place: int, pid: int, fd: int, number: int) -> None:
        """Remember a new description at the *place* that :meth:`find` gave."""
        self._groups[key].insert(place, (pid, fd, number))


class Collector:
    """Collects the descriptors of processes into one file table."""

    def __init__(
        self,
        table: FileTable,
        finder: PathFinder,
        objects: MemoryObjects,
        obstacles: list[Obstacle],
        options: Any,
        pids: list[int],
        warn: Callable[[str], object],
    ) -> None:
        self.table = table
        self.finder = finder
        self.objects = objects
        self.obstacles = obstacles
        self.descriptions = Descriptions()
        self.kinds: dict[int, base.Kind] = {}
        self.locks = locks.Locks(pids)
        self.context = base.DumpContext(obstacles, options, pids, self._owner, self._add_path, self.add, warn)
        self.external = ExternalFiles(options.external)
        self._types: dict[int, int] = {}

    def collect(self, pid: int, tid: int, pidfd: int) -> list[Descriptor]:
        """All descriptors of *pid*, ascending, which *tid* (:class:`.base.Open`) and *pidfd* lead to; what cannot be
        saved is added to the obstacles."""
        found: list[Descriptor] = []
        for fd in sorted(int(name) for name in os.listdir(f"/proc/{tid}/fd")):
            open = base.Open(pid, pidfd, fd, procfs.fdinfo(tid, fd), tid)
            try:
                added = self.add(open)
            finally:
                open.close()
            if added is not None:
                cloexec = bool(int(open.info["flags"], 8) & fc.O_CLOEXEC)
                found.append(Descriptor(fd, cloexec, *added))
        return found

    def finish(self) -> None:
        """After the last process: what the kinds have to see as a whole."""
        for kind in list(self.kinds.values()):
            kind.finish(self.context)
        self.locks.finish(self.obstacles, self.context.options.file_locks)

    def killed(self) -> None:
        """The processes are dead."""
        for kind in self.kinds.values():
            kind.killed()

    def leads_to(self, device: int) -> bool:
        """Whether any description leads to the terminal *device* (a device number)."""
        return any(kind.leads_to(device) for kind in self.kinds.values())

    def save(self, images: ImageDir) -> None:
        """Write the kinds' own images."""
        for kind in self.kinds.values():
            kind.save(images)
        self.locks.save(images)

    def close(self) -> None:
        """Let go of what the kinds hold."""
        for kind in self.kinds.values():
            kind.close()

    def add(self, open: base.Open) -> tuple[int, int] | None:
        """Add a description to the table, once: (file id, type), or None if it is refused."""
        key = (open.stat.st_dev, open.stat.st_ino, open.flags, open.position)
        known, place = self.descriptions.find(key, open.tid, open.fd)
        added = self._new(open) if known is None else (known, self._types[known])
        if known is None and added is not None:
            self._types[added[0]] = added[1]
            self.descriptions.insert(key, place, open.tid, open.fd, added[0])
        if "lock" in open.info and added is not None:
            self.locks.add(open, added[0])
        return added

    def _new(self, open: base.Open) -> tuple[int, int] | None:
        link, mode = open.link, open.stat.st_mode
        if "lock" in open.info and locks.refuse_nameless(open, self.obstacles):
            return None
        message: dict[str, Any] = {"flags": open.flags, "pos": open.position}
        o_path = open.flags & fc.O_PATH
        external = self.external.key(open.path, open.stat) if link.startswith("/") else ""
        if external:
            message |= {"fown": self._owner(open), "name": external, "ext": True}
            return self.table.add(base.REG, message), base.REG
        if link.startswith("/memfd:") and stat.S_ISREG(mode):
            owner = NO_OWNER if o_path else self._owner(open)
            message |= {"fown": owner, "inode_id": self.objects.inode(open.path, open.stat)}
            return self.table.add(base.MEMFD, message), base.MEMFD
        device = _is_plain_device(open.stat)
        plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or device
        if link.startswith("/") and (plain or o_path):
            if not o_path:
                message["fown"] = self._owner(open)
                if stat.S_ISDIR(mode) and message["fown"] is not NO_OWNER:
                    # F_NOTIFY makes who calls it the owner (fcntl_dirnotify in fs/notify/dnotify), and nothing else
                    # shows that. Of no other use is an owner to a directory.
                    reason = "is a directory with an owner for signals: it asked for notifications (F_NOTIFY), which"
                    self.context.refuse(open, f"{reason} nobody can read", "close it, or use inotify")
                    return None
            if stat.S_ISCHR(mode) and (os.major(open.stat.st_rdev), os.minor(open.stat.st_rdev)) in _STATELESS:
                message["pos"] = NO_SEEK
            if device:
                message["firn"] = {"rdev": open.stat.st_rdev}
            other = process_of(link)
            if other and other not in self.context.pids and os.path.exists(f"/proc/{other}"):
                self.context.warn(f"{open.what} is {link}, of a process outside: the restore opens what is there then")
            return self.finder.add(open.what, open.path, message, open.stat, None), base.REG
        return self._special(open)

    def _special(self, open: base.Open) -> tuple[int, int] | None:
        """A description of a kind that has a module of its own."""
        kind = base.type_of(open.link, open.stat)
        if kind == base.SOCKET:
            kind = base.family_type(open.copy())
        if kind is None or not base.is_built(kind):
            self.context.refuse(open, *_why_refused(open))
            return None
        if kind not in self.kinds:
            self.kinds[kind] = base.load(kind)()
        message = self.kinds[kind].collect(open, self.context)
        return None if message is None else (self.table.add(kind, message), kind)

    def _add_path(self, what: str, path: str, st: os.stat_result, message: dict[str, Any]) -> int:
        return self.finder.add(what, path, message, st, None)

    def _owner(self, open: base.Open) -> dict[str, int]:
        """fown_entry of the description: who gets its signals, and which."""
        copy = open.copy()
        kind, pid = struct.unpack("<ii", fcntl.fcntl(copy, fc.F_GETOWN_EX, bytes(8)))
        signal = fcntl.fcntl(copy, fc.F_GETSIG)
        if not pid and not signal:
            return NO_OWNER
        uid, euid = struct.unpack("<II", fcntl.fcntl(copy, fc.F_GETOWNER_UIDS, bytes(8)))
        return {"uid": uid, "euid": euid, "signum": signal, "pid_type": kind, "pid": pid}
