"""The network lock: nobody hears from a saved connection until it is restored.

State owned: tables of nf_tables (:mod:`firn.host.nftables`), in the network namespace of the connections. From the
moment a connection is looked at until it lives again, no packet to it reaches this machine's TCP, which would take data
that is in no image, or answer with a reset once the socket is gone; and none from it leaves.

===================  ===========================  =======================================================
when                 tables                       if firn is killed now
===================  ===========================  =======================================================
dump, frozen         ``firn-ID`` locks, and       ``firn-ID`` goes with firn, ``CRIU-ID`` is removed by the
                     ``CRIU-ID`` says whose it    guard: the connections work again. Without a guard it
                     is, and locks nothing yet    stays, and does nothing: ``firn unlock`` finds by it
                                                  sockets that are left in repair mode
dump, about to kill  ``CRIU-ID`` locks too        the same; without a guard, the tree is left locked
dump, tree killed    ``CRIU-ID`` locks            it shall stay: the lock waits for the restore
restore              ``CRIU-ID`` if the dump was  ``firn-ID`` goes with firn; ``CRIU-ID`` stays for the
                     here, and ``firn-ID`` lock   next try, unless the guard finishes the restore
restored             none
===================  ===========================  =======================================================

New clients of a listening socket are not refused either while a killed tree is away: they hear nothing, so they try
again. From the freeze on ``firn-ID`` drops their SYN, so that none is connected who would be lost with the tree.
``CRIU-ID`` drops only the resets that answer it where nobody listens: if the tree is never restored, and another server
takes its port, that one can be reached. Rules of iptables do none of this.

ID is the run id of the dump (``dump_criu_run_id`` of the inventory), so the restore needs nothing but the images, and
CRIU's restore removes the table ``CRIU-ID`` as it does its own. Tables that vanish with their maker are new in Linux
5.13; before, ``firn-ID`` stays too, and ``firn unlock`` removes it.

Both words of ``--network-lock``, iptables (CRIU's and our default) and nftables, mean nf_tables, and the image says so
to CRIU. Only where the kernel has none, iptables means rules of iptables, which stay if firn is killed. The rules of a
dump by CRIU are deleted by the restore.

What goes wrong: connections of another link or VRF with the same addresses and ports are locked too. A packet that
another processor is handling in the microseconds of the change can still get through.
"""

from __future__ import annotations

import errno
import os

from firn.errors import KernelError, RestoreError
from firn.host import iptables, nftables, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from firn.host.netlink import Channel
    from firn.host.nftables import Connection

IPTABLES, NFTABLES, SKIP = 0, 1, 2
"""``network_lock_method`` of the inventory."""
_ID_LENGTH = 36
"""Of a UUID."""
HELD, OWN = "CRIU-", "firn-"
"""How the names of tables begin: that of a lock that stays, that of a lock which ends with its firn."""


class Process:
    """A process, told from later ones with its pid by when it started (clock ticks since boot; 0: it was not there)."""

    __slots__ = ("pid", "started")

    def __init__(self, pid: int, started: int = -1) -> None:
        self.pid = pid
        self.started = _start_of(pid) if started < 0 else started

    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return self.started > 0 and _start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"{self.pid}/{self.started}"


def _start_of(pid: int) -> int:
    try:
        stat = procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.start_time) if stat.state not in "ZX" else 0


class Note:
    """What the comment of a table tells: who made it, for which tree (pid 0: a restore), and where the images are (the
    end of the path, if it is long). ``here``: the pids are of our pid namespace."""

    __slots__ = ("directory", "here", "maker", "tree")

    _BEGIN = "firn"

    def __init__(self, maker: Process, tree: Process, directory: str, here: bool = True) -> None:
        self.maker = maker
        self.tree = tree
        self.directory = directory
        self.here = here

    def __str__(self) -> str:
        head = f"{self._BEGIN} {self.maker} tree {self.tree} pidns {_pid_namespace()} in "
        room = 200 - len(head)
        whole = os.fsencode(self.directory)
        return head + (self.directory if len(whole) <= room else "..." + os.fsdecode(whole[-room:]))

    @classmethod
    def read(cls, comment: str) -> Note | None:
        """The note in *comment*; None if it is none of firn's."""
        words = comment.split(" ", 7)
        if len(words) != 8 or (words[0], words[2], words[4], words[6]) != (cls._BEGIN, "tree", "pidns", "in"):
            return None
        numbers = [*words[1].split("/"), *words[3].split("/"), words[5]]
        if len(numbers) != 5 or not all(number.isdecimal() for number in numbers):
            return None
        maker, maker_started, tree, tree_started, namespace = map(int, numbers)
        here = namespace == _pid_namespace()
        return cls(Process(maker, maker_started), Process(tree, tree_started), words[7], here)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


