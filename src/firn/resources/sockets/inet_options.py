"""Options of internet sockets beside those of every socket (images: ip_opts_entry, tcp_opts_entry, firn_inet).

What counts is what differs from a new socket of the same kind. Sources: ip(7), ipv6(7), tcp(7), udp(7), and the kernel
headers linux/in.h, linux/in6.h, linux/tcp.h, linux/udp.h, asm-generic/socket.h.
"""

from __future__ import annotations

import _socket
import errno
import struct

from firn.abi.tcp import TCP_FASTOPEN_CONNECT, TCP_MAXSEG, TCP_QUICKACK, TCP_WINDOW_CLAMP
from firn.errors import ImageError
from firn.resources.sockets import options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

AF_INET, AF_INET6 = 2, 10
STREAM, DGRAM, RAW = 1, 2, 3
IP, TCP, UDP, IPV6, UDPLITE, SOL_RAW = 0, 6, 17, 41, 136, 255
IPV6_V6ONLY = 26
MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP, MCAST_MSFILTER = 42, 46, 48
EXCLUDE, INCLUDE = 0, 1
IP_OPTIONS, TCP_ULP = 4, 31

IP_FIELDS = {15: "freebind", 8: "pktinfo", 1: "tos", 2: "ttl"}
TCP_FIELDS = {3: "cork", 1: "nodelay", 6: "keepcnt", 4: "keepidle", 5: "keepintvl"}
_BOOLEAN = ("freebind", "pktinfo", "cork", "nodelay")

KEPT = {
    # IP_OPTIONS, _ROUTER_ALERT, _RECVOPTS, _RETOPTS, _MTU_DISCOVER, _RECVERR, _RECVTTL, _RECVTOS, _PASSSEC,
    # _TRANSPARENT, _RECVORIGDSTADDR, _MINTTL, _CHECKSUM, _BIND_ADDRESS_NO_PORT, _RECVFRAGSIZE, _RECVERR_RFC4884,
    # _MULTICAST_IF, _MULTICAST_TTL, _MULTICAST_LOOP, _MULTICAST_ALL, _UNICAST_IF, _LOCAL_PORT_RANGE
    IP: (4, 5, 6, 7, 10, 11, 12, 13, 18, 19, 20, 21, 23, 24, 25, 26, 32, 33, 34, 49, 50, 51),
    # IPV6_2292*, _FLOWINFO, _UNICAST_HOPS, _MULTICAST_*, _MTU_DISCOVER, _RECVERR, _MULTICAST_ALL, _RECVERR_RFC4884,
    # _FLOWINFO_SEND, _RECV*, the sticky headers, _DONTFRAG, _RECVTCLASS, _TCLASS, _AUTOFLOWLABEL, _ADDR_PREFERENCES,
    # _MINHOPCOUNT, _RECVORIGDSTADDR, _UNICAST_IF, _RECVFRAGSIZE, _ROUTER_ALERT, _ROUTER_ALERT_ISOLATE, _TRANSPARENT,
    # _FREEBIND (a raw IPv6 socket has the latter two not at the level of IP)
    IPV6: (2, 3, 4, 5, 8, 11, 16, 17, 18, 19, 22, 23, 25, 29, 30, 31, 33, 49, 51, 53, 54, 55, 56, 57, 58, 59, 60, 62,
           66, 67, 70, 72, 73, 74, 75, 76, 77, 78),
    # TCP_MAXSEG, _SYNCNT, _LINGER2, _DEFER_ACCEPT, _WINDOW_CLAMP, _CONGESTION, _THIN_LINEAR_TIMEOUTS, _USER_TIMEOUT,
    # _FASTOPEN, _NOTSENT_LOWAT, _SAVE_SYN, _FASTOPEN_CONNECT, _FASTOPEN_KEY, _FASTOPEN_NO_COOKIE, _INQ, _TX_DELAY,
    # _RTO_MAX_MS, _RTO_MIN_US, _DELACK_MAX_US, _QUICKACK
    TCP: (TCP_MAXSEG, 7, 8, 9, TCP_WINDOW_CLAMP, TCP_QUICKACK, 13, 16, 18, 23, 25, 27, 30, 33, 34, 36, 37, 44, 45, 46),
    # UDP_ENCAP, _NO_CHECK6_TX, _NO_CHECK6_RX, _SEGMENT, _GRO
    UDP: (100, 101, 102, 103, 104),
    # UDPLITE_SEND_CSCOV, _RECV_CSCOV
    UDPLITE: (10, 11),
    # IPV6_CHECKSUM
    SOL_RAW: (7,),
}  # fmt: skip
"""Options that CRIU's messages have no field for, by level: firn keeps the bytes."""

