"""Packet sockets (images: packet_sock_entry).

State owned: type, protocol, device, options, memberships, rings, fanout group. Kernel: sock_diag(7) for rings and
memberships (linux/packet_diag.h), getsockopt(2) for the rest (packet(7), linux/if_packet.h). Back in the order that the
kernel wants: filter, version and header options, rings, memberships, bind(2), fanout. CRIU knows devices by their
index; firn keeps their names too, and goes by these.

What goes wrong: packets that wait cannot be sent again without the network hearing them: an obstacle; but those in a
ring that the program has mapped come back (:mod:`rings`). A ring that nobody has mapped comes back empty. A program
that spreads packets over a fanout group cannot be read.
"""

from __future__ import annotations

import _socket
import os
import struct

from firn.abi import nr, poll
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, KernelError, Obstacle, RestoreError
from firn.host import sockdiag
from firn.resources.base import Kind
from firn.resources.sockets import common, options, rings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.sockdiag import PacketSocket
    from firn.resources.base import DumpContext, Open, RestoreContext

AF_PACKET, SOL_PACKET = 17, 263
SO_DETACH_FILTER = 27
RAW, DGRAM = 3, 2
PACKET_ADD_MEMBERSHIP, PACKET_RX_RING, PACKET_COPY_THRESH, PACKET_TX_RING, PACKET_FANOUT = 1, 5, 7, 13, 18
PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF = 6, 7
FIELDS = (
    ("version", 10), ("reserve", 12), ("vnet_hdr", 15), ("loss", 14), ("aux_data", 8), ("orig_dev", 9),
    ("timestamp", 17),
)  # fmt: skip
"""Field of the message, option."""
# PACKET_TX_HAS_OFF, _QDISC_BYPASS, _IGNORE_OUTGOING, _VNET_HDR_SZ
KEPT = (19, 20, 23, 24)
_LEVELS: dict[int, tuple[int, ...]] = {SOL_PACKET: KEPT}
NO_FANOUT = 0xFFFFFFFF
_V3 = 2
_GONE = 0xFFFFFFFF
_SOCKADDR_LL = struct.Struct("<HHiHBB8x")
_MREQ = struct.Struct("<IHH32s")
_REQ, _REQ3 = struct.Struct("<4I"), struct.Struct("<7I")
_ADDRESS_LIMIT = 32
_MEMBERS_LIMIT = 1 << 16
_HELP = "close it before the dump"


