"""What the kernel tells about sockets of the current network namespace (sock_diag(7), linux/{unix,inet}_diag.h)."""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn.host.nftables import Connection

AF_UNIX, AF_INET, AF_NETLINK, AF_PACKET, SOCK_RAW, SOCK_CLOEXEC = 1, 2, 16, 17, 3, 0o2000000
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR = 1, 4, 0x300, 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGHDR = struct.Struct("<IHHII")
UNIX_DIAG_REQ = struct.Struct("<BBHIIIII")
UNIX_DIAG_MSG = struct.Struct("<BBBBIII")
SHOW_NAME, SHOW_VFS, SHOW_PEER, SHOW_ICONS, SHOW_RQLEN = 1, 2, 4, 8, 16
NAME, VFS, PEER, ICONS, RQLEN, MEMINFO, SHUTDOWN = range(7)
ESTABLISHED, CLOSE, LISTEN = 1, 7, 10
"""States; the numbers are those of TCP."""
INET_DIAG_REQ = struct.Struct("<BBBxI48x")
INET_DIAG_MSG = struct.Struct("<BBBB48x4xIIII")
_INET_INFO, INET_SHUTDOWN, INET_MD5SIG = 2, 8, 18
_CONNECTED = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
"""The states of a connection that a descriptor can have, as bits."""
_SYN_RECV, _WAITING = 3, 1 << 1 | 1 << 8
"""That of a handshake; as bits, those of a connection that waits to be accepted: ESTABLISHED, CLOSE-WAIT."""
_SOCK_DESTROY = 21  # linux/sock_diag.h
_TCP = 6
_BOUND = 13
"""TCP_BOUND_INACTIVE (net/tcp_states.h)."""
_ENDING = (4, 6, 9, 11)
"""FIN-WAIT-1, TIME-WAIT, LAST-ACK, CLOSING (net/tcp_states.h)."""
_ENDS = struct.Struct(">HH16s16s")
"""struct inet_diag_sockid: ports and addresses."""
_TCP_INFO = struct.Struct("<5xB10xI120xI")
"""Of struct tcp_info: tcpi_options, tcpi_snd_mss, tcpi_segs_in."""
_STAMPS, _STAMPS_SIZE = 1, 12
"""TCPI_OPT_TIMESTAMPS (linux/tcp.h), and the bytes that they take from each segment."""
_ID = slice(4, 52)
"""Where a whole one is in struct inet_diag_msg."""
PACKET_DIAG_REQ = struct.Struct("<BBHIIII")
PACKET_DIAG_MSG = struct.Struct("<BBHIII")
PACKET_DIAG_INFO = struct.Struct("<6I")
PACKET_DIAG_MCLIST = struct.Struct("<IIHH32s")
PACKET_DIAG_RING = struct.Struct("<7I")
PACKET_INFO, PACKET_MCLIST, PACKET_RX_RING, PACKET_TX_RING, PACKET_FANOUT, _, PACKET_MEMINFO = range(7)
PACKET_SHOW = 0x1F
PDI_AUXDATA, PDI_ORIGDEV, PDI_VNETHDR, PDI_LOSS = 2, 4, 8, 16
_RECEIVE = 1 << 17
_TRIES = 5


class UnixSocket:
    """One unix socket.

    ``name`` are the bytes of sun_path, empty if unbound; ``peer`` the inode of its peer (0: none, or one that is closed
    or not accepted yet); ``waiting`` the inodes of the clients that a listening socket has not accepted, in order;
    ``received`` and ``sent`` are bytes in the queues (for a listening socket clients and backlog); ``shutdown`` has
    bit 1 for reading, 2 for writing.
    """

    __slots__ = ("inode", "name", "peer", "received", "sent", "shutdown", "state", "type", "waiting")

    def __init__(self, payload: bytes) -> None:
        _, self.type, self.state, _, self.inode, _, _ = UNIX_DIAG_MSG.unpack_from(payload)
        self.name = b""
        self.peer = self.received = self.sent = self.shutdown = 0
        self.waiting: tuple[int, ...] = ()
        for kind, data in attributes(payload, UNIX_DIAG_MSG.size):
            if kind == NAME:
                self.name = data
            elif kind == PEER:
                self.peer = int.from_bytes(data, "little")
            elif kind == ICONS:
                self.waiting = struct.unpack(f"<{len(data) // 4}I", data)
            elif kind == RQLEN:
                self.received, self.sent = struct.unpack("<II", data)
            elif kind == SHUTDOWN:
                self.shutdown = data[0]


