"""Terminals (images: TTY entries, tty-info.img, tty-data.img).

State owned: which pseudoterminal, console or line a description leads to; settings, locked settings, window size,
lock, packet and exclusive mode, the session it controls and its foreground group; of pseudoterminals what is queued
both ways, and whether output is stopped. Kernel: ioctl_tty(2) on a copy of the description; the session from
/proc/PID/stat, because only its members may ask a slave for it. Pseudoterminals come back in the controller under
their old number, see :mod:`firn.resources.ttys.rebuild`; sessions get them in their leaders. What goes wrong: a slave's
master is outside (``--shell-job``, ``--external``); slaves that others hold; queues can only be looked at by taking
them out (:mod:`firn.resources.ttys.queues`); what was typed, unechoed, for a slave that was never open cannot be seen
at all.

Images are as CRIU writes them, with these additions: data is recorded for a slave that nobody has open, and then also
if it is empty (the master knows that it was open once); lines that newlines do not tell are records of their own.
"""

from __future__ import annotations

import fcntl
import os

from firn.abi import fcntl as fc
from firn.abi import tty
from firn.host import holders, procfs
from firn.resources.base import Kind
from firn.resources.ttys.queues import Queues, get_locked, get_termios, open_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir
    from firn.resources.base import DumpContext, Open, RestoreContext
    from firn.resources.ttys.rebuild import Rebuild
    from firn.tracee.program import Program

PTY, CONSOLE, VT, CTTY, EXT_TTY, SERIAL = range(1, 7)
"""type of tty_info_entry."""
_CONSOLE_INDEX, _VT_INDEX, _CTTY_INDEX, _SERIAL_INDEX, _EXTERNAL_INDEX = 1002, 1004, 1006, 1010, 1012
_FREE_INDEX = 1 << 20
"""Above all numbers of pseudoterminals: for further objects of a kind that has one index only."""
_ECHO_AND_SIGNALS = 0o10 | 1
_EIO, _ENOTTY = 5, 25
_OUTSIDE_HELP = "use --shell-job (-j) if it is the user's own terminal, or --external tty[{:x}:{:x}]"


class _Pty:
    """A pseudoterminal of the frozen processes: ``master`` is a descriptor of ours, -1 if they have none."""

    __slots__ = ("contents", "hung", "index", "master", "master_open", "slaves")

    def __init__(self, index: int) -> None:
        self.index = index
        self.master = -1
        self.master_open: Open | None = None
        self.slaves: list[Open] = []
        self.hung = False
        self.contents: list[tuple[int, bytes]] = []


