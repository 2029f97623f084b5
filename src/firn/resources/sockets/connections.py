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


def to_words(address: str, family: int) -> list[int]:
    """An address as the images have it: one or four words, copied from network order."""
    import _socket

    raw = _socket.inet_pton(family, address)
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def from_words(words: list[int], family: int) -> str:
    """The address that :func:`to_words` made."""
    import _socket

    return _socket.inet_ntop(family, struct.pack(f"<{len(words)}I", *words))


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


def clients(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Who waits to be accepted by the listening socket of an inet_sk_entry: firn_client, with its family."""
    found: list[dict[str, Any]] = message.get("firn", {}).get("clients", []) if message["state"] == _LISTEN else []
    return [each | {"family": message["family"]} for each in found]


def connections(files: dict[tuple[int, int], dict[str, Any]]) -> list[Connection]:
    """All connections in the file table of a checkpoint (by type and id). Impossible ones are left out: they are
    complained about where they are restored."""
    found = []
    for (kind, _), entry in files.items():
        message = entry.get(FIELD[INETSK])
        if kind != INETSK or message is None or message["proto"] != _TCP:
            continue
        own = [message] if message["state"] not in _NONE else clients(message)
        found += [connection(each) for each in own if is_sane(each)]
    return found


def is_sane(message: dict[str, Any]) -> bool:
    """Whether a connection has possible ends."""
    width = _WIDTH.get(message["family"], 0) // 4
    return all(
        width and len(message.get(f"{side}_addr", (0,) * 5)) <= width and not message.get(f"{side}_port", -1) >> 16
        for side in ("src", "dst")
    )
