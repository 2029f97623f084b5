"""Files that the caller of a restore supplies, and files that a dump leaves to it (``--inherit-fd``, ``--external``).

State owned: none; a checkpoint only holds the key under which each of its files can be supplied, and for a file that
was named external nothing else. Kernel: the mount id in fdinfo (proc(5)) and the inode number make the key of an
external file. It comes back as a duplicate of the caller's descriptor: flags, position and contents are the caller's.
What goes wrong: a descriptor of another kind than the file; an external file that nobody supplies.

Keys, as CRIU spells them: ``pipe:[INODE]`` and ``socket:[INODE]`` with the inode number at the dump,
``tty[RDEV:DEV]`` and ``file[MNT_ID:INODE]`` in hexadecimal, ``/memfd:NAME``, and for other files the path without its
first slash.
"""

from __future__ import annotations

import fcntl
import os
import stat

from firn.abi import fcntl as fc
from firn.errors import RestoreError, UsageError
from firn.host import procfs
from firn.resources.base import INETSK, PIPE, REG, UNIXSK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE = "file["
_SOCKETS = (INETSK, UNIXSK)


class Inherited:
    """The descriptors of ``--inherit-fd``, by key: of equal keys the first counts. Unused ones are no mistake.

    All but the three standard ones are made close-on-exec, and are closed when the restore has succeeded
    (:meth:`done`): a reader outside shall see the end when the restored tasks have closed theirs.
    """

    def __init__(self, texts: list[str]) -> None:
        self._fds: dict[str, int] = {}
        for text in texts:
            head, _, key = text.partition("]:")
            number = head.partition("[")[2]
            if not key or not number.isdecimal():
                raise UsageError(f"Invalid inherit fd argument: {text}")
            fd = int(number)
            self._fds.setdefault(key, fd)
            try:
                os.set_inheritable(fd, fd <= 2)
            except OSError as error:
                raise RestoreError(f"descriptor {fd} for {key}: {error.strerror}") from None

    def __bool__(self) -> bool:
        return bool(self._fds)

    def __contains__(self, key: str) -> bool:
        return key in self._fds

    def done(self) -> None:
        """Close what was supplied."""
        for fd in set(self._fds.values()):
            if fd > 2:
                os.close(fd)
        self._fds = {}

    def supplies(self, kind: int, message: dict[str, Any]) -> bool:
        """Whether the file *message* of type *kind* is there, so that nothing has to be made for it."""
        return bool(self._fds) and inherit_key(kind, message) in self._fds

    def number(self, key: str) -> int:
        """The caller's descriptor for *key*."""
        return self._fds[key]

    def take(self, key: str) -> int:
        """A duplicate of the caller's descriptor for *key*, which the caller of this method has to close."""
        try:
            return fcntl.fcntl(self._fds[key], fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise RestoreError(f"descriptor {self._fds[key]} for {key}: {error.strerror}") from None

    def open(self, key: str, kind: int, message: dict[str, Any]) -> int:
        """:meth:`take` for a file of type *kind*, whose sort is checked."""
        fd = self.take(key)
        try:
            mode = os.fstat(fd).st_mode
            for kinds, wanted, name in ((_SOCKETS, stat.S_IFSOCK, "socket"), ((PIPE,), stat.S_IFIFO, "pipe")):
                if kind in kinds and stat.S_IFMT(mode) != wanted:
                    raise RestoreError(f"descriptor {self._fds[key]}, inherited for {key}, is no {name}")
            there = fcntl.fcntl(fd, fc.F_GETFL) & fc.O_ACCMODE
            wanted_mode = message.get("flags", 0) & fc.O_ACCMODE
            if kind == PIPE and there not in (wanted_mode, fc.O_RDWR):
                # The caller has the pipe by its other end: any end leads to both.
                other = os.open(f"/proc/self/fd/{fd}", wanted_mode | fc.O_NONBLOCK | fc.O_CLOEXEC)
                fcntl.fcntl(other, fc.F_SETFL, message["flags"] & ~fc.FASYNC)
                os.dup2(other, fd, inheritable=False)
                os.close(other)
        except BaseException:
            os.close(fd)
            raise
        return fd


def inherit_key(kind: int, message: dict[str, Any], memory_name: str = "") -> str:
    """The key of a file of type *kind*; empty if it cannot be inherited (terminals have their own way)."""
    if kind == PIPE:
        return f"pipe:[{message['pipe_id']}]"
    if kind in _SOCKETS:
        return f"socket:[{message['ino']}]"
    if kind == REG:
        name: str = message["name"]
        return name if is_external(message) else name[1:]
    return f"/memfd:{memory_name}" if memory_name else ""


def is_external(message: dict[str, Any]) -> bool:
    """Whether the REG entry *message* is a file that only the caller of the restore can supply."""
    return bool(message.get("ext")) or message["name"].startswith(FILE)


def not_supplied(message: dict[str, Any]) -> RestoreError:
    """What to say of an external file that was not inherited."""
    key = message["name"]
    return RestoreError(f"{key} was left out of the checkpoint", f"give it with --inherit-fd fd[N]:{key}")


class ExternalFiles:
    """The ``file[MNT_ID:INODE]`` entries of ``--external`` at a dump."""

    def __init__(self, texts: list[str]) -> None:
        self.keys = {text for text in texts if text.startswith(FILE)}

    def key(self, link: str, st: os.stat_result) -> str:
        """The key of the file behind magic *link*, if it was named; else empty."""
        if not self.keys:
            return ""
        try:
            fd = os.open(link, fc.O_PATH | fc.O_CLOEXEC)
        except OSError:
            return ""
        try:
            key = f"{FILE}{int(procfs.fdinfo(os.getpid(), fd)['mnt_id']):x}:{st.st_ino:x}]"
        finally:
            os.close(fd)
        return key if key in self.keys else ""
