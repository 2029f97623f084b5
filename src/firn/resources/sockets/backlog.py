"""Connections that wait to be accepted: how they are saved (images: firn_client, in the entry of the listening socket).

Kernel: nobody has a descriptor of them, so they are accepted, and then read like any other (:mod:`tcp`). What was
accepted cannot be put back; an equal one can be made (:mod:`admission`), which the restore does too. So the sockets
are emptied last of all, when everything else is in the images. If the tree runs on, or the dump fails after all, its
clients are put back in their order; if it ends, its clients vanish with it.

Whether that can be done is found out before: the ability is tried with a socket of our own while the tree runs, once
a look has found that there is need of it; and a segment that means nothing, sent in the name of each peer, shows
whether a firewall lets such through. Where it cannot, new clients are kept away for a moment (their SYN is dropped, so
they try again after a second), until the program has accepted all that wait.

In the middle of a handshake can also be who has done all for it, and takes the connection for established: the kernel
ignores the last segment while a backlog is full. Such a client answers to any segment that is out of place, and that
ends the handshake, now that there is room. So it is sent one, if the tree ends. (Whoever waits for an answer to its SYN
ignores that, and tries again.)

What goes wrong: if firn is killed after a client was accepted and before it is back, the connection is closed. Clients
who are in the middle of a handshake and do not answer soon, or hold a SYN cookie, are told by a reset when they speak,
after the restore.
"""

from __future__ import annotations

import _socket
import os
import time

from firn.abi import poll
from firn.abi.tcp import INFO, SIOCINQ, TCP_AO_INFO, TCP_CLOSE, TCP_DEFER_ACCEPT, TCP_FASTOPEN, TCP_INFO, TH_ACK
from firn.errors import FirnError, KernelError, Obstacle, Refused, TargetError
from firn.host import holders, sockdiag
from firn.host.nftables import Connection
from firn.resources.sockets import connections, inet_options, options, packets, tcp
from firn.resources.sockets.admission import SMALLEST, Admission, Client
from firn.resources.sockets.inet_options import AF_INET6, TCP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.resources.base import DumpContext, Open
    from firn.resources.network.lock import Lock

    Listener = tuple[_socket.socket, Open, dict[str, Any]]

_HANDSHAKES_S, _PROMPT_S = 0.6, 0.05
"""A peer answers to what is out of place only twice a second (tcp_invalid_ratelimit)."""
_MOST_PROMPTED = 1000
_DRAIN_S = 0.5
_STEP_S = 0.002
_ARRIVAL_S = 0.05
_SO_ERROR, _SO_OOBINLINE, _MSG_DONTWAIT, _PART = 4, 10, 0x40, 1 << 16
_HELP = "let them be accepted, or drop them with --skip-in-flight"


def waiting(listener: _socket.socket) -> int:
    """How many connections wait to be accepted."""
    return int(INFO.unpack(listener.getsockopt(TCP, TCP_INFO, INFO.size))[3])


def refusal(count: int, why: str = "") -> tuple[str, str]:
    """(Reason, help) of an obstacle: *count* connections wait, and cannot be saved."""
    reason = f"listens, and {count} connection{'s wait' if count > 1 else ' waits'} to be accepted"
    return reason + (f" ({why})" if why else ""), _HELP


def doors(listener: _socket.socket) -> list[bytes]:
    """Where new clients reach it."""
    family, address = listener.family, listener.getsockname()
    message = {"family": family, "src_addr": _words(address, family), "src_port": address[1]}
    if family == AF_INET6:
        message["v6only"] = bool(listener.getsockopt(inet_options.IPV6, inet_options.IPV6_V6ONLY))
    return connections.doors(message)


def _words(address: tuple[Any, ...], family: int) -> list[int]:
    return connections.to_words(address[0].partition("%")[0], family)


def _half_open(listeners: list[Listener]) -> dict[int, list[sockdiag.Unaccepted]]:
    """By the number of a listening socket, who is in the middle of a handshake with it."""
    found: dict[int, list[sockdiag.Unaccepted]] = {}
    known = {family: sockdiag.half_open(family) for family in {listener.family for listener, _, _ in listeners}}
    for number, (listener, _, _) in enumerate(listeners):
        port = listener.getsockname()[1]
        mine = [each for each in known[listener.family] if each.sport == port]
        if mine:
            found[number] = mine
    return found


