"""Pipes and FIFOs (images: pipe and fifo entries, pipes-data.img, fifo-data.img).

State owned: which ends exist, their flags, the capacity, and the bytes inside, with the boundaries of packets
(O_DIRECT, pipe(7)). Kernel: tee(2) from a copy of a read end into a pipe of ours, which leaves the bytes where they
are; poll(2) tells whether the other end is open anywhere. They come back as pipe(2), or by opening the FIFO's name for
reading and writing, which never blocks, before each end is opened as it was.

What goes wrong: an end that only a process outside holds. It is saved all the same, as CRIU's callers expect: either
the caller of the restore supplies the pipe (``--inherit-fd fd[N]:pipe:[INODE]``), with what is in it then, or it comes
back without that end. The log tells both times. What is in a pipe for a reader outside is that reader's, and not saved.
A FIFO is opened by its name, so its other end is the one outside, if that is still there.

Contents are one record per pipe, as CRIU writes them, unless there are packets (which CRIU refuses): then the record
with the size has the bytes before the first packet, each further record without a size is a packet, and each further
one with a size is a run of bytes without boundaries.

A pipe is a ring of pages (fs/pipe.c), and is full when none is free, however little is in each. A write is joined to
what came before only if it fits into the same page whole, so bytes that came in small writes take more pages than they
need. How many bytes are in each page is kept, in a field of firn's own, where one write would not put them so. What is
not seen: whether the last page may be filled up (not if it came by splice, tee or vmsplice, or where bytes before those
in it were read); the last page of a restored pipe can be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from firn.abi import fcntl as fc
from firn.abi import nr, poll
from firn.abi.libc import syscall
from firn.errors import ImageError, RestoreError
from firn.host import holders
from firn.resources.base import FIFO, PIPE, REG, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from firn.images.reader import PayloadRef
    from firn.images.store import ImageDir
    from firn.resources.base import DumpContext, Open, RestoreContext

    Records = list[tuple[dict[str, Any], PayloadRef]]

O_LARGEFILE = 0o100000
"""The kernel's own bit: in the flags of what was opened by a name or through /proc, not of what pipe(2) made."""
PAGE = os.sysconf("SC_PAGESIZE")
READ, WRITE = 1, 2
_SIDES = {READ: "read", WRITE: "write"}
_DATA = {PIPE: "PIPES_DATA", FIFO: "FIFO_DATA"}
_FIONREAD = 0x541B
_EVERYTHING = 0x7FFFFFFF
_NOT_FOR_OPEN = fc.O_CREAT | fc.O_EXCL | fc.O_TRUNC | fc.O_DIRECT | fc.FASYNC


def sides(flags: int) -> int:
    """The sides (READ, WRITE) of a pipe that a descriptor opened with *flags* is."""
    return (READ, WRITE, READ | WRITE)[flags & fc.O_ACCMODE]


def _queued(fd: int) -> int:
    """Bytes in the pipe (FIONREAD)."""
    count = bytearray(4)
    fcntl.ioctl(fd, _FIONREAD, count)
    return int.from_bytes(count, "little")


class Part:
    """A packet, or a run of bytes; ``pages`` tells how many of its bytes are in each page of the pipe."""

    __slots__ = ("data", "packet", "pages")

    def __init__(self, data: bytes, packet: bool = False, pages: Iterable[int] = ()) -> None:
        self.data = data
        self.packet = packet
        self.pages = list(pages) or [len(data)]

    def is_dense(self) -> bool:
        """Whether one write would put the bytes into pages as they are, or this cannot be had."""
        return all(count == PAGE for count in self.pages[:-1]) or max(self.pages) > PAGE


