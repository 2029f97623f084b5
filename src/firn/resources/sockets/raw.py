"""Raw and ping sockets (images: inet_sk_entry): what they have beyond other internet sockets.

State owned: header options and ICMP filters (raw(7), icmp(7), linux/icmp.h), and the peer. Kernel: getsockopt(2), and
/proc/net/{raw,raw6,icmp,icmp6} for the peer, which getpeername(2) does not tell without a port, and for what waits;
sock_diag need not know raw sockets. What goes wrong: packets that wait cannot be sent again, for other sockets and the
kernel itself would take them too; so they are an obstacle. A ping socket is only for groups in
net.ipv4.ping_group_range: it is made as one of these.
"""

from __future__ import annotations

import _socket
import os
import struct

from firn.errors import ImageError
from firn.resources.sockets import options
from firn.resources.sockets.inet_options import AF_INET, AF_INET6, IP, IPV6, RAW, SOL_RAW, UDP, UDPLITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ICMP, ICMPV6 = 1, 58
IP_HDRINCL, IP_NODEFRAG, IPV6_HDRINCL = 3, 22, 36
_FILTERS = {(AF_INET, ICMP): (SOL_RAW, 4), (AF_INET6, ICMPV6): (ICMPV6, 32)}
"""(family, protocol) -> level and size of ICMP_FILTER or ICMPV6_FILTER."""
_FILTER = 1
_TABLES = {ICMP: "icmp", ICMPV6: "icmp", UDP: "udp", UDPLITE: "udplite"}
"""Files of /proc/net by protocol, of sockets that are not raw; with a 6 at the end for IPv6."""
_PEER, _STATE, _QUEUES, _INODE = 2, 3, 4, 9
"""Columns of these tables."""
_ESTABLISHED = 1


class Table:
    """The lines of the kernel's tables of raw, ping and UDP sockets."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[int, list[str]]] = {}

    def _line(self, sock: _socket.socket, inode: int) -> list[str] | None:
        name = "raw" if sock.type == RAW else _TABLES[sock.proto]
        name += "6" if sock.family == AF_INET6 else ""
        if name not in self._lines:
            found: dict[int, list[str]] = {}
            try:
                with open(f"/proc/net/{name}", encoding="ascii") as file:
                    for words in map(str.split, file.read().splitlines()[1:]):
                        found[int(words[_INODE])] = words
            except FileNotFoundError:
                pass
            self._lines[name] = found
        return self._lines[name].get(inode)

    def obstacles(self, sock: _socket.socket, inode: int) -> list[str]:
        """Why a raw or ping socket cannot be saved."""
        line = self._line(sock, inode)
        if line is not None and int(line[_QUEUES].partition(":")[2], 16):
            return ["has packets in its queue, which cannot be sent again to it alone"]
        return []

    def peer(self, sock: _socket.socket, inode: int) -> tuple[list[int], int] | None:
        """Address (words as in the images) and port that *sock* is connected to, also if getpeername(2) tells none
        because the port is 0."""
        line = self._line(sock, inode)
        if line is None or int(line[_STATE], 16) != _ESTABLISHED:
            return None
        address, _, port = line[_PEER].partition(":")
        return [int(address[at : at + 8], 16) for at in range(0, len(address), 8)], int(port, 16)


def _switches(family: int) -> tuple[tuple[str, int, int], ...]:
    if family == AF_INET6:
        return (("hdrincl", IPV6, IPV6_HDRINCL),)
    return (("hdrincl", IP, IP_HDRINCL), ("nodefrag", IP, IP_NODEFRAG))


def collect(sock: _socket.socket) -> dict[str, Any]:
    """The ip_opts_raw_entry of raw socket *sock*, as far as it differs from a new socket's."""
    fresh = options.new(sock)
    try:
        found: dict[str, Any] = {
            name: bool(value) for name, level, number in _switches(sock.family)
            if (value := sock.getsockopt(level, number)) != fresh.getsockopt(level, number)
        }  # fmt: skip
        if (sock.family, sock.proto) in _FILTERS:
            level, size = _FILTERS[sock.family, sock.proto]
            words = sock.getsockopt(level, _FILTER, size)
            if words != fresh.getsockopt(level, _FILTER, size):
                found["icmpv_filter"] = list(struct.unpack(f"<{size // 4}I", words))
        return found
    finally:
        fresh.close()


def restore(sock: _socket.socket, entry: dict[str, Any]) -> None:
    """Set what *collect* found. Raises :class:`OSError`, :class:`ImageError`."""
    if entry["type"] != RAW:
        return
    own = entry.get("ip_opts", {}).get("raw", {})
    for name, level, number in _switches(entry["family"]):
        if name in own:
            sock.setsockopt(level, number, own[name])
    words = own.get("icmpv_filter", [])
    if words:
        level, size = _FILTERS.get((entry["family"], entry["proto"]), (0, 0))
        if len(words) != size // 4:
            raise ImageError(f"internet socket {entry['id']} has an impossible ICMP filter")
        sock.setsockopt(level, _FILTER, struct.pack(f"<{len(words)}I", *words))


def make(family: int, kind: int, protocol: int) -> _socket.socket:
    """A new socket; a ping socket by a group that may have one. Raises :class:`OSError`."""
    try:
        return _socket.socket(family, kind | _socket.SOCK_CLOEXEC, protocol)
    except PermissionError:
        with open("/proc/sys/net/ipv4/ping_group_range", encoding="ascii") as file:
            low, high = map(int, file.read().split())
        if protocol not in (ICMP, ICMPV6) or low > high:
            raise
    before = os.getegid()
    os.setegid(low)
    try:
        return _socket.socket(family, kind | _socket.SOCK_CLOEXEC, protocol)
    finally:
        os.setegid(before)
