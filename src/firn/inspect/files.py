"""Open file descriptions in words, for :mod:`firn.inspect`."""

from __future__ import annotations

import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Entry = dict[str, Any]

KINDS = {
    1: ("file", "reg"), 2: ("pipe", "pipe"), 3: ("fifo", "fifo"), 4: ("inet socket", "isk"), 5: ("unix socket", "usk"),
    6: ("eventfd", "efd"), 7: ("epoll", "epfd"), 8: ("inotify", "ify"), 9: ("signalfd", "sgfd"),
    10: ("packet socket", "psk"), 11: ("terminal", "tty"), 12: ("fanotify", "ffy"), 13: ("netlink socket", "nlsk"),
    14: ("namespace", "nsf"), 15: ("tun device", "tunf"), 16: ("external", "ext"), 17: ("timerfd", "tfd"),
    18: ("memfd", "memfd"), 19: ("bpf map", "bpf"), 20: ("pidfd", "pidfd"),
}  # fmt: skip
"""fd_types of the images -> (name here, field of file_entry)."""

_ACCESS = {0: "r", 1: "w", 2: "rw", 3: "-"}
_O_APPEND, _O_NONBLOCK, _O_PATH = 0o2000, 0o4000, 0o10000000
_SOCKET_TYPES = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6", 136: "udplite", 255: "raw"}
_STATES = {
    1: "established", 2: "syn-sent", 3: "syn-received", 4: "fin-wait-1", 5: "fin-wait-2", 6: "time-wait", 7: "closed",
    8: "close-wait", 9: "last-ack", 10: "listening", 11: "closing",
}  # fmt: skip
"""include/net/tcp_states.h"""
CLOCKS = {0: "realtime", 1: "monotonic", 7: "boottime", 8: "realtime-alarm", 9: "boottime-alarm"}
_NAMESPACES = {
    1 << 7: "time", 1 << 17: "mnt", 1 << 25: "cgroup", 1 << 26: "uts", 1 << 27: "ipc", 1 << 28: "user", 1 << 29: "pid",
    1 << 30: "net",
}  # fmt: skip
"""CLONE_NEW* (include/uapi/linux/sched.h)."""


def describe(kind: int, message: Entry, tables: dict[str, dict[int, Entry]]) -> Entry:
    """What a description is: ``kind``, ``name`` (one line of text), ``access`` (r, w, rw, - for a path only), ``flags``
    and what else there is of its kind.

    *tables*: memfds by inode_id, terminals by id, remaps and regular files by file id, and what is queued (``bytes``)
    in pipes by pipe_id, in sockets by file id.
    """
    flags: int = message.get("uflags" if kind == 5 else "flags", 0)
    found: Entry = {"kind": KINDS[kind][0], "name": _NAMES.get(kind, _plain)(message, tables)}
    if kind in (1, 2, 11, 18):
        found["access"] = "-" if flags & _O_PATH else _ACCESS[flags & 3]
    if kind in (1, 18):
        # A character device or a directory has no position: all bits are set.
        found["position"] = None if message["pos"] == (1 << 64) - 1 else message["pos"]
    words = ((_O_APPEND, "append"), (_O_NONBLOCK, "nonblock"), (_O_PATH, "path"))
    found["flags"] = [word for bit, word in words if flags & bit]
    if kind == 1:
        remap = tables["remaps"].get(message["id"])
        found["unlinked"] = remap is not None
    if kind in (2, 3):
        found["pipe"] = message["pipe_id"]
    if kind in (4, 5):
        found["state"] = _state(kind, message)
    if kind in (2, 3, 5):
        queue = tables["pipes"].get(message["pipe_id"]) if kind != 5 else tables["sockets"].get(message["id"])
        found["queued_bytes"] = queue["bytes"] if queue else 0
    return found


def _plain(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    return ""


def _file(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    return str(message["name"])


def _fifo(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    named = tables["regular"].get(message.get("regf_id", 0)) or tables["regular"].get(message["id"])
    return str(named["name"]) if named else f"fifo:[{message['pipe_id']}]"


def _memfd(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    inode = tables["memfds"].get(message["inode_id"])
    return str(inode["name"]) if inode else f"inode {message['inode_id']}"


def _terminal(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    named = tables["regular"].get(message.get("regf_id", 0))
    info = tables["terminals"].get(message["tty_info_id"], {})
    index = f" pts/{info['pty']['index']}" if "pty" in info else ""
    return f"{named['name'] if named else 'terminal'}{index}"


def _address(words: list[int], port: int) -> str:
    """Address words are the bytes on the wire, read as little-endian numbers."""
    raw = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words)
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{port}"
    if len(raw) == 16:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{port}"
    return f"?:{port}"


def _state(kind: int, message: Entry) -> str:
    # Datagram sockets use the states of TCP: connected or not.
    if message["state"] == 7 and (message["type"] == 2 or kind == 5):
        return "unconnected"
    return _STATES.get(message["state"], str(message["state"]))


def _inet(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    protocol = _PROTOCOLS.get(message["proto"], f"protocol {message['proto']}")
    text = f"{protocol} {_address(message['src_addr'], message['src_port'])}"
    if message["dst_port"] or any(message["dst_addr"]):
        text += f" to {_address(message['dst_addr'], message['dst_port'])}"
    waiting = len(message.get("firn", {}).get("clients", ()))
    return text + (f", {waiting} waiting to be accepted" if waiting else "")


def _unix(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    raw: bytes = message["name"]
    # An abstract name begins with a zero byte (unix(7)); most have zero bytes up to the greatest length behind them.
    text = ("@" if raw[:1] == b"\0" else "") + raw.strip(b"\0").decode("utf-8", "surrogateescape")
    kind = _SOCKET_TYPES.get(message["type"], f"type {message['type']}")
    peer = f" peer socket:[{message['peer']}]" if message["peer"] else ""
    return f"{kind} socket:[{message['ino']}]" + (f" {text}" if text else "") + peer


def _timer(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    text = CLOCKS.get(message["clockid"], f"clock {message['clockid']}")
    if message["vsec"] or message["vnsec"]:
        text += f" {message['vsec'] + message['vnsec'] / 1e9:.3f} s left"
    if message["isec"] or message["insec"]:
        text += f" every {message['isec'] + message['insec'] / 1e9:.3f} s"
    return text


def _namespace(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
    return f"{_NAMESPACES.get(message['ns_cflag'], hex(message['ns_cflag']))} {message['ns_id']}"


def _count(field: str, what: str) -> Callable[[Entry, dict[str, dict[int, Entry]]], str]:
    def text(message: Entry, tables: dict[str, dict[int, Entry]]) -> str:
        number = len(message.get(field, ()))
        return f"{number} {what}{'' if number == 1 else 's'}"

    return text


_NAMES: dict[int, Callable[[Entry, dict[str, dict[int, Entry]]], str]] = {
    1: _file,
    2: lambda message, tables: f"pipe:[{message['pipe_id']}]",
    3: _fifo,
    4: _inet,
    5: _unix,
    6: lambda message, tables: f"counter {message['counter']}",
    7: _count("tfd", "target"),
    8: _count("wd", "watch"),
    9: lambda message, tables: f"signals {message['sigmask']:#x}",
    11: _terminal,
    12: _count("mark", "mark"),
    13: lambda message, tables: f"protocol {message['protocol']}",
    14: _namespace,
    15: lambda message, tables: str(message.get("netdev", "")),
    17: _timer,
    18: _memfd,
    19: lambda message, tables: str(message["map_name"]),
    20: lambda message, tables: f"process {message['nspid']}",
}
