"""The network device that a UDP socket sends to groups through, where IP_MULTICAST_IF was given its index (ip(7)).

getsockopt(2) tells an address at most, and not the index (do_ip_getsockopt in net/ipv4/ip_sockglue.c). Whether there
is one shows in sendmsg(2) with MSG_PROBE and MSG_CONFIRM, which looks for a way and sends nothing: with a source that
is no address of this machine, as IP_TRANSPARENT allows, a way to a group is only found if the device is known
(ip_route_output_key_hash_rcu in net/ipv4/route.c). Which device it is shows in a datagram to all hosts (224.0.0.1)
that may not leave this one (IP_MULTICAST_TTL 0), and arrives at a socket of ours. Both only of a socket that has a
port: any other would be given one.
"""

from __future__ import annotations

import _socket
import struct

from firn.resources.sockets import options
from firn.resources.sockets.inet_options import AF_INET, DGRAM, IP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_IP_PKTINFO, _IP_TRANSPARENT = 8, 19
_IP_MULTICAST_IF, _IP_MULTICAST_TTL, _IP_MULTICAST_LOOP = 32, 33, 34
_MSG_PROBE, _MSG_CONFIRM, _MSG_DONTWAIT = 0x10, 0x800, 0x40
_INFO = struct.Struct("<i4s4s")
"""struct in_pktinfo: device, our address, the address in the packet."""
_MREQN = struct.Struct("<4s4si")
_STAMPS_OF_SENT = 0x303
"""SOF_TIMESTAMPING_TX_* (linux/net_tstamp.h): what is sent would be told of."""
_NOBODY = bytes((240, 0, 0, 1))
_EVERYBODY = "224.0.0.1"
_PATIENCE_S = 0.25


def option(sock: _socket.socket) -> list[dict[str, object]]:
    """IP_MULTICAST_IF (firn_option, a struct ip_mreqn) of a UDP socket that has a port; empty if it has none, or one
    that getsockopt(2) tells. Raises :class:`LookupError` if it has one, and which is not found."""
    if (sock.family, sock.type) != (AF_INET, DGRAM) or any(sock.getsockopt(IP, _IP_MULTICAST_IF, 4)):
        return []
    stamps = options.value(sock, options.SOL_SOCKET, options.SO_TIMESTAMPING) or bytes(4)
    if int.from_bytes(stamps[:4], "little") & _STAMPS_OF_SENT or not _has(sock):
        return []
    return [{"level": IP, "number": _IP_MULTICAST_IF, "value": _MREQN.pack(bytes(4), bytes(4), _find(sock))}]


class _With:
    """Options of a socket that are others for a moment."""

    def __init__(self, sock: _socket.socket, wanted: Iterable[tuple[int, int]]) -> None:
        self._sock = sock
        self._wanted = list(wanted)
        self._before = [(number, sock.getsockopt(IP, number)) for number, _ in self._wanted]

    def __enter__(self) -> None:
        for number, value in self._wanted:
            self._sock.setsockopt(IP, number, value)

    def __exit__(self, *_: object) -> None:
        for number, value in self._before:
            self._sock.setsockopt(IP, number, value)


def _has(sock: _socket.socket) -> bool:
    """Whether a device is set."""
    control = [(IP, _IP_PKTINFO, _INFO.pack(0, _NOBODY, bytes(4)))]
    try:
        with _With(sock, [(_IP_TRANSPARENT, 1)]):
            sock.sendmsg([], control, _MSG_PROBE | _MSG_CONFIRM | _MSG_DONTWAIT, (_EVERYBODY, 9))
    except OSError:
        return False
    return True


def _find(sock: _socket.socket) -> int:
    """The index of the device."""
    ours = _socket.socket(AF_INET, DGRAM | _socket.SOCK_CLOEXEC)
    try:
        ours.bind(("", 0))
        ours.setsockopt(IP, _IP_PKTINFO, 1)
        ours.settimeout(_PATIENCE_S)
        with _With(sock, [(_IP_MULTICAST_TTL, 0), (_IP_MULTICAST_LOOP, 1)]):
            sock.sendto(b"", _MSG_DONTWAIT, (_EVERYBODY, ours.getsockname()[1]))
        _, control, _, _ = ours.recvmsg(1, 64)
        return next(int(_INFO.unpack(data)[0]) for level, kind, data in control if (level, kind) == (IP, _IP_PKTINFO))
    except (OSError, StopIteration) as error:
        raise LookupError("no datagram through it arrives") from error
    finally:
        ours.close()
