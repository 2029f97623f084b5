"""The terminals of a checkpoint on their way back, see :mod:`firn.resources.ttys`.

The kernel gives a new pseudoterminal the lowest free number, so as many are opened as it takes to get the wanted
ones, and the others closed again. Queues are filled before the settings are made, everything in the controller. What
only tasks can do is planned: a session leader takes its terminal, a member of the session sets the foreground group.
"""

from __future__ import annotations

import _signal
import fcntl
import os
import stat

from firn.abi import fcntl as fc
from firn.abi import nr, tty
from firn.abi import signal as sig
from firn.abi.libc import syscall
from firn.errors import ImageError, RestoreError
from firn.host import procfs
from firn.resources.base import REG, TTY
from firn.resources.ttys.queues import BY_FLOW, BY_KEY, Contents, Queues, open_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import RestoreContext
    from firn.tracee.program import Program

_UNKNOWN, _PTY, _CONSOLE, _VT, _CTTY, _EXTERNAL, _SERIAL = range(7)
_NOT_FOR_OPEN = fc.O_CREAT | fc.O_EXCL | fc.O_TRUNC | fc.FASYNC | fc.O_CLOEXEC
_ENOTTY = 25


class _File:
    """A TTY entry: its messages, and the terminal that it leads to."""

    __slots__ = ("id", "info", "mode", "name", "regf_id", "tty")

    def __init__(
        self, number: int, entry: dict[str, Any], infos: dict[int, dict[str, Any]], context: RestoreContext
    ) -> None:
        self.id = number
        self.tty: dict[str, Any] = entry["tty"]
        info = infos.get(self.tty["tty_info_id"])
        if info is None:
            raise ImageError(f"files image: terminal {number} has the unknown tty_info_id {self.tty['tty_info_id']}")
        self.info = info
        if "regf_id" not in self.tty:
            raise ImageError(f"files image: terminal {number} has no regf_id")
        self.regf_id: int = self.tty["regf_id"]
        path = context.message(REG, self.regf_id)
        self.name: str = path["name"]
        self.mode: int | None = path.get("mode")

    @property
    def flags(self) -> int:
        """O_* to open it with."""
        flags: int = self.tty["flags"]
        return flags & ~_NOT_FOR_OPEN

    @property
    def is_master(self) -> bool:
        """Whether it is the master side of a pseudoterminal."""
        return bool(self.info["type"] == _PTY and self.info["id"] & 1)

    @property
    def key(self) -> str:
        """The name by which it can be inherited."""
        return f"tty[{self.info['rdev']:x}:{self.info.get('dev', 0):x}]"


