"""What is queued in a pseudoterminal: taken out, and put in so that nothing is done to it again.

Two queues, both seen from where they are read: the slave's (typed input, after the line discipline's work on it) and
the master's (printed output). There is no way to look without taking, so :meth:`Queues.look` takes and puts back at
once while the processes stand still. Putting in needs settings under which the kernel changes, echoes and obeys
nothing: those of ``_literal``. Kernel: drivers/tty/n_tty.c, pty.c; termios(3) about canonical mode.

The slave's queue is a list of runs of bytes. Without canonical mode, or if only newlines end its lines, it is one run.
Otherwise each run is a line, and the last one is a line that is not finished, perhaps empty; a line that ends neither
in a newline nor in an end-of-line character was ended by the end-of-file character.

Output may be stopped, by the stop character (Ctrl-S) or by tcflow(3), and only what stopped it can start it again.
Nothing can be put back then, so it is started while queues are looked at, and stopped again in the same way.
"""

from __future__ import annotations

import fcntl
import os

from firn.abi import fcntl as fc
from firn.abi import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 16
_END_OF_FILE, _QUOTE = 4, 22
_NEWLINE = 10
BY_FLOW, BY_KEY = 1, 2
"""Who stopped output: tcflow(3), the stop character."""
_TRIES = 200
_PIECE = 256
"""What the kernel's buffers for bytes on their way hold: in such pieces as many fit as ever did."""


def get_termios(fd: int) -> tuple[int, int, int, int, int, bytes, int, int]:
    """The settings; of a master those of its slave."""
    iflag, oflag, cflag, lflag, line, characters, ispeed, ospeed = tty.TERMIOS.unpack(
        fcntl.ioctl(fd, tty.TCGETS2, bytes(tty.TERMIOS.size))
    )
    return iflag, oflag, cflag, lflag, line, characters, ispeed, ospeed


def set_termios(fd: int, raw: bytes) -> None:
    """Set a struct termios2 at once, without waiting for output or dropping input."""
    fcntl.ioctl(fd, tty.TCSETS2, raw)


def get_locked(fd: int) -> bytes:
    """Which settings are locked (TIOCGLCKTRMIOS)."""
    return bytes(fcntl.ioctl(fd, tty.TIOCGLCKTRMIOS, bytes(tty.TERMIOS_SIZE)))


def is_canonical(lflag: int) -> bool:
    """Whether input is read line by line."""
    return bool(lflag & tty.ICANON) and not lflag & tty.EXTPROC


def open_peer(master: int, flags: int) -> int:
    """A new description of the slave (TIOCGPTPEER)."""
    # O_CLOEXEC given here would stay in the description's flags, and every descriptor of it look as if it had that.
    fd: int = fcntl.ioctl(master, tty.TIOCGPTPEER, flags | fc.O_NOCTTY)
    os.set_inheritable(fd, False)
    return fd


def _literal(raw: bytes, canonical: bool) -> bytes:
    """Settings under which bytes pass unchanged. In canonical mode lines are ended by newline, by the characters of
    *raw* for that and by _END_OF_FILE, and _QUOTE makes the next byte an ordinary one."""
    _, _, cflag, lflag, line, old, ispeed, ospeed = tty.TERMIOS.unpack(raw)
    new = bytearray(tty.CHARACTERS)
    flags = lflag & tty.EXTPROC
    if canonical:
        flags |= tty.ICANON | tty.IEXTEN
        new[tty.VEOF], new[tty.VLNEXT] = _END_OF_FILE, _QUOTE
        new[tty.VEOL], new[tty.VEOL2] = _line_ends(old)
    else:
        if lflag & tty.EXTPROC:
            flags |= lflag & tty.ICANON
        # VTIME stays 0: what is there is read at once, nothing is waited for.
        new[tty.VMIN] = 0
    return tty.TERMIOS.pack(0, 0, cflag, flags, line, bytes(new), ispeed, ospeed)


