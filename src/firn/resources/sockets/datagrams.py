"""Datagrams that wait in a UDP socket, with their senders (images: firn_datagram).

They are read by peeking, and come back as packets that a raw socket (raw(7), raw(7) with IP_HDRINCL) sends to this
machine itself under the sender's address. What goes wrong: what was sent to a group or a whole network cannot be sent
again without others getting it too; a firewall may drop it, so the queue is looked at afterwards. A socket that shares
its port is connected to the sender meanwhile, for the kernel prefers such a one. What the kernel had merged (UDP_GRO)
comes back as the datagrams that it was.
"""

from __future__ import annotations

import _socket
import errno
import struct
import time

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, RestoreError
from firn.resources.sockets import options
from firn.resources.sockets.inet_options import AF_INET, AF_INET6, DGRAM, IP, IPV6, UDP, UDPLITE
from firn.resources.sockets.packets import checksum, pseudo, send, text, unmapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MSG_PEEK, _MSG_DONTWAIT = 2, 0x40
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_SHOWN = {AF_INET: (IP, (_IP_PKTINFO, 12, 13)), AF_INET6: (IPV6, (_IPV6_RECVPKTINFO, 51, 66))}
"""By family: level and options that have a datagram tell where it went, its hops left (IP_RECVTTL, IPV6_RECVHOPLIMIT)
and its kind of service (IP_RECVTOS, IPV6_RECVTCLASS)."""
_HOPS, _KIND = {(IP, 2), (IPV6, 52)}, {(IP, 1), (IPV6, 67)}
"""What they then tell: IP_TTL and IPV6_HOPLIMIT, IP_TOS and IPV6_TCLASS."""
_USUAL_HOPS = 64
_UDP_GRO = 104
_LARGEST, _CONTROL = 1 << 16, 512
_ROOM = 1 << 26
_PATIENCE_S = 1.0
_SOCKADDR = 16


def is_udp(sock: _socket.socket) -> bool:
    """Whether *sock* is a UDP or UDP-Lite socket."""
    return sock.type == DGRAM and sock.proto in (UDP, UDPLITE)


def _raw(address: str, family: int) -> bytes:
    """The bytes of an address, four for an IPv4 one in IPv6's clothes."""
    return unmapped(_socket.inet_pton(family, address.partition("%")[0]))


def peek(sock: _socket.socket) -> list[dict[str, Any]]:
    """All datagrams (firn_datagram), which stay where they are."""
    # A socket of IPv6 tells of a datagram that came by IPv4 what it would tell if it were one of IPv4.
    levels = (AF_INET,) if sock.family == AF_INET else (AF_INET, AF_INET6)
    switches = [(_SHOWN[family][0], number) for family in levels for number in _SHOWN[family][1]]
    before = [(level, number, sock.getsockopt(level, number)) for level, number in switches]
    offset = sock.getsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF)
    found = []
    try:
        for level, number in switches:
            sock.setsockopt(level, number, 1)
        sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, -1)
        # An empty datagram that was peeked at before is not seen at an offset again, but without one it is.
        first = _peek(sock)
        if first is None:
            return []
        if not first["data"]:
            found.append(first)
        sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, 0)
        while (datagram := _peek(sock)) is not None:
            found.append(datagram)
        return [piece for datagram in found for piece in _pieces(datagram)]
    finally:
        sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, offset)
        for level, number, value in before:
            sock.setsockopt(level, number, value)


def _peek(sock: _socket.socket) -> dict[str, Any] | None:
    try:
        data, control, _, source = sock.recvmsg(_LARGEST, _CONTROL, _MSG_PEEK | _MSG_DONTWAIT)
    except BlockingIOError:
        return None
    destination, size, way = b"", 0, {}
    for level, kind, content in control:
        if (level, kind) == (IP, _IP_PKTINFO):
            destination = destination or content[8:12]
        elif (level, kind) == (IPV6, _IPV6_PKTINFO):
            destination = content[:16]
        elif (level, kind) in _HOPS:
            way["hops"] = content[0]
        elif (level, kind) in _KIND:
            way["kind"] = content[0]
        elif (level, kind) == (UDP, _UDP_GRO):
            size = int.from_bytes(content[:4], "little")
    source_address = _raw(source[0], sock.family)
    found = {"source": source_address, "port": source[1], "destination": unmapped(destination), "data": data}
    return found | way | ({"size": size} if size else {})


def _pieces(datagram: dict[str, Any]) -> list[dict[str, Any]]:
    """The datagrams that the kernel has merged to one; each has ``size`` bytes, but for the last."""
    size = datagram.pop("size", 0)
    data = datagram["data"]
    return [datagram | {"data": data[at : at + size]} for at in range(0, len(data), size)] if size else [datagram]


