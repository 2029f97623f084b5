"""Unix sockets come back, all at once, in the controller (images: see :mod:`unix` beside this).

sockets   all exist, bound to their names; listening ones listen; pairs and streams are connected
fill      queues have what they had, sent by the peer, or by a temporary one
connect   datagram sockets are connected (only now, for a connected one takes nothing from others)
finish    options, backlogs, shutdown, flags are as they were

Connections are made through the listening socket whose name the accepted end bears, or a temporary one, because there
is no other way to give an accepted socket its name. Names that are not on disk any more are bound in a root directory
of our own, so that nothing that has the name now is touched.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat

from firn.errors import ImageError, RestoreError
from firn.host.sockdiag import CLOSE, ESTABLISHED, LISTEN
from firn.resources.base import UNIXSK
from firn.resources.sockets import common, options, queues
from firn.resources.sockets.standins import UCRED, Identity, StandIns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import RestoreContext

AF_UNIX, AF_UNSPEC, SOCK_CLOEXEC = 1, 0, 0o2000000
STREAM, DGRAM, SEQPACKET = 1, 2, 5
EXTERNAL = 1
_NAME_SIZE = 108
_PAYLOAD_LIMIT = 1 << 30


class Made:
    """A socket of the checkpoint on its way back. ``at`` is an O_PATH descriptor of its file; ``peer`` the other end of
    a connected pair, ``helper`` a temporary socket in its place."""

    __slots__ = ("at", "entry", "helper", "id", "peer", "sock", "taken")

    def __init__(self, number: int, entry: dict[str, Any]) -> None:
        self.id = number
        self.entry = entry
        self.sock: _socket.socket | None = None
        self.at = -1
        self.peer: Made | None = None
        self.helper: _socket.socket | None = None
        self.taken = False
        if entry["type"] not in (STREAM, DGRAM, SEQPACKET) or entry["state"] not in (ESTABLISHED, CLOSE, LISTEN):
            raise ImageError(f"{self}: impossible type {entry['type']} or state {entry['state']}")
        if len(entry["name"]) > _NAME_SIZE:
            raise ImageError(f"{self}: its name has {len(entry['name'])} bytes")

    def __str__(self) -> str:
        return f"unix socket {self.id}"

    inode = property(lambda self: self.entry["ino"])
    type = property(lambda self: self.entry["type"])
    who = property(lambda self: self._identity("peer"))
    connector = property(lambda self: self._identity("connector"))
    name = property(lambda self: self.entry["name"] if self.entry["name"][:1] == b"\0" else
                    self.entry["name"].split(b"\0")[0])  # fmt: skip
    listens = property(lambda self: self.entry["state"] == LISTEN)
    external = property(lambda self: bool(self.entry["uflags"] & EXTERNAL))

    def _identity(self, field: str) -> Identity | None:
        """Whom SO_PEERCRED tells of (peer), who made the connection that waits (connector); None if that is unknown."""
        entry = self.entry.get("firn", {}).get(field)
        return None if entry is None else Identity(entry)

    def get(self) -> _socket.socket:
        """The socket, which must have been made by now."""
        if self.sock is None:
            raise ImageError(f"{self} is needed before it can be made")
        return self.sock

    def address(self) -> str | bytes:
        """Where it can be reached."""
        name: bytes = self.name
        return f"/proc/self/fd/{self.at}" if self.at >= 0 else name


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
        self.by_inode = {made.inode: made for made in self.made.values()}
        self.listeners = {(made.name, made.type): made for made in self.made.values() if made.listens}
        self.records: dict[int, list[tuple[dict[str, Any], Any]]] = {}
        for record, payload in context.images.read_with_payload("SK_QUEUES"):
            self.records.setdefault(record["id_for"], []).append((record, payload))
        self.types: dict[int, int] = {}
        for kind, number in context.files:
            self.types.setdefault(number, kind)
        self._temporary: list[_socket.socket] = []
        self._senders: dict[bytes, _socket.socket] = {}
        self._standins = StandIns()

    def run(self) -> None:
        """All stages."""
        try:
            self._find_pairs()
            self._make_sockets()
            for made in self.made.values():
                if made.id in self.records and not made.external:
                    self._fill(made)
            self._connect_datagrams()
            for made in self.made.values():
                if made.sock is not None:
                    self._finish(made)
        except OSError as error:
            raise RestoreError(f"unix sockets cannot be made again: {error}") from error
        finally:
            self._standins.close()
            for helper in self._temporary:
                helper.close()
            for made in self.made.values():
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
        for made in self.made.values():
            other = self.by_inode.get(made.entry["peer"])
            if other is not None and other is not made and other.entry["peer"] == made.inode and not made.listens:
                if other.type != made.type:
                    raise ImageError(f"{made} is connected to {other} of another type")
                made.peer = other

    def _make_sockets(self) -> None:
        waiting = []
        connected = []
        for made in self.made.values():
            if made.external:
                continue
            if made.type == DGRAM:
                self._make_datagram(made)
            elif made.listens or (made.entry["state"] == CLOSE and made.peer is None):
                made.sock = _new(made.type)
                self._bind(made)
                if made.listens:
                    self._standins.listen(made.who, made.sock, len(self.made) + 1)
            elif made.entry["peer"] and made.peer is None:
                waiting.append(made)
            else:
                connected.append(made)
        for made in connected:
            if made.sock is None:
                self._make_connected(made)
        for made in sorted(waiting, key=lambda made: (int(made.entry["backlog"]), made.id)):
            listener = self.by_inode.get(made.entry["peer"])
            if listener is None or not listener.listens:
                raise ImageError(f"{made}: its peer {made.entry['peer']} is not there")
            made.sock = _new(made.type)
            self._bind(made)
            self._standins.connect(made.connector, made.sock, listener.address())

    def _make_datagram(self, made: Made) -> None:
        if made.sock is not None:
            return
        if made.peer is not None:
            made.sock, made.peer.sock = self._standins.pair(made.who, DGRAM)
            self._bind(made.peer)
        elif self._had_peer(made):
            made.sock, made.helper = self._standins.pair(made.who, DGRAM)
            self._temporary.append(made.helper)
        else:
            made.sock = _new(DGRAM)
        self._bind(made)

    def _had_peer(self, made: Made) -> bool:
        """Whether a datagram socket is one of a pair whose other end is closed."""
        used = made.entry["state"] == ESTABLISHED or made.id in self.records
        return used and not made.name and not made.entry["peer"]

    def _make_connected(self, made: Made) -> None:
        """A stream or seqpacket socket and its peer, or a temporary one if that is closed."""
        peer = made.peer
        server = made
        if peer is not None and (not made.name or (peer.name and self._is_server(peer, made))):
            server = peer
        client = peer if server is made else made
        if not server.name:
            server.sock, other = self._standins.pair(server.who, server.type)
        else:
            server.sock, other = self._connect_through(server, client)
        if client is not None:
            client.sock = other
        else:
            server.helper = other
            self._temporary.append(other)

    def _is_server(self, one: Made, other: Made) -> bool:
        """Which of two named ends was accepted: the one with a listening socket's name, else the younger one."""
        if self._listener(one) or self._listener(other):
            return self._listener(one) is not None
        return bool(one.inode > other.inode)

    def _listener(self, server: Made) -> Made | None:
        return self.listeners.get((server.name, server.type))

    def _connect_through(
        self, server: Made, client: Made | None
    ) -> tuple[_socket.socket, _socket.socket]:
        """(accepted socket, its client); the accepted one bears the listening socket's name."""
        listener = self._listener(server)
        own = None
        if listener is None:
            own = listener = Made(server.id, {**server.entry, "deleted": True})
            own.sock = _new(server.type)
            self._bind(own)
        # The client is told of who listened, the server of who connected.
        self._standins.listen(client.who if client else None, listener.get(), len(self.made) + 1)
        other = _new(server.type)
        try:
            if client is not None:
                client.sock = other
                self._bind(client)
            self._standins.connect(server.who, other, listener.address())
            fd, _ = listener.get()._accept()  # type: ignore[attr-defined]
            return _socket.socket(fileno=fd), other
        finally:
            if own is not None:
                own.get().close()
                if own.at >= 0:
                    os.close(own.at)

    # -- names -------------------------------------------------------------------------------------------------------

    def _bind(self, made: Made) -> None:
        name = made.name
        if not name:
            return
        try:
            if name[:1] == b"\0":
                made.get().bind(name)
            elif made.entry.get("deleted"):
                made.at = _bind_in_own_root(made.get(), name)
            else:
                made.at = _bind_on_disk(made.get(), name, made.entry.get("name_dir", "."))
        except OSError as error:
            shown = os.fsdecode(name).replace("\0", "@")
            help = "end the process that has it" if error.errno == errno.EADDRINUSE else ""
            raise RestoreError(f"{made} cannot be bound to {shown}: {os.strerror(error.errno or 0)}", help) from None
        perms = made.entry.get("file_perms")
        if perms and made.at >= 0:
            os.chown(f"/proc/self/fd/{made.at}", perms["uid"], perms["gid"])
            os.chmod(f"/proc/self/fd/{made.at}", perms["mode"] & 0o7777)

    # -- queues ------------------------------------------------------------------------------------------------------

    def _fill(self, made: Made) -> None:
        if made.listens:
            raise ImageError(f"sk-queues.img: {made} listens, and has a queue")
        sender, to = self._sender(made)
        size = sender.getsockopt(options.SOL_SOCKET, options.SO_SNDBUF)
        for record, payload in self.records[made.id]:
            data = self.context.images.read_payload(payload, _PAYLOAD_LIMIT)
            fds = []
            for scm in record.get("scm", []):
                if scm["type"] != queues.SCM_RIGHTS:
                    raise ImageError(f"sk-queues.img: a message for {made} has something of type {scm['type']}")
                fds += [self._queued(number) for number in scm["rights"]]
            own = record.get("firn", {})
            try:
                from_whom, where = sender, to
                if own.get("sender"):
                    from_whom, where = self._named_sender(own["sender"]), made.address()
                queues.send(from_whom, data, fds, made.type == STREAM, where, self._credentials(own))
            except OSError as error:
                raise RestoreError(f"the queue of {made} cannot be filled: {error.strerror}") from None
        options.set_buffer(sender, options.SO_SNDBUF, size)

    def _credentials(self, own: dict[str, Any]) -> bytes:
        """The struct ucred that a message bears; its process exists now."""
        if "credentials" not in own:
            return b""
        who = Identity(own["credentials"])
        self._standins.hold(who.pid)
        return UCRED.pack(who.pid, who.uid, who.gid)

    def _named_sender(self, name: bytes) -> _socket.socket:
        """The datagram socket of that name, or a temporary one in its place."""
        wanted = name if name[:1] == b"\0" else name.split(b"\0")[0]
        for other in self.made.values():
            if other.type == DGRAM and other.name == wanted and not other.external:
                return other.get()
        if wanted not in self._senders:
            helper = self._senders[wanted] = _new(DGRAM)
            self._temporary.append(helper)
            if wanted[:1] == b"\0":
                helper.bind(wanted)
            else:
                os.close(_bind_in_own_root(helper, wanted))
        return self._senders[wanted]

    def _queued(self, number: int) -> int:
        """Our descriptor of a file that is in a message."""
        kind = self.types.get(number)
        if kind is None:
            raise ImageError(f"sk-queues.img: file {number} is not there")
        return self.made[number].get().fileno() if number in self.made else self.context.open(kind, number)

    def _sender(self, made: Made) -> tuple[_socket.socket, str | bytes]:
        """Who sends what is in the queue, and the address if that is needed."""
        if made.peer is not None:
            return made.peer.get(), b""
        if made.helper is not None:
            return made.helper, b""
        if made.type != DGRAM:
            raise ImageError(f"sk-queues.img: {made} is not connected, and has a queue")
        for other in self.made.values():
            if other.entry["peer"] == made.inode and not other.external:
                return other.get(), made.address()
        helper = _new(DGRAM)
        self._temporary.append(helper)
        return helper, made.address()

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _connect_datagrams(self) -> None:
        for made in self.made.values():
            inode = made.entry["peer"]
            if made.type != DGRAM or made.peer is not None or not inode or made.external:
                continue
            peer = self.by_inode.get(inode)
            if peer is None or not peer.name:
                raise ImageError(f"{made}: its peer {inode} is not there, or has no name")
            if not peer.external:
                made.get().connect(peer.address())
                continue
            if not self.context.options.ext_unix_sk:
                raise RestoreError(f"{made} is connected to a service outside", "allow that with --ext-unix-sk")
            try:
                made.get().connect(peer.name)
            except OSError as error:
                name = os.fsdecode(peer.name).replace("\0", "@")
                raise RestoreError(f"{made} cannot be connected to {name}: {error.strerror}") from None

    def _finish(self, made: Made) -> None:
        entry, sock = made.entry, made.get()
        if made.helper is not None:
            made.helper.close()
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


