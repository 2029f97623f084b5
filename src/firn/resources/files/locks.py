"""File locks and leases (image: filelocks.img).

State owned: flock(2) locks, POSIX and open-file-description locks of fcntl(2), leases. Kernel: the ``lock:`` lines of
/proc/PID/fdinfo/FD (proc(5), fs/locks.c), which show what the open file description holds and, of POSIX locks, what
the process's descriptor table holds through it; who only waits for a lock is not there, and comes to wait again by its
own system call. Each task takes its locks back itself, so that the kernel records the right owner. What goes wrong:
somebody else has the lock meanwhile; a locked description that no process has open (it waits in a socket's queue).
"""

from __future__ import annotations

import os
import struct

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.errors import ImageError, Obstacle, RestoreError
from firn.host import kcmp, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir
    from firn.resources.base import Open
    from firn.resources.files.reopen import Opener
    from firn.tracee.program import Program

POSIX, FLOCK, OFD, LEASE = 1, 2, 4, 8
"""file_lock_entry.flag."""
READ, WRITE, UNLOCK = 0, 1, 2
BREAKING = 4
"""file_lock_entry.type; that of a lease which is being broken is what it shall become, with BREAKING."""

_KINDS = {"POSIX": POSIX, "FLOCK": FLOCK, "OFDLCK": OFD, "LEASE": LEASE}
_TYPES = {"READ": READ, "WRITE": WRITE, "UNLCK": UNLOCK}
_NAMES = {POSIX: "POSIX lock", FLOCK: "flock", OFD: "open-file-description lock", LEASE: "lease"}
_TYPE_NAMES = {READ: "read", WRITE: "write", UNLOCK: "ending"}
_FLOCK = struct.Struct("<hh4xqqi4x")
"""struct flock: l_type, l_whence, l_start, l_len, l_pid (include/uapi/asm-generic/fcntl.h)."""
_EAGAIN = 11
_FAR = (1 << 63) - 1


class Lock:
    """One lock or lease: ``kind`` and ``type`` as in the image, ``length`` 0 for up to the end of any file, ``pid`` of
    the process that took it as far as the kernel tells (-1, 0: it does not)."""

    __slots__ = ("kind", "length", "pid", "start", "type")

    def __init__(self, kind: int, type: int, pid: int, start: int, length: int) -> None:
        self.kind = kind
        self.type = type
        self.pid = pid
        self.start = start
        self.length = length

    def key(self) -> tuple[int, int, int, int]:
        """What tells it from others of the same owner."""
        return self.kind, self.type, self.start, self.length

    def __str__(self) -> str:
        """For messages."""
        text = f"{_TYPE_NAMES[self.type & ~BREAKING]} {_NAMES[self.kind]}"
        if self.kind in (POSIX, OFD):
            text += f" from byte {self.start} to " + (f"{self.start + self.length - 1}" if self.length else "the end")
        return text


def parse(line: str) -> tuple[Lock, str] | None:
    """The lock of a line of /proc/locks, or of fdinfo behind ``lock:``, and its file as ``major:minor:inode``.

    None for a waiter (``->``), and for what is no lock of a process (layouts and delegations of servers, a lease's
    breaker).
    """
    words = line.split()
    # Number, kind, mode, type, pid, file, start, end.
    if len(words) != 8 or words[1] not in _KINDS or words[2] == "BREAKER" or words[3] not in _TYPES:
        return None
    kind, type = _KINDS[words[1]], _TYPES[words[3]]
    if words[2] == "BREAKING":
        type |= BREAKING
    start = int(words[6])
    length = 0 if words[7] == "EOF" else int(words[7]) - start + 1
    return Lock(kind, type, int(words[4]), start, length), words[5]


