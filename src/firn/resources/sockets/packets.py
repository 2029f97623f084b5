"""Packets to sockets of this machine as if somebody else had sent them (ip(7), raw(7), ipv6(7): whole headers)."""

from __future__ import annotations

import _socket
import struct

from firn.resources.sockets.inet_options import AF_INET, AF_INET6
from firn.resources.sockets.options import SO_MARK, SOL_SOCKET

_RAW_PROTOCOL = 255
_TCP = 6
_SEGMENT = struct.Struct(">HHIIBBHHH")
LOCK_MARK = 0xC114
"""The mark of packets that a locked network lets through; CRIU's, for a lock may be CRIU's."""
MAPPED = bytes(10) + b"\xff\xff"


def text(address: bytes) -> str:
    """An address of 4 or 16 bytes for people, and for calls."""
    return _socket.inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def is_link_local(address: bytes) -> bool:
    """Whether an address of 16 bytes, or 4, is one of IPv6 that belongs to a single link (fe80::/10)."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def unmapped(address: bytes) -> bytes:
    """What travels: of an IPv4 address in an IPv6 one, the former."""
    return address[12:] if len(address) == 16 and address.startswith(MAPPED) else address


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def pseudo(source: bytes, target: bytes, protocol: int, length: int) -> bytes:
    """What a checksum covers besides the packet; that of IPv4 (RFC 768) has the same sum as that of IPv6 (RFC 8200)."""
    return source + target + struct.pack(">II", length, protocol)


def send(
    source: bytes, target: bytes, protocol: int, body: bytes, mark: int = 0, hops: int = 255, kind: int = 0,
    link: int = 0,
) -> None:  # fmt: skip
    """Send *body* from *source* to *target*, addresses of 4 or 16 bytes.

    *hops* are left of its way (IP_MINTTL asks for up to 255), *kind* is its type of service or traffic class, *link*
    the index of the device that a link-local *target* belongs to. Raises :class:`OSError`.
    """
    if len(source) == 4:
        # The kernel fills in the identification and the checksum.
        head = struct.pack(">BBHHHBBH", 0x45, kind, 20 + len(body), 0, 0, hops, protocol, 0)
    else:
        head = struct.pack(">IHBB", 6 << 28 | kind << 20, len(body), protocol, hops)
    family = AF_INET if len(target) == 4 else AF_INET6
    channel = _socket.socket(family, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _RAW_PROTOCOL)
    try:
        if mark:
            channel.setsockopt(SOL_SOCKET, SO_MARK, mark)
        where = (text(target), 0, 0, link) if link else (text(target), 0)
        channel.sendto(head + source + target + body, where)
    finally:
        channel.close()


def segment(
    ends: tuple[bytes, int, bytes, int],
    numbers: tuple[int, int],
    flags: int,
    window: int,
    options: bytes = b"",
    data: bytes = b"",
    urgent: int = 0,
    link: int = 0,
) -> None:
    """Send a TCP segment (RFC 9293) that a locked network lets through: *ends* are source and target, each an address
    and a port; *numbers* the sequence number and what is acknowledged; *options* fill whole words of four bytes;
    *urgent*, with that flag, is how far the urgent data goes; *link* as in :func:`send`."""
    source, sport, target, dport = ends
    head = sport, dport, *(number % (1 << 32) for number in numbers), (5 + len(options) // 4) << 4, flags, window
    rest = options + data
    draft = _SEGMENT.pack(*head, 0, urgent) + rest
    check = checksum(pseudo(source, target, _TCP, len(draft)) + draft)
    send(source, target, _TCP, _SEGMENT.pack(*head, check, urgent) + rest, LOCK_MARK, link=link)