def obstacles(message: dict[str, Any]) -> list[str]:
    """Why the datagrams of *message* cannot be sent again."""
    waiting = message["firn"]["datagrams"]
    if not waiting:
        return []
    if message.get("ifname"):
        return ["has datagrams in its queue, and a link-local address"]
    for address in {datagram["destination"] for datagram in waiting}:
        if not _is_own(address):
            where = text(address)
            return [f"has a datagram in its queue that was sent to {where}, which is no address of this machine alone"]
    for datagram in waiting:
        if datagram["source"].startswith(b"\xfe\x80") and len(datagram["source"]) == 16:
            return [f"has a datagram from the link-local address {text(datagram['source'])} in its queue"]
    return []


def shares(message: dict[str, Any]) -> list[str]:
    """Why the datagrams of *message* cannot be sent again to a socket that shares its port."""
    for datagram in message["firn"]["datagrams"]:
        if not datagram["port"] or _way_to(datagram["source"]) != datagram["destination"]:
            return ["has datagrams in its queue, and shares its port with others"]
    return []


def _way_to(address: bytes) -> bytes:
    """The address of ours with which *address* is reached; empty if it is not."""
    family = AF_INET if len(address) == 4 else AF_INET6
    probe = _socket.socket(family, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect((text(address), 9))
        return _raw(probe.getsockname()[0], family)
    except OSError:
        return b""
    finally:
        probe.close()


def _is_own(address: bytes) -> bool:
    """Whether *address* is a unicast address of this machine: then, and only then, it is its own way to itself."""
    return _way_to(address) == address


def fill(sock: _socket.socket, name: str, message: dict[str, Any], shared: bool = False) -> None:
    """Put the datagrams of *message* into the queue of *sock*, which is bound, not connected, and not to a device.

    *shared*: others have the same port. Raises :class:`RestoreError` if they do not arrive.
    """
    waiting = message.get("firn", {}).get("datagrams", [])
    if not waiting:
        return
    options.set_buffer(sock, options.SO_RCVBUF, _ROOM)
    for count, datagram in enumerate(waiting, 1):
        _check(name, datagram)
        if shared:
            source = text(datagram["source"])
            mapped = sock.family == AF_INET6 and len(datagram["source"]) == 4
            sock.connect((f"::ffff:{source}" if mapped else source, datagram["port"]))
        _send(name, message, datagram)
        if shared or count == len(waiting):
            _await(sock, name, count)
    if shared:
        nowhere = bytearray(_SOCKADDR)  # AF_UNSPEC
        syscall("connect to nobody", nr.connect, sock.fileno(), address_of(nowhere), len(nowhere))
    options.set_buffer(sock, options.SO_RCVBUF, message["opts"]["so_rcvbuf"])
    if "so_buf_lock" in message["opts"]:
        sock.setsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK, message["opts"]["so_buf_lock"])


def _await(sock: _socket.socket, name: str, count: int) -> None:
    """Wait until *count* datagrams are there."""
    end = time.monotonic() + _PATIENCE_S
    while len(peek(sock)) < count:
        if time.monotonic() > end:
            raise RestoreError(f"{name}: the datagrams of its queue do not arrive", "a firewall may drop them")
        time.sleep(0.001)


def _check(name: str, datagram: dict[str, Any]) -> None:
    source, target = datagram.get("source", b""), datagram.get("destination", b"")
    if len(source) not in (4, 16) or len(source) != len(target) or datagram.get("port", 0) >= 1 << 16:
        raise ImageError(f"{name}: a datagram in its queue has impossible addresses")


def _send(name: str, message: dict[str, Any], datagram: dict[str, Any]) -> None:
    source, target, data = (datagram.get(field, b"") for field in ("source", "destination", "data"))
    port = datagram.get("port", 0)
    try:
        body = _body(source, target, message["proto"], port, message["src_port"], data)
        hops, kind = datagram.get("hops", _USUAL_HOPS) & 0xFF, datagram.get("kind", 0) & 0xFF
        send(source, target, message["proto"], body, hops=hops or _USUAL_HOPS, kind=kind)
    except OSError as error:
        why = "it is too large" if error.errno == errno.EMSGSIZE else error.strerror
        raise RestoreError(f"{name}: a datagram from {text(source)} cannot be queued again: {why}") from None


def _body(source: bytes, target: bytes, protocol: int, near: int, far: int, data: bytes) -> bytes:
    """RFC 768 and RFC 3828 (UDP-Lite: length 0 means that the checksum covers everything)."""
    length = len(data) + 8
    head = struct.pack(">HHH", near, far, 0 if protocol == UDPLITE else length)
    check = checksum(pseudo(source, target, protocol, length) + head + b"\0\0" + data) or 0xFFFF
    return head + check.to_bytes(2, "big") + data
