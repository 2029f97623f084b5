"""Internet sockets come back, all at once, in the controller (images: see :mod:`inet` beside this).

bind      all exist with their options, and have their addresses
listen    listening ones listen, groups are joined
connect   TCP connections are there, and silent (:mod:`tcp_rebuild`)
fill      datagrams wait where they waited
finish    datagram sockets are connected; shutdown, flags are as they were
resume    at the very end of a restore: connections live

Sockets of one checkpoint that share a port were allowed to when they were bound, which later changes of their options
may hide: so SO_REUSEADDR is set on them while they are bound. With --tcp-close connections come back as sockets that
have none.
"""

from __future__ import annotations

import _socket
import errno
import struct

from firn.errors import ImageError, RestoreError
from firn.resources.base import INETSK
from firn.resources.sockets import common, connections, datagrams, inet_options, options, raw
from firn.resources.sockets.inet import (
    CLOSE,
    ESTABLISHED,
    LISTEN,
    STATES,
    is_address,
    is_supported,
)
from firn.resources.sockets.inet_options import AF_INET, AF_INET6, DGRAM, RAW, STREAM, TCP, UDP, UDPLITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import RestoreContext
    from firn.resources.sockets.admission import Admission, Client
    from firn.resources.sockets.tcp_rebuild import Stream

_NAMES = {(STREAM, TCP): "TCP", (DGRAM, UDP): "UDP", (DGRAM, UDPLITE): "UDP-Lite"}
_SO_PRIORITY = 12
_SHUTDOWN_BOTH = 3