def unix_sockets() -> dict[int, UnixSocket]:
    """All unix sockets by inode. Raises :class:`OSError` if the kernel does not answer."""
    show = SHOW_NAME | SHOW_VFS | SHOW_PEER | SHOW_ICONS | SHOW_RQLEN
    request = UNIX_DIAG_REQ.pack(AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show, 0, 0)
    return {socket.inode: socket for socket in map(UnixSocket, listing("unix sockets", request)) if socket.inode}


class PacketSocket:
    """One packet socket (linux/packet_diag.h).

    ``protocol`` is in host order; ``index`` that of its device (2**32 - 1: the device is gone); ``members`` are (index,
    how often, PACKET_MR_*, address); rings have the seven words of struct packet_diag_ring, or none; ``fanout`` is None
    without a group; ``queued`` are the bytes that wait.
    """

    __slots__ = ("copy_thresh", "fanout", "flags", "index", "inode", "members", "protocol", "queued", "reserve",
                 "rx_ring", "timestamp", "tx_ring", "type", "version")  # fmt: skip

    def __init__(self, payload: bytes) -> None:
        _, self.type, self.protocol, self.inode, _, _ = PACKET_DIAG_MSG.unpack_from(payload)
        self.index = self.version = self.reserve = self.copy_thresh = self.timestamp = self.flags = self.queued = 0
        self.members: list[tuple[int, int, int, bytes]] = []
        self.rx_ring: tuple[int, ...] = ()
        self.tx_ring: tuple[int, ...] = ()
        self.fanout: int | None = None
        for kind, data in attributes(payload, PACKET_DIAG_MSG.size):
            if kind == PACKET_INFO:
                info = PACKET_DIAG_INFO.unpack(data)
                self.index, self.version, self.reserve, self.copy_thresh, self.timestamp, self.flags = info
            elif kind == PACKET_MCLIST:
                for index, count, type, length, address in PACKET_DIAG_MCLIST.iter_unpack(data):
                    self.members.append((index, count, type, address[:length]))
            elif kind == PACKET_RX_RING:
                self.rx_ring = PACKET_DIAG_RING.unpack(data)
            elif kind == PACKET_TX_RING:
                self.tx_ring = PACKET_DIAG_RING.unpack(data)
            elif kind == PACKET_FANOUT:
                self.fanout = int.from_bytes(data, "little")
            elif kind == PACKET_MEMINFO:
                self.queued = int.from_bytes(data[:4], "little")


def packet_sockets() -> dict[int, PacketSocket]:
    """All packet sockets by inode. Raises :class:`OSError` if the kernel does not answer."""
    request = PACKET_DIAG_REQ.pack(AF_PACKET, 0, 0, 0, PACKET_SHOW, 0, 0)
    return {socket.inode: socket for socket in map(PacketSocket, listing("packet sockets", request))}


def inet_shutdowns(family: int, protocol: int) -> dict[int, int]:
    """By inode, how bound sockets are shut down: 1 for reading, 2 for writing, 3 for both. Others are left out.

    Raises :class:`OSError` if the kernel does not answer.
    """
    request = INET_DIAG_REQ.pack(family, protocol, 1 << INET_SHUTDOWN - 1, 0xFFFFFFFF)
    found: dict[int, int] = {}
    for payload in listing("internet sockets", request):
        inode = INET_DIAG_MSG.unpack_from(payload)[-1]
        for kind, data in attributes(payload, INET_DIAG_MSG.size):
            if kind == INET_SHUTDOWN and data[0]:
                found[inode] = data[0]
    return found


