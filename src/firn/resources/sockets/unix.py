"""Unix sockets (images: unix_sk_entry, sk-queues.img): how they are saved; :mod:`rebuild` beside this brings them back.

State owned: type, name and socket file, peer, backlog and clients that wait, shutdown, options, what is queued.
Kernel: sock_diag(7) for peers, names and waiting clients (:mod:`waiting` for what these had sent), SIOCUNIXFILE for the
socket file, getsockopt(2) and peeking on a copy of the descriptor. What goes wrong: a peer outside the tree; an error
that was not reported yet, which goes away when the queue is looked at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from firn.abi import nr, poll
from firn.abi.libc import syscall
from firn.host import holders, procfs, sockdiag
from firn.resources.base import Kind, Open
from firn.resources.sockets import common, options, queues
from firn.resources.sockets.waiting import Unseen, Waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

    from firn.host.sockdiag import UnixSocket
    from firn.images.store import ImageDir
    from firn.resources.base import DumpContext, RestoreContext
    from firn.resources.sockets.queues import Record
    from firn.resources.sockets.rebuild import Rebuild
    from firn.resources.sockets.waiting import Client

STREAM, DGRAM, SEQPACKET = 1, 2, 5
EXTERNAL = 1
"""uflags: a service outside the tree."""
_SIOCUNIXFILE = 0x89E0
_DELETED = " (deleted)"
_SO_PEERCRED, _SO_PEERGROUPS = 17, 59
_UCRED = struct.Struct("<III")
_NOBODY = 0xFFFFFFFF
_NOBODY_HAS_IT = "nobody in sight (it is on its way through a socket)"
_MOST_GROUPS = 1024
_HELP = "dump that process too, or close the socket"
_NO_OPTIONS = {
    "so_sndbuf": 0, "so_rcvbuf": 0, "so_snd_tmo_sec": 0, "so_snd_tmo_usec": 0, "so_rcv_tmo_sec": 0,
    "so_rcv_tmo_usec": 0,
}  # fmt: skip
_NO_OWNER = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}


class Queued:
    """One record of a queue: its descriptors by file id; those that lead to a socket which is just being collected are
    still in ``unknown``. ``sender`` is the name of a datagram's sender that would not send it again by itself, or
    ``nameless``."""

    __slots__ = ("ids", "nameless", "record", "sender", "unknown")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.ids: list[int] = []
        self.sender = b""
        self.nameless = False
        self.unknown: dict[int, Open] = {}


def _queued(records: list[Record]) -> list[Queued]:
    for record in records:
        if record.credentials == queues.NO_CREDENTIALS:
            record.credentials = b""
    return [Queued(record) for record in records]


class Socket:
    """A unix socket of the frozen processes.

    ``own`` is what firn's own field of its message tells; ``gone`` are clients that wait to be accepted, and are
    closed; ``unseen`` why those that wait cannot be looked at. ``lost`` is the name of its peer that is closed;
    ``reset``: the error that this has left behind (ECONNRESET, there is no other) was not reported yet; ``paired``:
    made by socketpair(2).
    """

    __slots__ = ("gone", "id", "lost", "open", "own", "paired", "queue", "reset", "seen", "unseen")

    def __init__(self, open: Open, seen: UnixSocket) -> None:
        self.open = open
        self.seen = seen
        self.queue: list[Queued] = []
        self.lost: bytes | None = None
        self.reset = self.paired = False
        self.own: dict[str, Any] = {}
        self.gone: list[tuple[Client, list[Queued]]] = []
        self.unseen = ""
        self.id = 0


def show(name: bytes) -> str:
    """A socket's name for people."""
    return "@" + name[1:].decode("utf-8", "replace") if name[:1] == b"\0" else os.fsdecode(name.rstrip(b"\0"))


