"""Parsers of /proc/PID: text in, plain records out (proc(5), Documentation/filesystems/proc.rst).

Nothing above this module parses text of the kernel. All functions raise :class:`OSError` (ENOENT or ESRCH when the
process is gone).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


_ROOM = 1 << 16


def read(path: str) -> bytes:
    """The whole of a /proc file."""
    return _read(path, 1)


def read_record(path: str) -> bytes:
    """The same of a file that the kernel makes as one piece (single_open, simple_read_from_buffer in fs/proc): what is
    shorter than asked for is all of it, and a read only to see the end would take as long as the first one."""
    return _read(path, _ROOM)


def _read(path: str, least: int) -> bytes:
    """Read until there are less than *least* bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, _ROOM)]
        while len(parts[-1]) >= least:
            parts.append(os.read(fd, _ROOM))
        return b"".join(parts)
    finally:
        os.close(fd)


class Stat:
    """/proc/PID/stat, or that of a thread."""

    __slots__ = ("comm", "fields", "pid")

    def __init__(self, text: bytes) -> None:
        left, right = text.index(b"("), text.rindex(b")")
        self.pid = int(text[:left])
        self.comm = text[left + 1 : right]
        self.fields = text[right + 2 :].split()

    state = property(lambda self: self.fields[0].decode())
    ppid = property(lambda self: int(self.fields[1]))
    pgrp = property(lambda self: int(self.fields[2]))
    session = property(lambda self: int(self.fields[3]))
    tty = property(lambda self: int(self.fields[4]))
    """Device number of the controlling terminal, 0 for none."""
    flags = property(lambda self: int(self.fields[6]))
    num_threads = property(lambda self: int(self.fields[17]))
    start_time = property(lambda self: int(self.fields[19]))
    start_code = property(lambda self: int(self.fields[23]))
    end_code = property(lambda self: int(self.fields[24]))
    start_stack = property(lambda self: int(self.fields[25]))
    exit_signal = property(lambda self: int(self.fields[35]))
    processor = property(lambda self: int(self.fields[36]))
    start_data = property(lambda self: int(self.fields[42]))
    end_data = property(lambda self: int(self.fields[43]))
    start_brk = property(lambda self: int(self.fields[44]))
    arg_start = property(lambda self: int(self.fields[45]))
    arg_end = property(lambda self: int(self.fields[46]))
    env_start = property(lambda self: int(self.fields[47]))
    env_end = property(lambda self: int(self.fields[48]))
    exit_code = property(lambda self: int(self.fields[49]))


PF_KTHREAD = 0x00200000
PF_IO_WORKER = 0x00000010


def stat(pid: int, tid: int = 0) -> Stat:
    """The stat record of a process, or of its thread *tid*."""
    return Stat(read_record(f"/proc/{pid}/task/{tid}/stat" if tid else f"/proc/{pid}/stat"))


def status(pid: int, tid: int = 0) -> dict[str, str]:
    """/proc/PID/status as a mapping of its lines."""
    raw = read_record(f"/proc/{pid}/task/{tid}/status" if tid else f"/proc/{pid}/status")
    text = raw.decode("utf-8", "surrogateescape")
    # Not splitlines(): a task's name may hold other line separators than "\n", which alone the kernel escapes.
    return {key: value.strip() for key, _, value in [line.partition(":") for line in text.split("\n") if line]}


def threads(pid: int) -> list[int]:
    """The thread ids of *pid*, the leader first."""
    tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    if pid in tids:
        tids.remove(pid)
        tids.insert(0, pid)
    return tids


def speaker(pid: int) -> int:
    """The id under which /proc, kcmp(2) and process_vm_readv(2) know the memory, files and directories of *pid*: its
    own, or that of another thread if its first one has exited. (That one has none of these any more, fs/proc/base.c;
    and /proc/TID is there for every thread, though it is not listed.)"""
    if stat(pid).state not in "ZX":
        return pid
    return next((tid for tid in threads(pid) if stat(pid, tid).state not in "ZX"), pid)


class Map:
    """One line of /proc/PID/maps, with the VmFlags of smaps when those were read (else None)."""

    __slots__ = ("device", "end", "flags", "inode", "key", "name", "offset", "page_size", "perms", "start", "whole")

    def __init__(
        self, start: int, end: int, perms: str, offset: int, device: tuple[int, int], inode: int, name: str
    ) -> None:
        self.start = start
        self.end = end
        self.perms = perms
        self.offset = offset
        self.device = device
        self.inode = inode
        self.name = name
        self.flags: frozenset[str] | None = None
        self.page_size = 4096
        self.key = 0
        self.whole = False

    def identity(self) -> tuple[int, int, str, int, int]:
        """What identifies the mapping when two readings are compared."""
        return self.start, self.end, self.perms, self.offset, self.inode

    @property
    def prot(self) -> int:
        """PROT_* bits."""
        p = self.perms
        return (p[0] == "r") | (p[1] == "w") << 1 | (p[2] == "x") << 2

    @property
    def shared(self) -> bool:
        """Whether this is a MAP_SHARED mapping."""
        return self.perms[3] == "s"


_Line = tuple[int, int, str, int, tuple[int, int], int, str]
_lines: dict[str, _Line] = {}
_flag_lines: dict[str, frozenset[str]] = {}
"""What lines of maps and of VmFlags say: they are the same in all processes that have forked from one."""
_MANY = 20_000