def _line_ends(characters: bytes) -> tuple[int, int]:
    """The end-of-line characters, but for those that have a use of their own in literal settings."""
    first, second = (
        0 if each in (_END_OF_FILE, _QUOTE) else each for each in (characters[tty.VEOL], characters[tty.VEOL2])
    )
    return first, second


class Contents:
    """What is in the two queues: runs of ``typed``, and ``printed``."""

    __slots__ = ("printed", "typed")

    def __init__(self, typed: list[bytes], printed: bytes) -> None:
        self.typed = typed
        self.printed = printed

    def __bool__(self) -> bool:
        return bool(self.typed or self.printed)


class Queues:
    """The queues of the pseudoterminal of *master*. ``peer`` is a non-blocking descriptor of the slave, -1: leave the
    slave alone, its queue can be filled only. ``stopped``: how :meth:`look` found output stopped (0: it was not)."""

    def __init__(self, master: int, peer: int) -> None:
        self.master = master
        self.peer = peer
        self.raw = tty.TERMIOS.pack(*get_termios(master))
        _, _, _, self.lflag, _, self.characters, _, _ = tty.TERMIOS.unpack(self.raw)
        self.canonical = is_canonical(self.lflag)
        self.stopped = 0

    def look(self) -> Contents:
        """What is queued; it is queued again when this returns or fails."""
        locked = get_locked(self.master)
        packets = int.from_bytes(fcntl.ioctl(self.master, tty.TIOCGPKT, bytes(4)), "little")
        found = Contents([], b"")
        try:
            if packets:
                fcntl.ioctl(self.master, tty.TIOCPKT, bytes(4))
            if any(locked):
                fcntl.ioctl(self.master, tty.TIOCSLCKTRMIOS, bytes(tty.TERMIOS_SIZE))
            if self._seems_stopped():
                self.stopped = self._start()
            # Other settings would start what a key has stopped, so these come first.
            self._take_printed(found)
            self._take_typed(found)
        finally:
            try:
                if found:
                    self.fill(found)
            finally:
                set_termios(self.master, self.raw)
                if self.stopped:
                    self.stop(self.stopped)
                if any(locked):
                    fcntl.ioctl(self.master, tty.TIOCSLCKTRMIOS, locked)
                if packets:
                    fcntl.ioctl(self.master, tty.TIOCPKT, packets.to_bytes(4, "little"))
        return found

    # -- taking --------------------------------------------------------------------------------------------------------

    def _take_typed(self, found: Contents) -> None:
        if not self.canonical:
            data = _read_all(lambda: _read(self.peer) or None)
            if data:
                found.typed.append(b"".join(data))
            return
        while True:
            line = _read(self.peer)
            if line is None:
                break
            found.typed.append(line)
        set_termios(self.master, _literal(self.raw, False))
        rest = b"".join(_read_all(lambda: _read(self.peer) or None))
        set_termios(self.master, self.raw)
        if found.typed or rest:
            found.typed.append(rest)

    def _take_printed(self, found: Contents) -> None:
        def read() -> bytes | None:
            # Our copy may be a blocking one.
            return os.read(self.master, _CHUNK) if tty.conditions(self.master, tty.POLLIN) & tty.POLLIN else None

        found.printed = b"".join(_read_all(read))
        if not tty.conditions(self.peer, tty.POLLOUT) & tty.POLLOUT:
            # The queue was full, so this could not be seen before.
            self.stopped = self._start()

    # -- stopped output ------------------------------------------------------------------------------------------------

    def _flows(self) -> bool:
        return bool(tty.conditions(self.peer, tty.POLLOUT) & tty.POLLOUT)

    def _seems_stopped(self) -> bool:
        """Whether output is stopped, as far as that can be seen: a full queue looks the same."""
        if self._flows():
            return False
        queued = int.from_bytes(fcntl.ioctl(self.master, tty.FIONREAD, bytes(4)), "little")
        return queued < tty.N_TTY_BUFFER

    def _start(self) -> int:
        """Start stopped output: how it was stopped (BY_FLOW, BY_KEY)."""
        fcntl.ioctl(self.peer, tty.TCXONC, tty.TCOON)
        if self._flows():
            return BY_FLOW
        # What a key has stopped TCOON starts only after a TCOOFF.
        fcntl.ioctl(self.peer, tty.TCXONC, tty.TCOOFF)
        fcntl.ioctl(self.peer, tty.TCXONC, tty.TCOON)
        return BY_KEY

    def stop(self, how: int) -> None:
        """Stop output (BY_FLOW, BY_KEY), under the terminal's own settings. Packet mode, which would tell, is off."""
        if how == BY_FLOW:
            fcntl.ioctl(self.peer, tty.TCXONC, tty.TCOOFF)
            return
        os.write(self.master, self.characters[tty.VSTOP : tty.VSTOP + 1])
        for _ in range(_TRIES):
            # The character goes its way in the background.
            if not self._flows():
                return
            tty.conditions(self.peer, tty.POLLIN, 1)

    # -- putting in ----------------------------------------------------------------------------------------------------

    def fill(self, contents: Contents) -> None:
        """Put *contents* into the queues, which must be empty. Raises OSError (ENOSPC) if they do not fit.

        The settings are other ones afterwards. With ``peer`` -1 only typed bytes can be put in.
        """
        canonical = self.canonical
        set_termios(self.master, _literal(self.raw, canonical))
        if contents.printed:
            self._put(self.peer, contents.printed, self.master)
        if contents.typed:
            data = self._quoted(contents.typed) if canonical else b"".join(contents.typed)
            self._put(self.master, data, self.peer)

    def _quoted(self, runs: list[bytes]) -> bytes:
        ends = {_NEWLINE, *_line_ends(self.characters)} - {0}
        special = ends | {_END_OF_FILE, _QUOTE}
        out = bytearray()
        for number, run in enumerate(runs):
            body, end = run, b""
            if number < len(runs) - 1:
                if run and run[-1] in ends:
                    body, end = run[:-1], run[-1:]
                else:
                    end = bytes((_END_OF_FILE,))
            for byte in body:
                if byte in special:
                    out.append(_QUOTE)
                out.append(byte)
            out += end
        return bytes(out)

    @staticmethod
    def _put(fd: int, data: bytes, reader: int) -> None:
        """Write all of *data*; *reader* is polled so that it is handed on."""
        flags = fcntl.fcntl(fd, fc.F_GETFL)
        if not flags & fc.O_NONBLOCK:
            fcntl.fcntl(fd, fc.F_SETFL, flags | fc.O_NONBLOCK)
        try:
            tries = _TRIES
            while data:
                try:
                    data = data[os.write(fd, data[:_PIECE]) :]
                except BlockingIOError:
                    if not tries:
                        raise OSError(28, f"{len(data)} queued bytes do not fit the terminal's queue") from None
                    tries -= 1
                    tty.conditions(fd, tty.POLLOUT, 5)
                if reader >= 0:
                    tty.conditions(reader)
        finally:
            if not flags & fc.O_NONBLOCK:
                fcntl.fcntl(fd, fc.F_SETFL, flags)

    def compact(self, typed: list[bytes]) -> list[bytes]:
        """The runs joined to one if that says the same."""
        if len(typed) < 2:
            return typed
        *lines, rest = typed
        if all(line.endswith(b"\n") and b"\n" not in line[:-1] for line in lines) and b"\n" not in rest:
            return [b"".join(typed)]
        return typed

    def expand(self, typed: list[bytes]) -> list[bytes]:
        """What :meth:`fill` needs, from the runs of an image."""
        if not self.canonical or len(typed) != 1:
            return typed
        *lines, rest = typed[0].split(b"\n")
        return [*(line + b"\n" for line in lines), rest]


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None


def _read_all(read: Callable[[], bytes | None]) -> list[bytes]:
    parts: list[bytes] = []
    while True:
        part = read()
        if part is None:
            return parts
        parts.append(part)
