"""TCP connections: how they are saved (images: tcp-stream-INO); :mod:`tcp_rebuild` beside this brings them back.

State owned: sequence numbers, both queues, windows, what was negotiated (segment size, window scales, SACK,
timestamps), and how far a connection is closed. Kernel: a copy of the descriptor in repair mode (TCP_REPAIR of
linux/tcp.h, needs CAP_NET_ADMIN), in which getsockopt(2) tells all that, and a look at either queue changes nothing.

Repair mode silences the socket calls of the program (EPERM, EINVAL), and lets a socket that is closed vanish without a
word to its peer. A program that runs on must not meet the former, also if firn is killed in the middle: so a socket is
in it only while what needs it is read, and again when the tree is dead and only our copies are left; and a guard ends
it if we are killed in between (:mod:`repair`). Between, the locked network keeps segments away, which would be taken
and answered. Repair mode loses SO_REUSEADDR (it reads 2 meanwhile, and 0 afterwards: do_tcp_setsockopt in
net/ipv4/tcp.c), which is therefore set again.

What goes wrong: urgent data, of which repair mode knows nothing; signatures (TCP-MD5, TCP-AO), whose keys and counters
it does not carry over; a Fast Open that is under way. Segments that arrived out of order are not saved: the peer has
to send them again, as they were never acknowledged.
"""

from __future__ import annotations

import errno
import fcntl

from firn.abi import poll
from firn.abi.tcp import (
    INFO,
    SIOCINQ,
    SIOCOUTQ,
    SIOCOUTQNSD,
    TCP_AO_INFO,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_INFO,
    TCP_LAST_ACK,
    TCP_MAXSEG,
    TCP_NO_QUEUE,
    TCP_QUEUE_SEQ,
    TCP_RECV_QUEUE,
    TCP_REPAIR,
    TCP_REPAIR_OFF_NO_WP,
    TCP_REPAIR_ON,
    TCP_REPAIR_QUEUE,
    TCP_REPAIR_WINDOW,
    TCP_SEND_QUEUE,
    TCP_SYN_SENT,
    TCP_TIMESTAMP,
    TCPI_OPT_ECN,
    TCPI_OPT_SACK,
    TCPI_OPT_TIMESTAMPS,
    TCPI_OPT_WSCALE,
    WINDOW,
)
from firn.errors import TargetError
from firn.resources.sockets import options, repair
from firn.resources.sockets.inet_options import TCP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

    from firn.images.store import ImageDir
    from firn.tracee.guard import Guard

STATES = {
    TCP_ESTABLISHED: "established", TCP_SYN_SENT: "SYN-SENT", TCP_FIN_WAIT1: "FIN-WAIT-1", TCP_FIN_WAIT2: "FIN-WAIT-2",
    TCP_CLOSE_WAIT: "CLOSE-WAIT", TCP_LAST_ACK: "LAST-ACK", TCP_CLOSING: "CLOSING",
}  # fmt: skip
"""States of a connection that an open descriptor can have (TIME-WAIT is not one: the descriptor's socket is closed)."""
FIN_QUEUED = (TCP_FIN_WAIT1, TCP_CLOSING, TCP_LAST_ACK)
"""Our FIN is in the send queue, not acknowledged."""
FIN_RECEIVED = (TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING)
WINDOW_FIELDS = ("snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")
KNOWN_OPTIONS = TCPI_OPT_TIMESTAMPS | TCPI_OPT_SACK | TCPI_OPT_WSCALE | TCPI_OPT_ECN
_NO_OFFSET = (-1).to_bytes(4, "little", signed=True)
_MSG_PEEK, _MSG_DONTWAIT = 2, 0x40
_SLACK = 1 << 18
"""The kernel shows whole segments, also if the peer has acknowledged a part of the first one."""


