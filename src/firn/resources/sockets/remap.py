"""Internet sockets come back on other addresses: ``--remap-ip OLD=NEW`` (ports stay).

The entries are changed as soon as they are read, so all that follows knows only the new addresses. A peer's address is
changed only if the peer is in the checkpoint too: others are where they are.
"""

from __future__ import annotations

import _socket
import struct

from firn.errors import UsageError
from firn.resources.base import INETSK
from firn.resources.sockets.connections import is_sane
from firn.resources.sockets.inet_options import AF_INET, AF_INET6
from firn.resources.sockets.packets import MAPPED, unmapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


def _bytes(text: str) -> bytes:
    try:
        return _socket.inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError):
        raise UsageError(f"--remap-ip: {text!r} is no address") from None


def parse(words: Iterable[str]) -> dict[bytes, bytes]:
    """Old address -> new one, 4 or 16 bytes. Raises :class:`UsageError`."""
    found: dict[bytes, bytes] = {}
    for word in words:
        old, equals, new = word.partition("=")
        before, after = _bytes(old), _bytes(new)
        if not equals or len(before) != len(after) or before in found:
            raise UsageError(f"--remap-ip {word}: it takes OLD=NEW, two addresses of one kind, each OLD once")
        found[before] = after
    return found


def _raw(words: list[int]) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


def _place(message: dict[str, Any], side: str) -> tuple[bytes, int]:
    return unmapped(_raw(message[f"{side}_addr"])), message[f"{side}_port"]


def apply(files: dict[tuple[int, int], dict[str, Any]], words: Iterable[str]) -> None:
    """Change the addresses in a file table (by type and id)."""
    table = parse(words)
    sockets = [entry["isk"] for (kind, _), entry in files.items() if kind == INETSK and "isk" in entry]
    inside = {(message["proto"], *_place(message, "src")) for message in sockets}
    for message in sockets:
        peer = message["proto"], *_place(message, "dst")
        anywhere = peer[0], bytes(len(peer[1])), peer[2]
        _change(message, "src", table)
        if peer in inside or anywhere in inside:
            _change(message, "dst", table)
        for client in message.get("firn", {}).get("clients", []):
            if not is_sane(client | {"family": message["family"]}):
                continue
            _change(client, "src", table)
            if (message["proto"], *_place(client, "dst")) in inside:
                _change(client, "dst", table)
        for datagram in message.get("firn", {}).get("datagrams", []):
            for side in ("source", "destination"):
                datagram[side] = table.get(datagram.get(side, b""), datagram.get(side, b""))


def _change(message: dict[str, Any], side: str, table: dict[bytes, bytes]) -> None:
    words = message[f"{side}_addr"]
    raw = _raw(words)
    new = table.get(unmapped(raw))
    if new is not None:
        new = MAPPED + new if len(raw) > len(new) else new
        message[f"{side}_addr"] = list(struct.unpack(f"<{len(new) // 4}I", new))
