"""Packet sockets (images: packet_sock_entry).

State owned: type, protocol, device, options, memberships, rings, fanout group. Kernel: sock_diag(7) for rings and
memberships (linux/packet_diag.h), getsockopt(2) for the rest (packet(7), linux/if_packet.h). Back in the order that the
kernel wants: filter, version and header options, rings, memberships, bind(2), fanout. CRIU knows devices by their
index; firn keeps their names too, and goes by these.

What goes wrong: packets that wait cannot be sent again without the network hearing them: an obstacle. A mapped ring is
an obstacle of the memory that it is mapped into: where the kernel writes next in it cannot be set. A ring that nobody
has mapped comes back empty. A program that spreads packets over a fanout group cannot be read.
"""

from __future__ import annotations

import _socket
import os
import struct

from firn.abi import nr, poll
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, RestoreError
from firn.host import sockdiag
from firn.resources.base import Kind
from firn.resources.sockets import common, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.sockdiag import PacketSocket
    from firn.resources.base import DumpContext, Open, RestoreContext

AF_PACKET, SOL_PACKET = 17, 263
RAW, DGRAM = 3, 2
PACKET_ADD_MEMBERSHIP, PACKET_RX_RING, PACKET_TX_RING, PACKET_FANOUT = 1, 5, 13, 18
PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF = 6, 7
FIELDS = (
    ("version", 10), ("reserve", 12), ("vnet_hdr", 15), ("loss", 14), ("aux_data", 8), ("orig_dev", 9),
    ("timestamp", 17), ("copy_thresh", 7),
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
            return None if reasons else _message(copy, seen, open, context)
        except OSError as error:
            context.refuse(open, f"has options that cannot be read: {error.strerror}", "it may have an eBPF filter")
            return None
        finally:
            copy.close()

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
            return sock.detach()
        except OSError as error:
            raise RestoreError(f"{name} cannot come back: {error}") from None
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            raise ImageError(f"{name} is impossible: {error}") from None
        finally:
            sock.close()


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

    options.restore(sock, message["opts"])
    for name, number in FIELDS:
        if message[name]:
            sock.setsockopt(SOL_PACKET, number, int(message[name]).to_bytes(4, "little"))
    options.set_kept(sock, own.get("options", []), _LEVELS)
    for name, number in (("rx_ring", PACKET_RX_RING), ("tx_ring", PACKET_TX_RING)):
        if name in message:
            words = [message[name][field] for field in _ring((0,) * 7)]
            packed = _REQ3.pack(*words) if message["version"] == _V3 else _REQ.pack(*words[:4])
            sock.setsockopt(SOL_PACKET, number, packed)
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
    if message.get("fanout", NO_FANOUT) != NO_FANOUT:
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT, message["fanout"].to_bytes(4, "little"))
