"""Clients of listening unix sockets that were not accepted yet: what they have sent, and those that are gone again.
And messages that cannot be peeked at, since that would take away an error that waits before them, or would not show
where an out-of-band byte is.

None of these can be reached by a call, so they are seen in the kernel's memory (:mod:`firn.host.unixqueue`), if it lets
us. A descriptor that was sent so is found by the address of its file among those of the tree. What goes wrong: it is
nowhere else open any more; the kernel does not let us look. Then the dump waits a moment, for the server to accept.
"""

from __future__ import annotations

import os

from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import KernelError
from firn.host import procfs
from firn.resources.base import pidfd_for_copies
from firn.resources.sockets import queues

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.sockdiag import UnixSocket
    from firn.host.unixqueue import Message, Queues
    from firn.resources.base import DumpContext


class Client:
    """One that waits: its place in the queue, its name, who connected, what it had sent."""

    __slots__ = ("connector", "name", "place", "records")

    def __init__(self, place: int, name: bytes, connector: dict[str, Any], records: list[queues.Record]) -> None:
        self.place = place
        self.name = name
        self.connector = connector
        self.records = records


class Unseen(Exception):
    """What is in a queue cannot be seen; the text says why."""


class Waiting:
    """Looks into such queues for a dump, until :meth:`close`."""

    def __init__(self) -> None:
        self._queues: Queues | None = None

    def close(self) -> None:
        """Let go of the kernel's memory."""
        if self._queues is not None:
            self._queues.close()
            self._queues = None

    def look(self, fd: int, seen: UnixSocket, sockets: dict[int, UnixSocket], context: DumpContext) -> list[Client]:
        """The clients of the listening socket *seen*, whose descriptor *fd* is ours, if some are gone or have sent
        something; else none. *sockets* are all of the machine. Raises :class:`Unseen`."""
        unheard = [inode for inode in seen.waiting if not inode or (inode in sockets and sockets[inode].sent)]
        if not unheard:
            return []
        try:
            clients = self._open().clients(fd)[: len(seen.waiting)]
            messages = [message for client in clients for message in client.sent]
            files = self._find_files({file for message in messages for file in message.files}, context)
        except (KernelError, OSError) as error:
            raise Unseen(str(error)) from None
        if len(clients) < len(seen.waiting):
            raise Unseen("it has changed meanwhile")
        found = []
        try:
            for place, client in enumerate(clients):
                connector = {"pid": client.pid, "uid": client.uid, "gid": client.gid, "groups": client.groups}
                records = [_record(message, files) for message in client.sent]
                found.append(Client(place, client.name, connector, records))
        finally:
            for ours in files.values():
                os.close(ours)
        return found

    def messages(self, fd: int, context: DumpContext, stream: bool = False) -> list[queues.Record]:
        """What is in the queue of a socket, of which *fd* is our descriptor; in that of a *stream* only an out-of-band
        byte that was read leaves a piece without bytes. Raises :class:`Unseen`."""
        try:
            messages = self._open().messages(fd)
            files = self._find_files({file for message in messages for file in message.files}, context)
        except (KernelError, OSError) as error:
            raise Unseen(str(error)) from None
        try:
            records = [_record(message, files) for message in messages]
            for record in records:
                record.mark = record.mark or (queues.WAS_URGENT if stream and not record.data else 0)
            return records
        finally:
            for ours in files.values():
                os.close(ours)

    def _open(self) -> Queues:
        if self._queues is None:
            from firn.host.unixqueue import Queues

            self._queues = Queues()
        return self._queues

    def _find_files(self, wanted: set[int], context: DumpContext) -> dict[int, int]:
        """Descriptors of ours for the files at the addresses *wanted*. Raises :class:`Unseen` if one is nowhere."""
        found: dict[int, int] = {}
        if not wanted:
            return found
        try:
            for fd in map(int, os.listdir("/proc/self/fd")):
                self._match(fd, wanted, found, False)
            for pid in context.pids:
                if wanted.issubset(found):
                    break
                self._search(pid, wanted, found)
            if not wanted.issubset(found):
                raise Unseen("a descriptor was sent that no process of the tree has open")
        except BaseException:
            for fd in found.values():
                os.close(fd)
            raise
        return found

    def _search(self, pid: int, wanted: set[int], found: dict[int, int]) -> None:
        """Look among the descriptors of a process."""
        tid = procfs.speaker(pid)
        pidfd = pidfd_for_copies(pid, tid)
        try:
            for name in os.listdir(f"/proc/{tid}/fd"):
                self._match(syscall(f"pidfd_getfd of {pid}", nr.pidfd_getfd, pidfd, int(name), 0), wanted, found, True)
        except FileNotFoundError:  # it has ended
            pass
        finally:
            os.close(pidfd)

    def _match(self, fd: int, wanted: set[int], found: dict[int, int], ours: bool) -> None:
        """Keep *fd*, or if it is not *ours* to keep a copy, if its file is wanted; else close it."""
        assert self._queues is not None
        try:
            file = self._queues.file(fd)
            if file in wanted and file not in found:
                found[file] = os.dup(fd)
        finally:
            if ours:
                os.close(fd)


def _record(message: Message, files: dict[int, int]) -> queues.Record:
    mark = queues.URGENT if message.urgent else 0
    fds = [os.dup(files[file]) for file in message.files]
    return queues.Record(message.data, fds, 0, message.sender, message.credentials, mark)
