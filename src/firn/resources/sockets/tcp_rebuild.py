"""TCP connections come back (images: tcp-stream-INO; see :mod:`tcp` beside this for what is in them).

begin     a new socket in repair mode gets the sequence numbers from before its queues; it is bound
connect   connect(2), which in repair mode tells nobody; what was negotiated; both queues, the window, how far it is
          closed. Nothing has been sent to the peer, and if all fails now, the sockets vanish without a word
resume    when nothing else can fail and the network is open: repair mode ends, and with it the silence; data that had
          not been sent is now given to the kernel like any data

Closing is done as it happened. Our FIN is queued by shutdown(2), and counts as sent in repair mode if the send queue is
the chosen one; the peer's FIN, and its acknowledgement of ours, come in a segment that we send in its name to ourselves
(:mod:`packets`), for there is no call that would do it. A FIN that had not been sent follows the unsent data.

Bytes that were sent and not acknowledged are queued as such, and repeated when the retransmission timer runs out (one
second at first: what was measured of the way to the peer is not carried over).
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import struct
import time

from firn.abi import fcntl as fc
from firn.abi.tcp import (
    INFO,
    REPAIR_OPT,
    SIOCINQ,
    SIOCOUTQ,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_FIN_WAIT2,
    TCP_INFO,
    TCP_LAST_ACK,
    TCP_MAX_WSCALE,
    TCP_NO_QUEUE,
    TCP_QUEUE_SEQ,
    TCP_RECV_QUEUE,
    TCP_REPAIR,
    TCP_REPAIR_OFF,
    TCP_REPAIR_OFF_NO_WP,
    TCP_REPAIR_ON,
    TCP_REPAIR_OPTIONS,
    TCP_REPAIR_QUEUE,
    TCP_REPAIR_WINDOW,
    TCP_SEND_QUEUE,
    TCP_SYN_SENT,
    TCP_TIMESTAMP,
    TCP_WINDOW_CLAMP,
    TCPI_OPT_SACK,
    TCPI_OPT_TIMESTAMPS,
    TCPI_OPT_WSCALE,
    TCPOPT_MSS,
    TCPOPT_SACK_PERM,
    TCPOPT_TIMESTAMP,
    TCPOPT_WINDOW,
    TH_ACK,
    TH_FIN,
    WINDOW,
)
from firn.errors import ImageError, RestoreError
from firn.resources.sockets import options, packets
from firn.resources.sockets.inet_options import AF_INET6, IP, IP_OPTIONS, TCP
from firn.resources.sockets.tcp import FIN_QUEUED, FIN_RECEIVED, STATES, WINDOW_FIELDS, count, switch_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

    from firn.images.store import ImageDir

_QUEUE_LIMIT = 1 << 30
_WORD = 1 << 32
_ROOM = 1 << 20
_SHUT_RD, _SHUT_WR = 0, 1
_MSG_DONTWAIT = 0x40
_SO_ERROR = 4
_PATIENCE_S = 5.0
_OPEN_WINDOW = 0xFFFF
_IP_OPTIONS_ROOM = 40
_SND_WND, _MAX_WINDOW = WINDOW_FIELDS.index("snd_wnd"), WINDOW_FIELDS.index("max_window")
_BYTES_ACKED = 120
"""Where tcpi_bytes_acked is in struct tcp_info."""


class Stream:
    """One connection on its way back. ``name`` is for messages, ``entry`` its inet_sk_entry."""

    __slots__ = ("_data", "_image", "_late", "entry", "name", "sock", "state")

    def __init__(self, name: str, entry: dict[str, Any], images: ImageDir) -> None:
        self.name = name
        self.entry = entry
        self.state: int = entry["state"]
        self.sock: socket
        found = images.read_with_payload("TCP_STREAM", entry["ino"])
        if not found:
            raise ImageError(f"tcp-stream-{entry['ino']:x}.img: missing")
        self._image, payload = found[0]
        self._check()
        self._data = images.read_payload(payload, 2 * _QUEUE_LIMIT)
        if len(self._data) != self._image["inq_len"] + self._image["outq_len"]:
            raise ImageError(f"tcp-stream-{entry['ino']:x}.img: its queues are cut")
        # With data that was not sent yet, our FIN comes after it.
        self._late = bool(self._image.get("unsq_len"))

    def _check(self) -> None:
        image = self._image
        sane = max(image["inq_len"], image["outq_len"]) <= _QUEUE_LIMIT
        sane &= image.get("unsq_len", 0) <= image["outq_len"] and 0 < image["mss_clamp"] < 1 << 16
        sane &= max(image["snd_wscale"], image.get("rcv_wscale", 0)) <= TCP_MAX_WSCALE
        if self.state in (TCP_FIN_WAIT2, TCP_SYN_SENT):
            sane &= not image["outq_len"]
        if not sane or not self.entry["src_port"] or not self.entry["dst_port"]:
            raise ImageError(f"tcp-stream-{self.entry['ino']:x}.img: impossible numbers")

    # -- begin -------------------------------------------------------------------------------------------------------

    def begin(self, sock: socket) -> None:
        """*sock* is new, and has its options."""
        self.sock = sock
        image = self._image
        try:
            sock.setsockopt(TCP, TCP_REPAIR, TCP_REPAIR_ON)
        except PermissionError:
            raise RestoreError(f"{self.name} cannot be connected again", "this needs CAP_NET_ADMIN") from None
        ours = self.state in (*FIN_QUEUED, TCP_FIN_WAIT2, TCP_SYN_SENT)
        self._sequence(TCP_SEND_QUEUE, image["outq_seq"] - image["outq_len"] - ours)
        self._sequence(TCP_RECV_QUEUE, image["inq_seq"] - image["inq_len"] - (self.state in FIN_RECEIVED))

    def _is_six(self) -> bool:
        """Whether its packets are those of IPv6."""
        return len(self._raw("dst")) != 4

    def _sequence(self, queue: int, number: int) -> None:
        self._choose(queue)
        self.sock.setsockopt(TCP, TCP_QUEUE_SEQ, (number % _WORD).to_bytes(4, "little"))
        self._choose(TCP_NO_QUEUE)

    def _choose(self, queue: int) -> None:
        self.sock.setsockopt(TCP, TCP_REPAIR_QUEUE, queue)

    # -- connect -----------------------------------------------------------------------------------------------------

    def connect(self, address: tuple[Any, ...]) -> None:
        """The socket is bound; *address* is the peer's. Raises :class:`RestoreError`."""
        if self.state == TCP_SYN_SENT:
            return
        try:
            self.sock.connect(address)
        except OSError as error:
            helps = {
                errno.EADDRNOTAVAIL: "the same connection exists: end the process that has it",
                errno.ENETUNREACH: "give this machine a route to it",
            }  # fmt: skip
            why = f"{self.name} cannot be connected to {address[0]}, port {address[1]}: {error.strerror}"
            raise RestoreError(why, helps.get(error.errno or 0, "")) from None
        try:
            self._negotiate()
            self._fill()
            self._close(late=False)
            # Before the peer can hear of so much room.
            if self._image["inq_len"]:
                _own_size(self.sock, options.SO_RCVBUF, self.entry["opts"])
            self._set_window()
            self._size_segments()
        except OSError as error:
            raise RestoreError(f"{self.name} cannot be connected again: {error.strerror}") from None

    def _negotiate(self) -> None:
        image, mask = self._image, self._image["opt_mask"]
        wanted = REPAIR_OPT.pack(TCPOPT_MSS, image["mss_clamp"])
        if mask & TCPI_OPT_WSCALE:
            wanted += REPAIR_OPT.pack(TCPOPT_WINDOW, image["snd_wscale"] | image.get("rcv_wscale", 0) << 16)
        if mask & TCPI_OPT_SACK:
            wanted += REPAIR_OPT.pack(TCPOPT_SACK_PERM, 0)
        if mask & TCPI_OPT_TIMESTAMPS:
            wanted += REPAIR_OPT.pack(TCPOPT_TIMESTAMP, 0)
        self.sock.setsockopt(TCP, TCP_REPAIR_OPTIONS, wanted)
        if mask & TCPI_OPT_TIMESTAMPS and "timestamp" in image:
            self.sock.setsockopt(TCP, TCP_TIMESTAMP, (image["timestamp"] % _WORD).to_bytes(4, "little"))

    def _size_segments(self) -> None:
        """The kernel reckons the size of segments at connect(2), when it does not know what the peer takes, and then
        only when it sees a window larger than all before (tcp_sync_mss in net/ipv4/tcp_output.c, tcp_ack_update_window
        in tcp_input.c). To set the options of IPv4 once more makes it reckon anew (do_ip_setsockopt in
        ip_sockglue.c); with IPv6 the peer's next word does (:meth:`_set_window`)."""
        if not self._is_six():
            self.sock.setsockopt(IP, IP_OPTIONS, self.sock.getsockopt(IP, IP_OPTIONS, _IP_OPTIONS_ROOM))

    def _fill(self) -> None:
        """Both queues, without what had not been sent."""
        image, data = self._image, memoryview(self._data)
        received = image["inq_len"]
        sent = received + image["outq_len"] - image.get("unsq_len", 0)
        if received:
            _make_room(self.sock, options.SO_RCVBUF, received)
            self._put(TCP_RECV_QUEUE, data[:received])
        if image["outq_len"]:
            _make_room(self.sock, options.SO_SNDBUF, image["outq_len"])
            self._put(TCP_SEND_QUEUE, data[received:sent])
        self._data = self._data[sent:]

    def _put(self, queue: int, data: memoryview) -> None:
        if not data:
            return
        self._choose(queue)
        try:
            while data:
                data = data[self.sock.send(data, _MSG_DONTWAIT) :]
        finally:
            self._choose(TCP_NO_QUEUE)

    def _set_window(self) -> None:
        image = self._image
        if WINDOW_FIELDS[-1] not in image:
            return
        *window, acknowledged = (image.get(name, 0) for name in WINDOW_FIELDS)
        if self._late and self.state == TCP_CLOSING and acknowledged == image["inq_seq"]:
            # The peer's FIN is still to come.
            acknowledged = (acknowledged - 1) % _WORD
        if self._is_six():
            # Whatever the peer says is more than that; it is asked at the end of repair mode.
            window[_SND_WND] = window[_MAX_WINDOW] = max(window[_SND_WND] - 1, 0)
        try:
            self._limit_window(window, acknowledged)
            self.sock.setsockopt(TCP, TCP_REPAIR_WINDOW, WINDOW.pack(*window, acknowledged))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ImageError(f"tcp-stream-{self.entry['ino']:x}.img: an impossible window") from None

    def _limit_window(self, window: list[int], acknowledged: int) -> None:
        """How large the window may become at all, and for now. A limit that grows takes the latter from the window of
        this moment (the kernel's tcp_set_window_clamp; before Linux 6.8 any limit does)."""
        own = self.entry.get("firn", {})
        if own.get("clamp"):
            now = WINDOW.pack(*window[:-1], own.get("ssthresh", 0), acknowledged)
            self.sock.setsockopt(TCP, TCP_REPAIR_WINDOW, now)
            self.sock.setsockopt(TCP, TCP_WINDOW_CLAMP, 1)  # the smallest there is
            self.sock.setsockopt(TCP, TCP_WINDOW_CLAMP, own["clamp"].to_bytes(4, "little"))

    # -- closing -----------------------------------------------------------------------------------------------------

    def _close(self, late: bool) -> None:
        """FINs, as far as they belong before (not *late*) or after the end of repair mode."""
        before = self.state in (TCP_CLOSE_WAIT, TCP_LAST_ACK)
        if before and not late:
            self._peer_says(TH_FIN | TH_ACK, TCP_CLOSE_WAIT)
        if late != self._late:
            return
        if self.state in (*FIN_QUEUED, TCP_FIN_WAIT2):
            self._shut(late)
        if self.state == TCP_FIN_WAIT2:
            self._peer_says(TH_ACK, TCP_FIN_WAIT2)
        elif self.state == TCP_CLOSING:
            self._peer_says(TH_FIN | TH_ACK, TCP_CLOSING)

    def _shut(self, late: bool) -> None:
        """Our FIN; with the send queue chosen in repair mode, it counts as sent (tcp_write_xmit)."""
        if late:
            self.sock.shutdown(_SHUT_WR)
            return
        self._choose(TCP_SEND_QUEUE)
        try:
            self.sock.shutdown(_SHUT_WR)
        finally:
            self._choose(TCP_NO_QUEUE)

    def _peer_says(self, flags: int, reached: int) -> None:
        """A segment in the peer's name, which acknowledges what it has acknowledged; wait until *reached*."""
        image = self._image
        ours = image["outq_seq"] - image["outq_len"] - (self.state in FIN_QUEUED)
        theirs = image["inq_seq"] - (self.state in FIN_RECEIVED)
        late = self._late and self.state == TCP_CLOSING
        if not late:
            # A receive queue that was filled by hand has used the window up, and the kernel would not take a FIN.
            window = theirs % _WORD, _OPEN_WINDOW, _OPEN_WINDOW, _OPEN_WINDOW, theirs % _WORD
            self.sock.setsockopt(TCP, TCP_REPAIR_WINDOW, WINDOW.pack(*window))
        source, target = self._raw("dst"), self._raw("src")
        link = 0
        if packets.is_link_local(target):
            link = _socket.if_nametoindex(self.entry.get("ifname", ""))
        elif self.entry["opts"].get("so_bound_dev"):
            # It comes from the loopback device.
            self._bind_to("")
        ends = source, self.entry["dst_port"], target, self.entry["src_port"]
        packets.segment(ends, (theirs, ours), flags, _OPEN_WINDOW, link=link)
        end = time.monotonic() + _PATIENCE_S
        # Late, the true peer may have its say too.
        wanted = (reached, TCP_CLOSE) if late else (reached,)
        while INFO.unpack(self.sock.getsockopt(TCP, TCP_INFO, INFO.size))[0] not in wanted:
            if time.monotonic() > end:
                why = f"{self.name} cannot be brought to {STATES[reached]}: a segment to it does not arrive"
                raise RestoreError(why, "a firewall may drop it")
            time.sleep(0.0005)
        if self.entry["opts"].get("so_bound_dev") and not link:
            self._bind_to(self.entry["opts"]["so_bound_dev"])

    def _bind_to(self, device: str) -> None:
        self.sock.setsockopt(options.SOL_SOCKET, options.SO_BINDTODEVICE, os.fsencode(device))

    def _raw(self, side: str) -> bytes:
        words = self.entry[f"{side}_addr"]
        return packets.unmapped(struct.pack(f"<{len(words)}I", *words))

    # -- resume ------------------------------------------------------------------------------------------------------

    def resume(self, address: tuple[Any, ...], again: bool = False) -> None:
        """The connection lives. *again*: somebody has died in the middle of this. Raises :class:`RestoreError`."""
        try:
            reuse = bool(self.entry["opts"].get("reuseaddr"))
            if self.state == TCP_SYN_SENT:
                switch_off(self.sock, reuse, TCP_REPAIR_OFF_NO_WP)
                self._call_again(address)
            else:
                switch_off(self.sock, reuse, TCP_REPAIR_OFF)
                rest = memoryview(self._data)[self._given() if again else 0 :]
                while rest:
                    rest = rest[self.sock.send(rest, _MSG_DONTWAIT) :]
                self._close(late=True)
            if self.entry.get("shutdown", 0) & 1 and self.state not in FIN_RECEIVED:
                self.sock.shutdown(_SHUT_RD)
            if self._image["outq_len"]:
                _own_size(self.sock, options.SO_SNDBUF, self.entry["opts"])
        except OSError as error:
            raise RestoreError(f"{self.name} cannot go on: {error.strerror}") from None

    def _given(self) -> int:
        """How much of what had not been sent the kernel was given by now: part of it may have arrived already."""
        acknowledged = -1
        while acknowledged != (now := self._acknowledged()):
            acknowledged, queued = now, count(self.sock, SIOCOUTQ)
        before = self._image["outq_len"] - self._image.get("unsq_len", 0)
        return min(max(acknowledged + queued - int(before), 0), len(self._data))

    def _acknowledged(self) -> int:
        """The bytes that the peer has acknowledged since the restore."""
        info: bytes = self.sock.getsockopt(TCP, TCP_INFO, _BYTES_ACKED + 8)
        return int.from_bytes(info[_BYTES_ACKED:], "little")

    def _call_again(self, address: tuple[Any, ...]) -> None:
        """connect(2) once more, with the old sequence number: to the peer the same call, made again."""
        fd = self.sock.fileno()
        flags = fcntl.fcntl(fd, fc.F_GETFL)
        fcntl.fcntl(fd, fc.F_SETFL, flags | fc.O_NONBLOCK)
        code = self.sock.connect_ex(address)
        fcntl.fcntl(fd, fc.F_SETFL, flags)
        if code not in (0, errno.EINPROGRESS, errno.EALREADY, errno.EISCONN):
            raise OSError(code, "connect")



