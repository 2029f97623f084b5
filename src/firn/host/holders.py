"""Who has a file open: a search of all descriptors of the machine (proc(5), /proc/PID/fd)."""

from __future__ import annotations

import os

from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Holder:
    """A descriptor of some process; ``mode`` is its O_ACCMODE."""

    __slots__ = ("fd", "mode", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.mode = int(procfs.fdinfo(pid, fd)["flags"], 8) & 3

    def __str__(self) -> str:
        try:
            name = f" ({procfs.stat(self.pid).comm.decode('utf-8', 'replace')})"
        except OSError:
            name = ""
        return f"process {self.pid}{name}, descriptor {self.fd}"


def _descriptors(skip: set[int]) -> Iterator[tuple[int, int]]:
    """(pid, number) of all descriptors of all processes but *skip*; what cannot be looked at is passed over."""
    for pid in procfs.processes():
        if pid in skip:
            continue
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for number in numbers:
            yield pid, int(number)


def of_sockets(inodes: set[int], skip: set[int]) -> dict[int, Holder]:
    """One holder for each of the sockets with these inodes that a process other than *skip* has open."""
    found: dict[int, Holder] = {}
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid, fd in _descriptors(skip):
        try:
            inode = wanted.get(os.readlink(f"/proc/{pid}/fd/{fd}"))
            if inode is not None:
                found[inode] = Holder(pid, fd)
        except OSError:
            continue
    return found


def with_link(link: str, skip: set[int]) -> Holder | None:
    """A descriptor whose link reads *link*, of any process but *skip*."""
    for pid, fd in _descriptors(skip):
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}") == link:
                return Holder(pid, fd)
        except OSError:
            continue
    return None


def find(device: int, inode: int, skip: set[int]) -> list[Holder]:
    """The descriptors that lead to the file (st_dev, st_ino), of all processes but *skip*.

    What cannot be looked at, or goes away meanwhile, is passed over.
    """
    found: list[Holder] = []
    for pid, fd in _descriptors(skip):
        try:
            there = os.stat(f"/proc/{pid}/fd/{fd}")
            if (there.st_ino, there.st_dev) == (inode, device):
                found.append(Holder(pid, fd))
        except OSError:
            continue
    return found