def _map_line(line: str) -> Map:
    known = _lines.get(line)
    if known is None:
        parts = line.split(None, 5)
        start, _, end = parts[0].partition("-")
        device, _, minor = parts[3].partition(":")
        # The name is the rest of the line as it is: it may end in blanks; a newline in it is written as \012.
        name = parts[5] if len(parts) > 5 else ""
        known = (
            int(start, 16), int(end, 16), parts[1], int(parts[2], 16), (int(device, 16), int(minor, 16)), int(parts[4]),
            name,
        )  # fmt: skip
        if len(_lines) < _MANY:
            _lines[line] = known
    return Map(*known)


def _flags(line: str) -> frozenset[str]:
    known = _flag_lines.get(line)
    if known is None:
        known = _flag_lines[line] = frozenset(line.split())
    return known


def maps(pid: int) -> list[Map]:
    """The mappings of *pid*, ascending."""
    text = read(f"/proc/{pid}/maps").decode("utf-8", "surrogateescape")
    return [_map_line(line) for line in text.split("\n") if line]


def named_map(pid: int, name: str) -> Map | None:
    """The first mapping of *pid* called *name* (like ``[vdso]``); the lines of all others are not parsed."""
    text = read(f"/proc/{pid}/maps")
    ending = f" {name}\n".encode("utf-8", "surrogateescape")
    at = text.find(ending)
    while at >= 0:
        line = text[text.rfind(b"\n", 0, at) + 1 : at + len(ending) - 1]
        found = _map_line(line.decode("utf-8", "surrogateescape"))
        if found.name == name:
            return found
        at = text.find(ending, at + 1)
    return None


def smaps(pid: int) -> list[Map]:
    """The mappings with their VmFlags, page size and protection key, and of locked ones
    whether they are ``whole``: all pages are in memory.

    Walks page tables: not cheap.
    """
    text = read(f"/proc/{pid}/smaps").decode("utf-8", "surrogateescape")
    found: list[Map] = []
    # A mapping is a line of maps, some twenty of "Key: value", VmFlags the last of them (fs/proc/task_mmu.c).
    parts = text.split("\nVmFlags:")
    mapping = parts[0]
    for part in parts[1:]:
        flags, _, following = part.partition("\n")
        line, _, values = mapping.partition("\n")
        current = _map_line(line)
        current.flags = _flags(flags)
        if _SMALL_PAGES not in values:
            current.page_size = _kilobytes(values, "KernelPageSize:") or 4096
        if "lo" in current.flags:
            current.whole = _kilobytes(values, "Rss:") >= current.end - current.start
        # The last line before VmFlags, if the processor has protection keys.
        last = values.rfind("\n") + 1
        if values.startswith("ProtectionKey:", last):
            current.key = int(values[last + 14 :])
        found.append(current)
        mapping = following
    return found


_SMALL_PAGES = "\nKernelPageSize:        4 kB\n"


def _kilobytes(values: str, key: str) -> int:
    """The bytes behind *key* in *values*, 0 if it is not there."""
    at = values.find(key)
    return int(values[at + len(key) : values.index(" kB", at)]) * 1024 if at >= 0 else 0


_FD_FOLDER = 0o40500


def link_stat(path: str) -> os.stat_result:
    """stat(2) of what a magic link leads to, also if that is the folder ``fd`` of a dead process: for that the kernel
    counts descriptors, and fails (proc_fd_getattr, fs/proc/fd.c). Its inode number is shown since Linux 5.14."""
    try:
        return os.stat(path)
    except (FileNotFoundError, ProcessLookupError):
        target = os.readlink(path)
        if not (target.startswith("/proc/") and target.endswith("/fd")):
            raise
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = read(f"/proc/self/fdinfo/{fd}").splitlines()
    finally:
        os.close(fd)
    inode = next((int(line[4:]) for line in lines if line.startswith(b"ino:")), 0)
    return os.stat_result((_FD_FOLDER, inode, os.stat("/proc").st_dev, 2, 0, 0, 0, 0, 0, 0), {"st_rdev": 0})


def fdinfo(pid: int, fd: int) -> dict[str, str]:
    """/proc/PID/fdinfo/FD; of repeated keys (epoll, inotify, lock) the last one wins, all are under ``lines``."""
    text = read_record(f"/proc/{pid}/fdinfo/{fd}").decode()
    result = {"lines": text}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        result[key] = value.strip()
    return result


def children(pid: int, tids: list[int] | None = None) -> list[int]:
    """The pids of the children of all threads of *pid*, which are *tids* if they are known (needs
    CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    for tid in tids or threads(pid):
        try:
            found += [int(word) for word in read(f"/proc/{pid}/task/{tid}/children").split()]
        except FileNotFoundError:
            continue
    return found


def processes() -> Iterator[int]:
    """The pids of all processes."""
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


class PosixTimer:
    """One timer of /proc/PID/timers."""

    __slots__ = ("clock", "id", "notify", "signal", "target", "value")

    def __init__(self, lines: dict[str, str]) -> None:
        self.id = int(lines["ID"])
        signal, _, value = lines["signal"].partition("/")
        self.signal = int(signal)
        self.value = int(value, 16)
        kind, _, target = lines["notify"].partition("/")
        how, _, number = target.partition(".")
        self.notify = {"signal": 0, "none": 1, "thread": 2}[kind] | (4 if how == "tid" else 0)
        self.target = int(number)
        self.clock = int(lines["ClockID"])


def timers(pid: int) -> list[PosixTimer]:
    """The POSIX timers of *pid*, by ascending id."""
    found: list[PosixTimer] = []
    current: dict[str, str] = {}
    for line in read(f"/proc/{pid}/timers").decode().splitlines():
        key, _, value = line.partition(":")
        if key == "ID" and current:
            found.append(PosixTimer(current))
            current = {}
        current[key] = value.strip()
    if current:
        found.append(PosixTimer(current))
    return sorted(found, key=lambda timer: timer.id)
