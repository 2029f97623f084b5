"""Terminals: ioctl_tty(2), termios, poll(2) conditions. Sources: include/uapi/asm-generic/{ioctls,termbits,poll}.h."""

from __future__ import annotations

import struct

from firn.abi import nr
from firn.abi.libc import address_of, syscall

TCSETS, TCGETS2, TCSETS2 = 0x5402, 0x802C542A, 0x402C542B
TCXONC, TCOOFF, TCOON = 0x540A, 0, 1
TIOCEXCL, TIOCSCTTY, TIOCSPGRP = 0x540C, 0x540E, 0x5410
TIOCGWINSZ, TIOCSWINSZ = 0x5413, 0x5414
FIONREAD, TIOCPKT, TIOCNOTTY = 0x541B, 0x5420, 0x5422
TIOCGPTN, TIOCSPTLCK, TIOCGDEV = 0x80045430, 0x40045431, 0x80045432
TIOCGPKT, TIOCGPTLCK, TIOCGEXCL = 0x80045438, 0x80045439, 0x80045440
TIOCGPTPEER, TIOCGSID = 0x5441, 0x5429
TIOCGLCKTRMIOS, TIOCSLCKTRMIOS = 0x5456, 0x5457

TERMIOS = struct.Struct("<IIIIB19sII")
"""struct termios2: input, output, control, local flags, line discipline, characters, input and output speed. Without
the speeds (the first 36 bytes) it is struct termios."""
TERMIOS_SIZE = 36
CHARACTERS = 19
VMIN, VEOF, VSTOP, VEOL, VLNEXT, VEOL2 = 6, 4, 9, 11, 15, 16
ICANON, IEXTEN, EXTPROC = 0o2, 0o100000, 0o200000
CBAUD, BOTHER = 0o10017, 0o10000
WINSIZE = struct.Struct("<HHHH")
N_TTY = 0
N_TTY_BUFFER = 4095
"""Bytes that the line discipline of a terminal can hold (drivers/tty/n_tty.c; the buffer has one more)."""

PTMX, DEV_TTY, DEV_CONSOLE = (5, 2), (5, 0), (5, 1)
VT_MAJOR, SLAVE_MAJOR = 4, 136
FIRST_SERIAL = 64
"""Device numbers (Documentation/admin-guide/devices.txt): VT_MAJOR has consoles, from FIRST_SERIAL on serial lines."""

POLLIN, POLLPRI, POLLOUT, POLLHUP = 1, 2, 4, 16


def conditions(fd: int, wanted: int = POLLIN | POLLPRI | POLLOUT, wait: int = 0) -> int:
    """The conditions among *wanted* (and POLLERR, POLLHUP) that hold, after at most *wait* ms until one does.

    For a terminal this also has the kernel hand over what is on its way to the line discipline.
    """
    asked = bytearray(fd.to_bytes(4, "little") + wanted.to_bytes(2, "little") + bytes(2))
    syscall(f"poll of descriptor {fd}", nr.poll, address_of(asked), 1, wait)
    return asked[6] | asked[7] << 8