class UnixSockets(Kind):
    """All unix sockets of a dump or of a restore."""

    def __init__(self) -> None:
        self.sockets: dict[int, Socket] = {}
        self.external: set[int] = set()
        self.sent: dict[int, list[Queued]] = {}
        self.connectors: dict[int, dict[str, Any]] = {}
        """By inode of clients that wait to be accepted, what they have sent, and who connected them."""
        self._waiting = Waiting()
        self._all: dict[int, UnixSocket] | None = None
        self._listeners: dict[int, UnixSocket] = {}
        self._pidfd = -1
        self._rebuild: Rebuild | None = None

    # -- collect -----------------------------------------------------------------------------------------------------

    def _seen(self) -> dict[int, UnixSocket]:
        """All unix sockets of the machine, as they are now that the processes stand still."""
        if self._all is None:
            self._all = sockdiag.unix_sockets()
            self._listeners = {inode: seen for seen in self._all.values() for inode in seen.waiting}
        return self._all

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The unix_sk_entry."""
        import _socket

        inode = open.stat.st_ino
        seen = self._seen().get(inode)
        if seen is None:
            context.refuse(open, "is a unix socket of another network namespace", "not supported yet; close it")
            return None
        if inode in self.external:
            return _external(seen)
        found = self.sockets[inode] = Socket(open, seen)
        found.reset = bool(poll.state(open.copy()) & poll.POLLERR) and f"unix[{inode}]" not in context.options.external
        copy = _socket.socket(fileno=os.dup(open.copy()))
        try:
            reasons = [f"has the option {text}, which images cannot hold" for text in options.unsupported(copy)]
            if not reasons:
                try:
                    self._collect_queue(found, copy, context)
                except Unseen as error:
                    what = "an error that was not reported yet" if found.reset else "an out-of-band byte"
                    reasons.append(f"is a unix socket with {what} in its queue, which cannot be looked at: {error}")
            for reason in reasons:
                context.refuse(open, reason, "close it before the dump, or let the program finish with it")
            return None if reasons else self._message(found, copy, context)
        finally:
            copy.close()

    def _listener(self, seen: UnixSocket) -> UnixSocket | None:
        """The listening socket in whose queue the connection of *seen* still waits."""
        return self._listeners.get(seen.inode)

    def _message(self, found: Socket, copy: socket, context: DumpContext) -> dict[str, Any] | None:
        open, seen = found.open, found.seen
        message: dict[str, Any] = {
            "ino": seen.inode, "type": seen.type, "state": seen.state, "flags": open.flags, "uflags": 0,
            "backlog": seen.sent, "peer": seen.peer, "fown": context.owner(open), "name": seen.name,
            "shutdown": seen.shutdown,
        }  # fmt: skip
        listener = self._listener(seen)
        if listener is not None:
            # Not the diag number, which nobody needs: the place in the listener's queue, which the images cannot tell.
            message |= {"peer": listener.inode, "backlog": listener.waiting.index(seen.inode)}
        own = _peer_identity(copy)
        found.paired = "peer" in own
        if f"unix[{seen.inode}]" in context.options.external:
            message |= {"peer": 0, "state": sockdiag.CLOSE, "shutdown": 0}
        else:
            if not seen.peer and listener is None:
                found.lost = _peer_name(copy)
            own |= {"reset": found.reset, "lost": None if found.lost is None else {"name": found.lost}}
        found.own.update((name, value) for name, value in own.items() if value)
        if found.own or seen.waiting or listener is not None:
            message["firn"] = found.own
        try:
            message["opts"] = options.collect(copy)
        except OSError as error:
            context.refuse(open, f"has options that cannot be read: {error.strerror}", "it may have an eBPF filter")
            return None
        if seen.name and seen.name[:1] != b"\0":
            where = _socket_file(copy.fileno(), seen.name)
            if where is None:
                context.refuse(open, f"is bound to {show(seen.name)}, which cannot be found again", "bind a full path")
                return None
            message |= where
        return message

    # -- queues ------------------------------------------------------------------------------------------------------

    def _collect_queue(self, found: Socket, copy: socket, context: DumpContext) -> None:
        seen = found.seen
        if seen.state == sockdiag.LISTEN:
            self._collect_waiting(found, copy, context)
            return
        if found.reset and seen.type != STREAM:
            records = self._behind_error(copy, seen, context)
        elif seen.type == STREAM:
            records = self._stream(copy, seen, context) if seen.received or queues.at_mark(copy) else []
        else:
            records = queues.peek_messages(copy, seen.type == SEQPACKET and bool(seen.shutdown & 1))
        found.queue = _queued(records)
        self._add_all_queued(found, found.queue, context)

    def _stream(self, copy: socket, seen: UnixSocket, context: DumpContext) -> list[Record]:
        try:
            return queues.peek_stream(copy, seen.received)
        except queues.Unclear:
            return self._waiting.messages(copy.fileno(), context, stream=True)

    def _behind_error(self, copy: socket, seen: UnixSocket, context: DumpContext) -> list[Record]:
        """The messages in a queue before which an error waits: to peek is to be told of that, which is gone then
        (__skb_try_recv_datagram). Who reads no more is always readable."""
        if not poll.state(copy.fileno(), poll.POLLIN):
            return []
        try:
            return self._waiting.messages(copy.fileno(), context)
        except Unseen:
            if seen.received or not seen.shutdown & 1:
                raise
            return []  # at the most empty ones

    def _collect_waiting(self, found: Socket, copy: socket, context: DumpContext) -> None:
        """What was sent to a listening socket's connections that it has not accepted."""
        try:
            clients = self._waiting.look(copy.fileno(), found.seen, self._seen(), context)
        except Unseen as error:
            found.unseen = str(error)
            return
        for client in clients:
            inode = found.seen.waiting[client.place]
            queue = _queued(client.records)
            if inode:
                self.sent[inode] = queue
                self.connectors[inode] = client.connector
            else:
                found.gone.append((client, queue))
            self._add_all_queued(found, queue, context)

    def _add_all_queued(self, found: Socket, queue: list[Queued], context: DumpContext) -> None:
        """Store what the descriptors in a queue lead to."""
        for index, queued in enumerate(queue):
            credentials = queued.record.credentials
            if credentials and not _identity(credentials)["pid"]:
                context.refuse(found.open, "has a message from a process outside our pid namespace in its queue")
            for place, fd in enumerate(queued.record.fds):
                what = f"{found.open.what}: descriptor {place} of message {index} in its queue"
                self._add_queued(queued, what, place, fd, context)

    def _add_queued(self, queued: Queued, what: str, place: int, fd: int, context: DumpContext) -> None:
        """Store what a queued descriptor leads to. The descriptor is ours, and stays open until the end, so the kernel
        can compare it with others."""
        if self._pidfd < 0:
            self._pidfd = syscall("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
        open = Open(os.getpid(), self._pidfd, fd, procfs.fdinfo(os.getpid(), fd))
        open.what = what
        queued.ids.append(0)
        if open.link.startswith("socket:[") and open.stat.st_ino in self.sockets:
            queued.unknown[place] = open
            return
        try:
            added = context.add_open(open)
        finally:
            open.close()
        if added is not None:
            queued.ids[place] = added[0]

    # -- finish ------------------------------------------------------------------------------------------------------

    def finish(self, context: DumpContext) -> None:
        """Peers and clients are all there, or are refused."""
        for found in list(self.sockets.values()):
            if any(obstacle.thing == found.open.what for obstacle in context.obstacles):
                continue
            self._check_peer(found, context)
            self._check_clients(found, context)
            self._check_senders(found, context)
            self._check_error(found, context)
            self._finish_queue(found.queue, context)
            if found.queue:
                found.id = (context.add_open(found.open) or (0, 0))[0]
            self._finish_waiting(found, context)

    def _finish_waiting(self, found: Socket, context: DumpContext) -> None:
        """Tell what a client had sent before it was accepted; of a listening socket, which clients are gone."""
        waited = self.sent.get(found.seen.inode, [])
        for queue in (waited, *(queue for _, queue in found.gone)):
            self._finish_queue(queue, context)
        if self._listener(found.seen) is not None:
            found.own["connector"] = self._connector(found, context)
        gone = [
            common.filled({
                "place": client.place, "name": client.name, "connector": client.connector,
                "sent": [_message(queued) for queued in queue],
            })
            for client, queue in found.gone
        ]  # fmt: skip
        found.own |= common.filled({"sent": [_message(queued) for queued in waited], "gone": gone})

    def _connector(self, found: Socket, context: DumpContext) -> dict[str, Any]:
        """Who will be told to have connected a client that waits: who did, or else who has it, or its server."""
        if found.seen.inode in self.connectors:
            return self.connectors[found.seen.inode]
        listener = self._listener(found.seen)
        near = [found, self.sockets[listener.inode]] if listener and listener.inode in self.sockets else [found]
        # What came out of a queue was found with us.
        holders = (each.open.pid for each in near if each.open.pid != os.getpid())
        return _who_is(next(holders, context.pids[0]))

    @staticmethod
    def _finish_queue(queue: list[Queued], context: DumpContext) -> None:
        for queued in queue:
            for place, open in queued.unknown.items():
                queued.ids[place] = (context.add_open(open) or (0, 0))[0]
                open.close()

    def _check_peer(self, found: Socket, context: DumpContext) -> None:
        seen = found.seen
        listener = self._listener(seen)
        peer = listener or (self._seen().get(seen.peer) if seen.peer else None)
        if not seen.peer and peer is None:
            return
        if f"unix[{seen.inode}]" in context.options.external:
            return
        inode = peer.inode if peer is not None else seen.peer
        if inode in self.sockets:
            return
        named = seen.type == DGRAM and peer is not None and bool(peer.name)
        if context.options.ext_unix_sk and named and self._add_external(found, inode, context):
            return
        help = f"{_HELP}; --external unix[{seen.inode}] drops the connection"
        if named:
            help += ", --ext-unix-sk connects again to its name"
        who = self._who(found, inode)
        # One that is only in its own queue is closed by the kernel before long (net/unix/garbage.c).
        reason = f"is connected to a socket outside the tree: {who or _NOBODY_HAS_IT}"
        context.refuse(found.open, reason, help, passing=not who)

    def _who(self, found: Socket, inode: int) -> str:
        who = holders.find(found.open.stat.st_dev, inode, {os.getpid()})
        return "; ".join(str(holder) for holder in who)

    def _add_external(self, found: Socket, inode: int, context: DumpContext) -> bool:
        """Store a socket outside the tree by its name."""
        self.external.add(inode)
        for holder in holders.find(found.open.stat.st_dev, inode, {os.getpid()}):
            pidfd = syscall(f"pidfd_open {holder.pid}", nr.pidfd_open, holder.pid, 0)
            try:
                open = Open(holder.pid, pidfd, holder.fd, procfs.fdinfo(holder.pid, holder.fd))
                return context.add_open(open) is not None
            finally:
                open.close()
                os.close(pidfd)
        return False

    def _check_clients(self, found: Socket, context: DumpContext) -> None:
        for inode in found.seen.waiting:
            if inode and inode not in self.sockets:
                who = self._who(found, inode) or _NOBODY_HAS_IT
                context.refuse(found.open, f"has a client outside the tree that it did not accept yet: {who}", _HELP)
            elif found.unseen and (not inode or self._seen()[inode].sent):
                reason = "has a client that is gone" if not inode else "has a client that sent something"
                reason += f" before it was accepted: {found.unseen}"
                context.refuse(found.open, reason, "let it be accepted", passing=True)

    def _check_senders(self, found: Socket, context: DumpContext) -> None:
        """Note for each datagram who sent it, if that is not whom the restore takes for want of a word."""
        if found.seen.type != DGRAM or not found.queue:
            return
        usual = self._usual_sender(found)
        senders = {queued.record.sender.rstrip(b"\0") for queued in found.queue}
        if usual is None and not found.seen.name and not found.seen.peer and len(senders) == 1:
            # Half of a pair: it has left the other half, which has sent something since, and is closed.
            found.own["lost"] = {"name": senders.pop(), "left": True}
            return
        for queued in found.queue:
            sender = queued.record.sender
            if sender.rstrip(b"\0") == usual:
                continue
            if not found.seen.name:
                what = show(sender) or "a socket without name"
                context.refuse(found.open, f"has a datagram from {what} in its queue, which cannot send it again")
                return
            queued.sender = sender
            queued.nameless = not sender

    def _usual_sender(self, found: Socket) -> bytes | None:
        """The name of the one socket that could have sent what is in a queue; None if there are several or none."""
        peer = self.sockets.get(found.seen.peer)
        others = {other.seen.name for other in self.sockets.values() if other.seen.peer == found.seen.inode}
        if not found.seen.name and len(others) == 1:
            return others.pop().rstrip(b"\0")
        if found.lost is not None:
            return found.lost
        paired = peer is not None and peer is not found and peer.seen.peer == found.seen.inode
        if peer is not None and (paired or found.reset or not (peer.seen.name and found.seen.name)):
            return peer.seen.name.rstrip(b"\0")
        return others.pop().rstrip(b"\0") if len(others) == 1 else None

    def _check_error(self, found: Socket, context: DumpContext) -> None:
        """The restore lets the peer go away again; a datagram one must be the other half of the pair."""
        if not found.reset or (found.lost is not None and found.seen.type != DGRAM):
            return
        peer = self.sockets.get(found.seen.peer)
        alone = found.lost is not None or (peer is not None and peer.paired and not peer.queue)
        foreign = any(queued.sender or queued.nameless for queued in found.queue)
        if not (found.seen.type == DGRAM and found.paired and alone) or foreign:
            reason = "is a unix socket with an error that was not reported yet, and that cannot be made again"
            context.refuse(found.open, reason, "close it before the dump, or let the program finish with it")

    # -- save --------------------------------------------------------------------------------------------------------

    def save(self, images: ImageDir) -> None:
        """Write the queues."""
        filled = [found for found in self.sockets.values() if found.queue]
        if not filled:
            return
        with images.writer("SK_QUEUES") as writer:
            for found in filled:
                for queued in found.queue:
                    entry: dict[str, Any] = {"id_for": found.id, "length": len(queued.record.data)}
                    if queued.ids:
                        entry["scm"] = [{"type": queues.SCM_RIGHTS, "rights": queued.ids}]
                    writer.add(entry | common.own_fields(_about(queued)))
                    writer.payload(queued.record.data)

    def close(self) -> None:
        """Close queued descriptors and what was rebuilt."""
        self._waiting.close()
        queues = [found.queue for found in self.sockets.values()]
        queues += [queue for found in self.sockets.values() for _, queue in found.gone]
        for queue in (*queues, *self.sent.values()):
            for queued in queue:
                queued.record.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._rebuild is not None:
            self._rebuild.close()

    # -- restore -----------------------------------------------------------------------------------------------------

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The socket *number*. All of them are made when the first is asked for."""
        from firn.resources.sockets.rebuild import Rebuild

        if self._rebuild is None:
            self._rebuild = Rebuild(context)
            self._rebuild.run()
        return self._rebuild.take(number)


def _message(queued: Queued) -> dict[str, Any]:
    """firn_unix_message."""
    about = common.filled(_about(queued))
    return common.filled({"data": queued.record.data, "rights": queued.ids, "about": about})


def _about(queued: Queued) -> dict[str, Any]:
    """firn_sk_packet: what images have no field for."""
    credentials = queued.record.credentials
    return {
        "credentials": _identity(credentials) if credentials else None, "sender": queued.sender,
        "nameless": queued.nameless, "mark": queued.record.mark,
    }  # fmt: skip


def _peer_name(copy: socket) -> bytes | None:
    """What getpeername(2) says of a peer that is closed; None if there is none."""
    try:
        return os.fsencode(copy.getpeername())
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return None


def _identity(credentials: bytes) -> dict[str, Any]:
    return dict(zip(("pid", "uid", "gid"), _UCRED.unpack(credentials), strict=True))


def _peer_identity(copy: socket) -> dict[str, Any]:
    """firn_unix: whom SO_PEERCRED tells of."""
    peer = _identity(copy.getsockopt(options.SOL_SOCKET, _SO_PEERCRED, _UCRED.size))
    if peer["uid"] == _NOBODY:
        return {}
    try:
        groups = copy.getsockopt(options.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS)
    except OSError:
        groups = b""
    if groups:
        peer["groups"] = groups
    return {"peer": peer}


def _who_is(pid: int) -> dict[str, Any]:
    """firn_identity of a process."""
    status = procfs.status(pid)
    uid, gid = (int(status[field].split()[1]) for field in ("Uid", "Gid"))
    groups = b"".join(int(group).to_bytes(4, "little") for group in status["Groups"].split())
    return {"pid": pid, "uid": uid, "gid": gid, "groups": groups}


def _external(seen: UnixSocket) -> dict[str, Any]:
    """The entry of a service outside: only its name matters."""
    return {
        "ino": seen.inode, "type": seen.type, "state": sockdiag.CLOSE, "flags": os.O_RDWR, "uflags": EXTERNAL,
        "backlog": 0, "peer": 0, "fown": _NO_OWNER, "name": seen.name, "opts": _NO_OPTIONS,
    }  # fmt: skip


def _socket_file(fd: int, name: bytes) -> dict[str, Any] | None:
    """What the images say of a bound socket's file; None if a relative name cannot be resolved again."""
    path_fd = fcntl.ioctl(fd, _SIOCUNIXFILE)
    try:
        path, st = os.readlink(f"/proc/self/fd/{path_fd}"), os.fstat(path_fd)
    finally:
        os.close(path_fd)
    told = os.fsdecode(name.split(b"\0")[0])
    entry: dict[str, Any] = {"file_perms": {"mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid}}
    if not st.st_nlink:
        path = path.removesuffix(_DELETED)
    if not told.startswith("/"):
        if not path.endswith("/" + told):
            return None
        entry["name_dir"] = path[: -len(told) - 1] or "/"
        told = path
    try:
        there = os.stat(told)
        entry["deleted"] = (there.st_dev, there.st_ino) != (st.st_dev, st.st_ino)
    except OSError:
        entry["deleted"] = True
    return entry
