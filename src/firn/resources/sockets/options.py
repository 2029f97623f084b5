"""Socket options (images: sk_opts_entry). Source: include/uapi/asm-generic/socket.h, socket(7)."""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

SOL_SOCKET = 1
SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 7, 8, 32, 33
SO_LINGER, SO_PASSCRED, SO_PEEK_OFF, SO_BUF_LOCK = 13, 16, 42, 72
SO_BINDTODEVICE, SO_ATTACH_FILTER = 25, 26

# Field of sk_opts_entry, option, its value in a new socket.
NUMBERS = (
    ("so_priority", 12, 0), ("so_rcvlowat", 18, 1), ("so_mark", 36, 0), ("so_oobinline", 10, 0),
)  # fmt: skip
SWITCHES = (
    ("reuseaddr", 2), ("so_passcred", SO_PASSCRED), ("so_passsec", 34), ("so_dontroute", 5), ("so_no_check", 11),
    ("so_reuseport", 15), ("so_broadcast", 6), ("so_keepalive", 9),
)  # fmt: skip
TIMEOUTS = (("so_snd_tmo", 21), ("so_rcv_tmo", 20))

# What the images have no field for: option, its value in a new socket, name.
UNKNOWN = (
    (29, 0, "SO_TIMESTAMP"), (35, 0, "SO_TIMESTAMPNS"), (44, 0, "SO_LOCK_FILTER"), (76, 0, "SO_PASSPIDFD"),
    (83, 1, "SO_PASSRIGHTS"), (SO_PEEK_OFF, -1, "SO_PEEK_OFF"), (37, 0, "SO_TIMESTAMPING"), (40, 0, "SO_RXQ_OVFL"),
)  # fmt: skip
_OPTIONAL = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
_TIMEVAL = struct.Struct("<qq")
_INSTRUCTION = struct.Struct("<HBBI")


def unsupported(sock: socket) -> list[str]:
    """The options of *sock* that are set and cannot be saved."""
    return [f"{name} = {value}" for number, usual, name in UNKNOWN if (value := _number(sock, number, usual)) != usual]


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
    return entry


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


def _set_filter(fd: int, program: list[int]) -> None:
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


def restore(sock: socket, entry: dict[str, Any]) -> None:
    """Set what differs from a new socket. Raises :class:`OSError` for what the kernel does not take."""
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
    if entry.get("so_filter"):
        _set_filter(sock.fileno(), entry["so_filter"])
