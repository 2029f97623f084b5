"""Socket options of all families (images: sk_opts_entry). Source: include/uapi/asm-generic/socket.h, socket(7).

What CRIU has a field for is always written. Of the rest firn keeps the bytes, where they differ from those of a new
socket of the same kind; so also at the levels of the families, each of which has its list. The owner of the socket's
inode is kept too: it decides who may share its port, and firewalls look at it (fchown(2) of a socket sets it).
docs/socket-options.md has the whole table, with what cannot be read from the kernel or set.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError
from firn.resources.sockets import common

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

SOL_SOCKET = 1
SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 2, 7, 8, 32, 33
SO_LINGER, SO_PASSCRED, SO_PEEK_OFF, SO_BUF_LOCK = 13, 16, 42, 72
SO_BINDTODEVICE, SO_ATTACH_FILTER, SO_MARK = 25, 26, 36
SO_TIMESTAMPING, SO_TIMESTAMPING_NEW, SO_PASSRIGHTS = 37, 65, 83
SO_LOCK_FILTER, SO_MEMINFO, SO_ZEROCOPY = 44, 55, 60
_OPT_ID = 1 << 7
_OPTMEM = 6
"""Place in what SO_MEMINFO tells (linux/sock_diag.h)."""
_SIZE = 256

# Field of sk_opts_entry, option, its value in a new socket.
NUMBERS = (
    ("so_priority", 12, 0), ("so_rcvlowat", 18, 1), ("so_mark", SO_MARK, 0), ("so_oobinline", 10, 0),
)  # fmt: skip
SWITCHES = (
    ("reuseaddr", SO_REUSEADDR), ("so_passcred", SO_PASSCRED), ("so_passsec", 34), ("so_dontroute", 5),
    ("so_no_check", 11), ("so_reuseport", 15), ("so_broadcast", 6), ("so_keepalive", 9),
)  # fmt: skip
TIMEOUTS = (("so_snd_tmo", 21), ("so_rcv_tmo", 20))

# SO_DEBUG, _TIMESTAMP, _TIMESTAMPNS (old and new), _TIMESTAMPING (old and new: these come last, for they decide which
# of both the socket has), _RXQ_OVFL, _WIFI_STATUS, _NOFCS, _SELECT_ERR_QUEUE, _BUSY_POLL, _MAX_PACING_RATE,
# _INCOMING_CPU, _ZEROCOPY, _TXTIME, _PREFER_BUSY_POLL, _BUSY_POLL_BUDGET, _RESERVE_MEM, _TXREHASH, _RCVMARK,
# _PASSPIDFD, _RCVPRIORITY, _PASSRIGHTS, _INQ; at the very end _PEEK_OFF and _LOCK_FILTER, after which no filter can be
# set.
KEPT = (1, 29, 35, 63, 64, SO_TIMESTAMPING, SO_TIMESTAMPING_NEW, 40, 41, 43, 45, 46, 47, 49, 60, 61, 69, 70, 73, 74, 75,
        76, 82, SO_PASSRIGHTS, 84, SO_PEEK_OFF, SO_LOCK_FILTER)  # fmt: skip
"""Options at SOL_SOCKET that CRIU's message has no field for, in the order in which they are set."""

_OPTIONAL = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN, errno.EINVAL)
_TIMEVAL = struct.Struct("<qq")
_INSTRUCTION = struct.Struct("<HBBI")


_new: dict[tuple[Any, ...], list[tuple[int, bytes]]] = {}
"""(Number, value) of options in new sockets, by family, type, protocol, level and numbers."""


def value(sock: socket, level: int, number: int) -> bytes | None:
    """The bytes of an option; None if this kernel or kind of socket does not know it."""
    try:
        return sock.getsockopt(level, number, _SIZE)
    except OSError as error:
        if error.errno in _UNKNOWN:
            return None
        raise


def new(sock: socket) -> socket:
    """A new socket of the same kind."""
    try:
        return _socket.socket(sock.family, sock.type | _socket.SOCK_CLOEXEC, sock.proto)
    except PermissionError:
        # A ping socket, for which we are in the wrong group. Other datagram sockets start with the same values.
        return _socket.socket(sock.family, sock.type | _socket.SOCK_CLOEXEC, 0)