class Locks:
    """All locks of a tree, during its dump. ``leased`` are the links of files that nobody can open without breaking a
    lease."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = frozenset(pids)
        self._found: dict[object, tuple[Lock, int, Open]] = {}
        self._holders: dict[int, list[tuple[int, int]]] = {}
        self.entries: list[dict[str, Any]] = []
        self.leased: set[str] = set()

    def add(self, open: Open, number: int) -> None:
        """Note the locks that *open*, the description with file id *number*, shows."""
        if open.pid in self.pids:
            self._holders.setdefault(number, []).append((open.pid, open.fd))
        for lock in locks_of(open):
            owner = open.pid if lock.kind == POSIX else 0
            self._found.setdefault((number, owner, *lock.key()), (lock, number, open))
            if lock.kind == LEASE and lock.type != READ:
                self.leased.add(open.link)

    def finish(self, obstacles: list[Obstacle], wanted: bool) -> None:
        """All descriptors of all (frozen) processes were seen: find the owners. Refuses all locks if not *wanted*."""
        for lock, number, open in self._found.values():
            holders = [(open.pid, open.fd)] if lock.kind == POSIX else self._holders.get(number, [])
            if not wanted:
                obstacles.append(Obstacle(open.what, f"holds a {lock} on {open.link}", "use --file-locks (-l)"))
            elif not holders:
                reason = f"a {lock} on {open.link}, which no process has open"
                obstacles.append(Obstacle(open.what, reason, "release it before the dump"))
            else:
                pid, fd = self._owner(lock.pid, holders)
                entry = {"flag": lock.kind, "type": lock.type, "pid": pid, "fd": fd}
                self.entries.append({**entry, "start": lock.start, "len": lock.length})

    def _owner(self, pid: int, holders: list[tuple[int, int]]) -> tuple[int, int]:
        """The (process, descriptor) that takes the lock again: of process *pid*, which took it, if it still can."""
        for holder, fd in holders:
            if holder == pid:
                return pid, fd
        if pid in self.pids:
            for holder, fd in holders:
                try:
                    same = kcmp.same(procfs.speaker(pid), procfs.speaker(holder), fc.KCMP_FILES)
                except OSError:
                    continue  # a zombie, which has no descriptors
                if same:
                    return pid, fd
        return holders[0]

    def save(self, images: ImageDir) -> None:
        """Write filelocks.img."""
        if self.entries:
            images.write_all("FILE_LOCKS", self.entries)


def locks_of(open: Open) -> list[Lock]:
    """What the fdinfo of *open* shows."""
    lines = [line[5:] for line in open.info["lines"].splitlines() if line.startswith("lock:")]
    return [parsed[0] for parsed in map(parse, lines) if parsed is not None]


def refuse_nameless(open: Open, obstacles: list[Obstacle]) -> bool:
    """Whether *open* is an unlinked file with a write lease: saving its contents would mean opening it, which breaks
    the lease."""
    if open.stat.st_nlink or all(lock.kind != LEASE or lock.type == READ for lock in locks_of(open)):
        return False
    obstacles.append(Obstacle(open.what, f"holds a write lease on the unlinked file {open.link}", "release it first"))
    return True


# -- restore -----------------------------------------------------------------------------------------------------------


class _Taking:
    """A lock on its way back: the image's entry, the file behind it, and the call that takes it."""

    __slots__ = ("call", "entry", "fd", "file", "lock", "message")

    def __init__(self, entry: dict[str, Any], file: tuple[int, int], message: dict[str, Any]) -> None:
        self.entry = entry
        self.lock = Lock(entry["flag"], entry["type"], entry["pid"], entry["start"], entry["len"])
        self.fd: int = entry["fd"]
        self.file = file
        self.message = message
        self.call = -1

    def __str__(self) -> str:
        name = self.message.get("name")
        on = f" on {name}" if isinstance(name, str) else ""
        return f"process {self.entry['pid']}: descriptor {self.fd}: the {self.lock}{on}"


def restore(images: ImageDir, opener: Opener, tasks: dict[int, tuple[Program, list[dict[str, Any]]]]) -> None:
    """Take all locks of the checkpoint. *tasks*: pid -> (its program, its fdinfo entries); all descriptors must be in
    place, credentials and signal owners of files must not be set yet.

    Raises ImageError for impossible entries, RestoreError for a lock that somebody else has.
    """
    by_task: dict[int, list[_Taking]] = {}
    for entry in images.read_all("FILE_LOCKS"):
        by_task.setdefault(entry["pid"], []).append(_check(entry, opener, tasks))
    for pid, takings in by_task.items():
        program = tasks[pid][0]
        for taking in takings:
            _plan(program, taking)
        program.run()
        for taking in takings:
            if program.results[taking.call] == -_EAGAIN:
                raise _taken(taking, opener, tasks)
    for takings in by_task.values():
        for taking in takings:
            if taking.lock.kind == LEASE and taking.lock.type & BREAKING:
                _break(taking, opener)


