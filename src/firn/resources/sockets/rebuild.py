"""Unix sockets come back, all at once, in the controller (images: see :mod:`unix` beside this).

sockets   all exist, bound to their names; listening ones listen; pairs and streams are connected
fill      queues have what they had, sent by the peer, or by a temporary one (:mod:`refill`)
connect   datagram sockets are connected (only now, for a connected one takes nothing from others)
finish    options, backlogs, shutdown, flags are as they were, and what was closed is closed again

Connections are made through the listening socket whose name the accepted end bears, or a temporary one, because there
is no other way to give an accepted socket its name. A closed peer is made as well, for its name (getpeername), for what
it had sent, and for the error that its end has left behind: ECONNRESET for whom it had not heard out.
"""

from __future__ import annotations

import _socket
import errno
import os

from firn.errors import ImageError, RestoreError
from firn.host.sockdiag import CLOSE
from firn.resources.base import UNIXSK
from firn.resources.sockets import common, names, options
from firn.resources.sockets.made import DGRAM, Made, gone_ones, is_found_by_name
from firn.resources.sockets.refill import Refill, disconnect
from firn.resources.sockets.standins import StandIns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.resources.base import RestoreContext

AF_UNIX, SOCK_CLOEXEC = 1, 0o2000000


def _new(kind: int) -> _socket.socket:
    return _socket.socket(AF_UNIX, kind | SOCK_CLOEXEC, 0)