def _make_room(sock: socket, option: int, size: int) -> None:
    """For *size* bytes in a buffer: in small segments they take several times as much."""
    room = max(4 * size + _ROOM, sock.getsockopt(options.SOL_SOCKET, option))
    options.set_buffer(sock, option, min(room, (1 << 31) - 2))


def _own_size(sock: socket, option: int, entry: dict[str, Any]) -> None:
    """The buffer's own size again, and whether the kernel may change it."""
    options.set_buffer(sock, option, entry["so_sndbuf" if option == options.SO_SNDBUF else "so_rcvbuf"])
    if "so_buf_lock" in entry:
        sock.setsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK, entry["so_buf_lock"])


def _bind_here(sock: socket) -> None:
    """Bind to the loopback device; with IPv6 switched off, an IPv6 socket gets an IPv4 address."""
    try:
        sock.bind(("::1" if sock.family == AF_INET6 else "127.0.0.1", 0))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL or sock.family != AF_INET6:
            raise
        sock.bind(("::ffff:127.0.0.1", 0))


def be_refused(name: str, sock: socket) -> None:
    """Make *sock*, which is new, one whose connection was refused, and which has told so: it may try another."""
    closed = _socket.socket(sock.family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, TCP)
    try:
        # Nobody else can listen there meanwhile.
        _bind_here(closed)
        sock.setblocking(False)
        sock.connect_ex(closed.getsockname())
        end = time.monotonic() + _PATIENCE_S
        while not sock.getsockopt(options.SOL_SOCKET, _SO_ERROR) and time.monotonic() < end:
            time.sleep(0.0005)
        sock.setblocking(True)
    except OSError as error:
        raise RestoreError(f"{name} cannot be made one that was refused: {error.strerror}") from None
    finally:
        closed.close()


