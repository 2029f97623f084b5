"""Processes that stand in for those that once connected unix sockets, so that SO_PEERCRED tells of them, not of us.

The kernel notes who calls socketpair(2), listen(2) and connect(2): pid, effective ids, groups (unix(7), SO_PEERCRED,
SO_PEERGROUPS). So a child with the wanted pid and ids makes these calls. It shares our descriptors (CLONE_FILES), and
lives until all sockets are made, before any task exists: afterwards its pid is free again for the task. If the pid is
in use by somebody else, the ids alone are right. Credentials in a message (SCM_CREDENTIALS) need only that the process
exists: root may write what it likes. SO_PEERPIDFD leads to the child that is gone, and not to the task.
"""

from __future__ import annotations

import _signal
import errno
import os
import select
import struct

from firn.abi import nr, sched
from firn.abi import signal as sig
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

AF_UNIX, SOCK_CLOEXEC = 1, 0o2000000
UCRED = struct.Struct("<iII")
"""struct ucred: pid, uid, gid."""
_PR_SET_PDEATHSIG = 1
_PAIR, _LISTEN, _CONNECT = range(3)
_COMMAND, _ANSWER = struct.Struct("<3i"), struct.Struct("<3i")
_MOST = 512
_NO_ID = 0xFFFFFFFF