class PacketSockets(Kind):
    """All packet sockets of a dump or of a restore."""

    def __init__(self) -> None:
        self._seen: dict[int, PacketSocket] | None = None
        self._ringed: dict[int, _Ringed | None] = {}
        """By inode, those that have rings; None: it was refused."""

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The packet_sock_entry."""
        if self._seen is None:
            self._seen = sockdiag.packet_sockets()
        seen = self._seen.get(open.stat.st_ino)
        if seen is None:
            reason = "is a packet socket of another network namespace, which is not supported yet"
            context.refuse(open, reason, _HELP)
            return None
        copy = _socket.socket(fileno=os.dup(open.copy()))
        try:
            reasons = _obstacles(copy, seen)
            for reason, help in reasons:
                context.refuse(open, reason, help)
            self._ringed[open.stat.st_ino] = None
            if reasons:
                return None
            message = _message(copy, seen, open, context)
            if seen.rx_ring or seen.tx_ring:
                self._ringed[open.stat.st_ino] = _Ringed(message, os.dup(open.copy()), seen)
            return message
        except OSError as error:
            context.refuse(open, f"has options that cannot be read: {error.strerror}", "it may have an eBPF filter")
            return None
        finally:
            copy.close()

    def map_rings(
        self, what: str, inode: int, size: int, places: rings.Places | None, obstacles: list[Obstacle]
    ) -> int:
        """Bytes [0, *size*) of socket *inode* are mapped by a process: have the contents of its rings saved. Returns
        its file id, or 0 if it cannot be saved; *what* names the mapping in messages."""
        if inode not in self._ringed:
            if inode in (self._seen if self._seen is not None else sockdiag.packet_sockets()):
                reason, help = "is the ring of a packet socket to which no descriptor of the tree leads", "keep it open"
            else:
                reason, help = "is memory of a kernel object that cannot be mapped again", "unmap it first"
            obstacles.append(Obstacle(what, reason, help))
            return 0
        ringed = self._ringed[inode]
        if ringed is None:
            return 0  # there is an obstacle already
        if size != sum(ring.size for ring in ringed.rings):
            obstacles.append(Obstacle(what, "is a part of a packet ring, which can only be mapped whole", "unmap it"))
            return 0
        try:
            ringed.save(places)
        except (KernelError, OSError) as error:
            obstacles.append(Obstacle(what, f"is a packet ring that cannot be saved: {error}"))
        number: int = ringed.message["id"]
        return number

    def close(self) -> None:
        """Let go of sockets with rings."""
        for ringed in self._ringed.values():
            if ringed is not None:
                os.close(ringed.fd)
        self._ringed.clear()

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The socket *number*."""
        name = f"packet socket {number}"
        if message["type"] not in (RAW, DGRAM) or message["protocol"] >= 1 << 16:
            raise ImageError(f"{name} has an impossible type or protocol")
        try:
            # Without a protocol: it must not hear anything before it has its filter.
            sock = _socket.socket(AF_PACKET, message["type"] | _socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise RestoreError(f"{name} cannot be made: {error.strerror}") from None
        try:
            _set_up(sock, message)
            common.set_flags(sock.fileno(), message)
            if {"rx_ring", "tx_ring"} & message.keys() and "firn" not in message:
                context.warn(f"{name} has a ring whose contents the images do not tell: it is empty, and begins anew")
            return sock.detach()
        except OSError as error:
            raise RestoreError(f"{name} cannot come back: {error}") from None
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            raise ImageError(f"{name} is impossible: {error}") from None
        finally:
            sock.close()


class _Ringed:
    """A collected socket with rings: its *message*, and a descriptor of ours."""

    def __init__(self, message: dict[str, Any], fd: int, seen: PacketSocket) -> None:
        self.message = message
        self.fd = fd
        self.rings = rings.rings(seen.version, seen.rx_ring, seen.tx_ring)
        self._saved = False

    def save(self, places: rings.Places | None) -> None:
        """Put the contents of the rings into the message, once. Raises :class:`KernelError`, :class:`OSError`."""
        if not self._saved:
            self.message.setdefault("firn", {}).update(rings.collect(self.fd, self.rings, places))
            self._saved = True


def _obstacles(copy: _socket.socket, seen: PacketSocket) -> list[tuple[str, str]]:
    if copy.type not in (RAW, DGRAM):
        return [("is a packet socket of the old kind (SOCK_PACKET), which is not supported", _HELP)]
    found = [(f"is a packet socket with {text}, which images cannot hold", _HELP) for text in options.unsupported(copy)]
    if seen.index == _GONE:
        found.append(("is a packet socket whose network device is gone", _HELP))
    if seen.queued or poll.state(copy.fileno()) & poll.POLLERR:
        reason = "is a packet socket with packets or an error in its queue, and packets cannot be put there again"
        found.append((reason, "let the program read them first, or try again"))
    if seen.fanout is not None and seen.fanout >> 16 & 0xFF in (PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF):
        found.append(("is a packet socket in a fanout group with a BPF program, which cannot be read", _HELP))
    return found


def _ring(ring: tuple[int, ...]) -> dict[str, int]:
    names = ("block_size", "block_nr", "frame_size", "frame_nr", "retire_tmo", "sizeof_priv", "features")
    return dict(zip(names, ring, strict=True))


def _message(copy: _socket.socket, seen: PacketSocket, open: Open, context: DumpContext) -> dict[str, Any]:
    message: dict[str, Any] = {
        "type": seen.type, "protocol": _socket.htons(seen.protocol), "flags": open.flags, "ifindex": seen.index,
        "fown": context.owner(open), "opts": options.collect(copy), "version": seen.version, "reserve": seen.reserve,
        "aux_data": bool(seen.flags & sockdiag.PDI_AUXDATA), "orig_dev": bool(seen.flags & sockdiag.PDI_ORIGDEV),
        "vnet_hdr": bool(seen.flags & sockdiag.PDI_VNETHDR), "loss": bool(seen.flags & sockdiag.PDI_LOSS),
        "timestamp": seen.timestamp, "copy_thresh": seen.copy_thresh,
    }  # fmt: skip
    message["mclist"] = [
        {"index": index, "type": kind, "addr": address} for index, count, kind, address in seen.members
        for _ in range(count)
    ]  # fmt: skip
    if seen.fanout is not None:
        message["fanout"] = copy.getsockopt(SOL_PACKET, PACKET_FANOUT)
    for name, ring in (("rx_ring", seen.rx_ring), ("tx_ring", seen.tx_ring)):
        if ring:
            message[name] = _ring(ring)
    indices = {seen.index, *(member[0] for member in seen.members)} - {0}
    devices = [{"index": index, "name": _socket.if_indextoname(index)} for index in sorted(indices)]
    return message | common.own_fields({"devices": devices, "options": options.kept(copy, SOL_PACKET, KEPT)})


def _set_up(sock: _socket.socket, message: dict[str, Any]) -> None:
    own = message.get("firn", {})
    names = {device.get("index", 0): device.get("name", "") for device in own.get("devices", [])}

    def index_of(index: int) -> int:
        try:
            return _socket.if_nametoindex(names[index]) if index in names else index
        except OSError:
            raise OSError(0, f"the network device {names[index]} is not there") from None

    for name, number in FIELDS:
        if message[name]:
            sock.setsockopt(SOL_PACKET, number, int(message[name]).to_bytes(4, "little"))
    options.set_kept(sock, own.get("options", []), _LEVELS)
    bound = _make_rings(sock, message)
    if bound and not message["protocol"]:
        raise ValueError("frames of a socket that hears nothing")
    if message["copy_thresh"]:
        sock.setsockopt(SOL_PACKET, PACKET_COPY_THRESH, int(message["copy_thresh"]).to_bytes(4, "little"))
    options.restore(sock, message["opts"], guarded=False)
    if not bound:
        options.guard(sock, message["opts"])
    if len(message["mclist"]) > _MEMBERS_LIMIT:
        raise ValueError("too many memberships")
    for member in message["mclist"]:
        address = member["addr"]
        if len(address) > _ADDRESS_LIMIT:
            raise ValueError("a hardware address is too long")
        request = _MREQ.pack(index_of(member["index"]), member["type"], len(address), address)
        sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    if message["ifindex"] or message["protocol"]:
        where = bytearray(_SOCKADDR_LL.pack(AF_PACKET, message["protocol"], index_of(message["ifindex"]), 0, 0, 0))
        syscall("bind", nr.bind, sock.fileno(), address_of(where), len(where))
    if bound:
        if not message["opts"].get("so_filter"):
            sock.setsockopt(options.SOL_SOCKET, SO_DETACH_FILTER, 0)
        options.guard(sock, message["opts"])
    if message.get("fanout", NO_FANOUT) != NO_FANOUT:
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT, message["fanout"].to_bytes(4, "little"))


def _make_rings(sock: _socket.socket, message: dict[str, Any]) -> bool:
    """Make the rings, with what was in them; see :func:`rings.rebuild`."""
    made: list[tuple[int, ...]] = []
    for name, number in (("rx_ring", PACKET_RX_RING), ("tx_ring", PACKET_TX_RING)):
        words = tuple(message[name][field] for field in _ring((0,) * 7)) if name in message else ()
        if words:
            packed = _REQ3.pack(*words) if message["version"] == _V3 else _REQ.pack(*words[:4])
            sock.setsockopt(SOL_PACKET, number, packed)
        made.append(words)
    own = message.get("firn", {})
    if not any(made) or not {"rx_place", "tx_place"} & own.keys():
        return False
    return rings.rebuild(sock, rings.rings(message["version"], *made), own)