def _prompt(one: sockdiag.Unaccepted) -> None:
    """Send the peer a segment that it only answers."""
    ends = packets.unmapped(one.near), one.sport, packets.unmapped(one.far), one.dport
    try:
        packets.segment(ends, (0, 0), TH_ACK, 0)
    except OSError:
        pass  # There is no way to it now.


class _Taken:
    """A client that we have accepted, and from which listening socket."""

    __slots__ = ("client", "connection", "listener")

    def __init__(self, listener: _socket.socket, connection: tcp.Connection) -> None:
        self.listener = listener
        self.connection = connection
        self.client: Client | None = None

    def read(self) -> list[str]:
        """Read everything; reasons why it cannot be saved."""
        sock, message = self.connection.sock, self.connection.message
        entry: dict[str, Any] = {
            name: message[name] for name in ("src_addr", "src_port", "dst_addr", "dst_port")
        }
        entry["rcvbuf"] = sock.getsockopt(options.SOL_SOCKET, options.SO_RCVBUF)
        urgent = self._read_urgent(entry) if poll.state(sock.fileno(), poll.POLLPRI) else b""
        reasons: list[str] = []
        if INFO.unpack(sock.getsockopt(TCP, TCP_INFO, INFO.size))[0] == TCP_CLOSE:
            # Reset by its peer.
            unread = tcp.count(sock, SIOCINQ)
            entry |= {"state": TCP_CLOSE, "data": urgent + (tcp.peek(sock, unread) if unread else b"")}
        else:
            sock.getsockopt(options.SOL_SOCKET, _SO_ERROR)  # Of the way to the peer: nobody has asked for it.
            reasons = self.connection.read(None)  # Nobody else has it.
            stream = self.connection.stream
            entry |= {"state": message["state"], "stream": stream, "data": urgent + self.connection.data}
            stream["inq_len"] = len(entry["data"])
        self.client = Client(entry)
        return reasons

    def _read_urgent(self, entry: dict[str, Any]) -> bytes:
        """Take what is there, up to the urgent byte and from it on, which cannot be peeked at as a whole. Nobody else
        has the socket."""
        sock = self.connection.sock
        entry["urgent"] = tcp.count(sock, SIOCINQ)
        sock.setsockopt(options.SOL_SOCKET, _SO_OOBINLINE, 1)
        data = b""
        try:
            while more := sock.recv(_PART, _MSG_DONTWAIT):
                data += more
        except (BlockingIOError, ConnectionResetError):
            pass
        return data


