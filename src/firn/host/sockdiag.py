"""What the kernel tells about sockets of the current network namespace (sock_diag(7), linux/{unix,inet}_diag.h)."""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn.host.nftables import Connection

AF_UNIX, AF_INET, AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC = 1, 2, 16, 3, 0o2000000
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
INET_SHUTDOWN, INET_MD5SIG = 8, 18
_TCP = 6
_CONNECTED = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
"""The states of a connection that a descriptor can have, as bits."""
_SOCK_DESTROY = 21  # linux/sock_diag.h
_TCP = 6
_ENDING = (4, 9, 11)
"""FIN-WAIT-1, LAST-ACK, CLOSING (net/tcp_states.h)."""
_ENDS = struct.Struct(">HH16s16s")
"""struct inet_diag_sockid: ports and addresses."""
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
    (``shutdown``: 1 for reading, 2 for writing, 3 both), whether its segments are signed (TCP-MD5)."""

    __slots__ = ("peer", "shutdown", "signed")

    def __init__(self, payload: bytes) -> None:
        family = payload[0]
        self.peer = payload[24 : 28 if family == AF_INET else 40], int.from_bytes(payload[6:8], "big")
        found = dict(attributes(payload, INET_DIAG_MSG.size))
        self.shutdown = found.get(INET_SHUTDOWN, b"\0")[0]
        self.signed = bool(found.get(INET_MD5SIG))


def tcp_connections(family: int) -> dict[int, TcpConnection]:
    """All TCP connections of a family by inode. Raises :class:`OSError` if the kernel does not answer."""
    request = INET_DIAG_REQ.pack(family, _TCP, 1 << INET_SHUTDOWN - 1, _CONNECTED)
    found = {INET_DIAG_MSG.unpack_from(payload)[-1]: TcpConnection(payload) for payload in listing("TCP", request)}
    found.pop(0, None)
    return found


def destroy_orphans(connections: list[Connection]) -> None:
    """Remove the kernel's half of those of the *connections* that no process has a descriptor of any more, but that the
    kernel still tries to end properly. Says a reset to their peers, unless that is dropped on the way.

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
            request = INET_DIAG_REQ.pack(family, _TCP, 0, states)[:8] + payload[4:52]
            head = NLMSGHDR.pack(NLMSGHDR.size + len(request), _SOCK_DESTROY, NLM_F_REQUEST, 1, 0)
            channel = _socket.socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
            channel.send(head + request)
            channel.close()


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
