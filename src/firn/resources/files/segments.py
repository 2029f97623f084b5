"""System V shared memory on the host (images: ipcns-shm-N.img, pagemap-shmem-ID).

State owned: the segments that the tree has attached: id, key, owner, creator, mode, size, contents, whether they are
marked to be removed (shmctl(2) IPC_RMID while attached) or locked. Kernel: a mapping called /SYSV........ whose inode
number is the segment's id (ipc/shm.c); shmctl IPC_STAT; the contents through /proc/PID/map_files, which is no
attachment. The mappings themselves are :mod:`firn.resources.memory.attach`'s.

How it comes back: a segment that still lives is attached again. If at the dump nobody but the tree had it attached, and
nobody has now, it gets the contents of the checkpoint, else it keeps what it has: it is others' too. A segment that is
gone (it was marked and the tree its last user, or the machine was started anew) is made again under its id, by
/proc/sys/kernel/shm_next_id. We hold every segment attached until the tasks have it.

What goes wrong: the id or key belongs to another segment now. Not kept: bytes behind the segment's size in its last
page, times and pids of the last operations, SHM_NORESERVE; and a segment that is marked has lost its key, so that a
mapping of one that is made anew is called /SYSV00000000.
"""

from __future__ import annotations

import errno
import os

from firn.abi import ipc, mman, nr, prctl
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, Obstacle, RestoreError
from firn.host import procfs
from firn.resources.files import memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