class Lock:
    """What a dump or a restore does to connections. This one does nothing: ``--network-lock skip``.

    ``method`` is for the inventory; ``used`` whether a connection was ever added; ``holds_doors`` whether it keeps new
    clients away.
    """

    method = SKIP
    holds_doors = False

    def __init__(self) -> None:
        self.used = False

    def add(self, connections: Iterable[Connection]) -> None:
        """Lock *connections* (each as the saved socket sees it), all in one step, both directions. May be called again
        with more. Raises :class:`OSError` and :class:`KernelError`; then what was locked before still is."""

    def close_doors(self, doors: Iterable[bytes], everything: bool = False) -> None:
        """Nobody new connects to listening sockets (:func:`firn.host.nftables.door`) while the dump is at work.
        *everything*: nobody reaches them at all, also who is in the middle of a handshake. May be called again with
        more. Raises :class:`OSError`."""

    def keep(self) -> None:
        """From now on the lock stays when firn ends, for the restore. Raises :class:`OSError`."""

    def forget(self) -> None:
        """What is to stay goes after all; for a copy of this process, of which that was killed. Raises
        :class:`OSError`."""

    def open(self) -> None:
        """Unlock all that is locked, also by the dump whose images are restored. Raises :class:`OSError`."""

    def descriptors(self) -> list[int]:
        """What a copy of this process needs for :meth:`open`."""
        return []

    def close(self) -> None:
        """The work is done, or has failed: what was not kept goes. What an earlier dump has kept stays."""


