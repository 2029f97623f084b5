"""The protocol of a kind of open file, and which module has which kind.

A kind is a class in a module of its own: how a description of it is saved and how it comes back, side by side. One
instance serves one dump or one restore, so it can keep what it must know about all descriptions of its kind. Kinds are
imported when the first of them is met: before the freeze, from a look at the running target's descriptors.
"""

from __future__ import annotations

import errno
import os
import stat

from firn.abi import events as ev
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import KernelError, Obstacle
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.images.store import ImageDir
    from firn.resources.files.external import Inherited
    from firn.resources.network.lock import Lock
    from firn.resources.sockets.backlog import Backlogs
    from firn.tracee.guard import Guard
    from firn.tracee.program import Program

REG, PIPE, FIFO, INETSK, UNIXSK, EVENTFD, EVENTPOLL, INOTIFY, SIGNALFD, PACKETSK, TTY = range(1, 12)
FANOTIFY, NETLINKSK, NS, TUNF, EXT, TIMERFD, MEMFD, BPFMAP, PIDFD = range(12, 21)
"""fd_types of the image format."""

FIELD = {
    REG: "reg", PIPE: "pipe", FIFO: "fifo", INETSK: "isk", UNIXSK: "usk", EVENTFD: "efd", EVENTPOLL: "epfd",
    INOTIFY: "ify", SIGNALFD: "sgfd", PACKETSK: "psk", TTY: "tty", FANOTIFY: "ffy", NETLINKSK: "nlsk", NS: "nsf",
    TUNF: "tunf", EXT: "ext", TIMERFD: "tfd", MEMFD: "memfd", BPFMAP: "bpf", PIDFD: "pidfd",
}  # fmt: skip
"""The field of file_entry that holds the message of a type."""

SOCKET = -1
"""Not a type of the images: a socket whose family is still to be asked."""

_LINKS = (
    ("pipe:[", PIPE), ("socket:[", SOCKET), ("anon_inode:[eventfd]", EVENTFD), ("anon_inode:[eventpoll]", EVENTPOLL),
    ("anon_inode:[signalfd]", SIGNALFD), ("anon_inode:[timerfd]", TIMERFD), ("anon_inode:inotify", INOTIFY),
    ("anon_inode:[fanotify]", FANOTIFY), ("anon_inode:[pidfd]", PIDFD), ("pidfd:[", PIDFD),
    *((f"{name}:[", NS) for name in ("pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup")),
)  # fmt: skip

_BUILT: dict[int, tuple[str, str]] = {
    PIPE: ("firn.resources.files.pipes", "Pipes"),
    FIFO: ("firn.resources.files.pipes", "Fifos"),
    INETSK: ("firn.resources.sockets.inet", "InetSockets"),
    UNIXSK: ("firn.resources.sockets.unix", "UnixSockets"),
    EVENTFD: ("firn.resources.files.events", "EventFd"),
    EVENTPOLL: ("firn.resources.files.epoll", "Epoll"),
    INOTIFY: ("firn.resources.files.watches", "Inotify"),
    SIGNALFD: ("firn.resources.files.events", "SignalFd"),
    PACKETSK: ("firn.resources.sockets.packet", "PacketSockets"),
    NETLINKSK: ("firn.resources.sockets.netlink", "NetlinkSockets"),
    FANOTIFY: ("firn.resources.files.watches", "Fanotify"),
    TIMERFD: ("firn.resources.files.events", "TimerFd"),
    TTY: ("firn.resources.ttys", "Ttys"),
    PIDFD: ("firn.resources.files.pidfd", "PidFd"),
    NS: ("firn.resources.namespaces", "NamespaceFiles"),
    TUNF: ("firn.resources.files.tun", "Tun"),
}
"""Type -> (module, class). A row is added when a kind is built."""

_FAMILIES: dict[int, int] = {1: UNIXSK, 2: INETSK, 10: INETSK, 16: NETLINKSK, 17: PACKETSK}
"""Socket family (AF_*) -> type, of the families that are built."""

_PROTOCOL_NAMES = {b"UNIX": UNIXSK, b"UNIX-STREAM": UNIXSK, b"NETLINK": NETLINKSK, b"PACKET": PACKETSK}
"""Names of protocols that do not belong to internet sockets."""