def _bind_on_disk(sock: _socket.socket, name: bytes, directory: str) -> int:
    """Bind to a path, relative ones in *directory*; a socket that has the name is replaced. An O_PATH descriptor."""
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        try:
            if stat.S_ISSOCK(os.lstat(name).st_mode):
                os.unlink(name)
        except FileNotFoundError:
            pass
        sock.bind(name)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    finally:
        os.fchdir(here)
        os.close(here)


def _bind_in_own_root(sock: _socket.socket, name: bytes) -> int:
    """Bind to a path that stays out of sight: in a directory that is the root meanwhile, and gone again afterwards."""
    top = f"/tmp/.firn-{os.getpid()}"
    os.mkdir(top, 0o700)
    root, here = (os.open(path, os.O_PATH | os.O_CLOEXEC) for path in ("/", "."))
    folder = os.path.join(b"/", os.path.dirname(name))
    try:
        os.chroot(top)
        os.chdir("/")
        os.makedirs(folder, exist_ok=True)
        sock.bind(name)
        at = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.unlink(name)
        try:
            os.removedirs(folder)
        except OSError:  # the name has no folder: this is the root itself
            pass
        return at
    finally:
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(here)
        os.close(root)
        os.close(here)
        try:
            os.rmdir(top)
        except OSError:
            pass
