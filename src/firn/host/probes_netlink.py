"""A small netlink(7) client for the probes: requests, attributes, and errors as :class:`OSError`."""

from __future__ import annotations

import os
import socket
import struct

from firn.abi import probe_consts as pc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ATTRIBUTE = struct.Struct("<HH")


def attribute(kind: int, payload: bytes, nested: bool = False) -> bytes:
    """One attribute, padded to four bytes; *nested* ones are marked so."""
    kind |= pc.NLA_F_NESTED if nested else 0
    return _padded(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload)


def attributes(payload: bytes) -> dict[int, bytes]:
    """The attributes in *payload*, by their kind."""
    found = {}
    while len(payload) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(payload)
        if size < _ATTRIBUTE.size:
            break
        found[kind & ~pc.NLA_F_NESTED] = payload[_ATTRIBUTE.size : size]
        payload = payload[size + 3 & ~3 :]
    return found


def message(kind: int, flags: int, payload: bytes) -> bytes:
    """One request."""
    return _padded(pc.NLMSGHDR.pack(pc.NLMSGHDR.size + len(payload), kind, pc.NLM_F_REQUEST | flags, 1, 0) + payload)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def talk(protocol: int, what: str, *requests: bytes, answers: int = 1) -> list[bytes]:
    """Send *requests* together, and collect the payloads of the reply until *answers* acknowledgements have come.

    A dump's end and a reply without NLM_F_ACK count as one. Raises :class:`OSError` (*what* leads its text) for an
    error that the kernel reports, and if it says nothing for three seconds.
    """
    found: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as channel:
        channel.settimeout(3)
        channel.bind((0, 0))
        channel.send(b"".join(requests))
        while answers:
            for kind, flags, payload in _messages(channel.recv(1 << 17)):
                if kind in (pc.NLMSG_ERROR, pc.NLMSG_DONE):
                    code = -struct.unpack_from("<i", payload)[0] if payload else 0
                    if code:
                        raise OSError(code, f"{what}: {os.strerror(code)}")
                    answers -= 1
                else:
                    found.append(payload)
                    if not flags & pc.NLM_F_MULTI:
                        answers -= 1
    return found


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(data) >= pc.NLMSGHDR.size:
        size, kind, flags, _, _ = pc.NLMSGHDR.unpack_from(data)
        if size < pc.NLMSGHDR.size:
            return
        yield kind, flags, data[pc.NLMSGHDR.size : size]
        data = data[size + 3 & ~3 :]