class Ttys(Kind):
    """Terminals of all kinds."""

    def __init__(self) -> None:
        self.infos: dict[int, dict[str, Any]] = {}
        self.ptys: dict[int, _Pty] = {}
        self._keys: dict[tuple[int, int, int], int] = {}
        self._devices: set[int] = set()
        self._controlling: list[tuple[Open, dict[str, Any], int]] = []
        self._sessions: dict[int, tuple[int, int]] | None = None
        self._rebuild: Rebuild | None = None

    # -- dump --------------------------------------------------------------------------------------------------------

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The tty_file_entry; the tty_info_entry of its terminal if that is new."""
        number = self._terminal(open, context)
        if number is None:
            return None
        owner = context.owner(open)
        known = len(context.obstacles)
        entry = {"flags": open.flags, "pos": 0, "fown": owner}
        regf_id = context.add_path(open.what, open.path, open.stat, entry)
        if self.infos[number]["type"] == PTY and "termios" not in self.infos[number]:
            # It has no name any more, and needs none: the terminal is made anew.
            del context.obstacles[known:]
        return {"tty_info_id": number, "flags": open.flags, "fown": owner, "regf_id": regf_id}

    def _terminal(self, open: Open, context: DumpContext) -> int | None:
        """The id of the terminal of *open*; None if it was refused."""
        device = os.major(open.stat.st_rdev), os.minor(open.stat.st_rdev)
        if f"tty[{open.stat.st_rdev:x}:{open.stat.st_dev:x}]" in (context.options.external or ()):
            return self._other(open, EXT_TTY, _EXTERNAL_INDEX + self._count(EXT_TTY), context)
        if device == tty.PTMX:
            return self._add_master(open, context)
        if device[0] == tty.SLAVE_MAJOR:
            return self._add_slave(open, device[1], context)
        if device == tty.DEV_TTY:
            return self._add_controlling(open, context)
        if device == tty.DEV_CONSOLE:
            return self._other(open, CONSOLE, _CONSOLE_INDEX, context)
        if device[0] == tty.VT_MAJOR and device[1] < tty.FIRST_SERIAL:
            return self._other(open, VT, device[1] or _VT_INDEX, context)
        if device[0] == tty.VT_MAJOR:
            return self._other(open, SERIAL, _SERIAL_INDEX, context)
        context.refuse(open, f"is a terminal of an unknown kind ({open.link})", "close it before the dump")
        return None

    def _count(self, kind: int) -> int:
        return sum(info["type"] == kind for info in self.infos.values())

    def _info(self, open: Open, kind: int, index: int, is_master: bool, key: tuple[int, int, int]) -> dict[str, Any]:
        """The new tty_info_entry for *open*, without settings."""
        number = index << 1 | is_master
        while number in self.infos:
            number = (max(_FREE_INDEX, number >> 1) + 1) << 1 | is_master
        st = open.stat
        info: dict[str, Any] = {
            "id": number, "type": kind, "locked": False, "exclusive": False, "packet_mode": False, "sid": 0, "pgrp": 0,
            "rdev": st.st_rdev & 0xFFFFFFFF, "dev": st.st_dev & 0xFFFFFFFF, "uid": st.st_uid, "gid": st.st_gid,
        }  # fmt: skip
        if kind == PTY:
            info["pty"] = {"index": index}
        self.infos[number] = info
        self._keys[key] = number
        return info

    def _add_settings(self, open: Open, info: dict[str, Any], context: DumpContext) -> bool:
        """Everything that ioctls tell; False if it was refused."""
        copy = open.copy()
        values = get_termios(copy)
        if values[4] != tty.N_TTY:
            context.refuse(open, f"is a terminal with line discipline {values[4]}, whose state is hidden", "close it")
            return False
        info["termios"] = _termios_entry(values)
        locked = get_locked(copy) + bytes(tty.TERMIOS.size - tty.TERMIOS_SIZE)
        info["termios_locked"] = _termios_entry(tty.TERMIOS.unpack(locked))
        size = tty.WINSIZE.unpack(fcntl.ioctl(copy, tty.TIOCGWINSZ, bytes(tty.WINSIZE.size)))
        info["winsize"] = dict(zip(("ws_row", "ws_col", "ws_xpixel", "ws_ypixel"), size, strict=True))
        info["exclusive"] = bool(_number(copy, tty.TIOCGEXCL))
        return True

    def _other(self, open: Open, kind: int, index: int, context: DumpContext) -> int | None:
        """A terminal that is no pseudoterminal of the processes: its device goes on to exist, and keeps its queues."""
        key = (kind, open.stat.st_rdev, open.stat.st_dev)
        if key not in self._keys:
            info = self._info(open, kind, index, False, key)
            device = _number(open.copy(), tty.TIOCGDEV)
            self._devices.add(device)
            info["sid"], info["pgrp"] = self._session(device, context)
            if not self._add_settings(open, info, context):
                return None
        return self._keys[key]

    def _session(self, device: int, context: DumpContext) -> tuple[int, int]:
        """(session, foreground group) of the terminal *device*, as far as a process of the tree is in it."""
        if self._sessions is None:
            self._sessions = {}
            groups = set()
            for pid in context.pids:
                fields = procfs.stat(pid).fields
                groups.add(int(fields[2]))
                if int(fields[4]):
                    self._sessions[int(fields[4])] = int(fields[3]), max(int(fields[5]), 0)
            for terminal, (session, group) in self._sessions.items():
                if session in context.pids and group not in groups:
                    self._sessions[terminal] = session, 0
        return self._sessions.get(device, (0, 0))

    # -- pseudoterminals -----------------------------------------------------------------------------------------------

    def _add_master(self, open: Open, context: DumpContext) -> int | None:
        copy = open.copy()
        index = _number(copy, tty.TIOCGPTN)
        key = (PTY, index, 1)
        pty = self.ptys.setdefault(index, _Pty(index))
        reason = self._why_not(open, copy, key, context)
        if reason:
            context.refuse(open, reason, "close it")
            return None
        info = self._info(open, PTY, index, True, key)
        info["sid"], info["pgrp"] = self._session(os.makedev(tty.SLAVE_MAJOR, index), context)
        info["locked"] = bool(_number(copy, tty.TIOCGPTLCK))
        info["packet_mode"] = bool(_number(copy, tty.TIOCGPKT))
        if not self._add_settings(open, info, context):
            return None
        pty.master, pty.master_open = os.dup(copy), open
        number: int = info["id"]
        return number

    def _why_not(self, open: Open, copy: int, key: tuple[int, int, int], context: DumpContext) -> str:
        """Why the master *open* cannot be saved; empty if it can."""
        if key in self._keys:
            return f"is a second master number {key[1]}: of another mount of devpts"
        if open.flags & fc.O_ACCMODE != fc.O_RDWR:
            return "is the master of a terminal, and not open for reading and writing"
        try:
            session = _number(copy, tty.TIOCGSID)
        except OSError:
            return ""
        if session != self._session(os.makedev(tty.SLAVE_MAJOR, key[1]), context)[0]:
            return f"is the master of the terminal of session {session}, which is outside the tree"
        return ""

    def _add_slave(self, open: Open, index: int, context: DumpContext) -> int | None:
        try:
            get_termios(open.copy())
            hung = False
        except OSError as error:
            if error.errno not in (_EIO, _ENOTTY):
                raise
            hung = True
        pty = self.ptys.setdefault(index, _Pty(index))
        if pty.slaves and (pty.hung != hung or pty.slaves[0].stat.st_dev != open.stat.st_dev):
            context.refuse(open, f"is a second terminal number {index}, besides {pty.slaves[0].what}", "close it")
            return None
        pty.hung = hung
        pty.slaves.append(open)
        key = (PTY, index, 0)
        if key not in self._keys:
            info = self._info(open, PTY, index, False, key)
            if hung:
                return int(info["id"])
            info["sid"], info["pgrp"] = self._session(open.stat.st_rdev, context)
            if not self._add_settings(open, info, context):
                return None
        return self._keys[key]

    def _add_controlling(self, open: Open, context: DumpContext) -> int | None:
        """/dev/tty: the session tells at restore which terminal it is."""
        try:
            device = _number(open.copy(), tty.TIOCGDEV)
        except OSError:
            context.refuse(open, "is /dev/tty of a terminal that has been hung up", "close it")
            return None
        session, group = self._session(device, context)
        if not session:
            context.refuse(open, "is /dev/tty, but of a terminal that no process here has any more", "close it")
            return None
        key = (CTTY, device, 0)
        if key not in self._keys:
            info = self._info(open, CTTY, _CTTY_INDEX, False, key)
            info["sid"], info["pgrp"] = session, group
            self._devices.add(device)
            if not self._add_settings(open, info, context):
                return None
            self._controlling.append((open, info, device))
        return self._keys[key]

    def leads_to(self, device: int) -> bool:
        """Whether the terminal can be taken again as a controlling one."""
        return device in self._devices or (os.major(device) == tty.SLAVE_MAJOR and os.minor(device) in self.ptys)

    def finish(self, context: DumpContext) -> None:
        """Look for masters and slaves outside; if all is well, at what is queued."""
        for open, info, device in self._controlling:
            pty = self.ptys.get(os.minor(device))
            if not context.options.shell_job and (pty is None or os.major(device) != tty.SLAVE_MAJOR):
                reason = f"is /dev/tty of session {info['sid']}, whose terminal is outside the tree"
                context.refuse(open, reason, "use --shell-job (-j)")
        outside = [pty for pty in self.ptys.values() if pty.master < 0 and not pty.hung]
        for pty in outside:
            if not context.options.shell_job or len(outside) > 1:
                st = pty.slaves[0].stat
                why = "" if len(outside) == 1 else ", and so is that of another one"
                context.refuse(
                    pty.slaves[0], f"is the terminal {pty.slaves[0].link} whose master is outside the tree{why}",
                    _OUTSIDE_HELP.format(st.st_rdev, st.st_dev),
                )  # fmt: skip
        for pty in self.ptys.values():
            if pty.master >= 0 and pty.master_open is not None and self._is_ours(pty, pty.master_open, context):
                self._look(pty, pty.master_open, context)

    def _is_ours(self, pty: _Pty, open: Open, context: DumpContext) -> bool:
        """Whether nobody outside has the slave, if the tree does not; refuses otherwise."""
        if pty.hung:
            context.refuse(open, f"has the number of the hung-up terminal {pty.slaves[0].link}", "close that one")
            return False
        if pty.slaves or tty.conditions(pty.master) & tty.POLLHUP:
            return True
        try:
            there = os.stat(f"/dev/pts/{pty.index}")
        except OSError:
            return True
        found = holders.find(there.st_dev, there.st_ino, {os.getpid(), *context.pids})
        if found:
            context.refuse(
                open, f"is the master of the terminal /dev/pts/{pty.index}, which others have open:"
                f" {'; '.join(map(str, found))}", "dump them too, or end them",
            )  # fmt: skip
        return not found

    def _look(self, pty: _Pty, open: Open, context: DumpContext) -> None:
        """Read the queues."""
        state = tty.conditions(pty.master)
        packets = _number(pty.master, tty.TIOCGPKT)
        if packets and state & tty.POLLPRI:
            context.refuse(open, "has a packet-mode message that was not read yet", "dump again", passing=True)
            return
        if not pty.slaves and not state & tty.POLLHUP:
            # The slave was never open. Opening it would be seen by the master for ever.
            if state & tty.POLLIN:
                context.refuse(open, "has queued output of a slave that was never opened", "open the slave")
            return
        locked = _number(pty.master, tty.TIOCGPTLCK)
        if locked:
            fcntl.ioctl(pty.master, tty.TIOCSPTLCK, bytes(4))
        try:
            peer = open_peer(pty.master, os.O_RDWR | os.O_NONBLOCK)
        finally:
            if locked:
                fcntl.ioctl(pty.master, tty.TIOCSPTLCK, locked.to_bytes(4, "little"))
        try:
            if pty.slaves and os.fstat(peer).st_dev != pty.slaves[0].stat.st_dev:
                context.refuse(open, f"is of another mount of devpts than {pty.slaves[0].what}", "close one of them")
                return
            self._look_into(pty, Queues(pty.master, peer), open, context)
        finally:
            os.close(peer)

    def _look_into(self, pty: _Pty, queues: Queues, open: Open, context: DumpContext) -> None:
        found = queues.look()
        if queues.stopped:
            self.infos[self._keys[PTY, pty.index, 1]]["firn"] = {"stopped": queues.stopped}
        iflag, _, _, lflag, *_ = get_termios(pty.master)
        plain = not queues.canonical and not iflag and not lflag & _ECHO_AND_SIGNALS
        if sum(map(len, found.typed)) > tty.N_TTY_BUFFER and not plain:
            context.refuse(open, "has more input queued than the terminal's buffer can hold", "let it be read first")
            return
        slave, master = pty.index << 1, pty.index << 1 | 1
        pty.contents = [(slave, run) for run in queues.compact(found.typed)]
        if found.printed:
            pty.contents.append((master, found.printed))
        if not pty.slaves and not found.typed:
            pty.contents.append((slave, b""))

    def save(self, images: ImageDir) -> None:
        """Write both images."""
        if not self.infos:
            return
        images.write_all("TTY_INFO", self.infos.values())
        data = [{"tty_id": number, "data": run} for pty in self.ptys.values() for number, run in pty.contents]
        if data:
            images.write_all("TTY_DATA", data)

    def close(self) -> None:
        """Let go of masters, and of what the restore held open."""
        for pty in self.ptys.values():
            if pty.master >= 0:
                os.close(pty.master)
                pty.master = -1
        if self._rebuild is not None:
            self._rebuild.close()

    # -- restore -----------------------------------------------------------------------------------------------------

    def _work(self, context: RestoreContext) -> Rebuild:
        if self._rebuild is None:
            from firn.resources.ttys.rebuild import Rebuild

            self._rebuild = Rebuild(context)
            self._rebuild.make()
        return self._rebuild

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The description *number*; the first call makes all pseudoterminals."""
        return self._work(context).take(number)

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """The session leader takes its controlling terminal; the foreground group is set."""
        assert self._rebuild is not None
        self._rebuild.plan(program, fd, message)

    def plan_session(self, program: Program, sid: int) -> None:
        """The task of *program*, which has just made session *sid* and has no descriptors, takes its terminal."""
        if self._rebuild is not None:
            self._rebuild.plan_session(program, sid)


def _number(fd: int, request: int) -> int:
    """What an ioctl that fills in an int tells."""
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")


def _termios_entry(values: tuple[int, int, int, int, int, bytes, int, int]) -> dict[str, Any]:
    """The termios_entry: the characters are the bytes of the C library's array, four in a word."""
    iflag, oflag, cflag, lflag, line, characters, ispeed, ospeed = values
    raw = characters + bytes(4 * tty.CHARACTERS - len(characters))
    words = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
    return {
        "c_iflag": iflag, "c_oflag": oflag, "c_cflag": cflag, "c_lflag": lflag, "c_line": line, "c_ispeed": ispeed,
        "c_ospeed": ospeed, "c_cc": words,
    }  # fmt: skip
