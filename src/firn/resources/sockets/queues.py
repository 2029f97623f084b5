"""What waits in the receive queue of a unix socket (image: sk-queues.img): messages, streams, descriptors on their way.

Kernel: recvmsg(2) with MSG_PEEK at an offset (SO_PEEK_OFF, socket(7)) leaves everything where it is; queued
descriptors (SCM_RIGHTS, unix(7)) are then copies of ours. What goes wrong: where in a stream descriptors hang is
only seen by a read that fails there.
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.resources.sockets.options import SO_PASSCRED, SO_PEEK_OFF, SO_SNDBUF, SOL_SOCKET, set_buffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

SCM_RIGHTS, SCM_CREDENTIALS = 1, 2
MSG_OOB, MSG_PEEK, MSG_CTRUNC, MSG_TRUNC, MSG_DONTWAIT, MSG_CMSG_CLOEXEC = 1, 2, 8, 0x20, 0x40, 0x40000000
_CONTROL = 8192
"""More than 253 descriptors (SCM_MAX_FD), credentials and a security label take."""
_DATAGRAM = 1 << 18
_ROOM = 1 << 29
_INTEGER = 4
_IOVEC = struct.Struct("<2Q")
_MSGHDR = struct.Struct("<QI4xQQQQI4x")
"""struct msghdr: name, its length, buffers, their number, control, its length, flags."""


class Record:
    """One message, or a run of stream bytes; ``fds`` are descriptors of ours, ``sender`` names a datagram's sender,
    ``credentials`` is its struct ucred if the socket asks for that."""

    __slots__ = ("credentials", "data", "fds", "flags", "sender")

    def __init__(self, data: bytes, fds: list[int], flags: int, sender: bytes, credentials: bytes) -> None:
        self.data = data
        self.fds = fds
        self.flags = flags
        self.sender = sender
        self.credentials = credentials

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            os.close(self.fds.pop())


def _peek(sock: socket, size: int) -> Record | None:
    """What is at the peek offset, which moves on; None if there is nothing."""
    try:
        data, control, flags, address = sock.recvmsg(size, _CONTROL, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTCONN:  # a seqpacket socket that never was connected says so instead of "nothing"
            return None
        raise
    fds: list[int] = []
    credentials = b""
    for level, kind, content in control:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            step = range(0, len(content) - len(content) % _INTEGER, _INTEGER)
            fds += [int.from_bytes(content[at : at + _INTEGER], "little") for at in step]
        if (level, kind) == (SOL_SOCKET, SCM_CREDENTIALS):
            credentials = content
    record = Record(data, fds, flags, os.fsencode(address or b""), credentials)
    if flags & MSG_CTRUNC:
        record.close()
        raise OSError(errno.EMFILE, "queued descriptors cannot be taken")
    return record


def _peek_at(sock: socket, offset: int, size: int) -> Record | None:
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, offset)
    return _peek(sock, size)


def has_urgent(sock: socket) -> bool:
    """Whether a stream has an out-of-band byte that was not read."""
    try:
        return bool(sock.recv(1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT))
    except OSError:
        return False


def peek_stream(sock: socket, count: int) -> list[Record]:
    """The *count* bytes in the queue of a stream, cut where descriptors hang. They stay there."""
    records: list[Record] = []
    at = 0
    before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    try:
        while at < count:
            record = _peek_at(sock, at, count - at)
            if record is None or not record.data:
                break
            if record.fds:
                plain = _before_descriptors(sock, at, len(record.data))
                if plain:
                    records.append(Record(record.data[:plain], [], 0, b"", record.credentials))
                    record.data = record.data[plain:]
                    at += plain
            records.append(record)
            at += len(record.data)
    finally:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
    return records


def _before_descriptors(sock: socket, at: int, count: int) -> int:
    """How many of the *count* bytes at *at* come before those that the descriptors hang on.

    Peeking at less than *count* bytes brings the descriptors nevertheless. But a read ends with the last whole piece if
    a buffer of the next one is not there, and the descriptors hang on the last piece: so one byte has no buffer.
    """
    if count == 1:
        return 0
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, at)
    buffer = bytearray(count - 1)
    parts = bytearray(_IOVEC.pack(address_of(buffer), count - 1) + _IOVEC.pack(0, 1))
    head = bytearray(_MSGHDR.pack(0, 0, address_of(parts), 2, 0, 0, 0))
    try:
        return syscall("recvmsg", nr.recvmsg, sock.fileno(), address_of(head), MSG_PEEK | MSG_DONTWAIT)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0


def peek_messages(sock: socket, ended: bool) -> list[Record]:
    """The messages in the queue of a datagram or seqpacket socket; they stay there.

    *ended*: nothing more can come, so an empty read may be the end instead of an empty message. Only a message has
    credentials, if they are asked for.
    """
    records: list[Record] = []
    passing = sock.getsockopt(SOL_SOCKET, SO_PASSCRED)
    before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    if ended:
        sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
    try:
        # An empty message that was peeked at before is not seen at an offset again.
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, -1)
        first = _peek(sock, 1)
        if first is None or (ended and not first.credentials):
            return records
        if not first.data:
            records.append(first)
        else:
            first.close()
        at, size = 0, _DATAGRAM
        while True:
            record = _peek_at(sock, at, size)
            if record is None or (ended and not record.credentials):
                return records
            if record.flags & MSG_TRUNC:
                record.close()
                size *= 4
                continue
            records.append(record)
            at += len(record.data)
    finally:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
        if ended:
            sock.setsockopt(SOL_SOCKET, SO_PASSCRED, passing)


def send(
    sock: socket, data: bytes, fds: list[int], stream: bool, to: str | bytes = "", credentials: bytes = b""
) -> None:
    """Put one record into the queue of the peer, or of the socket named *to*; sender's buffer permitting, which is made
    large. *credentials* (struct ucred) may be others' if we are root. Raises :class:`OSError`."""
    set_buffer(sock, SO_SNDBUF, _ROOM)
    control = [(SOL_SOCKET, SCM_RIGHTS, b"".join(fd.to_bytes(_INTEGER, "little") for fd in fds))] if fds else []
    if credentials:
        control.append((SOL_SOCKET, SCM_CREDENTIALS, credentials))
    while True:
        done = sock.sendmsg([data], control, MSG_DONTWAIT, to) if to else sock.sendmsg([data], control, MSG_DONTWAIT)
        data, control = data[done:], control[len(control) - bool(credentials) :]
        if not stream or not data:
            return
