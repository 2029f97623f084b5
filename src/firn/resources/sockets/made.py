"""A unix socket of a checkpoint on its way back, and those that stand for closed ones meanwhile (:mod:`rebuild`)."""

from __future__ import annotations

import _socket

from firn.errors import ImageError
from firn.host.sockdiag import CLOSE, ESTABLISHED, LISTEN
from firn.resources.sockets.standins import Identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STREAM, DGRAM, SEQPACKET = 1, 2, 5
EXTERNAL = 1
_NAME_SIZE = 108
_BEYOND = 1 << 32
"""No socket of the images has so high an inode number."""


class Made:
    """A socket of the checkpoint. ``at`` is an O_PATH descriptor of its file; ``peer`` the other end of a pair that is
    made as one. ``gone``: it is one that was closed already, and is closed again when all is done."""

    __slots__ = ("at", "entry", "gone", "id", "peer", "sock", "taken")

    def __init__(self, number: int, entry: dict[str, Any], gone: bool = False) -> None:
        self.id = number
        self.entry = entry
        self.sock: _socket.socket | None = None
        self.at = -1
        self.peer: Made | None = None
        self.gone = gone
        self.taken = False
        if entry["type"] not in (STREAM, DGRAM, SEQPACKET) or entry["state"] not in (ESTABLISHED, CLOSE, LISTEN):
            raise ImageError(f"{self}: impossible type {entry['type']} or state {entry['state']}")
        if len(entry["name"]) > _NAME_SIZE:
            raise ImageError(f"{self}: its name has {len(entry['name'])} bytes")

    def __str__(self) -> str:
        return f"unix socket {self.id}" if not self.gone else "a unix socket that was closed"

    inode = property(lambda self: self.entry["ino"])
    type = property(lambda self: self.entry["type"])
    own = property(lambda self: self.entry.get("firn", {}))
    who = property(lambda self: self._identity("peer"))
    connector = property(lambda self: self._identity("connector"))
    name = property(lambda self: self.entry["name"] if self.entry["name"][:1] == b"\0" else
                    self.entry["name"].split(b"\0")[0])  # fmt: skip
    listens = property(lambda self: self.entry["state"] == LISTEN)
    external = property(lambda self: bool(self.entry["uflags"] & EXTERNAL))
    reset = property(lambda self: bool(self.own.get("reset")))

    def _identity(self, field: str) -> Identity | None:
        """Whom SO_PEERCRED tells of (peer), who made the connection that waits (connector); None if that is unknown."""
        entry = self.own.get(field)
        return None if entry is None else Identity(entry)

    def get(self) -> _socket.socket:
        """The socket, which must have been made by now."""
        if self.sock is None:
            raise ImageError(f"{self} is needed before it can be made")
        return self.sock

    def is_open(self) -> bool:
        """Whether it was made, and not closed again."""
        return self.sock is not None and self.sock.fileno() >= 0

    def address(self) -> str | bytes:
        """Where it can be reached."""
        name: bytes = self.name
        return f"/proc/self/fd/{self.at}" if self.at >= 0 else name

    def lost(self, queue: bool) -> bytes | None:
        """The name of the peer that was closed; None if it had none. *queue*: something is in its queue."""
        entry = self.entry
        if "lost" in self.own:
            name: bytes = self.own["lost"].get("name", b"")
            return name
        # Images of CRIU do not tell; there a datagram socket is one of a pair.
        if entry["peer"] or self.external or self.listens:
            return None
        used = entry["state"] == ESTABLISHED
        if self.type == DGRAM:
            used = (used or queue) and not self.name
        return b"" if used else None


def gone_ones(made: list[Made], queues: set[int]) -> list[Made]:
    """The closed sockets that *made* ones had to do with: their peers (also those that they had left before), and
    clients that still wait to be accepted. *queues*: ids of those that have something in their queues."""
    found: list[Made] = []
    shared: dict[bytes, int] = {}

    def add(like: Made, entry: dict[str, Any]) -> int:
        usual = {"ino": _BEYOND + len(found), "type": like.type, "state": ESTABLISHED, "uflags": 0, "backlog": 0}
        found.append(Made(-1 - len(found), usual | {"peer": like.inode, "deleted": True} | entry, gone=True))
        return _BEYOND + len(found) - 1

    heard = {each.entry["peer"] for each in made}
    for each in made:
        name = each.lost(each.id in queues and each.inode not in heard)
        if name is not None:
            inode = shared.get(name, 0)
            if not inode or not is_found_by_name(each, name, each.id in queues):
                inode = add(each, {"name": name})
            if is_found_by_name(each, name, each.id in queues):
                shared[name] = inode
            if not each.own.get("lost", {}).get("left"):
                each.entry = {**each.entry, "peer": inode}
        for client in each.own.get("gone", []) if each.listens else []:
            own = {"connector": client.get("connector", {}), "sent": client.get("sent", [])}
            add(each, {"name": client.get("name", b""), "backlog": client.get("place", 0), "firn": own})
    return found


def is_found_by_name(made: Made, name: bytes, queue: bool) -> bool:
    """Whether a datagram socket is connected to a closed one of that *name* by the name, not as its partner; *queue*:
    something is in its own queue."""
    return bool(made.type == DGRAM and name and not made.reset and (made.name or not queue))