class Open:
    """An open file description of a frozen process, seen through descriptor *fd*.

    ``path`` is its magic link and ``link`` what that reads; ``flags`` are O_* without O_CLOEXEC, ``position`` the file
    offset; ``info`` the fields of its fdinfo file, ``info["lines"]`` its whole text; ``what`` names it in messages.
    ``tid`` is the id under which the kernel knows the descriptors of process ``pid`` (:func:`.procfs.speaker`).
    """

    __slots__ = ("_copy", "fd", "flags", "info", "link", "path", "pid", "pidfd", "position", "stat", "tid", "what")

    def __init__(self, pid: int, pidfd: int, fd: int, info: dict[str, str], tid: int = 0) -> None:
        self.pid = pid
        self.tid = tid or pid
        self.pidfd = pidfd
        self.fd = fd
        self.info = info
        self.path = f"/proc/{self.tid}/fd/{fd}"
        self.link = os.readlink(self.path)
        self.stat = procfs.link_stat(self.path)
        self.flags = int(info["flags"], 8) & ~0o2000000
        self.position = int(info["pos"])
        self.what = f"process {pid}: descriptor {fd}"
        self._copy = -1

    def copy(self) -> int:
        """Our own descriptor of the same description, open until :meth:`close`; do not change its state."""
        if self._copy < 0:
            self._copy = syscall(f"pidfd_getfd of {self.what}", nr.pidfd_getfd, self.pidfd, self.fd, 0)
        return self._copy

    def close(self) -> None:
        """Close the copy."""
        if self._copy >= 0:
            os.close(self._copy)
            self._copy = -1


def pidfd_for_copies(pid: int, tid: int) -> int:
    """A pidfd with which pidfd_getfd(2) copies descriptors of process *pid*, whose :func:`.procfs.speaker` is *tid*.
    KernelError if that is another thread and the kernel has no pidfds of threads.

    The call asks the very task that the pidfd is of: ESRCH if that is a first thread that has exited (kernel/pid.c).
    """
    try:
        return syscall(f"pidfd_open {tid}", nr.pidfd_open, tid, 0 if tid == pid else ev.PIDFD_THREAD)
    except OSError as error:
        if tid == pid or error.errno != errno.EINVAL:
            raise
    reason = "its first thread has exited, by which alone this kernel copies descriptors"
    raise KernelError(reason, "Linux 6.9 or later (PIDFD_THREAD)")


class DumpContext:
    """What a kind may use while it collects: ``add_file`` stores a further description and returns its id (1: REG by
    magic link, stat, message); ``add_open`` stores any description and returns (id, type) or None if it was refused;
    ``owner`` gives the fown_entry of a description; ``warn`` tells the log what a checkpoint does not hold. ``lock``
    keeps connections quiet, and ``backlogs`` has those that nobody has accepted; None unless they are to be saved
    (``--tcp-established``). ``guard`` is the dump's, or None."""

    __slots__ = ("add_open", "add_path", "backlogs", "guard", "lock", "obstacles", "options", "owner", "pids", "warn")

    def __init__(
        self,
        obstacles: list[Obstacle],
        options: Any,
        pids: list[int],
        owner: Callable[[Open], dict[str, int]],
        add_path: Callable[[str, str, os.stat_result, dict[str, Any]], int],
        add_open: Callable[[Open], tuple[int, int] | None],
        warn: Callable[[str], object] = str,
    ) -> None:
        self.obstacles = obstacles
        self.options = options
        self.pids = pids
        self.owner = owner
        self.add_path = add_path
        self.add_open = add_open
        self.lock: Lock | None = None
        self.backlogs: Backlogs | None = None
        self.guard: Guard | None = None
        self.warn = warn

    def refuse(self, open: Open, reason: str, help: str = "", passing: bool = False) -> None:
        """Note that *open* cannot be saved; *passing*: not just now, but the program is about to change that."""
        self.obstacles.append(Obstacle(open.what, reason, help, passing))