NEXT_ID = "/proc/sys/kernel/shm_next_id"
_FIELDS = ("key", "uid", "gid", "cuid", "cgid", "mode", "size", "atime", "dtime", "ctime", "cpid", "lpid", "attached")
_ATTEMPTS = 5
_PUNCH = 3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (include/uapi/linux/falloc.h)."""


def look_up(shmid: int) -> dict[str, int] | None:
    """What IPC_STAT tells of segment *shmid*, None if there is none. Raises OSError if it may not be asked."""
    raw = bytearray(ipc.SHMID64_DS.size)
    try:
        syscall(f"shmctl of segment {shmid}", nr.shmctl, shmid, ipc.IPC_STAT, address_of(raw))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EIDRM):
            return None
        raise
    return dict(zip(_FIELDS, ipc.SHMID64_DS.unpack(raw), strict=True))


def _boot() -> str:
    return procfs.read("/proc/sys/kernel/random/boot_id").decode().strip()


class DumpedSegments:
    """The segments of a dump: each saved once, however often it is attached. *numbers* are those of page lists that
    are taken."""

    def __init__(self, numbers: set[int]) -> None:
        self.entries: dict[int, dict[str, Any]] = {}
        self.fds: dict[int, int] = {}
        self.attached: dict[int, list[int]] = {}
        self.numbers = numbers
        self.pages = 0

    def add(self, what: str, link: str, st: os.stat_result, obstacles: list[Obstacle]) -> int:
        """The id of the segment that is mapped at magic *link*; *what* names the mapping."""
        shmid = st.st_ino
        if shmid in self.entries:
            self.attached[shmid][0] += 1
            return shmid
        found = look_up(shmid)
        if found is None or st.st_size < found["size"]:
            reason = "is memory of a System V segment that is none of this IPC namespace"
            obstacles.append(Obstacle(what, reason, "unmap it first"))
            return shmid
        entry: dict[str, Any] = {
            "desc": {name: found[name] & 0xFFFFFFFF for name in ("key", "uid", "gid", "cuid", "cgid", "mode")},
            "size": found["size"], "in_pagemaps": True, "firn": {"boot": _boot()},
        }  # fmt: skip
        entry["desc"]["id"] = shmid
        if st.st_blksize != mman.PAGE:
            entry["hugetlb_flag"] = (st.st_blksize.bit_length() - 1) << mman.MAP_HUGE_SHIFT
        self.fds[shmid] = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        self.entries[shmid] = entry
        self.attached[shmid] = [1, found["attached"]]
        self.numbers.add(shmid)
        return shmid

    def save(self, images: ImageDir, namespace: int, next_pages_id: int) -> int:
        """Write ipcns-shm-*namespace*.img and the contents, the pages into images from number *next_pages_id* on; the
        next one after them."""
        for shmid, (ours, all_of_them) in self.attached.items():
            self.entries[shmid]["firn"]["outside"] = all_of_them > ours
        images.write_all("IPCNS_SHM", list(self.entries.values()), namespace)
        for shmid, entry in self.entries.items():
            whole = {**entry, "size": os.fstat(self.fds[shmid]).st_size}
            self.pages += memfd.save_pages(images, self.fds[shmid], whole, shmid, next_pages_id)
            next_pages_id += 1
        return next_pages_id

    def close(self) -> None:
        """Let go of the segments."""
        while self.fds:
            os.close(self.fds.popitem()[1])


class Segment:
    """A segment that the restore has attached at ``address`` of our own memory."""

    __slots__ = ("address", "created", "entry", "id", "marked", "refill")

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.id: int = entry["desc"]["id"]
        self.created = self.marked = self.refill = False
        self.address = 0

    @property
    def mode(self) -> int:
        """Permissions and state, as IPC_STAT tells them."""
        return int(self.entry["desc"]["mode"])

    @property
    def length(self) -> int:
        """Bytes that an attachment covers."""
        return attached_size(self.entry)

    def prepare(self, images: ImageDir) -> None:
        """Find the segment or make it; attach it."""
        living = look_up(self.id)
        if living is None:
            self._create()
        else:
            self._compare(living)
        self.address = syscall(f"shmat of segment {self.id}", nr.shmat, self.id, 0, 0)
        if self.created:
            self._settle()
            self.fill(images)

    def _compare(self, living: dict[str, int]) -> None:
        desc, own = self.entry["desc"], self.entry.get("firn", {})
        same = all(living[name] & 0xFFFFFFFF == desc[name] for name in ("key", "cuid", "cgid"))
        same = same and living["size"] == self.entry["size"]
        # Ids begin anew with every start of the machine, and private segments have nothing else to know them by.
        if own.get("boot", _boot()) != _boot() and (living["attached"] or not living["key"]):
            same = False
        if not same:
            raise RestoreError(
                f"System V shared memory {self.id} is another segment than at the dump",
                f"end its users and remove it (ipcrm -m {self.id})",
            )
        self.refill = bool(own) and not own.get("outside") and not living["attached"]

    def _create(self) -> None:
        desc, size = self.entry["desc"], self.entry["size"]
        flags = ipc.IPC_CREAT | ipc.IPC_EXCL | self.mode & 0o777
        if self.entry.get("hugetlb_flag"):
            flags |= ipc.SHM_HUGETLB | self.entry["hugetlb_flag"]
        for _ in range(_ATTEMPTS):
            found = self._get(desc, size, flags)
            if found == self.id:
                self.created = True
                return
            _control(found, ipc.IPC_RMID)  # somebody else was faster with a segment of their own
        raise RestoreError(
            f"the id of System V shared memory {self.id} is in use", "see what has it: ipcs -m, and remove it: ipcrm"
        )

    def _get(self, desc: dict[str, int], size: int, flags: int) -> int:
        """shmget(2) with the wanted id, as the creator: nothing can change who that was."""
        euid, egid = os.geteuid(), os.getegid()
        dumpable = syscall("prctl", nr.prctl, prctl.GET_DUMPABLE, 0, 0, 0, 0)
        try:
            with open(NEXT_ID, "w", encoding="ascii") as file:
                file.write(str(self.id))
            if egid != desc["cgid"]:
                os.setegid(desc["cgid"])
            if euid != desc["cuid"]:
                os.seteuid(desc["cuid"])
            return syscall("shmget", nr.shmget, desc["key"], size, flags)
        except OSError as error:
            help = f"see what has it: ipcs -m -i {self.id}" if error.errno == errno.EEXIST else ""
            why = f"its key {desc['key']:#x} is taken" if error.errno == errno.EEXIST else error.strerror
            raise RestoreError(f"System V shared memory {self.id} cannot be made again: {why}", help) from None
        finally:
            if os.geteuid() != euid:
                os.seteuid(euid)
            if os.getegid() != egid:
                os.setegid(egid)
            # To be another user for a moment took it away, and the tasks have to reach our descriptors.
            syscall("prctl", nr.prctl, prctl.SET_DUMPABLE, dumpable, 0, 0, 0)

    def _settle(self) -> None:
        """Owner, mode, and the marks."""
        desc = self.entry["desc"]
        raw = bytearray(ipc.SHMID64_DS.pack(0, desc["uid"], desc["gid"], 0, 0, self.mode & 0o777, *[0] * 7))
        _control(self.id, ipc.IPC_SET, raw)
        if self.mode & ipc.SHM_LOCKED:
            _control(self.id, ipc.SHM_LOCK)
        if self.mode & ipc.SHM_DEST:
            _control(self.id, ipc.IPC_RMID)
            self.marked = True

    def fill(self, images: ImageDir) -> None:
        """Give it the contents of the checkpoint."""
        name = f"/proc/self/map_files/{self.address:x}-{self.address + self.length:x}"
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            syscall("fallocate", nr.fallocate, fd, _PUNCH, 0, self.length)
            size = self.length if self.entry.get("hugetlb_flag") else self.entry["size"]
            memfd.fill_pages(images, fd, {**self.entry, "size": size}, self.id, f"System V segment {self.id}")
        finally:
            os.close(fd)

    def close(self) -> None:
        """Detach it."""
        if self.address:
            syscall(f"shmdt of segment {self.id}", nr.shmdt, self.address)
            self.address = 0

    def undo(self) -> None:
        """Remove it if it is ours."""
        if self.created and not self.marked:
            _control(self.id, ipc.IPC_RMID)
        self.created = False


class RestoredSegments:
    """The segments of a checkpoint, made or found."""

    def __init__(self, images: ImageDir) -> None:
        self.images = images
        self.segments: list[Segment] = []

    def prepare(self, entries: list[dict[str, Any]]) -> None:
        """Make or find the segments of *entries* (ipc_shm_entry)."""
        for entry in entries:
            segment = Segment(entry)
            self.segments.append(segment)
            segment.prepare(self.images)

    def finish(self) -> None:
        """The last moment before the tree runs: contents of segments that were there already."""
        for segment in self.segments:
            if segment.refill:
                segment.fill(self.images)

    def succeeded(self) -> None:
        """The tree runs: what was made stays."""
        for segment in self.segments:
            segment.created = False

    def close(self) -> None:
        """Detach everything; remove what was made if the restore has failed."""
        for segment in self.segments:
            segment.close()
            segment.undo()
        self.segments = []


def attached_size(entry: dict[str, Any]) -> int:
    """How many bytes an attachment of a segment covers: whole pages, of its own page size."""
    page = 1 << (entry.get("hugetlb_flag", 0) >> mman.MAP_HUGE_SHIFT) if entry.get("hugetlb_flag") else mman.PAGE
    return int(-(-entry["size"] // page) * page)


def load(images: ImageDir, namespace: int, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Id -> entry of the segments *wanted* by mappings, sizes and ids checked. What the images do not describe (CRIU's
    have no such list without an IPC namespace) has to be there."""
    found = {entry["desc"]["id"]: entry for entry in images.read_all("IPCNS_SHM", namespace)}
    for shmid in wanted - set(found):
        living = look_up(shmid)
        if living is None:
            raise RestoreError(f"System V shared memory {shmid} is gone, and the checkpoint does not hold it")
        desc = {name: living[name] & 0xFFFFFFFF for name in ("key", "uid", "gid", "cuid", "cgid", "mode")}
        found[shmid] = {"desc": {**desc, "id": shmid}, "size": living["size"]}
    for shmid in wanted:
        if not 0 < found[shmid]["size"] < 1 << 47 or shmid >> 31 or not found[shmid].get("in_pagemaps", True):
            raise ImageError(f"ipcns-shm image: segment {shmid} has no possible id or size, or is of an old form")
    return {shmid: found[shmid] for shmid in wanted}


def _control(shmid: int, command: int, raw: bytearray | None = None) -> None:
    syscall(f"shmctl of segment {shmid}", nr.shmctl, shmid, command, address_of(raw) if raw else 0)