class Contents:
    """Reads what is in pipes without taking it out. Has three pipes of its own, open until :meth:`close`."""

    def __init__(self) -> None:
        self._pipes: list[tuple[int, int]] = []

    def read(self, end: int) -> list[Part]:
        """What is in the pipe of read end *end*, oldest first.

        Raises :class:`OSError` for a pipe that cannot be looked into.
        """
        if not self._pipes:
            self._pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(3)]
            fcntl.fcntl(self._pipes[1][1], fcntl.F_SETPIPE_SZ, PAGE)
        reader, writer = self._pipes[0]
        self._grow(writer, fcntl.fcntl(end, fcntl.F_GETPIPE_SZ))
        try:
            got = syscall("tee of a pipe", nr.tee, end, writer, _EVERYTHING, os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return []
        if not got:
            return []
        if got < _queued(end):
            raise OSError(errno.EFBIG, f"{_queued(end)} bytes are more than a pipe of ours may hold (CAP_SYS_RESOURCE)")
        whole = self._without_packets(reader, writer, got)
        syscall("tee of a pipe", nr.tee, end, writer, _EVERYTHING, os.SPLICE_F_NONBLOCK)
        return self._split() if whole is None else [Part(whole, pages=self._pages(got))]

    @staticmethod
    def _grow(writer: int, size: int) -> None:
        """Room for *size* bytes and, if the limit allows, one more."""
        for wanted in (2 * size, size):
            if fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) >= wanted:
                return
            try:
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, wanted)
            except OSError:
                continue
            return

    @staticmethod
    def _without_packets(reader: int, writer: int, count: int) -> bytes | None:
        """The bytes of the copy, or None if there are packets in it: reading stops after a packet, so a byte written
        behind everything is only reached if there is none. The copy is empty afterwards."""
        try:
            os.write(writer, b"\0")
            data = os.read(reader, count + 1)
        except BlockingIOError:
            data = b""
        if len(data) == count + 1:
            return data[:-1]
        while _queued(reader):
            os.read(reader, count)
        return None

    def _pages(self, count: int) -> list[int]:
        """How the *count* bytes of the copy are spread over its pages; it is empty afterwards."""
        (reader, _), (one, into_one), _ = self._pipes
        pages = []
        while count:
            # Goes into a pipe of one page, and is not joined to anything.
            pages.append(os.splice(reader, into_one, _EVERYTHING, flags=os.SPLICE_F_NONBLOCK))
            os.read(one, pages[-1])
            count -= pages[-1]
        return pages

    def _split(self) -> list[Part]:
        """The copy page by page: slower, and exact about packets."""
        (reader, _), (one, into_one), (probe, into_probe) = self._pipes
        parts: list[Part] = []
        while _queued(reader):
            count = os.splice(reader, into_one, _EVERYTHING, flags=os.SPLICE_F_NONBLOCK)
            syscall("tee of a pipe", nr.tee, one, into_probe, count, os.SPLICE_F_NONBLOCK)
            os.write(into_probe, b"\0")
            packet = len(os.read(probe, count + 1)) == count
            if packet:
                os.read(probe, 1)
            part = Part(os.read(one, count), packet)
            if parts and not packet and not parts[-1].packet:
                parts[-1].data += part.data
                parts[-1].pages += part.pages
            else:
                parts.append(part)
        return parts

    def close(self) -> None:
        """Close the pipes."""
        for pair in self._pipes:
            os.close(pair[0])
            os.close(pair[1])
        self._pipes = []


class _Pipe:
    """A pipe or FIFO of the frozen processes: ``known`` are the sides they hold; ``lonely``: nobody has the other;
    ``outside``: who has it, if only processes outside do."""

    __slots__ = ("ends", "id", "known", "lonely", "outside", "parts", "size")

    def __init__(self, number: int, size: int) -> None:
        self.id = number
        self.size = size
        self.known = 0
        self.lonely = False
        self.outside = ""
        self.ends: list[Open] = []
        self.parts: list[Part] | None = None