def _check(entry: dict[str, Any], opener: Opener, tasks: dict[int, tuple[Program, list[dict[str, Any]]]]) -> _Taking:
    pid, kind, type = entry["pid"], entry["flag"], entry["type"]
    if pid not in tasks:
        raise ImageError(f"filelocks.img: there is no process {pid} that could hold a lock")
    found = next((item for item in tasks[pid][1] if item["fd"] == entry["fd"]), None)
    if found is None:
        raise ImageError(f"filelocks.img: process {pid} has no descriptor {entry['fd']} that could be locked")
    right = (READ, WRITE, READ | BREAKING, UNLOCK | BREAKING) if kind == LEASE else (READ, WRITE)
    if kind not in _NAMES or type not in right:
        raise ImageError(f"filelocks.img: process {pid}: a lock of the unknown kind {kind} or type {type:#x}")
    start, length = entry["start"], entry["len"]
    if start < 0 or length < 0 or start + length > _FAR + 1:
        raise ImageError(f"filelocks.img: process {pid}: a lock of the impossible range {start}, {length}")
    file = found["type"], found["id"]
    return _Taking(entry, file, opener.message(*file))


def _plan(program: Program, taking: _Taking) -> None:
    """Add the call that takes the lock; that somebody has it is no error yet."""
    lock, fd, label = taking.lock, taking.fd, f"taking of {taking}"
    if lock.kind == FLOCK:
        how = (fc.LOCK_EX if lock.type == WRITE else fc.LOCK_SH) | fc.LOCK_NB
        taking.call = program.call(label, nr.flock, fd, how, allow=_EAGAIN)
    elif lock.kind == LEASE:
        taking.call = program.call(label, nr.fcntl, fd, fc.F_SETLEASE, _before_break(taking), allow=_EAGAIN)
        # A lease makes its taker the owner that gets signals. The recorded one comes back later; until then breaking
        # the lease must not send a signal, because the first break has sent it.
        program.call(f"F_SETOWN of descriptor {fd}", nr.fcntl, fd, fc.F_SETOWN, 0)
    else:
        program.reserve(1, _FLOCK.size)
        at = program.data(_FLOCK.pack(lock.type, os.SEEK_SET, lock.start, lock.length, 0))
        command = fc.F_SETLK if lock.kind == POSIX else fc.F_OFD_SETLK
        taking.call = program.call(label, nr.fcntl, fd, command, at, allow=_EAGAIN)


def _before_break(taking: _Taking) -> int:
    """The type of the lease before it was broken. One that has to end was of either type, and it makes no difference
    any more: so the one that its file's mode allows."""
    target: int = taking.lock.type
    if not target & BREAKING:
        return target
    read_only = taking.message["flags"] & fc.O_ACCMODE == os.O_RDONLY
    return READ if target & UNLOCK and read_only else WRITE


def _break(taking: _Taking, opener: Opener) -> None:
    """Begin to break a lease as it was: by opening the file as one may not."""
    mode = os.O_WRONLY if taking.lock.type & UNLOCK else os.O_RDONLY
    try:
        fd = os.open(f"/proc/self/fd/{opener.open(*taking.file)}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:
        return
    except OSError as error:
        raise RestoreError(f"{taking} cannot be broken again: {error.strerror}") from None
    os.close(fd)
    raise RestoreError(f"{taking} cannot be broken again: the file can be opened")


def _taken(taking: _Taking, opener: Opener, tasks: dict[int, Any]) -> RestoreError:
    """The error for a lock that cannot be had, with the name of a holder outside."""
    if taking.lock.kind == LEASE:
        return RestoreError(f"{taking} cannot be taken: somebody else has the file open", "close it there")
    st = os.fstat(opener.open(*taking.file))
    wanted = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    holder = ""
    for line in procfs.read("/proc/locks").decode().splitlines():
        parsed = parse(line)
        if parsed is None or parsed[1] != wanted or parsed[0].pid in tasks:
            continue
        lock = parsed[0]
        if (lock.kind == FLOCK) == (taking.lock.kind == FLOCK) and lock.kind != LEASE:
            holder = f" by {_name(lock.pid)}"
            break
    return RestoreError(f"{taking} cannot be taken: the file is locked{holder}", "release that lock first")


def _name(pid: int) -> str:
    if pid <= 0:
        return "an open file description"
    try:
        return f"process {pid} ({procfs.stat(pid).comm.decode('utf-8', 'backslashreplace')})"
    except OSError:
        return f"process {pid}"
