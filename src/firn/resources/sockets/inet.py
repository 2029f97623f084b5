"""Internet sockets (images: inet_sk_entry): how they are saved; :mod:`inet_rebuild` beside this brings them back.

State owned: addresses, whether it listens and for how many, options, multicast groups, datagrams that wait, what was
not read of a TCP connection that is over (firn's own fields: the images have no place for options beyond a few, groups,
datagrams, rests). Kernel: getsockopt(2) on a copy of the descriptor, TCP_INFO for the state, sock_diag(7) for shutdown,
peeking for datagrams. A connection's stream is :mod:`tcp`'s. What goes wrong: what was half sent; datagrams that cannot
be sent again as if by their sender; connections that nobody has accepted yet, of which nobody has a descriptor.
"""

from __future__ import annotations

import _socket
import errno
import os

from firn.abi import poll
from firn.abi.tcp import (
    INFO,
    INFO_DELIVERED,
    INFO_SSTHRESH,
    SIOCINQ,
    SIOCOUTQ,
    TCP_CLOSE,
    TCP_INFO,
    TCP_LISTEN,
    TCP_REPAIR,
    TCP_SYN_SENT,
    TCP_WINDOW_CLAMP,
)
from firn.errors import Obstacle
from firn.host import families, holders, sockdiag
from firn.resources.base import Kind
from firn.resources.sockets import common, connections, datagrams, hidden, inet_options, options, outgoing, raw, tcp
from firn.resources.sockets.inet_options import (
    AF_INET,
    AF_INET6,
    DGRAM,
    RAW,
    STREAM,
    TCP,
    UDP,
    UDPLITE,
    is_tcp,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir
    from firn.resources.base import DumpContext, Open, RestoreContext
    from firn.resources.sockets.inet_rebuild import InetRebuild

SUPPORTED = ((STREAM, TCP), (DGRAM, UDP), (DGRAM, UDPLITE))
PINGS = {AF_INET: 1, AF_INET6: 58}
"""ICMP protocols of ping sockets (icmp(7)), by family."""
ESTABLISHED, CLOSE, LISTEN = sockdiag.ESTABLISHED, TCP_CLOSE, TCP_LISTEN
STATES = tcp.STATES
_UDP_CORK = 1
_HIGHEST_RAW = 255
_SHUT_BOTH = 3
_CLOSE_IT = "close it before the dump"


class InetSockets(Kind):
    """All internet sockets of a dump or of a restore."""

    def __init__(self) -> None:
        self._shut: dict[tuple[int, int], dict[int, int]] = {}
        self._diag: dict[int, dict[int, sockdiag.TcpConnection]] = {}
        self._saved: list[tuple[Open, dict[str, Any]]] = []
        self._connections: list[tcp.Connection] = []
        self._listeners: list[tuple[_socket.socket, Open, dict[str, Any]]] = []
        self._rebuild: InetRebuild | None = None
        self._raw = raw.Table()
        self._keys: dict[int, set[int]] = {}
        self._bound: dict[int, dict[int, int]] = {}
        self._labels: list[int] | None = None

    # -- collect -----------------------------------------------------------------------------------------------------

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The inet_sk_entry."""
        copy = _socket.socket(fileno=os.dup(open.copy()))
        kept = False
        try:
            reasons = _foreign(copy) or [
                (reason, _CLOSE_IT) for reason in (*_obstacles(copy), *inet_options.unsupported(copy))
            ]
            for reason, help in reasons:
                context.refuse(open, reason, help)
            if reasons:
                return None
            state, backlog = _tcp_state(copy, open, context) if is_tcp(copy) else (CLOSE, 0)
            if self._is_signed(copy, open.stat.st_ino, state, context):
                context.refuse(open, "has keys for signatures (TCP_MD5SIG), which the kernel does not tell", _CLOSE_IT)
                state = 0
            message = self._message(copy, open, context, state, backlog) if state else None
            if message is not None and state in STATES and is_tcp(copy) and not context.options.tcp_close:
                self._connections.append(tcp.Connection(copy, message, open.what))
                kept = True
            elif message is not None and state == LISTEN and context.lock is not None:
                self._listeners.append((copy, open, message))
                kept = True
            return message
        finally:
            if not kept:
                copy.close()

    def _is_signed(self, copy: _socket.socket, inode: int, state: int, context: DumpContext) -> bool:
        """Whether it is a TCP socket that listens or is connected, and would come back without its keys."""
        if not is_tcp(copy):
            return False
        if state == LISTEN:
            if copy.family not in self._keys:
                self._keys[copy.family] = sockdiag.tcp_signed(copy.family)
            return inode in self._keys[copy.family]
        listed = self._listed(copy, inode) if state in STATES and not context.options.tcp_close else None
        return listed is not None and listed.signed()

    def _message(
        self, copy: _socket.socket, open: Open, context: DumpContext, state: int, backlog: int
    ) -> dict[str, Any] | None:
        over = is_tcp(copy) and state == CLOSE and bool(poll.state(copy.fileno(), poll.POLLRDHUP))
        listed = self._listed(copy, open.stat.st_ino) if is_tcp(copy) and state in STATES else None
        message: dict[str, Any] = {
            "ino": open.stat.st_ino, "family": copy.family, "type": copy.type, "proto": copy.proto, "state": state,
            "flags": open.flags, "backlog": backlog, "fown": context.owner(open),
        }  # fmt: skip
        try:
            message["opts"] = options.collect(copy)
        except OSError as error:
            context.refuse(open, f"has options that cannot be read: {error.strerror}", "it may have an eBPF filter")
            return None
        message |= inet_options.collect(copy, over or state in STATES)
        # How a socket that still has its port is shut; None if it has not.
        bound = self._bound_and_shut(copy, open.stat.st_ino) if over else None
        peer = listed.peer if listed is not None and state == TCP_SYN_SENT else None
        _addresses(copy, message, over and bound is None, peer)
        if not is_tcp(copy):
            self._add_raw(copy, message)
        if not is_tcp(copy) and not datagrams.is_udp(copy):
            for reason in self._raw.obstacles(copy, message["ino"]):
                context.refuse(open, reason, "let the program read it first, or try again", passing=True)
        shutdown = listed.shutdown if listed is not None else self._shutdown(copy, message, over)
        shutdown = bound if bound is not None else shutdown
        if shutdown:
            message["shutdown"] = shutdown
        if is_tcp(copy):
            message["firn"] = message.get("firn", {}) | _ended_or_goes_on(copy, state, over and shutdown == _SHUT_BOTH)
        if copy.type != STREAM:
            own = message.setdefault("firn", {})
            self._add_outgoing(copy, open, context, message)
            own["groups"] = inet_options.memberships(copy)
            own["datagrams"] = datagrams.peek(copy) if datagrams.is_udp(copy) else []
            for reason in datagrams.obstacles(message):
                context.refuse(open, reason, "let the program read it first")
            if not any(own.values()):
                del message["firn"]
        if self._labels is None:
            self._labels = hidden.flow_labels()
        for reason in hidden.obstacles(copy, message, over, self._labels):
            context.refuse(open, reason, _CLOSE_IT)
        self._saved.append((open, message))
        return message

    def _add_outgoing(
        self, copy: _socket.socket, open: Open, context: DumpContext, message: dict[str, Any]
    ) -> None:
        """The device for groups, if that is not among the options."""
        if not message["src_port"] or not datagrams.is_udp(copy) or message["opts"].get("so_bound_dev"):
            return
        try:
            more = outgoing.option(copy)
        except LookupError as error:
            reason = f"sends to groups through a device that is known by its index only (IP_MULTICAST_IF): {error}"
            context.refuse(open, reason, "name the device by its address")
            return
        if more:
            own = message["firn"]
            own["options"] = own.get("options", []) + more
            own |= inet_options.devices(own["options"])

    def _listed(self, copy: _socket.socket, inode: int) -> sockdiag.TcpConnection | None:
        """What the kernel's list of connections tells of this one."""
        if copy.family not in self._diag:
            self._diag[copy.family] = sockdiag.tcp_connections(copy.family)
        return self._diag[copy.family].get(inode)

    def _bound_and_shut(self, copy: _socket.socket, inode: int) -> int | None:
        if copy.family not in self._bound:
            self._bound[copy.family] = sockdiag.tcp_bound(copy.family)
        return self._bound[copy.family].get(inode)

    def _add_raw(self, copy: _socket.socket, message: dict[str, Any]) -> None:
        """What raw sockets have and others have not, and a peer without a port."""
        if copy.type == RAW:
            own = raw.collect(copy)
            if own:
                message["ip_opts"]["raw"] = own
        # A connected socket has an address.
        has_none = message["state"] == ESTABLISHED or not any(message["src_addr"])
        peer = None if has_none else self._raw.peer(copy, message["ino"])
        if peer is not None:
            message["state"] = ESTABLISHED
            message["dst_addr"], message["dst_port"] = peer

    def _shutdown(self, copy: _socket.socket, message: dict[str, Any], over: bool) -> int:
        """1 if shut for reading, 2 for writing, 3 for both."""
        if is_tcp(copy):
            return 3 if over else 0
        key = copy.family, copy.proto
        if message["src_port"] and key not in self._shut and datagrams.is_udp(copy):
            self._shut[key] = sockdiag.inet_shutdowns(*key)
        seen = self._shut.get(key, {}).get(message["ino"], 0)
        return seen | (1 if poll.state(copy.fileno(), poll.POLLRDHUP) else 0)

    def finish(self, context: DumpContext) -> None:
        """Whether datagrams can be sent again is another matter for sockets that share their port. Connections are read
        last of all, and only if nothing stands against the dump."""
        for open, message in self._saved:
            if not message.get("firn", {}).get("datagrams"):
                continue
            key = message["proto"], message["src_port"]
            shared = [other for _, other in self._saved if (other["proto"], other["src_port"]) == key]
            for reason in datagrams.shares(message) if len(shared) > 1 else ():
                context.refuse(open, reason, "let the program read them first")
        if self._connections and not context.options.leave_running:
            self._find_holders(context)
        if context.obstacles:
            return
        if context.lock is not None and self._connections:
            context.lock.add([connections.connection(each.message) for each in self._connections])
        if context.lock is not None and self._listeners and not _stays(context):
            context.lock.close_doors([door for _, _, message in self._listeners for door in connections.doors(message)])
            for copy, open, _ in self._listeners:  # who came after we looked, and before the doors were closed
                _tcp_state(copy, open, context)
        if context.backlogs is not None and not context.options.skip_in_flight:
            context.backlogs.finish(self._listeners, context, _stays(context))
        for connection in self._connections:
            for reason in connection.read(context.guard):
                context.obstacles.append(Obstacle(connection.what, reason, _CLOSE_IT))
            if connection.message["state"] == CLOSE:
                _forget_connection(connection.message)

    def _find_holders(self, context: DumpContext) -> None:
        """A connection that somebody outside has too would not end with the tree, but be left dumb."""
        inodes = {each.message["ino"]: each for each in self._connections}
        for inode, holder in holders.of_sockets(set(inodes), {os.getpid(), *context.pids}).items():
            reason = f"is a TCP connection that {holder} has too"
            context.obstacles.append(Obstacle(inodes[inode].what, reason, "close it there"))

    def killed(self) -> None:
        """Nothing of the connections may be heard: our copies, the last, vanish in repair mode."""
        self._close_listeners()
        while self._connections:
            self._connections.pop().vanish()

    def _close_listeners(self) -> None:
        while self._listeners:
            self._listeners.pop()[0].close()

    def save(self, images: ImageDir) -> None:
        """What flows through the connections."""
        for connection in self._connections:
            connection.save(images)

    # -- restore -----------------------------------------------------------------------------------------------------

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The socket *number*. All of them are made when the first is asked for."""
        from firn.resources.sockets.inet_rebuild import InetRebuild

        if self._rebuild is None:
            self._rebuild = InetRebuild(context)
            self._rebuild.run()
        return self._rebuild.take(number)

    def complete(self) -> None:
        """Connections wait to be accepted again."""
        if self._rebuild is not None:
            self._rebuild.complete()

    def quiet(self) -> list[int]:
        """The sockets of connections."""
        return self._rebuild.quiet() if self._rebuild is not None else []

    def resume(self, again: bool = False) -> None:
        """Connections begin to live."""
        if self._rebuild is not None:
            self._rebuild.resume(again)

    def close(self) -> None:
        """Close what was rebuilt and not taken, and our copies of sockets."""
        self._close_listeners()
        while self._connections:
            self._connections.pop().sock.close()
        if self._rebuild is not None:
            self._rebuild.close()


def is_supported(family: int, kind: int, protocol: int) -> bool:
    """Whether firn saves such an internet socket."""
    if kind == RAW:
        return 0 <= protocol <= _HIGHEST_RAW
    return (kind, protocol) in SUPPORTED or (kind == DGRAM and protocol == PINGS.get(family))


def _ended_or_goes_on(copy: _socket.socket, state: int, over: bool) -> dict[str, Any]:
    """Of a TCP socket, for firn_inet: what was not read of a connection that is *over*, or that there never was one; of
    one that goes on, its window's limits."""
    if state in STATES and state != TCP_SYN_SENT:
        told = copy.getsockopt(TCP, TCP_INFO, INFO_SSTHRESH + 4)
        threshold = int.from_bytes(told[INFO_SSTHRESH:], "little")
        return {"clamp": copy.getsockopt(TCP, TCP_WINDOW_CLAMP), "ssthresh": threshold}
    unread = tcp.count(copy, SIOCINQ) if over else 0
    if unread:
        return {"unread": tcp.peek(copy, unread)}
    told = copy.getsockopt(TCP, TCP_INFO, INFO_DELIVERED + 4) if over else b""
    # Not even its SYN has arrived anywhere: connect(2) has failed, without waiting for it.
    return {"refused": True} if len(told) == INFO_DELIVERED + 4 and not any(told[INFO_DELIVERED:]) else {}


def _stays(context: DumpContext) -> bool:
    """Whether the tree lives on after the dump, so that nobody is refused."""
    return bool(context.options.leave_running or context.options.leave_stopped)


def _foreign(copy: _socket.socket) -> list[tuple[str, str]]:
    """Why this is no socket that firn saves at all, and what helps."""
    if not is_supported(copy.family, copy.type, copy.proto):
        return [families.why_refused(copy.fileno())]
    if common.is_elsewhere(copy.fileno()):
        return [("is an internet socket of another network namespace, which is not supported yet", _CLOSE_IT)]
    return []


def _obstacles(copy: _socket.socket) -> list[str]:
    reasons = [f"has the option {text}, which images cannot hold" for text in options.unsupported(copy)]
    if poll.state(copy.fileno()) & poll.POLLERR:
        reasons.append("has an error that was not reported yet, which images cannot hold")
    if datagrams.is_udp(copy) and (copy.getsockopt(UDP, _UDP_CORK) or tcp.count(copy, SIOCOUTQ)):
        reasons.append("is corked, or has datagrams that are not sent yet, which images cannot hold")
    return reasons


def _may_wait(copy: _socket.socket, open: Open, context: DumpContext, waiting: int) -> bool:
    """Whether the dump goes on though clients wait to be accepted; else the socket was refused."""
    if context.options.skip_in_flight:
        return True
    if context.backlogs is not None:
        return context.backlogs.collect(copy, open, context)
    from firn.resources.sockets.backlog import refusal

    context.refuse(open, *refusal(waiting), passing=True)
    return False


def _tcp_state(copy: _socket.socket, open: Open, context: DumpContext) -> tuple[int, int]:
    """(state, backlog) of a TCP socket; state 0 if it was refused."""
    state, _, _, waiting, backlog = INFO.unpack(copy.getsockopt(TCP, TCP_INFO, INFO.size))
    if state == LISTEN:
        return (state, backlog) if not waiting or _may_wait(copy, open, context, waiting) else (0, 0)
    if state in STATES:
        if copy.getsockopt(TCP, TCP_REPAIR):
            # Only a dump that was killed leaves the socket of a running program so; what SO_REUSEADDR was is not known.
            tcp.switch_off(copy, True)
        if not (context.options.tcp_established or context.options.tcp_close):
            help = "--tcp-established saves it; --tcp-close brings it back closed"
            context.refuse(open, f"is a TCP connection ({STATES[state]})", help)
            return 0, 0
        return state, 0
    if state != CLOSE:
        context.refuse(open, "is a TCP connection in the middle of its handshake", "try again", passing=True)
        return 0, 0
    if copy.getsockopt(TCP, TCP_REPAIR):
        context.refuse(open, "is in repair mode (TCP_REPAIR): somebody is at work on it", _CLOSE_IT)
        return 0, 0
    return CLOSE, 0


def _forget_connection(message: dict[str, Any]) -> None:
    """The connection of *message* has ended while the tree was frozen."""
    words = [0] * (1 if message["family"] == AF_INET else 4)
    message |= {"src_addr": words, "dst_addr": words, "src_port": 0, "dst_port": 0, "shutdown": 3}


def _addresses(
    copy: _socket.socket, message: dict[str, Any], over: bool, peer: tuple[bytes, int] | None = None
) -> None:
    """Both addresses, and what they mean. A TCP socket whose connection is over has none any more. *peer*: where it
    goes if getpeername(2) does not say that yet."""
    nowhere: tuple[Any, ...] = ("::" if copy.family == AF_INET6 else "0.0.0.0", 0)
    near = far = nowhere
    if not over:
        near = copy.getsockname()
        try:
            far = copy.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        if peer is not None:
            far = _socket.inet_ntop(copy.family, peer[0]), peer[1]
    if copy.type != STREAM and far is not nowhere:
        message["state"] = ESTABLISHED
    for side, address in (("src", near), ("dst", far)):
        text, _, scope = address[0].partition("%")
        message[f"{side}_addr"] = connections.to_words(text, copy.family)
        message[f"{side}_port"] = address[1]
        index = address[3] if len(address) > 3 else 0
        if index or scope:
            message["ifname"] = _socket.if_indextoname(index) if index else scope
    if copy.family == AF_INET6:
        message["v6only"] = bool(copy.getsockopt(inet_options.IPV6, inet_options.IPV6_V6ONLY))


def is_address(words: list[int], family: int) -> bool:
    """Whether a message has a possible address; CRIU may leave out what is zero."""
    return len(words) in ((0, 1) if family == AF_INET else (0, 4))
