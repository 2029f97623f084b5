"""Datagrams that wait in a UDP socket, with their senders (images: firn_datagram).

They are read by peeking, and come back as packets that a raw socket (raw(7), raw(7) with IP_HDRINCL) sends to this
machine itself under the sender's address. What goes wrong: what was sent to a group or a whole network cannot be sent
again without others getting it too; a firewall may drop it, so the queue is looked at afterwards.
"""

from __future__ import annotations

import _socket
import errno
import struct
import time

from firn.errors import ImageError, RestoreError
from firn.resources.sockets import options
from firn.resources.sockets.inet_options import AF_INET, AF_INET6, DGRAM, IP, IPV6, UDP, UDPLITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MSG_PEEK, _MSG_DONTWAIT = 2, 0x40
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
_UDP_GRO = 104
_LARGEST, _CONTROL = 1 << 16, 512
_ROOM = 1 << 26
_PATIENCE_S = 1.0
_MAPPED = bytes(10) + b"\xff\xff"
_RAW_PROTOCOL = 255


def is_udp(sock: _socket.socket) -> bool:
    """Whether *sock* is a UDP or UDP-Lite socket."""
    return sock.type == DGRAM and sock.proto in (UDP, UDPLITE)


def _raw(address: str, family: int) -> bytes:
    """The bytes of an address, four for an IPv4 one in IPv6's clothes."""
    raw = _socket.inet_pton(family, address.partition("%")[0])
    return raw[12:] if raw.startswith(_MAPPED) and len(raw) == 16 else raw


def peek(sock: _socket.socket) -> list[dict[str, Any]]:
    """All datagrams (firn_datagram), which stay where they are."""
    level, switch = (IPV6, _IPV6_RECVPKTINFO) if sock.family == AF_INET6 else (IP, _IP_PKTINFO)
    before = sock.getsockopt(level, switch)
    offset = sock.getsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF)
    sock.setsockopt(level, switch, 1)
    found = []
    try:
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
        return found
    finally:
        sock.setsockopt(options.SOL_SOCKET, options.SO_PEEK_OFF, offset)
        sock.setsockopt(level, switch, before)


def _peek(sock: _socket.socket) -> dict[str, Any] | None:
    try:
        data, control, _, source = sock.recvmsg(_LARGEST, _CONTROL, _MSG_PEEK | _MSG_DONTWAIT)
    except BlockingIOError:
        return None
    destination = b""
    for level, kind, content in control:
        if (level, kind) == (IP, _IP_PKTINFO):
            destination = content[8:12]
        elif (level, kind) == (IPV6, _IPV6_PKTINFO):
            destination = content[:16]
    if destination.startswith(_MAPPED):
        destination = destination[12:]
    return {"source": _raw(source[0], sock.family), "port": source[1], "destination": destination, "data": data}


def obstacles(sock: _socket.socket, message: dict[str, Any]) -> list[str]:
    """Why the datagrams of *message* cannot be sent again."""
    waiting = message["firn"]["datagrams"]
    if not waiting:
        return []
    if message["opts"].get("so_bound_dev") or message.get("ifname"):
        return ["has datagrams in its queue, and is bound to a network device"]
    if sock.getsockopt(UDP, _UDP_GRO):
        return ["has datagrams in its queue, which the kernel may have merged (UDP_GRO)"]
    for address in {datagram["destination"] for datagram in waiting}:
        if not _is_own(address):
            text = _text(address)
            return [f"has a datagram in its queue that was sent to {text}, which is no address of this machine alone"]
    for datagram in waiting:
        if datagram["source"].startswith(b"\xfe\x80") and len(datagram["source"]) == 16:
            return [f"has a datagram from the link-local address {_text(datagram['source'])} in its queue"]
    return []


def _text(address: bytes) -> str:
    return _socket.inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def _is_own(address: bytes) -> bool:
    """Whether *address* is a unicast address of this machine: then, and only then, it is its own way to itself."""
    family = AF_INET if len(address) == 4 else AF_INET6
    probe = _socket.socket(family, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect((_text(address), 9))
        return _raw(probe.getsockname()[0], family) == address
    except OSError:
        return False
    finally:
        probe.close()


def fill(sock: _socket.socket, name: str, message: dict[str, Any]) -> None:
    """Put the datagrams of *message* into the queue of *sock*, which is bound and not connected.

    Raises :class:`RestoreError` if they do not arrive.
    """
    waiting = message.get("firn", {}).get("datagrams", [])
    if not waiting:
        return
    options.set_buffer(sock, options.SO_RCVBUF, _ROOM)
    for datagram in waiting:
        _send(name, message, datagram)
    end = time.monotonic() + _PATIENCE_S
    while len(peek(sock)) < len(waiting):
        if time.monotonic() > end:
            raise RestoreError(f"{name}: the datagrams of its queue do not arrive", "a firewall may drop them")
        time.sleep(0.001)
    options.set_buffer(sock, options.SO_RCVBUF, message["opts"]["so_rcvbuf"])
    if "so_buf_lock" in message["opts"]:
        sock.setsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK, message["opts"]["so_buf_lock"])


def _send(name: str, message: dict[str, Any], datagram: dict[str, Any]) -> None:
    source, target, data = (datagram.get(field, b"") for field in ("source", "destination", "data"))
    port = datagram.get("port", 0)
    if len(source) not in (4, 16) or len(source) != len(target) or port >= 1 << 16:
        raise ImageError(f"{name}: a datagram in its queue has impossible addresses")
    packet = _packet(source, target, message["proto"], port, message["src_port"], data)
    family = AF_INET if len(target) == 4 else AF_INET6
    channel = _socket.socket(family, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _RAW_PROTOCOL)
    try:
        channel.sendto(packet, (_text(target), 0))
    except OSError as error:
        why = "it is too large" if error.errno == errno.EMSGSIZE else error.strerror
        raise RestoreError(f"{name}: a datagram from {_text(source)} cannot be queued again: {why}") from None
    finally:
        channel.close()


def _packet(source: bytes, target: bytes, protocol: int, near: int, far: int, data: bytes) -> bytes:
    """A whole packet; RFC 768 and RFC 3828 (UDP-Lite: length 0 means that the checksum covers everything)."""
    length = len(data) + 8
    pseudo = source + target + struct.pack(">II", length, protocol)
    head = struct.pack(">HHH", near, far, 0 if protocol == UDPLITE else length)
    check = _checksum(pseudo + head + b"\0\0" + data) or 0xFFFF
    body = head + check.to_bytes(2, "big") + data
    if len(source) == 4:
        # The kernel fills in the length, the identification and the checksum.
        return struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, protocol, 0) + source + target + body
    return struct.pack(">IHBB", 6 << 28, length, protocol, 64) + source + target + body


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)