def _groups(entry: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = entry.get("firn", {}).get("groups", [])
    return groups


class Made:
    """A socket of the checkpoint on its way back."""

    __slots__ = ("clients", "entry", "id", "sock", "stream", "taken")

    def __init__(self, number: int, entry: dict[str, Any]) -> None:
        self.id = number
        self.entry = entry
        self.sock: _socket.socket | None = None
        self.stream: Stream | None = None
        self.clients: list[Client] = []
        self.taken = False
        self._check()

    def _check(self) -> None:
        entry = self.entry
        family, state = entry["family"], entry["state"]
        if family not in (AF_INET, AF_INET6) or not is_supported(family, entry["type"], entry["proto"]):
            kind = f"family {family} type {entry['type']} protocol {entry['proto']}"
            raise RestoreError(f"internet socket {self.id} is of a kind that is not supported: {kind}")
        possible = (CLOSE, LISTEN, *STATES) if entry["type"] == STREAM else (CLOSE, ESTABLISHED)
        addresses = all(is_address(entry[f"{side}_addr"], family) for side in ("src", "dst"))
        ports = entry["src_port"] < 1 << 16 and entry["dst_port"] < 1 << 16
        devices = [entry.get("ifname", ""), *(group.get("interface", "") for group in _groups(entry))]
        sane = addresses and ports and entry.get("shutdown", 0) <= _SHUTDOWN_BOTH
        if state not in possible or not sane or any("\0" in device for device in devices):
            raise ImageError(f"internet socket {self.id} has an impossible state, address, port or device")

    def __str__(self) -> str:
        kind = _NAMES.get((self.entry["type"], self.entry["proto"]), "raw" if self.entry["type"] == RAW else "ping")
        return f"{kind} socket {self.id} ({self.shown('src')})"

    listens = property(lambda self: self.entry["state"] == LISTEN)
    connection = property(lambda self: self.entry["type"] == STREAM and self.entry["state"] in STATES)
    bound = property(lambda self: not self.connection and (self.entry["src_port"] or any(self.entry["src_addr"])))
    key = property(lambda self: (self.entry["type"], self.entry["proto"], self.entry["src_port"]))

    def text(self, side: str) -> str:
        """The address of one *side* (src, dst)."""
        family = self.entry["family"]
        words = self.entry[f"{side}_addr"] or [0] * (1 if family == AF_INET else 4)
        return connections.from_words(words, family)

    def shown(self, side: str) -> str:
        """Address and port for people."""
        text = self.text(side)
        return f"{f'[{text}]' if ':' in text else text}:{self.entry[f'{side}_port']}"

    def address(self, side: str) -> tuple[Any, ...]:
        """What bind(2) and connect(2) take. Raises :class:`OSError` if its network device is not there."""
        port = self.entry[f"{side}_port"]
        if self.entry["family"] == AF_INET:
            return self.text(side), port
        text = self.text(side)
        local = text.startswith(("fe8", "fe9", "fea", "feb", "ff")) and self.entry.get("ifname")
        return text, port, 0, _socket.if_nametoindex(self.entry["ifname"]) if local else 0

    def get(self) -> _socket.socket:
        """The socket, which must have been made by now."""
        assert self.sock is not None
        return self.sock


class InetRebuild:
    """Makes all internet sockets of a checkpoint."""

    def __init__(self, context: RestoreContext) -> None:
        self.options = context.options
        self.made = {
            number: Made(number, entry["isk"])
            for (kind, number), entry in context.files.items()
            if kind == INETSK and not context.inherited.supplies(kind, entry["isk"])
        }
        self._context = context
        self._admission: Admission | None = None
        self._sharing: dict[tuple[int, int, int], int] = {}

    def run(self) -> None:
        """All stages but the last."""
        for made in self.made.values():
            if made.connection and not self.options.tcp_close:
                self._load_stream(made)
            if made.listens and connections.clients(made.entry):
                self._load_clients(made)
            if made.bound or made.stream is not None:
                self._sharing[made.key] = self._sharing.get(made.key, 0) + 1
        for stage in (self._make, self._listen, self._connect, self._fill, self._finish):
            for made in self.made.values():
                stage(made)

    def _load_stream(self, made: Made) -> None:
        if not self.options.tcp_established:
            what = f"{made} is connected to {made.shown('dst')} ({STATES[made.entry['state']]})"
            raise RestoreError(what, "--tcp-established brings it back so; --tcp-close brings it back closed")
        from firn.resources.sockets.tcp_rebuild import Stream

        made.stream = Stream(str(made), made.entry, self._context.images)

    def _load_clients(self, made: Made) -> None:
        """Those who wait to be accepted get into the backlog last of all, for they would hear if we failed then."""
        if self.options.tcp_close:
            self._context.warn(f"{made} comes back without the connections that waited to be accepted")
            return
        if not self.options.tcp_established:
            what = f"{made} has connections that wait to be accepted"
            raise RestoreError(what, "--tcp-established brings them back; --tcp-close leaves them out")
        from firn.resources.sockets.admission import Admission, load

        made.clients = load(str(made), made.entry)
        if self._admission is None:
            self._admission = Admission()

    def complete(self) -> None:
        """Clients wait again. Raises :class:`KernelError`, :class:`OSError`."""
        for made in self.made.values():
            if made.clients:
                assert self._admission is not None
                with self._admission.facing(made.get()):
                    for client in made.clients:
                        self._admission.admit(made.get(), client)

    def quiet(self) -> list[int]:
        """Our descriptors of connections, which do not live yet."""
        return [made.get().fileno() for made in self.made.values() if made.stream is not None]

    def resume(self, again: bool) -> None:
        """Connections live. *again*: some may do so already; and one that does not is no reason not to see to others.

        Raises :class:`RestoreError`, if not *again*.
        """
        for made in self.made.values():
            try:
                if made.stream is not None:
                    made.stream.resume(made.address("dst"), again)
            except RestoreError:
                if not again:
                    raise

    def take(self, number: int) -> int:
        """Socket *number*, to be closed by the caller."""
        made = self.made[number]
        made.taken = True
        return made.get().fileno()

    def close(self) -> None:
        """Close what nobody took."""
        if self._admission is not None:
            self._admission.close()
        for made in self.made.values():
            if made.sock is not None:
                # What was taken is closed by its taker.
                made.sock.detach() if made.taken else made.sock.close()

    # -- stages ------------------------------------------------------------------------------------------------------

    def _make(self, made: Made) -> None:
        entry = made.entry
        try:
            made.sock = raw.make(entry["family"], entry["type"], entry["proto"])
        except OSError as error:
            raise RestoreError(f"{made} cannot be made: {error.strerror}") from None
        self._end(made)
        try:
            own = entry["opts"] | ({"so_bound_dev": ""} if _comes_late(entry) else {})
            options.restore(made.sock, own, guarded=not _guarded_late(made))
            inet_options.restore(made.sock, entry)
            raw.restore(made.sock, entry)
            # IP_TOS changes it.
            if made.sock.getsockopt(options.SOL_SOCKET, _SO_PRIORITY) != entry["opts"].get("so_priority", 0):
                made.sock.setsockopt(options.SOL_SOCKET, _SO_PRIORITY, entry["opts"].get("so_priority", 0))
        except OSError as error:
            device = entry["opts"].get("so_bound_dev")
            where = f" (it is bound to the network device {device})" if device else ""
            raise RestoreError(f"an option of {made}{where} cannot be set: {error.strerror}") from None
        except (ValueError, TypeError, struct.error) as error:
            raise ImageError(f"{made} has an impossible option: {error}") from None
        if made.stream is not None:
            made.stream.begin(made.sock)
        if made.bound or made.stream is not None:
            self._bind(made)

    def _end(self, made: Made) -> None:
        """How a connection has ended, where that leaves more than a socket that is shut."""
        own = made.entry.get("firn", {})
        tells = own.get("unread") or own.get("refused")
        if made.entry["type"] != STREAM or made.entry["state"] != CLOSE or not tells:
            return
        from firn.resources.sockets import tcp_rebuild

        if own.get("refused"):
            tcp_rebuild.be_refused(str(made), made.get())
        else:
            tcp_rebuild.end_with(str(made), made.get(), own["unread"], made.entry["opts"])

    def _bind(self, made: Made) -> None:
        sock = made.get()
        if made.stream is None and self._sharing[made.key] > 1:
            sock.setsockopt(options.SOL_SOCKET, options.SO_REUSEADDR, 1)
        try:
            sock.bind(made.address("src"))
        except OSError as error:
            raise _in_the_way(made, error) from None

    def _listen(self, made: Made) -> None:
        sock, entry = made.get(), made.entry
        try:
            if made.listens:
                sock.listen(min(entry["backlog"], 0x7FFFFFFF))
        except OSError as error:
            raise _in_the_way(made, error) from None
        if made.stream is None:
            # Of a connection, repair mode has the option for itself.
            sock.setsockopt(options.SOL_SOCKET, options.SO_REUSEADDR, bool(entry["opts"].get("reuseaddr")))
        for member in _groups(entry):
            try:
                inet_options.join(sock, member)
            except OSError as error:
                where = f"a multicast group on the network device {member.get('interface', '')}"
                raise RestoreError(f"{made} cannot join {where}: {error.strerror}") from None

    def _connect(self, made: Made) -> None:
        if made.stream is not None:
            made.stream.connect(made.address("dst"))

    def _fill(self, made: Made) -> None:
        if datagrams.is_udp(made.get()):
            datagrams.fill(made.get(), str(made), made.entry, self._sharing.get(made.key, 0) > 1)
            if _comes_late(made.entry):
                device = made.entry["opts"]["so_bound_dev"]
                try:
                    made.get().setsockopt(options.SOL_SOCKET, options.SO_BINDTODEVICE, device.encode())
                except OSError as error:
                    what = f"{made} cannot be bound to the network device {device}"
                    raise RestoreError(f"{what}: {error.strerror}") from None

    def _finish(self, made: Made) -> None:
        sock, entry = made.get(), made.entry
        if _guarded_late(made):
            try:
                options.guard(sock, entry["opts"])
            except OSError as error:
                raise RestoreError(f"the filter of {made} cannot be set: {error.strerror}") from None
        if entry["type"] != STREAM and entry["state"] == ESTABLISHED:
            try:
                sock.connect(made.address("dst"))
            except OSError as error:
                raise RestoreError(f"{made} cannot be connected to {made.shown('dst')}: {error.strerror}") from None
        if entry.get("shutdown") and not made.connection and not entry.get("firn", {}).get("refused"):
            try:
                sock.shutdown(entry["shutdown"] - 1)  # SHUT_RD 0, SHUT_WR 1, SHUT_RDWR 2
            except OSError as error:
                # The kernel says so of every socket that is not connected, and shuts it nevertheless.
                if error.errno != errno.ENOTCONN:
                    raise
        common.set_flags(sock.fileno(), entry)


def _guarded_late(made: Made) -> bool:
    """Whether a socket gets its filter only when it has its data again, which the filter may be younger than."""
    return made.stream is not None or bool(made.entry.get("firn", {}).get("datagrams"))


def _comes_late(entry: dict[str, Any]) -> bool:
    """Whether a socket is bound to its device only when its datagrams wait again: they come from another device."""
    has_device = entry["type"] == DGRAM and bool(entry["opts"].get("so_bound_dev"))
    return has_device and entry["proto"] in (UDP, UDPLITE) and bool(entry.get("firn", {}).get("datagrams"))


def _in_the_way(made: Made, error: OSError) -> RestoreError:
    helps = {
        errno.EADDRINUSE: "end the process that has it, or give its socket with --inherit-fd if they have shared it; a "
        "connection that is over keeps it for a minute (TIME-WAIT)",
        errno.EADDRNOTAVAIL: "give this machine the address",
    }  # fmt: skip
    return RestoreError(f"{made} cannot have its address: {error.strerror}", helps.get(error.errno or 0, ""))
