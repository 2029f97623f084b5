"""Netlink sockets (images: netlink_sk_entry).

State owned: protocol, port id, groups, destination, options. Kernel: getsockname(2), getpeername(2) and getsockopt(2)
on a copy of the descriptor, NETLINK_LIST_MEMBERSHIPS for groups beyond the 32nd, which CRIU has no place for, and
/proc/net/netlink for what waits (netlink(7)). Back by bind(2), NETLINK_ADD_MEMBERSHIP, connect(2).

What goes wrong: a message that waits bears the kernel as its sender, and nobody else can send such a one; so it is an
obstacle, as is a dump that the kernel has not finished. Some subsystems remember a socket by its port id and forget
it when the socket is closed: netfilter's packet queues and logs show that, and are refused; so are process events.
Sockets with groups are opened when all tasks exist, so that they do not hear of the restore itself.
"""

from __future__ import annotations

import _socket
import os

from firn.abi import poll
from firn.errors import ImageError, RestoreError
from firn.resources.base import Kind
from firn.resources.sockets import common, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, Open, RestoreContext

AF_NETLINK = 16
SOL_NETLINK = 270
NETLINK_CONNECTOR, NETLINK_NETFILTER = 11, 12
NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS = 1, 9
# NETLINK_PKTINFO, _BROADCAST_ERROR, _NO_ENOBUFS, _LISTEN_ALL_NSID, _CAP_ACK, _EXT_ACK, _GET_STRICT_CHK
KEPT = (3, 4, 5, 8, 10, 11, 12)
"""Options of linux/netlink.h, all of which firn keeps the bytes of."""
_LEVELS: dict[int, tuple[int, ...]] = {SOL_NETLINK: KEPT}
RAW, DGRAM = 3, 2
CONNECTED, CLOSE = 1, 7
_WORD = 32
_MOST_GROUPS = 1024
"""Bytes; no more can be asked for."""
_PROCESS_EVENTS = 1
_MEMORY, _DUMPING, _INODE = 4, 6, 9
"""Columns of /proc/net/netlink: bytes in the receive queue, an unfinished dump, the socket."""


class NetlinkSockets(Kind):
    """All netlink sockets of a dump or of a restore."""

    def __init__(self) -> None:
        self._seen: dict[int, list[str]] | None = None

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The netlink_sk_entry."""
        copy = _socket.socket(fileno=os.dup(open.copy()))
        try:
            if common.is_elsewhere(copy.fileno()):
                reason = "is a netlink socket of another network namespace, which is not supported yet"
                context.refuse(open, reason, "close it before the dump")
                return None
            for reason, help in self._obstacles(copy, open.stat.st_ino):
                context.refuse(open, reason, help)
            return _message(copy, open, context)
        except OSError as error:
            context.refuse(open, f"has options that cannot be read: {error.strerror}", "it may have an eBPF filter")
            return None
        finally:
            copy.close()

    def _obstacles(self, copy: _socket.socket, inode: int) -> list[tuple[str, str]]:
        if self._seen is None:
            with open("/proc/net/netlink", encoding="ascii") as file:
                self._seen = {int(line.split()[_INODE]): line.split() for line in file.read().splitlines()[1:]}
        found = []
        line = self._seen.get(inode, [])
        if line and line[_DUMPING] not in ("0", "(null)"):
            found.append(("is a netlink socket with a listing that the kernel has not finished", "try again"))
        elif poll.state(copy.fileno(), poll.POLLIN | poll.POLLERR) or (line and line[_MEMORY] != "0"):
            reason = "is a netlink socket with messages or an error in its queue, which nobody but the kernel can send"
            found.append((reason, "let the program read them first, or try again"))
        port = copy.getsockname()[0]
        if port and copy.proto == NETLINK_NETFILTER:
            found += [
                (f"is a netlink socket that serves a netfilter {what}", "it must be set up again after a restore")
                for what in ("queue", "log")
                if str(port) in _ports(f"/proc/net/netfilter/nfnetlink_{what}")
            ]
        if copy.proto == NETLINK_CONNECTOR and _groups(copy)[:1] and _groups(copy)[0] & _PROCESS_EVENTS:
            reason = "is a netlink socket that listens to process events (CN_IDX_PROC), which it has to ask for itself"
            found.append((reason, "close it before the dump"))
        return found

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Those that listen to groups must not hear what the restore does."""
        return any(message["groups"]) or bool(message.get("firn", {}).get("groups"))

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The socket *number*."""
        name = f"netlink socket {number}"
        try:
            sock = _socket.socket(AF_NETLINK, RAW | _socket.SOCK_CLOEXEC, message["protocol"])
        except (OSError, OverflowError) as error:
            raise RestoreError(f"{name} (protocol {message['protocol']}) cannot be made: {error}") from None
        try:
            options.restore(sock, message["opts"])
            options.set_kept(sock, message.get("firn", {}).get("options", []), _LEVELS)
            _place(sock, message)
            common.set_flags(sock.fileno(), message)
            return sock.detach()
        except OSError as error:
            raise RestoreError(f"{name} (port id {message['portid']}) cannot come back: {error.strerror}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ImageError(f"{name} is impossible: {error}") from None
        finally:
            sock.close()


def _ports(path: str) -> list[str]:
    """The port ids (second column) in a table of netfilter; none if the kernel has none."""
    try:
        with open(path, encoding="ascii") as file:
            return [line.split()[1] for line in file]
    except FileNotFoundError:
        return []


def _groups(sock: _socket.socket) -> bytes:
    """A bit for each group; bit 0 of the first byte is group 1."""
    return sock.getsockopt(SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, _MOST_GROUPS)


def _message(copy: _socket.socket, open: Open, context: DumpContext) -> dict[str, Any]:
    port = copy.getsockname()[0]
    peer, peer_groups = copy.getpeername()
    groups = _groups(copy)
    first = int.from_bytes(groups[:4], "little")
    message: dict[str, Any] = {
        "ino": open.stat.st_ino, "protocol": copy.proto, "state": CONNECTED if peer or peer_groups else CLOSE,
        "flags": open.flags, "portid": port, "groups": [first] if first else [], "dst_portid": peer,
        "dst_group": peer_groups.bit_length(), "fown": context.owner(open), "opts": options.collect(copy),
    }  # fmt: skip
    own = {"groups": groups.rstrip(b"\0") if any(groups[4:]) else b"", "options": options.kept(copy, SOL_NETLINK, KEPT)}
    return message | common.own_fields(own)


def _place(sock: _socket.socket, message: dict[str, Any]) -> None:
    """Port id, groups and destination."""
    words = message["groups"]
    if len(words) > 1 or message["dst_group"] > _WORD:
        raise ValueError(f"{len(words)} words of groups, or destination group {message['dst_group']}")
    if message["portid"] or any(words):
        sock.bind((message["portid"], words[0] if words else 0))
    for at, byte in enumerate(message.get("firn", {}).get("groups", b"")):
        for bit in range(8):
            if byte >> bit & 1 and 8 * at >= _WORD:
                sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 8 * at + bit + 1)
    if message["dst_portid"] or message["dst_group"]:
        group = message["dst_group"]
        sock.connect((message["dst_portid"], 1 << group - 1 if group else 0))
