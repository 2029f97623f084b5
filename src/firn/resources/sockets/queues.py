"""What waits in the receive queue of a unix socket (image: sk-queues.img): messages, streams, descriptors on their way.

Kernel: recvmsg(2) with MSG_PEEK at an offset (SO_PEEK_OFF, socket(7)) leaves everything where it is; queued
descriptors (SCM_RIGHTS, unix(7)) are then copies of ours. What goes wrong: where in a stream descriptors hang is
only seen by a read that fails there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from firn.abi import nr, poll
from firn.abi.libc import address_of, syscall
from firn.resources.sockets.options import SO_PASSCRED, SO_PEEK_OFF, SO_SNDBUF, SOL_SOCKET, set_buffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

SCM_RIGHTS, SCM_CREDENTIALS, SCM_PIDFD = 1, 2, 4
MSG_OOB, MSG_PEEK, MSG_CTRUNC, MSG_TRUNC, MSG_DONTWAIT, MSG_CMSG_CLOEXEC = 1, 2, 8, 0x20, 0x40, 0x40000000
URGENT, WAS_URGENT = 1, 2
"""Marks of a record: an out-of-band byte, or where one was that has been read."""
NO_CREDENTIALS = struct.pack("<iII", 0, 65534, 65534)
"""What a message bears that was sent when nobody asked for credentials."""
_SIOCATMARK = 0x8905
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
    ``credentials`` is its struct ucred; ``mark`` is URGENT or WAS_URGENT, or 0;
    ``joined``: a read brings it together with the one before."""

    __slots__ = ("credentials", "data", "fds", "flags", "joined", "mark", "sender")

    def __init__(
        self, data: bytes, fds: list[int] | None = None, flags: int = 0, sender: bytes = b"", credentials: bytes = b"",
        mark: int = 0,
    ) -> None:  # fmt: skip
        self.data = data
        self.fds = fds or []
        self.flags = flags
        self.sender = sender
        self.credentials = credentials
        self.mark = mark
        self.joined = False

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
        if (level, kind) == (SOL_SOCKET, SCM_PIDFD) and int.from_bytes(content, "little", signed=True) >= 0:
            os.close(int.from_bytes(content, "little"))
    record = Record(data, fds, flags, os.fsencode(address or b""), credentials)
    if flags & MSG_CTRUNC:
        record.close()
        raise OSError(errno.EMFILE, "queued descriptors cannot be taken")
    return record


class _Asking:
    """Meanwhile *sock* asks for credentials: a message may have some though nobody wants them now, if its sender did,
    or it was sent over a connection that was not accepted yet. And its peek offset is ours to set."""

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self._passing = sock.getsockopt(SOL_SOCKET, SO_PASSCRED)
        self._offset = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)

    def __enter__(self) -> None:
        if not self._passing:
            self._sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)

    def __exit__(self, *_: object) -> None:
        self._sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, self._offset)
        if not self._passing:
            self._sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 0)


def _peek_at(sock: socket, offset: int, size: int) -> Record | None:
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, offset)
    return _peek(sock, size)


class Unclear(Exception):
    """The out-of-band byte is somewhere among others, and the kernel does not tell where."""


def _urgent_byte(sock: socket) -> bytes | None:
    """The out-of-band byte of a stream that was not read; empty if it is there, but is shown as data (SO_OOBINLINE)."""
    try:
        return sock.recv(1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT)
    except OSError:
        return b"" if poll.state(sock.fileno(), poll.POLLPRI) else None


def at_mark(sock: socket) -> bool:
    """Whether the next byte is, or follows, an out-of-band one (SIOCATMARK)."""
    found = bytearray(4)
    try:
        fcntl.ioctl(sock.fileno(), _SIOCATMARK, found)
    except OSError:  # Linux before 5.15 has no such bytes
        return False
    return any(found)


def _skips_urgent() -> bool:
    """Whether a look at the queue passes over an out-of-band byte that is the first; some kernels show it."""
    import _socket

    one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        one.send(b"u", MSG_OOB)
        one.send(b"d")
        return other.recv(1, MSG_PEEK) == b"d"
    finally:
        one.close()
        other.close()


