"""``firn unlock``: what is left of network locks (:mod:`firn.resources.network.lock`), and what of it goes.

A lock is *stale* if its firn was killed and the tree still runs, or if that was in a restore. It *waits* if it keeps
the connections of a finished dump quiet until they are restored; CRIU's locks cannot be told from that.
"""

from __future__ import annotations

from firn.errors import FirnError
from firn.host import iptables, nftables
from firn.images.store import ImageDir, read_files
from firn.resources.network import lock
from firn.resources.sockets.connections import connections
from firn.resources.sockets.repair import end_repair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn.host.netlink import Channel
    from firn.host.nftables import Table

BUSY, STALE, WAITING = "busy", "stale", "waiting"


class Found:
    """A table that locks, or belongs to a lock: its ``name``, ``state`` (above) and a ``text`` that says why."""

    __slots__ = ("name", "note", "state", "text")

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.note = lock.Note.read(table.comment)
        self.state, self.text = self._judge(table)

    def _judge(self, table: Table) -> tuple[str, str]:
        note = self.note
        if note is None or not note.here:
            who = "CRIU" if note is None else "a firn of another pid namespace"
            return (BUSY if table.owned else WAITING), f"made by {who}"
        tree = f"process {note.tree.pid} with images in {note.directory}"
        work = f"a dump of {tree}" if note.tree.pid else f"a restore from {note.directory}"
        if table.owned or note.maker.alive():
            return BUSY, f"firn is at work (process {note.maker.pid}): {work}"
        if note.tree.pid and table.armed and not note.tree.alive():
            return WAITING, f"waits for the restore of {tree}"
        return STALE, f"left by {work}"


def find(channel: Channel) -> list[Found]:
    """All locks of this network namespace."""
    return [Found(table) for table in nftables.tables(channel) if table.name.startswith((lock.HELD, lock.OWN))]


def unlock(directory: str | None, everything: bool) -> Iterator[str]:
    """Remove stale locks; with a *directory* only the locks of the checkpoint there, with *everything* all.

    Gives a line for each lock that was found. Raises :class:`FirnError` if the checkpoint is being dumped or restored,
    :class:`ImageError`, :class:`OSError`.
    """
    channel = nftables.open_channel()
    try:
        found = find(channel)
        if directory is not None:
            found = _of_checkpoint(found, directory)
        for each in found:
            yield _treat(channel, each, everything or directory is not None)
    finally:
        channel.close()
    yield from _rules(directory, everything)


def _rules(directory: str | None, everything: bool) -> Iterator[str]:
    """Rules of iptables, of which nobody knows whose they are."""
    there = iptables.locked() if iptables.available() else []
    if directory is not None and there:
        images = ImageDir.open(directory)
        try:
            wanted = {each.key() for each in connections(read_files(images))}
        finally:
            images.close()
        there = [each for each in there if each.key() in wanted]
    asked = everything or directory is not None
    if asked:
        iptables.remove(there)
    for each in there:
        yield f"iptables: {each!r}; {'removed' if asked else 'kept (firn unlock -D DIR or --all removes it)'}"


def _of_checkpoint(found: list[Found], directory: str) -> list[Found]:
    images = ImageDir.open(directory)
    try:
        run_id = images.read_one("INVENTORY").get("dump_criu_run_id", "")
    finally:
        images.close()
    mine = [each for each in found if each.name in (lock.HELD + run_id, lock.OWN + run_id)]
    for each in mine:
        if each.state == BUSY:
            raise FirnError(f"{each.name}: {each.text}", "wait for it")
    return mine


def _treat(channel: Channel, each: Found, asked: bool) -> str:
    """Remove the lock *each* if it is stale or *asked* for; what was done, in words."""
    if each.state == BUSY:
        return f"{each.name}: {each.text}; kept"
    if each.state == WAITING and not asked:
        return f"{each.name}: {each.text}; kept (firn unlock -D DIR or --all removes it)"
    repaired = ""
    if each.note is not None and each.note.here and each.note.tree.alive():
        count = end_repair(each.note.tree.pid)
        repaired = f", {count} connection{'s' if count > 1 else ''} taken out of repair mode" if count else ""
    lock.remove_tables(channel, [each.name])
    return f"{each.name}: {each.text}; removed{repaired}"
