"""What internet sockets have and the kernel does not show, or only once: found by its traces, and refused.

- Counters of MSG_ZEROCOPY (linux/errqueue.h): a new socket begins with 0, and its program would wait for ever for the
  number that it expects. Where nothing can have been sent yet, there is no count.
- Keys for signatures (TCP_MD5SIG, TCP_AO_ADD_KEY) of a socket that is not listed with them, as it neither listens nor
  is connected: the memory for them is charged to the socket.
- The SYN of a connection (TCP_SAVE_SYN): who reads it takes it. Asked for with too little room the kernel only tells
  that it is there (do_tcp_getsockopt in net/ipv4/tcp.c).
- Leases of flow labels: /proc/net/ip6_flowlabel has all labels, and to renew one works only for a socket that has it.
- Multicast routing: one socket of those for IGMP or ICMPv6 is the router's; mc_forwarding tells that there is one.
"""

from __future__ import annotations

import _socket
import errno
import struct

from firn.abi.tcp import TCP_CLOSE, TCP_LISTEN, TCP_SAVED_SYN
from firn.resources.sockets import options
from firn.resources.sockets.inet_options import AF_INET6, IPV6, RAW, STREAM, TCP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FLOWLABEL_MGR, _RENEW, _ANY_SHARE = 32, 2, 1
_LEASE = struct.Struct("<16s4sBBHHHI")
"""struct in6_flowlabel_req (linux/in6.h): address, label in network order, action, share, flags, times."""
_STICKY = (54, 55, 57, 59)
"""IPV6_HOPOPTS, _RTHDRDSTOPTS, _RTHDR, _DSTOPTS: headers whose memory is charged too."""
_ROUTERS = {2: "/proc/sys/net/ipv4/conf/all/mc_forwarding", 58: "/proc/sys/net/ipv6/conf/all/mc_forwarding"}
"""By protocol of the raw socket (IGMP, ICMPv6)."""


def obstacles(sock: _socket.socket, message: dict[str, Any], over: bool, labels: list[int]) -> list[str]:
    """Why the socket of an inet_sk_entry cannot be saved. *over*: of TCP, its connection has ended; *labels*:
    :func:`flow_labels`."""
    found = []
    tcp = sock.type == STREAM and sock.proto == TCP
    state = message["state"]
    if tcp and state == TCP_CLOSE and not over and _has_more(sock, message):
        found.append("has keys for signatures (TCP_MD5SIG, TCP_AO), which the kernel does not tell")
    if tcp and state not in (TCP_CLOSE, TCP_LISTEN) and _has_syn(sock):
        found.append("has the SYN of its connection (TCP_SAVE_SYN), which was not read")
    sends = state not in (TCP_CLOSE, TCP_LISTEN) if tcp else message["src_port"]
    if sends and options.value(sock, options.SOL_SOCKET, options.SO_ZEROCOPY) == b"\1\0\0\0":
        found.append("has SO_ZEROCOPY, and the kernel does not tell how much was sent so")
    if sock.family == AF_INET6 and any(_has_lease(sock, label) for label in labels):
        found.append("has a lease of a flow label (IPV6_FLOWLABEL_MGR), which cannot be had again")
    if sock.type == RAW and _routes(sock.proto):
        found.append("is a raw socket of a kind that multicast routing is done with, and somebody here does it")
    return found


def _has_more(sock: _socket.socket, message: dict[str, Any]) -> bool:
    """Whether memory is charged to a TCP socket for something else than its filter and header options."""
    if "so_filter" in message["opts"] or not options.memory(sock):
        return False
    own = message.get("firn", {}).get("options", [])
    return not any((each["level"], each["number"]) in {(IPV6, number) for number in _STICKY} for each in own)


def _has_syn(sock: _socket.socket) -> bool:
    try:
        sock.getsockopt(TCP, TCP_SAVED_SYN, 1)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOPROTOOPT):
            raise
        return error.errno == errno.EINVAL
    return False


def flow_labels() -> list[int]:
    """All flow labels that somebody has a lease of."""
    try:
        with open("/proc/self/net/ip6_flowlabel", encoding="ascii") as file:
            return [int(line.split()[0], 16) for line in file.read().splitlines()[1:]]
    except FileNotFoundError:
        return []


def _has_lease(sock: _socket.socket, label: int) -> bool:
    request = _LEASE.pack(bytes(16), label.to_bytes(4, "big"), _RENEW, _ANY_SHARE, 0, 0, 0, 0)
    try:
        sock.setsockopt(IPV6, _FLOWLABEL_MGR, request)
    except OSError:
        return False
    return True


def _routes(protocol: int) -> bool:
    if protocol not in _ROUTERS:
        return False
    try:
        with open(_ROUTERS[protocol], "rb") as file:
            return int(file.read()) > 0
    except FileNotFoundError:
        return False