class Rebuild:
    """Makes all terminals at once (:meth:`make`) and hands out their descriptions (:meth:`take`)."""

    def __init__(self, context: RestoreContext) -> None:
        self.context = context
        self.infos = _read_infos(context)
        self.files = [
            _File(number, entry, self.infos, context) for (kind, number), entry in context.files.items() if kind == TTY
        ]
        self.data: dict[int, list[bytes]] = {}
        for record in context.images.read_all("TTY_DATA"):
            self.data.setdefault(record["tty_id"], []).append(record["data"])
        self.made: dict[int, int] = {}
        self.working: dict[int, int] = {}
        self.outside: set[int] = set()
        processes = context.images.read_all("PSTREE")
        self.sessions: dict[int, int] = {entry["pid"]: entry["sid"] for entry in processes}
        self.groups: set[int] = {entry["pgid"] for entry in processes}
        root = processes[0]
        if root["sid"] != root["pid"]:
            # Groups of the old session, in whose place ours is.
            self.groups -= {root["sid"], root["pgid"]} - self.sessions.keys()

    def make(self) -> None:
        """Make everything; ``made`` then has a descriptor for each file id. Undone by :meth:`close`."""
        masters: dict[int, _File] = {}
        slaves: dict[int, list[_File]] = {}
        for file in self.files:
            if file.key in self.context.inherited:
                self._inherit(file)
            elif file.info["type"] == _PTY:
                index = file.info["pty"]["index"]
                if not file.is_master:
                    slaves.setdefault(index, []).append(file)
                elif file.flags & fc.O_ACCMODE != fc.O_RDWR:
                    raise RestoreError(f"terminal {file.id} is a master that is not open for reading and writing")
                elif masters.setdefault(index, file) is not file:
                    raise ImageError(f"files image: terminals {masters[index].id} and {file.id} are one master")
        alone = {index: each[0] for index, each in slaves.items() if index not in masters}
        hung = {index: file for index, file in alone.items() if "termios" not in file.info}
        by_path: dict[str, set[int]] = {}
        for index, file in (masters | hung).items():
            by_path.setdefault(file.name if index in masters else "/dev/ptmx", set()).add(index)
        fds: dict[int, int] = {}
        try:
            for path, wanted in by_path.items():
                fds |= _make_masters(path, wanted)
            self._fit_out(masters, slaves, hung, fds)
        finally:
            for fd in fds.values():
                os.close(fd)
        for file in self.files:
            if file.id not in self.made:
                self.made[file.id] = self._open_other(file)

    def _fit_out(
        self, masters: dict[int, _File], slaves: dict[int, list[_File]], hung: dict[int, _File], fds: dict[int, int]
    ) -> None:
        for index, file in masters.items():
            self._open_slaves(file, slaves.get(index, []), fds[index])
            self.made[file.id] = fds.pop(index)
        for index, each in slaves.items():
            if index in hung:
                fcntl.ioctl(fds[index], tty.TIOCSPTLCK, bytes(4))
                for file in each:
                    self.made[file.id] = open_peer(fds[index], file.flags)
            elif index not in masters:
                for file in each:
                    self.made[file.id] = self._open_outside(file)

    def take(self, number: int) -> int:
        """The descriptor of file *number*, which is the caller's from now on."""
        if number not in self.made:
            raise ImageError(f"files image: terminal {number} is there twice")
        return self.made.pop(number)

    def close(self) -> None:
        """Close what was not handed out."""
        for fds in (self.made, self.working):
            while fds:
                os.close(fds.popitem()[1])

    # -- pseudoterminals -----------------------------------------------------------------------------------------------

    def _open_slaves(self, file: _File, slaves: list[_File], master: int) -> None:
        """Fill and set the pseudoterminal of *master*, and open its slaves."""
        info, index = file.info, file.info["pty"]["index"]
        slave_id = next((each.info["id"] for each in slaves), info["id"] & ~1)
        typed, printed = self.data.get(slave_id, []), b"".join(self.data.get(info["id"], []))
        fcntl.ioctl(master, tty.TIOCSPTLCK, bytes(4))
        raw = _to_raw(info, "termios")
        fcntl.ioctl(master, tty.TCSETS2, raw)
        controls = bool(info["sid"]) and info["sid"] in self.sessions
        opened = bool(slaves or typed or printed or controls)
        if opened:
            self.working[index] = peer = open_peer(master, os.O_RDWR | os.O_NONBLOCK)
            _fill(master, peer, typed, printed, index)
            fcntl.ioctl(master, tty.TCSETS2, raw)
        if "termios_locked" in info and any(locked := _to_raw(info, "termios_locked")):
            fcntl.ioctl(master, tty.TIOCSLCKTRMIOS, locked[: tty.TERMIOS_SIZE])
        _set_size(master, info)
        stopped = info.get("firn", {}).get("stopped", 0)
        if opened and stopped in (BY_FLOW, BY_KEY):
            Queues(master, self.working[index]).stop(stopped)
        for slave in slaves:
            self.made[slave.id] = self._open_slave(slave, master, index)
        if slaves and slaves[0].info["exclusive"]:
            fcntl.ioctl(self.made[slaves[0].id], tty.TIOCEXCL)
        if opened and not slaves and not controls:
            # Nobody has it open: the master is told so.
            os.close(self.working.pop(index))
        _set_status(master, file.tty)
        fcntl.ioctl(master, tty.TIOCSPTLCK, int(info["locked"]).to_bytes(4, "little"))
        fcntl.ioctl(master, tty.TIOCPKT, int(info["packet_mode"]).to_bytes(4, "little"))
        if info["exclusive"]:
            fcntl.ioctl(master, tty.TIOCEXCL)

    def _open_slave(self, file: _File, master: int, index: int) -> int:
        if file.name == f"/dev/pts/{index}":
            fd = open_peer(master, file.flags)
            info = file.info
            if "uid" in info and "gid" in info:
                os.fchown(fd, info["uid"], info["gid"])
            if file.mode is not None:
                os.fchmod(fd, stat.S_IMODE(file.mode))
        else:
            fd = os.dup(self.context.open(REG, file.regf_id))
        _set_status(fd, file.tty)
        return fd

    # -- others --------------------------------------------------------------------------------------------------------

    def _inherit(self, file: _File) -> None:
        inherited = self.context.inherited
        fd = inherited.take(file.key)
        if not os.isatty(fd):
            os.close(fd)
            raise RestoreError(f"descriptor {inherited.number(file.key)}, inherited for {file.key}, is no terminal")
        self.made[file.id] = fd
        self.outside.add(file.info["id"])

    def _open_outside(self, file: _File) -> int:
        """A slave whose master is elsewhere: our own terminal takes its place."""
        if not self.context.options.shell_job:
            raise RestoreError(
                f"the master of the terminal {file.name} was outside the checkpoint",
                f"use --shell-job (-j), or --inherit-fd fd[N]:{file.key}",
            )
        if not os.isatty(0):
            raise RestoreError(
                f"our own terminal would take the place of {file.name}, but standard input is none",
                "run firn in a terminal",
            )
        self.outside.add(file.info["id"])
        try:
            fd = os.open("/proc/self/fd/0", file.flags | fc.O_NOCTTY | fc.O_CLOEXEC)
        except OSError as error:
            raise RestoreError(f"our terminal {os.readlink('/proc/self/fd/0')}: {error.strerror}") from None
        _set_status(fd, file.tty)
        return fd

    def _open_other(self, file: _File) -> int:
        kind = file.info["type"]
        if kind == _EXTERNAL:
            raise RestoreError(f"{file.name} is outside the checkpoint", f"give it with --inherit-fd fd[N]:{file.key}")
        if kind == _CTTY:
            return self._open_controlling(file)
        fd = os.dup(self.context.open(REG, file.regf_id))
        self.made[file.id] = fd
        if kind != _CONSOLE and "termios" in file.info:
            fcntl.ioctl(fd, tty.TCSETS2, _to_raw(file.info, "termios"))
            _set_size(fd, file.info)
        _set_status(fd, file.tty)
        return fd

    def _open_controlling(self, file: _File) -> int:
        """/dev/tty: which terminal that is depends on who opens it."""
        session = file.info["sid"]
        for info in self.infos.values():
            if info["type"] == _PTY and info["sid"] == session and info["pty"]["index"] in self.working:
                fd = _open_as_session(self.working[info["pty"]["index"]], file.name, file.flags)
                break
        else:
            if not self.context.options.shell_job:
                raise RestoreError(f"{file.name} is the terminal of session {session}, which is not in the checkpoint",
                                   "use --shell-job (-j)")  # fmt: skip
            self.outside.add(file.info["id"])
            try:
                fd = os.open(file.name, file.flags | fc.O_NOCTTY | fc.O_CLOEXEC)
            except OSError as error:
                raise RestoreError(f"{file.name}: {error.strerror}", "run firn in a terminal") from None
        _set_status(fd, file.tty)
        return fd

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def plan(self, program: Program, fd: int, message: dict[str, Any]) -> None:
        """What a restored task does with its descriptor *fd*."""
        info = self.infos[message["tty_info_id"]]
        pid = program.runner.pid
        is_slave = info["type"] != _PTY or not info["id"] & 1
        if not is_slave or not info["sid"] or self.sessions.get(pid) != info["sid"]:
            return
        outside = info["id"] in self.outside
        if info["sid"] == pid:
            program.call(f"TIOCSCTTY of descriptor {fd}", nr.ioctl, fd, tty.TIOCSCTTY, outside)
        if outside and "termios" in info:
            program.reserve(1, tty.TERMIOS.size)
            program.call("TCSETS2", nr.ioctl, fd, tty.TCSETS2, program.data(_to_raw(info, "termios")))
        if info["pgrp"] in self.groups:
            program.reserve(1, 16)
            group = program.data(info["pgrp"].to_bytes(4, "little"))
            allow = _ENOTTY if outside else 0
            program.call(f"TIOCSPGRP of descriptor {fd}", nr.ioctl, fd, tty.TIOCSPGRP, group, allow=allow)

    def plan_session(self, program: Program, sid: int) -> None:
        """Have the task of *program*, which has just made session *sid*, take its controlling terminal, before it has
        children, which inherit it. The task has no descriptors."""
        for info in self.infos.values():
            if info["type"] != _PTY or info["sid"] != sid or not sid:
                continue
            source = self.working.get(info["pty"]["index"], -1)
            if source >= 0:
                program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
                program.call(f"take terminal {source}", nr.pidfd_getfd, 0, source, 0)
                program.call(f"TIOCSCTTY of terminal {info['pty']['index']}", nr.ioctl, 1, tty.TIOCSCTTY, 0)
                program.call("close all", nr.close_range, 0, 0xFFFFFFFF, 0)
                return


