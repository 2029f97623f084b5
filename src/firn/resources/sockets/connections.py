"""Which of the internet sockets in the images are connections, and between what (images: inet_sk_entry).

Apart from :mod:`inet` because it is also asked when nothing is restored: to lock connections, and to unlock them.
"""

from __future__ import annotations

import struct

from firn.host.nftables import MAPPED, Connection, door
from firn.resources.base import FIELD, INETSK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TCP = 6
_WIDTH = {2: 4, 10: 16}
_LISTEN = 10
_NONE = (7, _LISTEN)
"""States (linux/tcp_states.h) in which nobody is at the other end: CLOSE, LISTEN."""


def connection(message: dict[str, Any]) -> Connection:
    """The connection of an inet_sk_entry that is one."""
    source, destination = (
        struct.pack(f"<{len(words)}I", *words).ljust(_WIDTH[message["family"]], b"\0")
        for words in (message["src_addr"], message["dst_addr"])
    )
    return Connection(message["family"], source, message["src_port"], destination, message["dst_port"])


def doors(message: dict[str, Any]) -> list[bytes]:
    """Where new clients reach the listening socket of an inet_sk_entry (elements as of :func:`nftables.door`)."""
    words, port = message["src_addr"], message["src_port"]
    address = struct.pack(f"<{len(words)}I", *words).ljust(_WIDTH[message["family"]], b"\0")
    if address.startswith(MAPPED):
        address = address[len(MAPPED) :]
    found = [door(address, port)]
    if len(address) == _WIDTH[10] and not any(address) and not message.get("v6only"):
        found.append(door(bytes(_WIDTH[2]), port))
    return found


def listens(files: dict[tuple[int, int], dict[str, Any]]) -> bool:
    """Whether the file table of a checkpoint has a listening TCP socket."""
    messages = (entry.get(FIELD[INETSK]) for (kind, _), entry in files.items() if kind == INETSK)
    return any(each is not None and (each["proto"], each["state"]) == (_TCP, _LISTEN) for each in messages)


def connections(files: dict[tuple[int, int], dict[str, Any]]) -> list[Connection]:
    """All connections in the file table of a checkpoint (by type and id). Impossible ones are left out: they are
    complained about where they are restored."""
    found = []
    for (kind, _), entry in files.items():
        message = entry.get(FIELD[INETSK])
        if kind != INETSK or message is None or message["proto"] != _TCP or message["state"] in _NONE:
            continue
        width = _WIDTH.get(message["family"], 0) // 4
        sane = message["src_port"] >> 16 == 0 == message["dst_port"] >> 16
        if sane and width and all(len(message[side]) <= width for side in ("src_addr", "dst_addr")):
            found.append(connection(message))
    return found