def peek_stream(sock: socket, count: int) -> list[Record]:
    """The *count* bytes in the queue of a stream, cut where descriptors hang and where out-of-band bytes are or were.
    They stay there. Raises :class:`Unclear`, :class:`OSError`.

    A read does not go on to an out-of-band byte, nor past the place of one that was read (manage_oob). With an offset
    only the first piece of the queue is treated so, so a look that begins at such a byte shows it.
    """
    records: list[Record] = []
    try:
        _add_stream(records, sock, count)
    except BaseException:
        for record in records:
            record.close()
        raise
    return records


def _add_stream(records: list[Record], sock: socket, count: int) -> None:
    urgent = _urgent_byte(sock)
    first = at_mark(sock)
    at = 0
    with _Asking(sock):
        if first and urgent is None:
            records.append(Record(b"", mark=WAS_URGENT))
        elif first:
            records.append(Record(urgent or _byte_at(sock, 0), mark=URGENT))
            if urgent and _skips_urgent():
                count -= 1  # what a look passes over, an offset does not count either
            else:
                at = 1
        while at < count:
            record = _peek_at(sock, at, count - at)
            if record is None or not record.data:
                break
            if record.fds:
                plain = _before_descriptors(sock, at, len(record.data))
                if plain:
                    records.append(Record(record.data[:plain], credentials=record.credentials))
                    record.data = record.data[plain:]
                    record.joined = True
                    at += plain
            records.append(record)
            at += len(record.data)
    if at != count:
        raise Unclear
    if urgent is None or not first:
        _find_marks(records, urgent)


def _byte_at(sock: socket, offset: int) -> bytes:
    record = _peek_at(sock, offset, 1)
    if record is None:
        raise Unclear
    record.close()
    return record.data


def _find_marks(records: list[Record], urgent: bytes | None) -> None:
    """Mark the one that begins with the byte *urgent*; without one, put a mark wherever one is that was read."""
    sure, maybe = [], []
    for index in range(1, len(records)):
        last, record = records[index - 1 : index + 1]
        if last.mark or record.joined:
            continue
        if not last.fds and last.credentials == record.credentials:
            sure.append(index)
        elif not urgent or record.data.startswith(urgent):
            maybe.append(index)
    if urgent is None:
        for index in reversed(sure):
            records.insert(index, Record(b"", mark=WAS_URGENT))
        return
    found = sure or maybe
    if len(found) != 1:
        raise Unclear
    record = records[found[0]]
    if len(record.data) > 1 and record.fds:
        raise Unclear
    rest = Record(record.data[1:], credentials=record.credentials)
    record.data, record.mark = record.data[:1], URGENT
    if rest.data:
        records.insert(found[0] + 1, rest)


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
    credentials, which are asked for.
    """
    records: list[Record] = []
    with _Asking(sock):
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


def send(
    sock: socket, data: bytes, fds: list[int], stream: bool, to: str | bytes = "", credentials: bytes = b"",
    mark: int = 0,
) -> None:  # fmt: skip
    """Put one record into the queue of the peer, or of the socket named *to*; sender's buffer permitting, which is made
    large. *credentials* (struct ucred) may be others' if we are root; with a *mark* its last byte is out-of-band.
    Raises :class:`OSError`."""
    set_buffer(sock, SO_SNDBUF, _ROOM)
    control = [(SOL_SOCKET, SCM_RIGHTS, b"".join(fd.to_bytes(_INTEGER, "little") for fd in fds))] if fds else []
    if credentials:
        control.append((SOL_SOCKET, SCM_CREDENTIALS, credentials))
    flags = MSG_DONTWAIT | (MSG_OOB if mark else 0)
    while True:
        done = sock.sendmsg([data], control, flags, to) if to else sock.sendmsg([data], control, flags)
        data, control = data[done:], control[len(control) - bool(credentials) :]
        if not stream or not data:
            return