def _read_infos(context: RestoreContext) -> dict[int, dict[str, Any]]:
    infos: dict[int, dict[str, Any]] = {}
    for info in context.images.read_all("TTY_INFO"):
        if info["type"] == _UNKNOWN:
            info["type"] = _type_of(info["rdev"])
        if info["type"] > _SERIAL:
            raise ImageError(f"tty-info.img: terminal {info['id']} has the unknown type {info['type']}")
        if info["type"] == _PTY and "pty" not in info:
            raise ImageError(f"tty-info.img: terminal {info['id']} has no pty part")
        if info["type"] == _PTY and info["id"] & 1 and not {"termios", "termios_locked", "winsize"} <= info.keys():
            raise ImageError(f"tty-info.img: the master {info['id']} has no settings")
        for part in ("termios", "termios_locked"):
            if part in info and len(info[part].get("c_cc", [])) < tty.CHARACTERS:
                raise ImageError(f"tty-info.img: terminal {info['id']} has less than {tty.CHARACTERS} elements in c_cc")
        infos[info["id"]] = info
    return infos


def _type_of(rdev: int) -> int:
    """The type of a terminal in an old image, from its device number."""
    device = os.major(rdev), os.minor(rdev)
    if device == tty.PTMX or device[0] == tty.SLAVE_MAJOR:
        return _PTY
    if device in (tty.DEV_TTY, tty.DEV_CONSOLE):
        return _CTTY if device == tty.DEV_TTY else _CONSOLE
    if device[0] == tty.VT_MAJOR:
        return _VT if device[1] < tty.FIRST_SERIAL else _SERIAL
    raise ImageError(f"tty-info.img: the device {device[0]}:{device[1]} is no terminal")


