"""What the kernel tells about sockets of the current network namespace (sock_diag(7), linux/{unix,inet}_diag.h)."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_TCP = 6
AF_UNIX, AF_NETLINK, AF_PACKET, SOCK_RAW, SOCK_CLOEXEC = 1, 16, 17, 3, 0o2000000
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR = 1, 0x300, 0x10
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


def tcp_signed(family: int) -> set[int]:
    """Inodes of the TCP sockets that listen and have keys for signatures (TCP_MD5SIG).

    Connections are not asked for: there may be thousands, at 10 us each. Raises :class:`OSError` if the kernel does
    not answer.
    """
    # The kernel adds the keys only where tcp_info is asked for (seen on Linux 6.18).
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << _INET_INFO - 1, 1 << LISTEN)
    return {
        INET_DIAG_MSG.unpack_from(payload)[-1]
        for payload in listing("TCP sockets", request)
        if any(kind == INET_MD5SIG for kind, _ in attributes(payload, INET_DIAG_MSG.size))
    }


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