class Identity:
    """Who somebody is: pid, effective user and group, further groups (packed 32-bit numbers)."""

    __slots__ = ("gid", "groups", "pid", "uid")

    def __init__(self, entry: dict[str, Any]) -> None:
        self.pid: int = entry.get("pid", 0)
        self.uid: int = entry.get("uid", 0)
        self.gid: int = entry.get("gid", 0)
        groups: bytes = entry.get("groups", b"")
        if self.pid >= 1 << 31:
            raise ImageError(f"a unix socket knows of an impossible process {self.pid}")
        self.groups = struct.unpack(f"<{len(groups) // 4}I", groups[: len(groups) // 4 * 4])

    @property
    def key(self) -> tuple[int, ...]:
        """To compare by."""
        return self.pid, self.uid, self.gid, *self.groups


class _StandIn:
    """One child, and the pipes to it."""

    pid = 0
    _pidfd = -1

    def __init__(self, who: Identity) -> None:
        self._orders, self._order = os.pipe2(os.O_CLOEXEC)
        self._answer, self._answers = os.pipe2(os.O_CLOEXEC)
        self.key = who.key
        parent = os.getpid()
        try:
            self.pid = _clone(who.pid)
            if not self.pid:
                _serve(who, parent, self._orders, self._answers)
            self._pidfd = os.pidfd_open(self.pid)
            self._result()
        except OSError as error:
            self.close()
            text = f"nobody can stand in for process {who.pid} (user {who.uid}): {error.strerror}"
            raise RestoreError(text, "restore as root") from None

    def ask(self, order: int, first: int, second: int, address: bytes = b"") -> tuple[int, int]:
        """Let it make a call. Raises :class:`OSError` with what the call said."""
        os.write(self._order, _COMMAND.pack(order, first, second) + address)
        return self._result()

    def _result(self) -> tuple[int, int]:
        # The writing end of the answers is ours as well, so if the child ends the pipe would not tell.
        ready = select.poll()
        ready.register(self._answer, select.POLLIN)
        ready.register(self._pidfd, select.POLLIN)
        if all(fd != self._answer for fd, _ in ready.poll()):
            raise OSError(errno.ECHILD, "it has ended")
        answer = os.read(self._answer, _ANSWER.size)
        failure, first, second = _ANSWER.unpack(answer)
        if failure:
            raise OSError(failure, os.strerror(failure))
        return first, second

    def close(self) -> None:
        """It ends; its pid is free when this returns."""
        # Without a writer its read comes to an end.
        for fd in (self._order, self._answer):
            os.close(fd)
        if self.pid:
            os.waitpid(self.pid, 0)
        for fd in (self._orders, self._answers, self._pidfd):
            if fd >= 0:
                os.close(fd)


def _clone(pid: int) -> int:
    """A child that shares our descriptors: with *pid* if that is free, else with any."""
    wanted = bytearray(struct.pack("<i", pid))
    for number in (1, 0) if pid > 0 else (0,):
        where = address_of(wanted) if number else 0
        args = bytearray(sched.CLONE_ARGS.pack(sched.CLONE_FILES, 0, 0, 0, sig.SIGCHLD, 0, 0, 0, where, number, 0))
        try:
            return syscall(f"clone3 with pid {pid}", nr.clone3, address_of(args), len(args))
        except OSError as error:
            if not number or error.errno not in (errno.EEXIST, errno.EINVAL, errno.EPERM):
                raise
    raise AssertionError("unreachable")


def _serve(who: Identity, parent: int, orders: int, answers: int) -> None:
    """The child's life. Never returns."""
    try:
        failure, first, second = 0, 0, 0
        try:
            _become(who, parent)
        except (OSError, ValueError, OverflowError) as error:
            failure = getattr(error, "errno", 0) or errno.EINVAL
        while True:
            os.write(answers, _ANSWER.pack(failure, first, second))
            command = os.read(orders, _MOST)
            if len(command) < _COMMAND.size:
                break
            failure, first, second = 0, 0, 0
            try:
                order, first, second = _COMMAND.unpack_from(command)
                first, second = _obey(order, first, second, command[_COMMAND.size :])
            except OSError as error:
                failure = error.errno or errno.EIO
    finally:
        os._exit(0)


def _become(who: Identity, parent: int) -> None:
    """Take the ids of *who*; files are still ours to reach. We end with firn, whose descriptors we hold."""
    if who.uid != _NO_ID and list(who.groups) != os.getgroups():
        os.setgroups(who.groups)
    if who.gid not in (os.getegid(), _NO_ID):
        os.setegid(who.gid)
    if who.uid not in (os.geteuid(), _NO_ID):
        before = os.geteuid()
        os.seteuid(who.uid)
        syscall("setfsuid", nr.setfsuid, before)
    # To change ids takes it away, so it comes last.
    syscall("PR_SET_PDEATHSIG", nr.prctl, _PR_SET_PDEATHSIG, _signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _obey(order: int, first: int, second: int, address: bytes) -> tuple[int, int]:
    if order == _PAIR:
        pair = bytearray(8)
        syscall("socketpair", nr.socketpair, AF_UNIX, first | SOCK_CLOEXEC, 0, address_of(pair))
        one, other = struct.unpack("<2i", pair)
        return one, other
    if order == _LISTEN:
        syscall("listen", nr.listen, first, second)
    else:
        where = bytearray(AF_UNIX.to_bytes(2, "little") + address)
        syscall("connect", nr.connect, first, address_of(where), len(where))
    return 0, 0


class StandIns:
    """All that are needed, each made when it is needed first: one for a pid, whose ids have to be right only while it
    makes a call. Without an identity the calls are our own."""

    def __init__(self) -> None:
        self._made: dict[int, _StandIn] = {}

    def hold(self, pid: int) -> None:
        """See to it that there is a process *pid*, if there can be one."""
        if pid not in self._made:
            self._made[pid] = _StandIn(Identity({"pid": pid, "uid": _NO_ID, "gid": _NO_ID}))

    def _get(self, who: Identity) -> _StandIn:
        found = self._made.pop(who.pid, None)
        if found is not None and found.key != who.key:
            found.close()
            found = None
        self._made[who.pid] = found or _StandIn(who)
        return self._made[who.pid]

    def pair(self, who: Identity | None, kind: int) -> tuple[socket, socket]:
        """socketpair(2)."""
        import _socket

        if who is None:
            return _socket.socketpair(AF_UNIX, kind | SOCK_CLOEXEC, 0)
        one, other = self._get(who).ask(_PAIR, kind, 0)
        return _socket.socket(AF_UNIX, kind, 0, one), _socket.socket(AF_UNIX, kind, 0, other)

    def listen(self, who: Identity | None, sock: socket, backlog: int) -> None:
        """listen(2); a second time it changes the backlog, and who is noted."""
        if who is None:
            sock.listen(backlog)
        else:
            self._get(who).ask(_LISTEN, sock.fileno(), backlog)

    def connect(self, who: Identity | None, sock: socket, address: str | bytes) -> None:
        """connect(2)."""
        if who is None:
            sock.connect(address)
        else:
            raw = os.fsencode(address)
            self._get(who).ask(_CONNECT, sock.fileno(), 0, raw if raw[:1] == b"\0" else raw + b"\0")

    def close(self) -> None:
        """All end."""
        for standin in self._made.values():
            standin.close()
        self._made.clear()
