"""Parsers of /proc/PID: text in, plain records out (proc(5), Documentation/filesystems/proc.rst).

Nothing above this module parses text of the kernel. All functions raise :class:`OSError` (ENOENT or ESRCH when the
process is gone).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def read(path: str) -> bytes:
    """The whole of a /proc file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = os.read(fd, 65536)
        if len(first) < 4000:
            more = os.read(fd, 65536)
            if not more:
                return first
            first += more
        parts = [first]
        while True:
            part = os.read(fd, 1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)
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
    return Stat(read(f"/proc/{pid}/task/{tid}/stat" if tid else f"/proc/{pid}/stat"))


def status(pid: int, tid: int = 0) -> dict[str, str]:
    """/proc/PID/status as a mapping of its lines."""
    text = read(f"/proc/{pid}/task/{tid}/status" if tid else f"/proc/{pid}/status").decode("utf-8", "surrogateescape")
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

    __slots__ = ("device", "end", "flags", "huge", "inode", "key", "name", "offset", "page_size", "perms", "start")

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
        self.huge = 0
        self.key = 0

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


def _map_line(line: str) -> Map:
    parts = line.split(None, 5)
    start, _, end = parts[0].partition("-")
    major, _, minor = parts[3].partition(":")
    # The name is the rest of the line as it is: it may end in blanks; a newline in it is written as \012.
    name = parts[5] if len(parts) > 5 else ""
    return Map(
        int(start, 16), int(end, 16), parts[1], int(parts[2], 16), (int(major, 16), int(minor, 16)), int(parts[4]), name
    )


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
    """The mappings with their VmFlags, page size, amount of huge pages (bytes) and protection key.

    Walks page tables: not cheap.
    """
    text = read(f"/proc/{pid}/smaps").decode("utf-8", "surrogateescape")
    found: list[Map] = []
    at = 0
    while at < len(text):
        # A mapping is a line of maps, some twenty of "Key: value", VmFlags the last of them (fs/proc/task_mmu.c).
        flags = text.index("\nVmFlags:", at)
        end = text.index("\n", flags + 1)
        current = _map_line(text[at : text.index("\n", at)])
        current.flags = frozenset(text[flags + 9 : end].split())
        current.page_size = _kilobytes(text, "\nKernelPageSize:", at, flags) or 4096
        current.huge = _kilobytes(text, "\nAnonHugePages:", at, flags)
        # The last line before VmFlags, if the processor has protection keys.
        last = text.rfind("\n", at, flags) + 1
        if text.startswith("ProtectionKey:", last, flags):
            current.key = int(text[last + 14 : flags])
        found.append(current)
        at = end + 1
    return found


def _kilobytes(text: str, key: str, start: int, end: int) -> int:
    """The bytes behind *key* in text[start:end], 0 if it is not there."""
    at = text.find(key, start, end)
    return int(text[at + len(key) : text.index(" kB", at)]) * 1024 if at >= 0 else 0


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
    text = read(f"/proc/{pid}/fdinfo/{fd}").decode()
    result = {"lines": text}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        result[key] = value.strip()
    return result


def children(pid: int) -> list[int]:
    """The pids of the children of all threads of *pid* (needs CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    for tid in threads(pid):
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