_OF_CONNECTION = {TCP: (TCP_MAXSEG, TCP_WINDOW_CLAMP, TCP_QUICKACK, TCP_FASTOPEN_CONNECT)}
"""What a connection sets by itself, and what must not be done once more when it is made again."""
_BY_INDEX: dict[tuple[int, int], tuple[Literal["big", "little"], int]] = {
    (IP, 50): ("big", 0), (IPV6, 17): ("little", 0), (IPV6, 76): ("big", 0), (IP, 32): ("little", 8),
}  # fmt: skip
"""Options that have the index of a network device (IP_UNICAST_IF, IPV6_MULTICAST_IF, IPV6_UNICAST_IF; IP_MULTICAST_IF
if it is a struct ip_mreqn): its byte order, and where it is."""
_OF_DATAGRAMS = {IP: (32, 33), IPV6: (17, 18)}
"""Multicast options that a stream does not take, though accepted ones show other values than new ones."""

_MIN_MSS, _MAX_MSS = 88, 32767
"""What may be set (TCPMIN_MSS and MAX_TCP_WINDOW of the kernel)."""
_GROUP = struct.Struct("<I4x")
_FILTER = struct.Struct("<II")
_STORAGE = 128
_MOST_SOURCES = 1024


def levels(family: int, kind: int, protocol: int) -> tuple[int, ...]:
    """The levels at which a socket has options."""
    own: tuple[int, ...] = ()
    if kind == RAW:
        own = (SOL_RAW,) if family == AF_INET6 else ()
    elif protocol in (TCP, UDP, UDPLITE):
        own = (UDP, UDPLITE) if protocol == UDPLITE else (protocol,)
    return (IP, *((IPV6,) if family == AF_INET6 else ()), *own)


def is_tcp(sock: _socket.socket) -> bool:
    """Whether *sock* is a TCP socket, and no raw one for packets of that protocol."""
    return sock.type == STREAM and sock.proto == TCP


def collect(sock: _socket.socket, connected: bool) -> dict[str, Any]:
    """ip_opts, tcp_opts and firn's options of *sock*, as far as they differ from a new socket's.

    *connected*: it has, or had, a connection.
    """
    found: dict[str, Any] = {"ip_opts": _named(sock, IP, IP_FIELDS)}
    if is_tcp(sock) and (named := _named(sock, TCP, TCP_FIELDS)):
        found["tcp_opts"] = named
    kept = []
    passed = (_OF_DATAGRAMS if is_tcp(sock) else {}) | (_OF_CONNECTION if connected else {})
    for level in levels(sock.family, sock.type, sock.proto):
        kept += options.kept(sock, level, KEPT[level], passed.get(level, ()))
    kept = [option for option in kept if not _is_derived(option)]
    if kept:
        found["firn"] = {"options": kept} | devices(kept)
    return found


def _index(option: dict[str, Any]) -> int:
    """The index of the network device that an option names; 0 if it names none."""
    order, at = _BY_INDEX.get((option.get("level", 0), option.get("number", 0)), ("little", 1 << 16))
    return int.from_bytes(option.get("value", b"")[at : at + 4], order)