def _make_masters(path: str, wanted: set[int]) -> dict[int, int]:
    """Masters with the wanted numbers, opened by *path*: number -> descriptor."""
    made: dict[int, int] = {}
    others: list[int] = []
    top = max(wanted)
    limit = int(procfs.read("/proc/sys/kernel/pty/max"))
    if top >= limit:
        raise RestoreError(f"terminal {top}: this machine has {limit} at most", f"sysctl -w kernel.pty.max={top + 1}")
    try:
        while made.keys() != wanted:
            fd = _new_master(path, top)
            others.append(fd)
            number = int.from_bytes(fcntl.ioctl(fd, tty.TIOCGPTN, bytes(4)), "little")
            if number in wanted:
                made[number] = others.pop()
            missing = min(wanted - made.keys(), default=number + 1)
            if number >= missing:
                raise RestoreError(f"the terminal number {missing} is taken", f"end what uses /dev/pts/{missing}")
    except BaseException:
        others += made.values()
        raise
    finally:
        for fd in others:
            os.close(fd)
    return made


def _new_master(path: str, top: int) -> int:
    """The next master there is."""
    try:
        return os.open(path, fc.O_RDWR | fc.O_NOCTTY | fc.O_CLOEXEC)
    except OSError as error:
        raise RestoreError(f"{path} cannot be opened until it is terminal {top}: {error.strerror}") from None