class TcpConnection:
    """What of a connection only the kernel's list tells: its ``peer`` (address in network order, port), how it is shut
    (``shutdown``: 1 for reading, 2 for writing, 3 both)."""

    __slots__ = ("_family", "_id", "peer", "shutdown")

    def __init__(self, payload: bytes) -> None:
        self._family = family = payload[0]
        self._id = payload[_ID]
        self.peer = payload[24 : 28 if family == AF_INET else 40], int.from_bytes(payload[6:8], "big")
        found = dict(attributes(payload, INET_DIAG_MSG.size))
        self.shutdown = found.get(INET_SHUTDOWN, b"\0")[0]

    def signed(self) -> bool:
        """Whether its segments are signed (TCP_MD5SIG). Asked for one by one: the kernel tells it only with tcp_info,
        of which the whole list takes 10 us for each connection of the machine. Raises :class:`OSError`."""
        request = INET_DIAG_REQ.pack(self._family, _TCP, 1 << _INET_INFO - 1, _CONNECTED)[:8] + self._id
        flags = NLM_F_REQUEST | NLM_F_ACK
        return any(map(_has_keys, ask("a TCP connection", request, SOCK_DIAG_BY_FAMILY, flags, NETLINK_SOCK_DIAG)))


def tcp_connections(family: int) -> dict[int, TcpConnection]:
    """All TCP connections of a family by inode. Raises :class:`OSError` if the kernel does not answer."""
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << INET_SHUTDOWN - 1, _CONNECTED)
    found = {INET_DIAG_MSG.unpack_from(payload)[-1]: TcpConnection(payload) for payload in listing("TCP", request)}
    found.pop(0, None)
    return found


def tcp_bound(family: int) -> dict[int, int]:
    """By inode, how TCP sockets that have a port, but neither listen nor are connected, are shut down: 1 for reading, 2
    for writing. The kernel lists them since Linux 6.8. Raises :class:`OSError`."""
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << INET_SHUTDOWN - 1, 1 << _BOUND)
    return {
        INET_DIAG_MSG.unpack_from(payload)[-1]: dict(attributes(payload, INET_DIAG_MSG.size)).get(
            INET_SHUTDOWN, b"\0"
        )[0]
        for payload in listing("TCP sockets", request)
    }


class Unaccepted:
    """A TCP connection that no process has a descriptor of: it waits to be accepted, if it is established.

    ``near`` and ``far`` are addresses of 4 or 16 bytes, in network order; ``state`` as in net/tcp_states.h; ``unread``
    the bytes that wait in it, with the peer's FIN; ``room`` the data of its largest segment (options count as data);
    ``arrived`` how many segments have.
    """

    __slots__ = ("arrived", "dport", "far", "near", "room", "sport", "state", "unread")

    def __init__(self, payload: bytes) -> None:
        self.sport, self.dport, near, far = _ENDS.unpack_from(payload, _ID.start)
        width = 4 if payload[0] == AF_INET else 16
        self.near, self.far = near[:width], far[:width]
        self.state = payload[1]
        self.unread = INET_DIAG_MSG.unpack_from(payload)[4]
        info = dict(attributes(payload, INET_DIAG_MSG.size)).get(_INET_INFO, b"").ljust(_TCP_INFO.size, b"\0")
        agreed, self.room, self.arrived = _TCP_INFO.unpack_from(info)
        self.room += _STAMPS_SIZE if agreed & _STAMPS else 0


def unaccepted(family: int, port: int) -> list[Unaccepted]:
    """Connections to *port* of this machine that wait to be accepted. Raises :class:`OSError`."""
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << _INET_INFO - 1, _WAITING)[:8] + port.to_bytes(2, "big")
    found = listing("TCP", request.ljust(INET_DIAG_REQ.size, b"\0"))
    return [Unaccepted(payload) for payload in found if not INET_DIAG_MSG.unpack_from(payload)[-1]]


def half_open(family: int) -> list[Unaccepted]:
    """Connections of a family that are in the middle of their handshake. Raises :class:`OSError`."""
    return [Unaccepted(payload) for payload in listing("TCP", INET_DIAG_REQ.pack(family, _TCP, 0, 1 << _SYN_RECV))]


def find_unaccepted(family: int, near: bytes, sport: int, far: bytes, dport: int) -> Unaccepted | None:
    """The connection between these two ends, if it is there and nobody has accepted it. Raises :class:`OSError`."""
    ends = _ENDS.pack(sport, dport, near.ljust(16, b"\0"), far.ljust(16, b"\0")) + bytes(4) + b"\xff" * 8
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << _INET_INFO - 1, _WAITING)[:8] + ends
    try:
        found = ask("a TCP connection", request, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_ACK, NETLINK_SOCK_DIAG)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    # If there is none, the kernel tells of the listening socket, or of what it remembers of an earlier one.
    mine = [each for each in found if _WAITING >> each[1] & 1 and not INET_DIAG_MSG.unpack_from(each)[-1]]
    return Unaccepted(mine[0]) if mine else None