def devices(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The names of the network devices in options, as a field of firn_inet: elsewhere they have other indices."""
    names = dict(_socket.if_nameindex()) if any(map(_index, kept)) else {}
    found = [{"index": index, "name": names[index]} for index in sorted(set(map(_index, kept))) if index in names]
    return {"devices": found} if found else {}


def _here(option: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """The option with the index that the device has here. Raises :class:`OSError` if it is not there."""
    index = _index(option)
    if index not in names:
        return option
    try:
        index = _socket.if_nametoindex(names[index])
    except OSError:
        raise OSError(errno.ENODEV, f"the network device {names[index]} is not there") from None
    order, at = _BY_INDEX[option["level"], option["number"]]
    return option | {"value": option["value"][:at] + index.to_bytes(4, order) + option["value"][at + 4 :]}


def _is_derived(option: dict[str, Any]) -> bool:
    """Whether it is a segment size that nobody may set: IP options make the kernel compute one without a route."""
    size = int.from_bytes(option["value"][:4], "little")
    return (option["level"], option["number"]) == (TCP, TCP_MAXSEG) and not _MIN_MSS <= size <= _MAX_MSS


def _named(sock: _socket.socket, level: int, fields: dict[int, str]) -> dict[str, int]:
    """By field, what differs; a raw IPv6 socket has none of IPv4's options."""
    found = {}
    for number, value in options.differing(sock, level, tuple(fields)):
        known = int.from_bytes(value, "little", signed=True)
        found[fields[number]] = bool(known) if fields[number] in _BOOLEAN else known
    return found


def unsupported(sock: _socket.socket) -> list[str]:
    """What options make of *sock* that cannot be saved."""
    if not is_tcp(sock):
        return []
    found = []
    layer = (options.value(sock, TCP, TCP_ULP) or b"").rstrip(b"\0")
    if layer:
        found.append(f"has the protocol {layer.decode('ascii', 'replace')!r} on top (TCP_ULP)")
    return found


def restore(sock: _socket.socket, entry: dict[str, Any]) -> None:
    """Set the options, before bind(2). Raises :class:`OSError` for what the kernel does not take."""
    # Not of a raw socket: that has a number from the start, and so cannot be changed any more.
    if "v6only" in entry and entry["family"] == AF_INET6 and entry["type"] != RAW:
        sock.setsockopt(IPV6, IPV6_V6ONLY, entry["v6only"])
    tcp = TCP_FIELDS if entry["type"] == STREAM else {}
    for level, fields, message in ((IP, IP_FIELDS, "ip_opts"), (TCP, tcp, "tcp_opts")):
        values = entry.get(message, {})
        for number, name in fields.items():
            if name in values:
                sock.setsockopt(level, number, int(values[name]).to_bytes(4, "little"))
    if entry["type"] == STREAM:
        for number, name in TCP_FIELDS.items():
            # Where older images have them.
            if entry["opts"].get(f"tcp_{name}"):
                sock.setsockopt(TCP, number, entry["opts"][f"tcp_{name}"].to_bytes(4, "little"))
    allowed = {level: KEPT[level] for level in levels(entry["family"], entry["type"], entry["proto"])}
    own = entry.get("firn", {})
    names = {device.get("index", 0): device.get("name", "") for device in own.get("devices", [])}
    options.set_kept(sock, [_here(option, names) for option in own.get("options", [])], allowed)


# -- multicast memberships -------------------------------------------------------------------------------------------


def _address(group: bytes) -> bytes:
    """A sockaddr_storage of an address without port."""
    made = struct.pack("<HH", AF_INET, 0) + group if len(group) == 4 else struct.pack("<HHI", AF_INET6, 0, 0) + group
    return made.ljust(_STORAGE, b"\0")


def _candidates(family: int) -> list[tuple[int, bytes]]:
    """(interface index, group) of everything that any socket or the kernel has joined; from /proc/net/igmp*."""
    found = []
    index = 0
    with open("/proc/self/net/igmp", "rb") as file:
        for line in file.read().splitlines()[1:]:
            words = line.split()
            if not line[:1].isspace():
                index = int(words[0])
            else:
                found.append((index, int(words[0], 16).to_bytes(4, "little")))
    if family == AF_INET6:
        try:
            with open("/proc/self/net/igmp6", "rb") as file:
                found += [(int(words[0]), bytes.fromhex(words[2].decode())) for words in map(bytes.split, file)]
        except FileNotFoundError:
            pass
    return found


def memberships(sock: _socket.socket) -> list[dict[str, Any]]:
    """The multicast groups that *sock* is in (firn_group). TCP sockets cannot be in any."""
    found = []
    for index, group in _candidates(sock.family):
        request = _GROUP.pack(index) + _address(group) + _FILTER.pack(0, 0)
        entry = _filter_of(sock, IP if len(group) == 4 else IPV6, request, _MOST_SOURCES)
        if entry is not None:
            found.append({"interface": _socket.if_indextoname(index), "group": group, **entry})
    return found


def _filter_of(sock: _socket.socket, level: int, request: bytes, room: int) -> dict[str, Any] | None:
    """Mode and sources of a membership (struct group_filter); None if *sock* is not in that group."""
    from firn.abi import nr
    from firn.abi.libc import address_of, syscall

    head = _GROUP.size + _STORAGE
    buffer = bytearray(request[:head] + _FILTER.pack(0, room) + bytes(room * _STORAGE))
    size = bytearray(len(buffer).to_bytes(4, "little"))
    where = address_of(buffer)
    try:
        syscall("MCAST_MSFILTER", nr.getsockopt, sock.fileno(), level, MCAST_MSFILTER, where, address_of(size))
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL, errno.ENOPROTOOPT):
            return None
        raise
    mode, count = _FILTER.unpack_from(buffer, head)
    at = head + _FILTER.size
    start, length = (4, 4) if level == IP else (8, 16)
    places = [at + _STORAGE * index + start for index in range(min(count, room))]
    return {"mode": mode, "sources": [bytes(buffer[place : place + length]) for place in places]}


def join(sock: _socket.socket, member: dict[str, Any]) -> None:
    """Join a group again. Raises :class:`OSError`, also for an interface that is not there."""
    group, sources = member.get("group", b""), member.get("sources", [])
    if any(len(address) not in (4, 16) or len(address) != len(group) for address in (group, *sources)):
        raise ImageError("a multicast group has an impossible address")
    level = IP if len(group) == 4 else IPV6
    head = _GROUP.pack(_socket.if_nametoindex(member.get("interface", ""))) + _address(group)
    if member.get("mode", EXCLUDE) == INCLUDE:
        for source in sources:
            sock.setsockopt(level, MCAST_JOIN_SOURCE_GROUP, head + _address(source))
        return
    sock.setsockopt(level, MCAST_JOIN_GROUP, head)
    if sources:
        listed = b"".join(map(_address, sources))
        sock.setsockopt(level, MCAST_MSFILTER, head + _FILTER.pack(EXCLUDE, len(sources)) + listed)