def _fill(master: int, peer: int, typed: list[bytes], printed: bytes, index: int) -> None:
    if not typed and not printed:
        return
    queues = Queues(master, peer)
    try:
        queues.fill(Contents(queues.expand(typed), printed))
    except OSError as error:
        raise RestoreError(f"what was queued in terminal {index} cannot be put back: {error.strerror}") from None


def _to_raw(info: dict[str, Any], part: str) -> bytes:
    """A struct termios2 from a termios_entry. Speeds are only good for what has no code of its own."""
    entry = info[part]
    words = b"".join(word.to_bytes(4, "little") for word in entry["c_cc"])
    flags = [entry[field] for field in ("c_iflag", "c_oflag", "c_cflag", "c_lflag")]
    if entry["c_line"] != tty.N_TTY:
        raise RestoreError(f"terminal {info['id']} has line discipline {entry['c_line']}, which cannot be restored")
    speeds = entry["c_ispeed"], entry["c_ospeed"]
    if flags[2] & tty.CBAUD == tty.BOTHER and not all(speeds):
        speeds = 38400, 38400
    return tty.TERMIOS.pack(*flags, 0, words[: tty.CHARACTERS], *speeds)


def _set_size(fd: int, info: dict[str, Any]) -> None:
    if "winsize" in info:
        size = [info["winsize"][field] & 0xFFFF for field in ("ws_row", "ws_col", "ws_xpixel", "ws_ypixel")]
        fcntl.ioctl(fd, tty.TIOCSWINSZ, tty.WINSIZE.pack(*size))


def _set_status(fd: int, message: dict[str, Any]) -> None:
    """The status flags. A description with an owner gets O_ASYNC from its task, after its owner."""
    flags, owner = message["flags"], message["fown"]
    if owner.get("pid") or owner.get("signum"):
        flags &= ~fc.FASYNC
    fcntl.fcntl(fd, fc.F_SETFL, flags)


def _open_as_session(slave: int, path: str, flags: int) -> int:
    """Open /dev/tty as a process whose controlling terminal *slave* is: a helper, which gives it back at once."""
    told, tell = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go)
            os.close(told)
            _signal.signal(sig.SIGHUP, _signal.SIG_IGN)
            os.setsid()
            fcntl.ioctl(slave, tty.TIOCSCTTY, 0)
            fd = os.open(path, flags | fc.O_NOCTTY | fc.O_CLOEXEC)
            fcntl.ioctl(slave, tty.TIOCNOTTY)
            os.write(tell, fd.to_bytes(4, "little"))
            os.read(wait, 1)
        finally:
            os._exit(0)
    try:
        os.close(tell)
        os.close(wait)
        answer = os.read(told, 4)
        if not answer:
            raise RestoreError(f"{path} cannot be opened as a controlling terminal")
        pidfd = syscall(f"pidfd_open {pid}", nr.pidfd_open, pid, 0)
        try:
            return syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, int.from_bytes(answer, "little"), 0)
        finally:
            os.close(pidfd)
    finally:
        os.close(told)
        os.close(go)
        os.waitpid(pid, 0)