class Backlogs:
    """The backlogs of all listening sockets of a dump. Lives from before the first look at the tree.

    *lock* is that of the current look.
    """

    def __init__(self, lock: Lock, warn: Callable[[str], object]) -> None:
        self._lock = lock
        self._warn = warn
        self._admission: Admission | None = None
        self._why = ""
        self._tried = self._drained = False
        self._refused: list[_socket.socket] = []
        self._listeners: list[Listener] = []
        self._probed: set[bytes] = set()
        self._silent: set[bytes] = set()
        self._taken: list[_Taken] = []
        self._deferring: list[tuple[_socket.socket, int]] = []

    # -- looks at the tree ---------------------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """The tree runs: whether the clients can be saved from now on."""
        if not self._tried:
            self._tried = True
            try:
                if not self._lock.holds_doors:
                    raise KernelError("without a network lock by nf_tables")
                self._admission = Admission()
                return True
            except KernelError as error:
                self._why = str(error)
        return False

    def collect(self, listener: _socket.socket, open: Open, context: DumpContext) -> bool:
        """Whether the dump may go on with *listener*, for which somebody waits; else it is refused."""
        if self._admission is None:
            self._refuse(listener, open, context, self._why)
            return False
        return True

    def _refuse(self, listener: _socket.socket, open: Open, context: DumpContext, why: str) -> None:
        context.refuse(open, *refusal(waiting(listener), why), passing=True)
        self._refused.append(_socket.socket(fileno=os.dup(listener.fileno())))

    def finish(self, listeners: list[Listener], context: DumpContext, stays: bool) -> None:
        """All sockets are known, and unless the tree *stays*, nobody new comes: find out whether those who wait can be
        put back. Refuses what cannot."""
        coming = {} if stays else _half_open(listeners)
        if self._admission is None:
            if coming and not self._tried:
                listener, open, _ = listeners[next(iter(coming))]
                context.refuse(open, "listens, and a connection is in the middle of its handshake", _HELP, passing=True)
                self._refused.append(_socket.socket(fileno=os.dup(listener.fileno())))
            return
        if not coming and not any(waiting(listener) for listener, _, _ in listeners):
            return
        inodes = {open.stat.st_ino for _, open, _ in listeners}
        shared = holders.of_sockets(inodes, {os.getpid(), *context.pids})
        for each in listeners:
            listener, open, _ = each
            holder = shared.get(open.stat.st_ino)
            if not waiting(listener):
                self._listeners += [each] if holder is None else []
                continue
            why = f"{holder} has the socket too" if holder is not None else self._against(listener)
            if why:
                self._refuse(listener, open, context, why)
            self._listeners.append(each)

    def _against(self, listener: _socket.socket) -> str:
        """Why those who wait could not be put back; they are locked."""
        if options.value(listener, options.SOL_SOCKET, options.SO_BINDTODEVICE):
            return "of a socket that is bound to a network device"
        if listener.getsockopt(TCP, TCP_FASTOPEN):
            return "of a socket with TCP Fast Open"
        if options.value(listener, TCP, TCP_AO_INFO) is not None:
            return "of a socket with authentication (TCP-AO)"
        assert self._admission is not None
        try:
            with self._admission.facing(listener):
                pass
        except OSError as error:
            return f"of a socket that is tied to something: {error.strerror}"
        found = sockdiag.unaccepted(listener.family, listener.getsockname()[1])
        self._silence([Connection(listener.family, each.near, each.sport, each.far, each.dport) for each in found])
        for each in found:
            if each.room < SMALLEST[len(packets.unmapped(each.far))]:
                return "one has very small segments"
            if len(each.far) == 16 and each.far[0] == 0xFE and each.far[1] >> 6 == 2:
                return "one has a link-local address"
            if each.far not in self._probed and not self._arrives(listener.family, each):
                return "a firewall would not let one be put back"
            self._probed.add(each.far)
        return ""

    def _silence(self, connections: list[Connection]) -> None:
        """Lock those of the connections that are not yet."""
        new = {each.key(): each for each in connections if each.key() not in self._silent}
        if new:
            self._lock.add(new.values())
            self._silent |= new.keys()

    @staticmethod
    def _arrives(family: int, one: sockdiag.Unaccepted) -> bool:
        """Whether a segment that we send in the peer's name reaches the connection. Its numbers mean nothing, so the
        kernel only repeats its own, which the lock drops."""
        ends = packets.unmapped(one.far), one.dport, packets.unmapped(one.near), one.sport
        packets.segment(ends, (0, 0), TH_ACK, 0)
        end = time.monotonic() + _ARRIVAL_S
        while time.monotonic() < end:
            now = sockdiag.find_unaccepted(family, one.near, one.sport, one.far, one.dport)
            if now is None or now.arrived != one.arrived:
                return True
            time.sleep(_STEP_S)
        return False

    def relent(self, lock: Lock) -> bool:
        """The tree runs on after a look that was refused, and there is a new *lock*: whether more than a moment of time
        was won. Either clients can be saved now, or none waits any more at the sockets that were in the way."""
        refused, self._refused = self._refused, []
        self._lock, self._silent, self._listeners = lock, set(), []
        try:
            return bool(refused) and (self.prepare() or self._drain(refused))
        finally:
            for each in refused:
                each.close()

    def _drain(self, listeners: list[_socket.socket]) -> bool:
        """Keep new clients away until nobody waits, but not for long, and once: each of them loses a second."""
        if self._drained or not self._lock.holds_doors:
            return False
        self._drained = True
        self._lock.close_doors([door for each in listeners for door in doors(each)])
        end = time.monotonic() + _DRAIN_S
        while any(waiting(each) for each in listeners) and time.monotonic() < end:
            time.sleep(_STEP_S)
        return True

    # -- the end of a dump ---------------------------------------------------------------------------------------------

    def take(self, stays: bool) -> None:
        """Accept and read all who wait, and note them in the listening sockets' messages. If the tree *stays*, they are
        put back at once. Raises :class:`Refused`, :class:`OSError`, :class:`FirnError`; then :meth:`put_back` helps."""
        listeners, self._listeners = self._listeners, []
        if not listeners:
            return
        if stays:
            # Else the places that those in our hands leave could be taken, where a backlog is full.
            self._lock.close_doors([door for listener, _, _ in listeners for door in doors(listener)], everything=True)
        able, obstacles = [], []
        for each in listeners:
            why, count = self._against(each[0]), waiting(each[0])
            if not why:
                able.append(each)
            elif count:
                obstacles.append(Obstacle(each[1].what, *refusal(count, why)))
        if obstacles:
            raise Refused(obstacles)
        for listener, open, message in able:
            self._accept_all(listener, open.what, message)
        if not stays:
            self._end_handshakes(able)
            return
        lost = self._put_back()
        if lost:
            raise TargetError(lost[0])

    def _end_handshakes(self, listeners: list[Listener]) -> None:
        """Accept also those who take themselves for connected already."""
        for listener, _, _ in listeners:
            seconds = listener.getsockopt(TCP, TCP_DEFER_ACCEPT)
            if seconds:
                # Who has not spoken yet counts as connected for itself alone.
                self._deferring.append((listener, seconds))
                listener.setsockopt(TCP, TCP_DEFER_ACCEPT, 0)
        end = time.monotonic() + _HANDSHAKES_S
        prompt = 0.0
        pending = True
        while pending and time.monotonic() < end:
            coming = _half_open(listeners)
            pending = bool(coming)
            again = time.monotonic() >= prompt
            for number, (listener, open, message) in enumerate(listeners):
                for each in coming.get(number, ())[:_MOST_PROMPTED] if again else ():
                    _prompt(each)
                self._accept_all(listener, open.what, message)
            prompt = time.monotonic() + _PROMPT_S if again else prompt
            time.sleep(_STEP_S if pending else 0)

    def _accept_all(self, listener: _socket.socket, what: str, entry: dict[str, Any]) -> None:
        port = listener.getsockname()[1]
        # Whether anybody waits is asked first, for the socket may be one that blocks.
        while poll.state(listener.fileno(), poll.POLLIN):
            try:
                fd, peer = listener._accept()  # type: ignore[attr-defined]
            except ConnectionAbortedError:
                continue
            sock = _socket.socket(fileno=fd)
            message = _message(sock, port, peer)
            taken = _Taken(listener, tcp.Connection(sock, message, f"{what}: the connection of {peer[0]}:{peer[1]}"))
            self._taken.append(taken)
            self._silence([connections.connection(message)])
            reasons = taken.read()
            if reasons:
                raise Refused([Obstacle(taken.connection.what, reason, _HELP) for reason in reasons])
            assert taken.client is not None
            entry.setdefault("firn", {}).setdefault("clients", []).append(taken.client.entry)

    def put_back(self) -> None:
        """The tree runs on after all: whoever was taken waits again."""
        for lost in self._put_back():
            self._warn(lost)

    def _put_back(self) -> list[str]:
        """What went wrong, for each who is lost."""
        lost = []
        while self._taken:
            listener = self._taken[0].listener
            try:
                assert self._admission is not None
                with self._admission.facing(listener):
                    while self._taken and self._taken[0].listener is listener:
                        self._put_one(self._admission)
            except (OSError, FirnError) as error:
                lost.append(f"{self._taken.pop(0).connection.what} is lost: {error}")
        while self._deferring:
            listener, seconds = self._deferring.pop()
            listener.setsockopt(TCP, TCP_DEFER_ACCEPT, seconds)
        return lost

    def _put_one(self, admission: Admission) -> None:
        taken = self._taken[0]
        if taken.client is None:
            taken.read()
        taken.connection.vanish()
        assert taken.client is not None
        admission.admit(taken.listener, taken.client)
        self._taken.pop(0)

    def vanish(self) -> None:
        """The tree has ended: its clients hear nothing, until it is restored."""
        while self._taken:
            self._taken.pop().connection.vanish()

    def close(self) -> None:
        """Let go of what was held."""
        for each in (*self._refused, *(taken.connection.sock for taken in self._taken)):
            each.close()
        self._refused, self._taken = [], []
        if self._admission is not None:
            self._admission.close()


def _message(sock: _socket.socket, port: int, peer: tuple[Any, ...]) -> dict[str, Any]:
    """As much of an inet_sk_entry as :class:`tcp.Connection` and the lock need. Of a connection that is over, the
    socket does not tell *port* and *peer*."""
    return {
        "ino": os.fstat(sock.fileno()).st_ino, "family": sock.family,
        "opts": {"reuseaddr": bool(sock.getsockopt(options.SOL_SOCKET, options.SO_REUSEADDR))},
        "src_addr": _words(sock.getsockname(), sock.family), "src_port": port,
        "dst_addr": _words(peer, sock.family), "dst_port": peer[1],
    }  # fmt: skip