def destroy_orphans(connections: list[Connection]) -> None:
    """Remove the kernel's half of those of the *connections* that no process has a descriptor of any more, but that the
    kernel still tries to end properly, or remembers. Says a reset to their peers, unless that is dropped on the way.

    For a socket in this state it works since Linux 6.11 (tcp_abort). Raises :class:`OSError`.
    """
    import _socket

    from firn.host.nftables import Connection

    wanted = {each.key() for each in connections}
    states = sum(1 << state for state in _ENDING)
    for family, width in ((2, 4), (10, 16)):
        for payload in listing("internet", INET_DIAG_REQ.pack(family, _TCP, 0, states)):
            sport, dport, near, far = _ENDS.unpack_from(payload, 4)
            key = Connection(family, near[:width], sport, far[:width], dport).key()
            if INET_DIAG_MSG.unpack_from(payload)[-1] or key not in wanted:
                continue
            # The cookie at the end of the id makes it this socket and no other.
            request = INET_DIAG_REQ.pack(family, _TCP, 0, states)[:8] + payload[_ID]
            head = NLMSGHDR.pack(NLMSGHDR.size + len(request), _SOCK_DESTROY, NLM_F_REQUEST, 1, 0)
            channel = _socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
            channel.send(head + request)
            channel.close()


def tcp_signed(family: int) -> set[int]:
    """Inodes of the TCP sockets that listen and have keys for signatures (TCP_MD5SIG).

    Raises :class:`OSError` if the kernel does not answer.
    """
    # The kernel adds the keys only where tcp_info is asked for (seen on Linux 6.18).
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << _INET_INFO - 1, 1 << LISTEN)
    return {
        INET_DIAG_MSG.unpack_from(payload)[-1]
        for payload in listing("TCP sockets", request)
        if _has_keys(payload)
    }


def _has_keys(payload: bytes) -> bool:
    return any(kind == INET_MD5SIG for kind, _ in attributes(payload, INET_DIAG_MSG.size))


def listing(
    what: str, request: bytes, kind: int = SOCK_DIAG_BY_FAMILY, protocol: int = NETLINK_SOCK_DIAG
) -> list[bytes]:
    """The answers to a request for all *what*, asked again while changes disturb it. Raises :class:`OSError`."""
    return ask(what, request, kind, NLM_F_REQUEST | NLM_F_DUMP, protocol)


def ask(what: str, request: bytes, kind: int, flags: int, protocol: int) -> list[bytes]:
    """The payloads of the answers to one netlink(7) message about *what*. Raises :class:`OSError`."""
    import _socket

    head = NLMSGHDR.pack(NLMSGHDR.size + len(request), kind, flags, 1, 0)
    channel = _socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
    try:
        for _ in range(_TRIES):
            channel.send(head + request)
            found: list[bytes] = []
            if not _receive(channel, what, found):
                break
        return found
    finally:
        channel.close()


def _receive(channel: object, what: str, found: list[bytes]) -> bool:
    """Put the answers of one dump into *found*; whether it was disturbed by changes."""
    disturbed = False
    while True:
        data: bytes = channel.recv(_RECEIVE)  # type: ignore[attr-defined]
        at = 0
        while at < len(data):
            size, kind, flags, _, _ = NLMSGHDR.unpack_from(data, at)
            disturbed |= bool(flags & NLM_F_DUMP_INTR)
            payload = data[at + NLMSGHDR.size : at + size]
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                code = -int.from_bytes(payload[:4], "little", signed=True) if payload else 0
                if code:
                    raise OSError(code, f"{what}: {os.strerror(code)}")
                return disturbed
            found.append(payload)
            at += size + 3 & ~3


def attributes(payload: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The netlink attributes of a message from offset *at* on: (kind, data)."""
    while at + 4 <= len(payload):
        size, kind = struct.unpack_from("<HH", payload, at)
        if size < 4:
            return
        yield kind, payload[at + 4 : at + size]
        at += size + 3 & ~3