def _of_new(sock: socket, level: int, numbers: tuple[int, ...]) -> list[tuple[int, bytes]]:
    """What a new socket does not know, one that is in use does not know either, and is left out."""
    key = sock.family, sock.type, sock.proto, level, numbers
    if key not in _new:
        fresh = new(sock)
        try:
            _new[key] = [
                (number, usual) for number in numbers if (usual := value(fresh, level, number)) is not None
            ]
        finally:
            fresh.close()
    return _new[key]


def differing(
    sock: socket, level: int, numbers: tuple[int, ...], passed: tuple[int, ...] = ()
) -> list[tuple[int, bytes]]:
    """(Number, value) of the options *numbers* of one level that a new socket has otherwise, without those *passed*
    over."""
    return [
        (number, now)
        for number, usual in _of_new(sock, level, numbers)
        if number not in passed and (now := value(sock, level, number)) is not None and now != usual
    ]


def kept(sock: socket, level: int, numbers: tuple[int, ...], passed: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """firn_option of what :func:`differing` finds."""
    return [
        {"level": level, "number": number, "value": now} for number, now in differing(sock, level, numbers, passed)
    ]


def set_kept(sock: socket, kept: list[dict[str, Any]], allowed: dict[int, tuple[int, ...]]) -> None:
    """Set options again, which must be among those *allowed* by level. Raises :class:`OSError`, :class:`ImageError`."""
    for option in kept:
        level, number = option.get("level", 0), option.get("number", 0)
        if number not in allowed.get(level, ()):
            raise ImageError(f"a socket has the impossible option {level}:{number}")
        try:
            sock.setsockopt(level, number, option.get("value", b""))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (level {level}, number {number})") from None


def unsupported(sock: socket) -> list[str]:
    """The options of *sock* that are set and cannot be saved: those that count what is sent."""
    if sock.family == _socket.AF_UNIX:
        return []
    # Nothing tells how far the count has come, and a new one begins with 0.
    stamps = int.from_bytes((value(sock, SOL_SOCKET, SO_TIMESTAMPING) or b"")[:4], "little")
    return [f"SO_TIMESTAMPING = {stamps:#x} (with SOF_TIMESTAMPING_OPT_ID)"] if stamps & _OPT_ID else []


def memory(sock: socket) -> int:
    """Bytes of memory that the kernel has charged to *sock* for what options have added to it: filters, keys."""
    words = value(sock, SOL_SOCKET, SO_MEMINFO) or b""
    return int.from_bytes(words[4 * _OPTMEM : 4 * _OPTMEM + 4], "little")


def collect(sock: socket) -> dict[str, Any]:
    """The sk_opts_entry of *sock*. Raises :class:`OSError` for a filter that the kernel does not show."""
    entry: dict[str, Any] = {
        "so_sndbuf": sock.getsockopt(SOL_SOCKET, SO_SNDBUF), "so_rcvbuf": sock.getsockopt(SOL_SOCKET, SO_RCVBUF),
        "so_buf_lock": _number(sock, SO_BUF_LOCK, 0),
    }  # fmt: skip
    for name, number in TIMEOUTS:
        entry[f"{name}_sec"], entry[f"{name}_usec"] = _TIMEVAL.unpack(sock.getsockopt(SOL_SOCKET, number, 16))
    for name, number, usual in NUMBERS:
        entry[name] = _number(sock, number, usual) & 0xFFFFFFFF
    for name, number in SWITCHES:
        entry[name] = bool(_number(sock, number, 0))
    if not entry["so_mark"]:
        del entry["so_mark"]
    on, seconds = struct.unpack("<iI", sock.getsockopt(SOL_SOCKET, SO_LINGER, 8))
    if on:
        entry["so_linger"] = seconds
    device = sock.getsockopt(SOL_SOCKET, SO_BINDTODEVICE, 16).rstrip(b"\0")
    if device:
        entry["so_bound_dev"] = device.decode("utf-8", "surrogateescape")
    program = _get_filter(sock.fileno())
    if program:
        entry["so_filter"] = program
    st = os.fstat(sock.fileno())
    own = {"options": kept(sock, SOL_SOCKET, KEPT), "uid": st.st_uid, "gid": st.st_gid}
    return entry | common.own_fields(own)


def _number(sock: socket, number: int, usual: int) -> int:
    """An option's value; *usual* if this kernel or family does not know it."""
    try:
        return sock.getsockopt(SOL_SOCKET, number)
    except OSError as error:
        if error.errno not in _OPTIONAL:
            raise
        return usual


def _get_filter(fd: int) -> list[int]:
    """The classic BPF program of a socket; its length is counted in instructions."""
    size = bytearray(4)
    syscall("getsockopt SO_GET_FILTER", nr.getsockopt, fd, SOL_SOCKET, SO_ATTACH_FILTER, 0, address_of(size))
    count = int.from_bytes(size, "little")
    if not count:
        return []
    code = bytearray(8 * count)
    where = address_of(code)
    syscall("getsockopt SO_GET_FILTER", nr.getsockopt, fd, SOL_SOCKET, SO_ATTACH_FILTER, where, address_of(size))
    return [c << 48 | jt << 40 | jf << 32 | k for c, jt, jf, k in _INSTRUCTION.iter_unpack(code)]


def set_filter(fd: int, program: list[int]) -> None:
    """Attach a classic BPF *program*, its instructions as in sk_opts_entry. Raises :class:`OSError`."""
    code = bytearray()
    for word in program:
        code += _INSTRUCTION.pack(word >> 48 & 0xFFFF, word >> 40 & 0xFF, word >> 32 & 0xFF, word & 0xFFFFFFFF)
    head = bytearray(struct.pack("<H6xQ", len(program), address_of(code)))
    where = address_of(head)
    syscall("setsockopt SO_ATTACH_FILTER", nr.setsockopt, fd, SOL_SOCKET, SO_ATTACH_FILTER, where, len(head))


def set_buffer(sock: socket, number: int, size: int) -> None:
    """SO_SNDBUF or SO_RCVBUF: *size* as the kernel reports it, twice what is set. Beyond the limits if allowed."""
    if not size or sock.getsockopt(SOL_SOCKET, number) == size:
        return
    try:
        sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE if number == SO_SNDBUF else SO_RCVBUFFORCE, size // 2)
    except PermissionError:
        sock.setsockopt(SOL_SOCKET, number, size // 2)


def restore(sock: socket, entry: dict[str, Any], guarded: bool = True) -> None:
    """Set what differs from a new socket; without its filter, if not *guarded*: :func:`guard` sets that.

    Raises :class:`OSError` for what the kernel does not take.
    """
    set_buffer(sock, SO_SNDBUF, entry["so_sndbuf"])
    set_buffer(sock, SO_RCVBUF, entry["so_rcvbuf"])
    if "so_buf_lock" in entry and entry["so_buf_lock"] != _number(sock, SO_BUF_LOCK, entry["so_buf_lock"]):
        sock.setsockopt(SOL_SOCKET, SO_BUF_LOCK, entry["so_buf_lock"])
    for name, number in TIMEOUTS:
        times = entry[f"{name}_sec"], entry[f"{name}_usec"]
        if any(times):
            sock.setsockopt(SOL_SOCKET, number, _TIMEVAL.pack(*times))
    for name, number, usual in NUMBERS:
        if entry.get(name, usual) != usual:
            sock.setsockopt(SOL_SOCKET, number, entry[name].to_bytes(4, "little"))
    for name, number in SWITCHES:
        if entry.get(name):
            sock.setsockopt(SOL_SOCKET, number, 1)
    if "so_linger" in entry:
        sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("<iI", 1, entry["so_linger"]))
    if entry.get("so_bound_dev"):
        sock.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, os.fsencode(entry["so_bound_dev"]))
    own = entry.get("firn", {})
    if own.get("uid") or own.get("gid"):
        os.fchown(sock.fileno(), own.get("uid", 0), own.get("gid", 0))
    set_kept(sock, [option for option in own.get("options", []) if not _locks(option)], {SOL_SOCKET: KEPT})
    if guarded:
        guard(sock, entry)


def guard(sock: socket, entry: dict[str, Any]) -> None:
    """Set the filter, and that it stays. Raises :class:`OSError`."""
    if entry.get("so_filter"):
        set_filter(sock.fileno(), entry["so_filter"])
    locks = [option for option in entry.get("firn", {}).get("options", []) if _locks(option)]
    set_kept(sock, locks, {SOL_SOCKET: KEPT})


def _locks(option: dict[str, Any]) -> bool:
    return (option.get("level"), option.get("number")) == (SOL_SOCKET, SO_LOCK_FILTER)