class _Piped(Kind):
    """What pipes and FIFOs have in common."""

    type = 0
    unseen = ""
    """Who has the other side if no process shows it; empty if nobody needs to have it."""
    outside_help = ""
    """What becomes of an end outside; the place is for the inode number."""

    def __init__(self) -> None:
        self.pipes: dict[tuple[int, int], _Pipe] = {}
        self.numbers: set[int] = set()
        self.contents = Contents()
        self.filled: set[int] = set()
        self._records: dict[int, Records] | None = None

    # -- dump --------------------------------------------------------------------------------------------------------

    def _add(self, open: Open, context: DumpContext) -> _Pipe | None:
        """Note an end; None if it was refused."""
        copy = open.copy()
        key = open.stat.st_dev, open.stat.st_ino
        pipe = self.pipes.get(key)
        if pipe is None:
            number = open.stat.st_ino & 0xFFFFFFFF
            while number in self.numbers:  # FIFOs of two file systems
                number = number + 1 & 0xFFFFFFFF
            self.numbers.add(number)
            pipe = self.pipes[key] = _Pipe(number, fcntl.fcntl(copy, fcntl.F_GETPIPE_SZ))
        pipe.ends.append(open)
        mine = sides(open.flags)
        pipe.known |= mine
        if mine != READ | WRITE:
            pipe.lonely = pipe.lonely or bool(poll.state(copy))
        if mine & READ and pipe.parts is None:
            try:
                pipe.parts = self.contents.read(copy)
            except OSError as error:
                context.refuse(open, f"is a pipe that cannot be looked into: {error.strerror}", "close it")
                return None
        return pipe

    def finish(self, context: DumpContext) -> None:
        """Look for ends outside, and into pipes that nobody can read."""
        for (device, inode), pipe in self.pipes.items():
            missing = (READ | WRITE) & ~pipe.known
            if missing and not pipe.lonely:
                self._note_outside(device, inode, pipe, missing, context)
            if pipe.parts is None and not pipe.outside:
                self._read_write_only(pipe)

    def _note_outside(self, device: int, inode: int, pipe: _Pipe, missing: int, context: DumpContext) -> None:
        """Find out who outside the tree has the *missing* side."""
        found = holders.find(device, inode, {os.getpid(), *context.pids})
        pipe.outside = "; ".join(str(holder) for holder in found if sides(holder.mode) & missing) or self.unseen
        if pipe.outside:
            context.warn(
                f"{pipe.ends[0].what} is the {_SIDES[pipe.known]} end of a pipe whose {_SIDES[missing]} end is outside"
                f" the tree: {pipe.outside}; {self.outside_help.format(inode)}"
            )

    def _read_write_only(self, pipe: _Pipe) -> None:
        """A reader can still come through /proc, so the bytes are kept."""
        fd = os.open(pipe.ends[0].path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            pipe.parts = self.contents.read(fd)
        finally:
            os.close(fd)

    def save(self, images: ImageDir) -> None:
        """Write the contents."""
        if not self.pipes:
            return
        with images.writer(_DATA[self.type]) as writer:
            for pipe in self.pipes.values():
                parts = pipe.parts or []
                if not parts or parts[0].packet:
                    parts = [Part(b""), *parts]
                for part in parts:
                    entry: dict[str, Any] = {"pipe_id": pipe.id, "bytes": len(part.data)}
                    own: dict[str, Any] = {"outside": pipe.outside} if pipe.outside else {}
                    if not part.is_dense():
                        own["pages"] = part.pages
                    if own:
                        entry["firn"] = own
                    writer.add(entry if part.packet else {**entry, "size": pipe.size})
                    writer.payload(part.data)

    def close(self) -> None:
        """Close what was needed to look into pipes."""
        self.contents.close()

    # -- restore -----------------------------------------------------------------------------------------------------

    def _take_records(self, number: int, context: RestoreContext) -> Records:
        """What the images hold of pipe *number*, the first time; then nothing."""
        if self._records is None:
            self._records = {}
            for entry, payload in context.images.read_with_payload(_DATA[self.type]):
                self._records.setdefault(entry["pipe_id"], []).append((entry, payload))
        return self._records.pop(number, [])

    @staticmethod
    def _fill(number: int, fd: int, records: Records, context: RestoreContext) -> None:
        """Give pipe *number* its capacity and contents, through *fd*, whose flags are lost."""
        if not records:
            return
        size = max(records[0][0].get("size", 0), max(entry["bytes"] for entry, _ in records))
        _set_capacity(fd, size, number)
        capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        for index, (entry, payload) in enumerate(records):
            data = context.images.read_payload(payload, capacity)
            pages = entry.get("firn", {}).get("pages", [])
            if pages and (sum(pages) != len(data) or not all(pages)):
                raise ImageError(f"{payload.name}: pipe {number} has {len(data)} bytes, but others in its pages")
            if len(records) == 1 and not pages:
                done = _write(fd, data)
            else:
                done = _splice_in(fd, data, bool(index) and "size" not in entry, capacity, pages)
            if done != len(data):
                raise ImageError(f"{payload.name}: pipe {number} has more bytes than its capacity of {capacity}")


def _splice_in(fd: int, data: bytes, packet: bool, capacity: int, pages: list[int]) -> int:
    """Put a run of bytes or a packet into a pipe, with so many bytes in its *pages*, or packed; how many bytes went in.

    The kernel joins what is written to bytes before it, but what is spliced it moves page by page as it is.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | (os.O_DIRECT if packet else 0))
    done = 0
    try:
        _set_capacity(writer, capacity, 0)
        for count in pages or [len(data)]:
            moved = _write(writer, data[done : done + count])
            done += moved
            while moved:
                moved -= os.splice(reader, fd, moved, flags=os.SPLICE_F_NONBLOCK)
        return done
    except BlockingIOError:
        return -1
    finally:
        os.close(reader)
        os.close(writer)


def _set_capacity(fd: int, size: int, number: int) -> None:
    """F_SETPIPE_SZ, if *size* is another one than what the pipe has."""
    if not size or size == fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ):
        return
    if size > _EVERYTHING:
        raise ImageError(f"pipe {number} has the impossible capacity {size}")
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
    except OSError as error:
        raise RestoreError(
            f"pipe {number} cannot have its capacity of {size} bytes: {error.strerror}",
            "raise /proc/sys/fs/pipe-max-size",
        ) from None


def _write(fd: int, data: bytes) -> int:
    """Write what fits at once; how much that was."""
    fcntl.fcntl(fd, fc.F_SETFL, fcntl.fcntl(fd, fc.F_GETFL) | fc.O_NONBLOCK)
    try:
        return os.write(fd, data) if data else 0
    except BlockingIOError:
        return 0


def _set_flags(fd: int, flags: int, owner: dict[str, int]) -> None:
    """The flags that fcntl(2) can set. A description with an owner gets FASYNC from the task, after its owner."""
    if owner.get("pid") or owner.get("signum"):
        flags &= ~fc.FASYNC
    fcntl.fcntl(fd, fc.F_SETFL, flags)


class _Made:
    """A pipe of a restore: the ``free`` ends that no entry has got yet; ``due`` entries are still to be opened.

    ``path`` leads to the pipe: its descriptor is open as long as there are entries due, as a free end or as an entry's.
    """

    __slots__ = ("due", "free", "path")

    def __init__(self, due: int) -> None:
        self.free = dict(zip((READ, WRITE), os.pipe(), strict=True))
        self.path = f"/proc/self/fd/{self.free[READ]}"
        self.due = due

    def close(self) -> None:
        """Close the ends that belong to no entry."""
        while self.free:
            os.close(self.free.popitem()[1])


class Pipes(_Piped):
    """The ends of pipe(2)."""

    type = PIPE
    unseen = "nobody in sight (it is on its way through a socket)"
    outside_help = "the restore needs --inherit-fd fd[N]:pipe:[{}], or the pipe comes back without it"

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self._count: dict[int, int] = {}

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The pipe_entry."""
        pipe = self._add(open, context)
        if pipe is None:
            return None
        return {"pipe_id": pipe.id, "flags": open.flags, "fown": context.owner(open)}

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The end *number*; its pipe is made with the first of its ends."""
        pipe_id, flags = message["pipe_id"], message["flags"]
        if flags & fc.O_ACCMODE == fc.O_ACCMODE:
            raise ImageError(f"files image: pipe end {number} is open for nothing (flags {flags:#o})")
        made = self.made.get(pipe_id)
        if made is None:
            made = self.made[pipe_id] = _Made(self._ends(context)[pipe_id])
            records = self._take_records(pipe_id, context)
            self._fill(pipe_id, made.free[WRITE], records, context)
            outside = records[0][0].get("firn", {}).get("outside") if records else ""
            if outside:
                context.warn(
                    f"pipe:[{pipe_id}] comes back without its other end, which was outside at the dump: {outside};"
                    f" --inherit-fd fd[N]:pipe:[{pipe_id}] would supply it"
                )
        fd = made.free.pop(sides(flags), -1) if not flags & O_LARGEFILE else -1
        if fd < 0:
            fd = os.open(made.path, flags & ~_NOT_FOR_OPEN | fc.O_CLOEXEC)
        _set_flags(fd, flags, message["fown"])
        made.due -= 1
        if not made.due:
            # Else the tasks would not see that the other end is closed.
            made.close()
        return fd

    def _ends(self, context: RestoreContext) -> dict[int, int]:
        """How many entries each pipe has."""
        if not self._count:
            for (kind, _), entry in context.files.items():
                if kind == PIPE:
                    number = entry["pipe"]["pipe_id"]
                    self._count[number] = self._count.get(number, 0) + 1
        return self._count

    def close(self) -> None:
        """Close what no entry has got."""
        super().close()
        for made in self.made.values():
            made.close()


class Fifos(_Piped):
    """The ends of FIFOs: their path, flags and owner are in a REG entry of their own."""

    type = FIFO
    outside_help = "the restore opens it by its name again"

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The fifo_entry."""
        pipe = self._add(open, context)
        if pipe is None:
            return None
        entry = {"flags": open.flags, "pos": open.position, "fown": context.owner(open)}
        return {"pipe_id": pipe.id, "regf_id": context.add_path(open.what, open.path, open.stat, entry)}

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """The end *number*, opened by its name as it was, while a descriptor for both directions keeps that from
        blocking."""
        if "regf_id" not in message:
            raise ImageError(f"files image: FIFO {number} has no regf_id")
        entry = context.message(REG, message["regf_id"])
        flags, owner = entry["flags"], entry["fown"]
        entry["flags"] = flags & ~(fc.O_ACCMODE | fc.O_NOFOLLOW | fc.O_DIRECT) | fc.O_RDWR | fc.O_NONBLOCK
        try:
            both = context.open(REG, message["regf_id"])
        finally:
            entry["flags"] = flags
        path = os.readlink(f"/proc/self/fd/{both}")
        if not stat.S_ISFIFO(os.fstat(both).st_mode):
            raise RestoreError(f"{path} is not a FIFO any more", "put it back")
        self._refill(message["pipe_id"], both, path, context)
        fd = os.open(path, flags & ~_NOT_FOR_OPEN | fc.O_CLOEXEC)
        _set_flags(fd, flags, owner)
        # Only this end may stay open, and the other descriptor is the opener's.
        os.dup2(fd, both, inheritable=False)
        # The tasks set owners by what the message of the file itself says.
        message |= {"fown": owner, "flags": flags}
        return fd

    def _refill(self, number: int, fd: int, path: str, context: RestoreContext) -> None:
        """Fill the FIFO once. What a process outside, which has the other end, still keeps in it is left there."""
        if number in self.filled:
            return
        self.filled.add(number)
        records = self._take_records(number, context)
        if not _queued(fd):
            self._fill(number, fd, records, context)
        elif not (records and records[0][0].get("firn", {}).get("outside")):
            raise RestoreError(f"the FIFO {path} holds data of a process that has it open", "end that process")
