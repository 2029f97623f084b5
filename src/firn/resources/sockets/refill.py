"""Queues of unix sockets get what they had: sent by the peer, or by another socket in its place (:mod:`rebuild`)."""

from __future__ import annotations

import _socket
import os

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, RestoreError
from firn.resources.sockets import names, options, queues
from firn.resources.sockets.made import DGRAM, STREAM, Made
from firn.resources.sockets.standins import UCRED, Identity, StandIns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import RestoreContext

AF_UNIX, SOCK_CLOEXEC = 1, 0o2000000
_PAYLOAD_LIMIT = 1 << 30


def disconnect(sock: _socket.socket) -> None:
    """A datagram socket has no peer any more, and nothing in its queue (connect(2), AF_UNSPEC)."""
    nobody = bytearray(16)
    syscall("connect to nobody", nr.connect, sock.fileno(), address_of(nobody), len(nobody))


def _wanted(own: dict[str, Any]) -> bytes:
    """The name of the sender of a message."""
    name: bytes = own.get("sender", b"")
    return name if name[:1] == b"\0" else name.split(b"\0")[0]


def _is_foreign(made: Made, own: dict[str, Any]) -> bool:
    """Whether a message is not from whom *made* is connected to."""
    if not own.get("sender") and not own.get("nameless"):
        return False
    return made.peer is None or made.peer.name != _wanted(own)


class Refill:
    """Sends again what was queued in the sockets *made*."""

    def __init__(self, made: list[Made], context: RestoreContext, standins: StandIns) -> None:
        self.made = made
        self.by_id = {each.id: each for each in made}
        self.context = context
        self.standins = standins
        self.records: dict[int, list[tuple[dict[str, Any], Any]]] = {}
        for record, payload in context.images.read_with_payload("SK_QUEUES"):
            self.records.setdefault(record["id_for"], []).append((record, payload))
        self._types: dict[int, int] = {}
        for kind, number in context.files:
            self._types.setdefault(number, kind)
        self._temporary: dict[bytes, _socket.socket] = {}

    def fill(self, made: Made) -> None:
        """Fill the queue of *made*, and that of the server which has not accepted it yet."""
        records = self.records.pop(made.id, [])
        if records and made.listens:
            raise ImageError(f"sk-queues.img: {made} listens, and has a queue")
        if made.type == DGRAM and made.peer and any(_is_foreign(made, record.get("firn", {})) for record, _ in records):
            if not made.peer.name:
                raise ImageError(f"sk-queues.img: {made} has a message from another than its peer")
            # It is connected again when all queues are full, by name.
            disconnect(made.get())
            made.peer = None
        for record, payload in records:
            data = self.context.images.read_payload(payload, _PAYLOAD_LIMIT)
            fds = []
            for scm in record.get("scm", []):
                if scm["type"] != queues.SCM_RIGHTS:
                    raise ImageError(f"sk-queues.img: a message for {made} has something of type {scm['type']}")
                fds += [self._queued(number) for number in scm["rights"]]
            own = record.get("firn", {})
            try:
                sender, to = self._sender(made, own)
                self._send(sender, data, fds, made, own, to)
            except OSError as error:
                raise RestoreError(f"the queue of {made} cannot be filled: {error.strerror}") from None
        for message in made.own.get("sent", []):
            fds = [self._queued(number) for number in message.get("rights", [])]
            try:
                self._send(made.get(), message.get("data", b""), fds, made, message.get("about", {}))
            except OSError as error:
                raise RestoreError(f"{made} cannot send what it had sent: {error.strerror}") from None

    def _send(
        self, sender: _socket.socket, data: bytes, fds: list[int], made: Made, own: dict[str, Any], to: str | bytes = ""
    ) -> None:
        stream = made.type == STREAM
        mark = own.get("mark", 0) if stream else 0
        if stream and not data and not mark:
            return
        size = sender.getsockopt(options.SOL_SOCKET, options.SO_SNDBUF)
        queues.send(sender, data or b"\0" if mark else data, fds, stream, to, self._credentials(own), mark)
        if mark == queues.WAS_URGENT:
            made.get().recv(1, queues.MSG_OOB)
        options.set_buffer(sender, options.SO_SNDBUF, size)

    def _credentials(self, own: dict[str, Any]) -> bytes:
        """The struct ucred that a message bears; its process exists now."""
        if "credentials" not in own:
            return b""
        who = Identity(own["credentials"])
        self.standins.hold(who.pid)
        return UCRED.pack(who.pid, who.uid, who.gid)

    def _queued(self, number: int) -> int:
        """Our descriptor of a file that is in a message."""
        kind = self._types.get(number)
        if kind is None:
            raise ImageError(f"sk-queues.img: file {number} is not there")
        return self.by_id[number].get().fileno() if number in self.by_id else self.context.open(kind, number)

    def _sender(self, made: Made, own: dict[str, Any]) -> tuple[_socket.socket, str | bytes]:
        """Who sends a message, and the address if that is needed."""
        if made.type != DGRAM or not _is_foreign(made, own):
            return self._usual_sender(made)
        if not made.name:
            raise ImageError(f"sk-queues.img: {made} has no name, and a message from another than its peer")
        return self._other_sender(_wanted(own)), made.address()

    def _other_sender(self, name: bytes) -> _socket.socket:
        """The datagram socket of that name, or a temporary one in its place."""
        for other in self.made if name else ():
            if other.type == DGRAM and other.name == name and not other.external and other.is_open():
                return other.get()
        if name not in self._temporary:
            helper = self._temporary[name] = _socket.socket(AF_UNIX, DGRAM | SOCK_CLOEXEC, 0)
            if name[:1] == b"\0":
                helper.bind(name)
            elif name:
                os.close(names.out_of_sight(helper, name))
        return self._temporary[name]

    def _usual_sender(self, made: Made) -> tuple[_socket.socket, str | bytes]:
        if made.peer is not None:
            return made.peer.get(), b""
        if made.type != DGRAM:
            raise ImageError(f"sk-queues.img: {made} is not connected, and has a queue")
        for other in self.made:
            if other.gone and made.name and made.entry["peer"] == other.inode:
                return other.get(), made.address()
        for other in self.made:
            if other.entry["peer"] == made.inode and not other.external:
                return other.get(), made.address()
        return self._other_sender(b""), made.address()

    def close(self) -> None:
        """Close temporary senders."""
        for helper in self._temporary.values():
            helper.close()
        self._temporary.clear()