def count(sock: socket, number: int) -> int:
    """The number of bytes that an ioctl(2) of a socket tells."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), number, bytes(4)), "little")


def peek(sock: socket, size: int) -> bytes:
    """*size* bytes that were received and not read, which stay there."""
    offset = _peek_offset(sock)
    if offset is None:
        return _peek(sock, size)
    sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, _NO_OFFSET)
    try:
        return _peek(sock, size)
    finally:
        sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, offset)


def _peek(sock: socket, size: int) -> bytes:
    """Up to *size* bytes of a queue, where no SO_PEEK_OFF is in the way."""
    try:
        return sock.recv(size, _MSG_PEEK | _MSG_DONTWAIT) if size else b""
    except BlockingIOError:
        return b""


def _peek_offset(sock: socket) -> int | None:
    """The SO_PEEK_OFF of a stream, which has one since Linux 6.9, if it is in use: then one peeks only behind it, and
    moves it on."""
    raw = options.value(sock, options.SOL_SOCKET, options.SO_PEEK_OFF)
    offset = -1 if raw is None else int.from_bytes(raw, "little", signed=True)
    return offset if offset >= 0 else None


def switch_off(sock: socket, reuse: bool, how: int = TCP_REPAIR_OFF_NO_WP) -> None:
    """End repair mode, which took SO_REUSEADDR away. *how*: TCP_REPAIR_OFF also sends the peer a window probe."""
    sock.setsockopt(TCP, TCP_REPAIR, how)
    sock.setsockopt(options.SOL_SOCKET, options.SO_REUSEADDR, reuse)


class Connection:
    """A connection of the frozen tree: our copy of its socket, its inet_sk_entry, and in the end what is in its image.

    ``what`` names it in messages.
    """

    __slots__ = ("data", "message", "sock", "stream", "what")

    def __init__(self, sock: socket, message: dict[str, Any], what: str) -> None:
        self.sock = sock
        self.message = message
        self.what = what
        self.stream: dict[str, Any] = {}
        self.data = b""

    def read(self, guard: Guard | None) -> list[str]:
        """Read everything; reasons why it cannot be saved. The socket is as it was again, and nothing is sent."""
        state, agreed, scales, _, _ = INFO.unpack(self.sock.getsockopt(TCP, TCP_INFO, INFO.size))
        self.message["state"] = state
        reasons = self._obstacles(state)
        if reasons or state == TCP_CLOSE:
            return reasons
        self.stream = {"opt_mask": agreed & KNOWN_OPTIONS, "snd_wscale": scales & 15, "rcv_wscale": scales >> 4}
        if agreed & TCPI_OPT_TIMESTAMPS:
            self.stream["timestamp"] = self.sock.getsockopt(TCP, TCP_TIMESTAMP) & 0xFFFFFFFF
        sizes = (count(self.sock, number) for number in (SIOCINQ, SIOCOUTQ, SIOCOUTQNSD))
        waiting, queued, unsent = (0, 0, 0) if state == TCP_SYN_SENT else sizes
        fin = state in FIN_QUEUED
        reuse = bool(self.message["opts"].get("reuseaddr"))
        offset = _peek_offset(self.sock)
        if guard is not None:
            guard.note(repair.note(self.sock.fileno(), reuse, offset))
        try:
            if offset is not None:
                self.sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, _NO_OFFSET)
            reasons = self._read_queues(waiting, queued - fin, max(unsent - fin, 0))
        finally:
            switch_off(self.sock, reuse)
            if offset is not None:
                self.sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, offset)
            if guard is not None:
                guard.note(b"")
        return reasons

    def _obstacles(self, state: int) -> list[str]:
        reasons = []
        if state not in STATES and state != TCP_CLOSE:
            reasons.append("is a TCP connection in the middle of its handshake (SYN-RECEIVED)")
        seen = poll.state(self.sock.fileno(), poll.POLLPRI | poll.POLLERR)
        if seen & poll.POLLERR:
            reasons.append("has an error that was not reported yet, which images cannot hold")
        if seen & poll.POLLPRI:
            reasons.append("has urgent data that was not read, which the kernel does not take back")
        try:
            self.sock.getsockopt(TCP, TCP_AO_INFO, 64)
            reasons.append("is a TCP connection with authentication (TCP-AO), which cannot be carried over")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOPROTOOPT, errno.EINVAL):
                raise
        return reasons

    def _read_queues(self, waiting: int, queued: int, unsent: int) -> list[str]:
        """Read what *waiting* bytes from the peer, and *queued* ones for it, of which some are *unsent*, stand for; in
        repair mode, which is left on."""
        calling = self.message["state"] == TCP_SYN_SENT
        received = _peek(self.sock, waiting)
        self.sock.setsockopt(TCP, TCP_REPAIR, TCP_REPAIR_ON)
        # In repair mode it is what the peer offered.
        self.stream["mss_clamp"] = self.sock.getsockopt(TCP, TCP_MAXSEG)
        window = WINDOW.unpack(self.sock.getsockopt(TCP, TCP_REPAIR_WINDOW, WINDOW.size))
        inq_seq = self._sequence(TCP_RECV_QUEUE)
        # Once the send queue is chosen, the kernel takes what it would send for sent: so it is the last thing.
        outq_seq = self._sequence(TCP_SEND_QUEUE)
        sent = _peek(self.sock, queued + _SLACK if queued or calling else 0)
        self.sock.setsockopt(TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
        if calling and sent:
            return ["is a TCP connection whose first data is on its way (TCP Fast Open)"]
        if len(received) != waiting or len(sent) < queued:
            raise TargetError(f"{self.what}: its queues changed while they were read")
        self.data = received + sent[len(sent) - queued :]
        self.stream |= dict(zip(WINDOW_FIELDS, window, strict=True))
        self.stream |= {
            "inq_len": waiting, "inq_seq": inq_seq, "outq_len": queued, "outq_seq": outq_seq,
            "unsq_len": min(unsent, queued),
        }  # fmt: skip
        return []

    def _sequence(self, queue: int) -> int:
        """The sequence number at the end of a queue, which is chosen by that."""
        self.sock.setsockopt(TCP, TCP_REPAIR_QUEUE, queue)
        return self.sock.getsockopt(TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF

    def vanish(self) -> None:
        """Nobody else has the socket any more: it goes without a word."""
        try:
            self.sock.setsockopt(TCP, TCP_REPAIR, TCP_REPAIR_ON)
        except OSError:
            pass  # The lock drops what it says, and it is too late to fail.
        self.sock.close()

    def save(self, images: ImageDir) -> None:
        """Write the image."""
        if self.stream:
            with images.writer("TCP_STREAM", self.message["ino"]) as writer:
                writer.add(self.stream)
                writer.payload(self.data)