class NftLock(Lock):
    """A lock by tables of nf_tables.

    *run_id* is that of the dump. Only a dump, whose *note* names a tree, can keep its lock. *namespace* is a descriptor
    of the network namespace (-1: ours). With *rules*, the dump may have used iptables. Most of the work is done here,
    so before a freeze.
    """

    method = NFTABLES
    holds_doors = True

    def __init__(self, run_id: str, note: Note, namespace: int = -1, rules: bool = False) -> None:
        super().__init__()
        self._rules = rules
        # Not more of what an image says than what can be a run id gets into a name.
        known = len(run_id) == len(run_id.strip("-")) == _ID_LENGTH and not run_id.strip("0123456789abcdefABCDEF-")
        self._held = HELD + run_id if known else ""
        self._own = OWN + (run_id if known else str(note.maker.pid))
        self._connections: list[Connection] = []
        self._doors: list[bytes] = []
        self._note = note
        self._dumps = note.tree.pid > 0
        self._kept = False
        self._channel: Channel | None = nftables.open_channel(namespace)
        try:
            self._prepare(self._channel)
        except BaseException:
            self.close()
            raise

    def _prepare(self, channel: Channel) -> None:
        if self._dumps:
            nftables.make(channel, self._held, str(self._note))
        _remove_stale(channel, self._own)
        try:
            nftables.make(channel, self._own, str(self._note), owned=True)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            nftables.make(channel, self._own, str(self._note))
        nftables.arm(channel, self._own)

    def _open_channel(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def add(self, connections: Iterable[Connection]) -> None:
        """Lock *connections*."""
        more = list(connections)
        self.used |= bool(more)
        nftables.add(self._open_channel(), self._own, more)
        self._connections += more

    def close_doors(self, doors: Iterable[bytes], everything: bool = False) -> None:
        """Drop the SYN of new clients."""
        more = [each for each in doors if everything or each not in self._doors]
        self.used |= bool(more)
        nftables.close_doors(self._open_channel(), self._own, more, nftables.ALL_IN if everything else nftables.SYN_IN)
        self._doors += more

    def keep(self) -> None:
        """Lock the same in the table that stays."""
        if self._connections or self._doors:
            nftables.arm(self._open_channel(), self._held, self._connections)
            self._kept = True
            nftables.close_doors(self._open_channel(), self._held, self._doors, nftables.RESET_OUT)

    def forget(self) -> None:
        """Remove the table that stays; the other one has gone, or goes, with its maker."""
        channel = nftables.open_channel()
        try:
            remove_tables(channel, (self._held,))
        finally:
            channel.close()

    def open(self) -> None:
        """Remove all tables of this dump."""
        if self._channel is None:
            return
        if self._rules and iptables.available():
            iptables.remove(self._connections)
        self._channel.drain()
        remove_tables(self._channel, (self._held, self._own))
        self._kept = False

    def descriptors(self) -> list[int]:
        """The channel: a table that vanishes with it obeys no other."""
        return [] if self._channel is None else [self._channel.fileno()]

    def close(self) -> None:
        """Remove the tables that were not kept."""
        if self._channel is None:
            return
        try:
            remove_tables(self._channel, (self._held, self._own) if self._dumps and not self._kept else (self._own,))
        finally:
            self._channel.close()
            self._channel = None


def remove_tables(channel: Channel, names: Iterable[str]) -> None:
    """Remove those of the tables that are there, at once. Raises :class:`OSError`."""
    there = {table.name for table in nftables.tables(channel)}
    found = [name for name in names if name in there]
    if found:
        nftables.remove(channel, found)


def _remove_stale(channel: Channel, name: str) -> None:
    """Remove the table *name* if its maker was killed, where the kernel does not do that."""
    for table in nftables.tables(channel):
        note = Note.read(table.comment) if table.name == name and not table.owned else None
        if note is not None and note.here and not note.maker.alive():
            nftables.remove(channel, [name])


class IptablesLock(Lock):
    """A lock by rules of iptables, where the kernel has no nf_tables. They stay if firn is killed."""

    method = IPTABLES

    def __init__(self) -> None:
        super().__init__()
        self._added: list[Connection] = []
        self._all: list[Connection] = []

    def add(self, connections: Iterable[Connection]) -> None:
        """Lock *connections*."""
        more = list(connections)
        if not more:
            return
        self.used = True
        there = {each.key() for each in iptables.locked()}
        new = [each for each in more if each.key() not in there]
        iptables.add(new)
        self._added += new
        self._all += more

    def keep(self) -> None:
        """Nothing is undone at the end."""
        self._added = []

    def open(self) -> None:
        """Delete all rules of the connections."""
        iptables.remove(self._all)
        self._added, self._all = [], []

    def close(self) -> None:
        """Delete the rules that were not there before."""
        iptables.remove(self._added)
        self._added = []


class Broken(Lock):
    """A lock that could not be made, which matters only if there is a connection to lock."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def add(self, connections: Iterable[Connection]) -> None:
        """Raises :class:`KernelError`."""
        raise KernelError(f"connections cannot be locked: {self._why}", "--network-lock skip leaves them open")


def for_dump(method: str, run_id: str, tree: int, directory: str) -> Lock:
    """The lock of a dump of the tree of process *tree* into *directory*; *method* is that of ``--network-lock``."""
    if method == "skip":
        return Lock()
    try:
        return NftLock(run_id, Note(Process(os.getpid()), Process(tree), directory))
    except OSError as error:
        return _other(error, method == "iptables")


def for_restore(run_id: str, directory: str, method: int) -> Lock:
    """The lock of a restore of what the dump *run_id*, here or on another machine, has saved into *directory*.

    *method* is the dump's (``network_lock_method``): rules of iptables, if there are any, go with the lock.
    Raises :class:`RestoreError` if the same is being restored already.
    """
    try:
        return NftLock(run_id, Note(Process(os.getpid()), Process(0, 0), directory), rules=method == IPTABLES)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise RestoreError("another restore of this checkpoint is at work", "wait for it") from error
        return _other(error, True)


def _other(error: OSError, allowed: bool) -> Lock:
    """What takes the place of nf_tables, which gave *error*."""
    return IptablesLock() if allowed and iptables.available() else Broken(str(error))