def end_with(name: str, sock: socket, data: bytes, entry: dict[str, Any]) -> None:
    """Make *sock*, which is new, one whose connection is over while *data* is still to be read.

    A connection over loopback is reset by its other end: that leaves nothing behind, and what has arrived stays.
    Options come later: some keep segments away.
    """
    server = _socket.socket(sock.family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, TCP)
    try:
        _bind_here(server)
        server.listen(1)
        _make_room(sock, options.SO_RCVBUF, len(data))
        for each in (sock, server):
            each.settimeout(_PATIENCE_S)
        sock.connect(server.getsockname())
        fd, _ = server._accept()  # type: ignore[attr-defined]
        other = _socket.socket(fileno=fd)
        try:
            other.settimeout(_PATIENCE_S)
            other.sendall(data)
            end = time.monotonic() + _PATIENCE_S
            while count(other, SIOCOUTQ) and time.monotonic() < end:
                time.sleep(0.0005)
            other.setsockopt(options.SOL_SOCKET, options.SO_LINGER, struct.pack("<ii", 1, 0))
        finally:
            other.close()
        while not sock.getsockopt(options.SOL_SOCKET, _SO_ERROR) and time.monotonic() < end:
            time.sleep(0.0005)
        if count(sock, SIOCINQ) != len(data):
            raise RestoreError(f"{name} does not get back what was not read", "a firewall may drop it")
        _own_size(sock, options.SO_RCVBUF, entry)
        sock.setblocking(True)
    except OSError as error:
        raise RestoreError(f"{name} does not get back what was not read: {error.strerror or error}") from None
    finally:
        server.close()