class RestoreContext:
    """What a kind may use while it restores: ``message(type, id)`` and ``open(type, id)`` of other files (``open``
    gives our own descriptor of it), the images, the options, and all pids of the checkpoint. ``files`` are all file
    entries by (type, id); ``inherited`` what ``--inherit-fd`` supplies; ``warn`` tells the log what does not come
    back."""

    __slots__ = ("files", "images", "inherited", "message", "open", "options", "pids", "warn")

    def __init__(
        self,
        images: ImageDir,
        options: Any,
        pids: list[int],
        files: dict[tuple[int, int], dict[str, Any]],
        message: Callable[[int, int], dict[str, Any]],
        open: Callable[[int, int], int],
        inherited: Inherited,
        warn: Callable[[str], object] = str,
    ) -> None:
        self.images = images
        self.options = options
        self.pids = pids
        self.files = files
        self.message = message
        self.open = open
        self.inherited = inherited
        self.warn = warn


class Kind:
    """A kind of open file. Override what applies."""

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The message of *open*, without id; None if it was refused. The process is frozen: read, change nothing."""
        raise NotImplementedError

    def finish(self, context: DumpContext) -> None:
        """All descriptors of all frozen processes are collected: look at what belongs together (peers, queues)."""

    def killed(self) -> None:
        """The frozen processes are dead: nobody needs their files but us."""

    def leads_to(self, device: int) -> bool:
        """Whether a collected description leads to the terminal *device*, as a controlling one."""
        return False

    def save(self, images: ImageDir) -> None:
        """Write images of this kind's own; the processes may be running again."""

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether the file can only be opened when all restored tasks exist."""
        return False

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """Make the description and return a descriptor of ours (close-on-exec) for it. Called once per file id."""
        raise NotImplementedError

    def plan_session(self, program: Program, sid: int) -> None:
        """Calls of the task that has just become the leader of session *sid*, before it has children."""

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """Calls that the restored task makes when all its descriptors are in place; *fd* is its number in the task."""

    def complete(self) -> None:
        """All restored tasks have all their descriptors."""

    def quiet(self) -> list[int]:
        """The descriptors that :meth:`resume` needs; none if it has nothing to do."""
        return []

    def resume(self, again: bool = False) -> None:
        """The restored tasks run in a moment, and nothing else can fail: let happen what others would notice. *again*:
        somebody who had the same descriptors has begun with that, and has died."""

    def close(self) -> None:
        """Let go of what was held open; also called after a failure."""


def type_of(link: str, st: os.stat_result) -> int | None:
    """The type of a descriptor that is not an ordinary file, from its link; None if there is no such kind."""
    for prefix, kind in _LINKS:
        if link.startswith(prefix):
            return kind
    if stat.S_ISFIFO(st.st_mode):
        return FIFO
    if stat.S_ISCHR(st.st_mode) and st.st_rdev == os.makedev(10, 200):
        return TUNF
    if stat.S_ISCHR(st.st_mode) and (os.major(st.st_rdev) in (4, 5) or 136 <= os.major(st.st_rdev) <= 143):
        return TTY
    return None


def family_type(copy: int) -> int | None:
    """The type of the socket *copy* (a descriptor of ours), if its family is built."""
    from firn.abi.libc import address_of

    value, size = bytearray(4), bytearray(b"\x04\0\0\0")
    # SOL_SOCKET 1, SO_DOMAIN 39 (include/uapi/asm-generic/socket.h)
    syscall("getsockopt SO_DOMAIN", nr.getsockopt, copy, 1, 39, address_of(value), address_of(size))
    return _FAMILIES.get(int.from_bytes(value, "little"))


def is_built(kind: int | None) -> bool:
    """Whether firn saves and restores files of type *kind*."""
    return kind in _BUILT


def load(kind: int) -> type[Kind]:
    """The class of type *kind*."""
    module_name, name = _BUILT[kind]
    module = __import__(module_name, fromlist=[name])
    found: type[Kind] = getattr(module, name)
    return found


def preload(pid: int) -> set[int]:
    """Import, before the freeze, the kinds that the running process *pid* seems to need; which these are."""
    found: set[int] = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            kind = type_of(os.readlink(path), os.stat(path))
        except OSError:
            continue
        if kind == SOCKET:
            kind = _PROTOCOL_NAMES.get(_protocol_name(path), INETSK)
        if kind is not None and is_built(kind) and kind not in found:
            load(kind)
            found.add(kind)
    return found


def _protocol_name(path: str) -> bytes:
    """What the kernel calls a socket's protocol (net/socket.c: an extended attribute of each socket)."""
    try:
        return os.getxattr(path, "system.sockprotoname").rstrip(b"\0")
    except OSError:
        return b""