class Rebuild:
    """Makes all unix sockets of a checkpoint."""

    def __init__(self, context: RestoreContext) -> None:
        self.context = context
        self.made = {
            number: Made(number, entry["usk"])
            for (kind, number), entry in context.files.items()
            if kind == UNIXSK and not context.inherited.supplies(kind, entry["usk"])
        }
        self._standins = StandIns()
        own = list(self.made.values())
        self.refill = Refill(own, context, self._standins)
        self.gone = gone_ones(own, set(self.refill.records))
        self.all = self.refill.made = own + self.gone
        self.by_inode = {made.inode: made for made in self.all}
        self.listeners = {(made.name, made.type): made for made in own if made.listens}
        self.left: list[Made] = []
        """Datagram sockets that have left their partner, which is still connected to them."""

    def run(self) -> None:
        """All stages."""
        try:
            self._find_pairs()
            self._make_sockets()
            for made in self.all:
                if made.peer in self.left:
                    self.refill.fill(made)
            self._part()
            for made in self.all:
                if not made.external:
                    self.refill.fill(made)
            self._connect_datagrams()
            for made in self.gone:
                self._end(made)
            for made in self.made.values():
                if made.sock is not None:
                    self._finish(made)
        except OSError as error:
            raise RestoreError(f"unix sockets cannot be made again: {error}") from error
        finally:
            self._standins.close()
            self.refill.close()
            for made in self.gone:
                if made.sock is not None:
                    made.sock.close()
            for made in self.all:
                if made.at >= 0:
                    os.close(made.at)
                    made.at = -1

    def take(self, number: int) -> int:
        """Socket *number*, to be closed by the caller."""
        made = self.made[number]
        if made.external:
            raise ImageError(f"{made} is a service outside, no file")
        made.taken = True
        return made.get().fileno()

    def close(self) -> None:
        """Close what nobody took."""
        for made in self.made.values():
            if made.sock is not None:
                # What was taken is closed by its taker.
                made.sock.detach() if made.taken else made.sock.close()

    # -- sockets -----------------------------------------------------------------------------------------------------

    def _find_pairs(self) -> None:
        heard = {made.entry["peer"] for made in self.all}
        for made in self.all:
            other = self.by_inode.get(made.entry["peer"])
            if other is None or other is made or made.listens or other.listens or other.external:
                continue
            mutual = other.entry["peer"] == made.inode
            if not self._was_pair(made, other, mutual, made.inode in heard):
                continue
            if other.type != made.type:
                raise ImageError(f"{made} is connected to {other} of another type")
            made.peer = other
            if not mutual:
                self.left.append(other)
        for made in self.left:
            if made.peer is not None:
                if not made.peer.gone or not made.peer.name:
                    raise ImageError(f"{made} is half of two pairs")
                made.peer.peer = None
            made.peer = None

    def _was_pair(self, made: Made, other: Made, mutual: bool, heard: bool) -> bool:
        """Whether two sockets, the first of which is connected to the second, are made as a pair. Only so can they be
        connected to one without a name, or hear from it, or an error of its parting be had. *heard*: somebody is
        connected to the first, so that if it has no name it was a pair with that one."""
        if made.type != DGRAM:
            return mutual
        if made.gone or other.gone:
            live, gone = (other, made) if made.gone else (made, other)
            return made.gone if not mutual else not is_found_by_name(live, gone.name, live.id in self.refill.records)
        if mutual:
            return not (made.name and other.name) or made.reset or other.reset
        return not other.name or made.reset or (not made.name and not heard and made.id in self.refill.records)

    def _make_sockets(self) -> None:
        waiting = []
        connected = []
        late = self._late()
        for made in sorted(self.all, key=lambda made: made.peer is None):
            if made.external or made in late:
                continue
            if made.type == DGRAM:
                self._make_datagram(made)
            elif made.listens or (made.entry["state"] == CLOSE and made.peer is None):
                made.sock = _new(made.type)
                self._bind(made)
                if made.listens:
                    self._standins.listen(made.who, made.sock, len(self.all) + 1)
            elif made.entry["peer"] and made.peer is None:
                waiting.append(made)
            else:
                connected.append(made)
        taken = {made.name for made in late}
        for made in self.gone:
            if made.type == DGRAM and made.name in taken:
                self._finish_early(made)
        for made in late:
            self._make_datagram(made)
        for made in connected:
            if made.sock is None:
                self._make_connected(made)
        for made in sorted(waiting, key=lambda made: (int(made.entry["backlog"]), made.id)):
            listener = self.by_inode.get(made.entry["peer"])
            if listener is None or not listener.listens:
                raise ImageError(f"{made}: its peer {made.entry['peer']} is not there")
            made.sock = _new(made.type)
            self._bind(made)
            self._standins.listen(made.who or listener.who, listener.get(), len(self.all) + 1)
            self._standins.connect(made.connector, made.sock, listener.address())

    def _late(self) -> list[Made]:
        """Datagram sockets with an abstract name that a closed one had before, which must have it first."""
        before = {made.name for made in self.gone if made.type == DGRAM and made.name[:1] == b"\0"}
        return [made for made in self.made.values() if made.type == DGRAM and made.name in before]

    def _finish_early(self, gone: Made) -> None:
        """Have all done that a closed datagram socket is needed for. Whoever is connected to it hears only it."""
        for made in self.made.values():
            if made.entry["peer"] == gone.inode:
                self.refill.fill(made)
                if made.peer is None:
                    made.get().connect(gone.address())
        self._end(gone)

    def _make_datagram(self, made: Made) -> None:
        if made.sock is not None:
            return
        if made.peer is None and made.who is not None:
            # It was one of a pair once; SO_PEERCRED still tells who made that.
            made.sock, other = self._standins.pair(made.who, DGRAM)
            other.close()
            disconnect(made.sock)
        elif made.peer is None:
            made.sock = _new(DGRAM)
        else:
            if made.peer.sock is not None:
                raise ImageError(f"{made.peer} is half of two pairs")
            made.sock, made.peer.sock = self._standins.pair(made.who or made.peer.who, DGRAM)
            self._bind(made.peer)
        self._bind(made)

    def _make_connected(self, made: Made) -> None:
        """A stream or seqpacket socket and its peer."""
        peer = made.peer
        if peer is None:
            raise ImageError(f"{made} is connected, but not to anything")
        server = made
        if not made.name or (peer.name and self._is_server(peer, made)):
            server = peer
        client = peer if server is made else made
        if not server.name:
            server.sock, client.sock = self._standins.pair(server.who or client.who, server.type)
            self._bind(client)
        else:
            self._connect_through(server, client)

    def _is_server(self, one: Made, other: Made) -> bool:
        """Which of two named ends was accepted: the one with a listening socket's name, else the younger one."""
        if self._listener(one) or self._listener(other):
            return self._listener(one) is not None
        return bool(one.inode > other.inode)

    def _listener(self, server: Made) -> Made | None:
        return self.listeners.get((server.name, server.type))

    def _connect_through(self, server: Made, client: Made) -> None:
        """An accepted socket and its client; the accepted one bears the listening socket's name."""
        listener = self._listener(server)
        own = None
        if listener is None:
            own = listener = Made(server.id, {**server.entry, "deleted": True}, server.gone)
            own.sock = _new(server.type)
            self._bind(own)
        try:
            # The client is told of who listened, the server of who connected.
            self._standins.listen(client.who or listener.who, listener.get(), len(self.all) + 1)
            client.sock = _new(server.type)
            self._bind(client)
            self._standins.connect(server.who, client.sock, listener.address())
            fd, _ = listener.get()._accept()  # type: ignore[attr-defined]
            server.sock = _socket.socket(fileno=fd)
        finally:
            if own is not None:
                own.get().close()
                if own.at >= 0:
                    os.close(own.at)

    def _bind(self, made: Made) -> None:
        if not made.name:
            return
        try:
            made.at = names.bind(made.get(), made.name, made.entry, str(made))
        except RestoreError as error:
            # The name of what is closed would only be shown, and may well be another's by now.
            if not made.gone or getattr(error.__cause__, "errno", 0) != errno.EADDRINUSE:
                raise
            self.context.warn(f"{error.message}: it comes back without that name")
            made.entry = {**made.entry, "name": b""}

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _part(self) -> None:
        """Let go those that have left their partner. They lose what is in their queues, so that is not filled yet."""
        for made in self.all:
            if made.type != DGRAM or not made.reset or made.peer is None or made.peer.gone:
                continue
            made.get().send(b"\0")
            if made.peer not in self.left:
                # It has come back since.
                disconnect(made.peer.get())
                made.peer.get().connect(made.address())
        for made in self.left:
            disconnect(made.get())

    def _connect_datagrams(self) -> None:
        """Whoever is connected to others was heard by them before that: a connected one takes nothing from others, not
        even that they connect to it."""
        pending = [
            made for made in self.all
            if made.type == DGRAM and made.entry["peer"] and made.peer is None and not made.external and not made.gone
        ]  # fmt: skip
        while pending:
            heard_by: dict[int, list[int]] = {}
            for made in pending:
                heard_by.setdefault(made.entry["peer"], []).append(made.inode)
            ready = [made for made in pending if heard_by.get(made.inode, []) in ([], [made.entry["peer"]])] or pending
            for made in ready:
                self._connect_datagram(made)
            pending = [made for made in pending if made not in ready]

    def _connect_datagram(self, made: Made) -> None:
        peer = self.by_inode.get(made.entry["peer"])
        if peer is not None and peer.gone and not (peer.name and peer.is_open()):
            return
        if peer is None or not peer.name:
            raise ImageError(f"{made}: its peer {made.entry['peer']} is not there, or has no name")
        if not peer.external:
            made.get().connect(peer.address())
            return
        if not self.context.options.ext_unix_sk:
            raise RestoreError(f"{made} is connected to a service outside", "allow that with --ext-unix-sk")
        try:
            made.get().connect(peer.name)
        except OSError as error:
            name = os.fsdecode(peer.name).replace("\0", "@")
            raise RestoreError(f"{made} cannot be connected to {name}: {error.strerror}") from None

    @staticmethod
    def _end(made: Made) -> None:
        """Close a socket that was closed. Its peer is told of what was not read by an error (unix_release_sock)."""
        if not made.is_open():
            return
        if made.peer is not None and made.peer.reset:
            made.peer.get().send(b"\0")
            if made.type == DGRAM:
                disconnect(made.get())
        made.get().close()

    def _finish(self, made: Made) -> None:
        entry, sock = made.entry, made.get()
        try:
            options.restore(sock, entry["opts"])
        except OSError as error:
            raise RestoreError(f"an option of {made} cannot be set: {error.strerror}") from None
        if made.listens:
            self._standins.listen(made.who, sock, min(entry["backlog"], 0x7FFFFFFF))
        how = entry.get("shutdown", 0)
        if how:
            sock.shutdown(how - 1)  # SHUT_RD 0, SHUT_WR 1, SHUT_RDWR 2
        common.set_flags(sock.fileno(), entry)
