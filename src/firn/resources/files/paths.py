"""Where an open file can be found again: paths, unlinked files, hard links (images: reg entries, remap-fpath,
ghost-file).

State owned: the name under which a restore finds the file, and the contents of files that have none any more. Kernel:
the magic links /proc/PID/{fd,map_files,cwd,root,exe}; a name ends in `` (deleted)`` when its directory entry is gone,
but a file may also be called so, so names are always checked by device and inode. What goes wrong: the name leads to
another file (replaced), or the file lives on under another hard link only: then a link of our own is needed
(``--link-remap``). A file of /proc whose process or thread is dead is opened again while a helper has their ids.
Labels of security modules (extended attributes) are not kept of unlinked files; the modules give them.
"""

from __future__ import annotations

import os
import stat

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import Obstacle
from firn.host import procfs
from firn.resources.base import REG
from firn.resources.files.procfiles import is_of_descriptor, process_of
from firn.resources.files.table import FileTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

DELETED = " (deleted)"
LINKED, GHOST, PROCFS = 0, 1, 2
"""remap_type of remap_file_path_entry."""
NO_SEEK = (1 << 64) - 1
GHOST_CHUNKS_FROM = 12288
_LABELS = ("security.selinux", "security.ima", "security.evm", "security.SMACK64")
FS_IOC_GETFLAGS = 0x80086601
_UNCHANGEABLE = 0x30
"""FS_IMMUTABLE_FL | FS_APPEND_FL (include/uapi/linux/fs.h)."""
_MANY_LINKS = 1000
MQUEUE_MAGIC = 0x19800202


class Ghost:
    """An unlinked file whose contents go into the checkpoint; ``link`` leads to it while the task lives."""

    __slots__ = ("fd", "id", "path", "stat")

    def __init__(self, number: int, path: str, st: os.stat_result, fd: int) -> None:
        self.id = number
        self.path = path
        self.stat = st
        self.fd = fd


class PathFinder:
    """Names files for a checkpoint and collects what has to be kept of the nameless ones."""

    def __init__(self, table: FileTable, obstacles: list[Obstacle], options: Any) -> None:
        self.table = table
        self.obstacles = obstacles
        self.ghost_limit: int = options.ghost_limit
        self.link_remap: bool = options.link_remap
        self.evasive_devices: bool = options.evasive_devices
        self.ghosts: dict[tuple[int, int], Ghost] = {}
        self.links: dict[tuple[int, int], tuple[str, int]] = {}
        self.made_links: list[str] = []
        self.remaps: list[dict[str, Any]] = []

    def add(self, what: str, link: str, message: dict[str, Any], st: os.stat_result, key: object) -> int:
        """Add the file behind magic link *link* to the table as REG; *what* names it in obstacles. The file id."""
        name, found = self._name(link, st)
        size_known = stat.S_ISREG(st.st_mode)
        entry = {"flags": 0, "pos": 0, "fown": NO_OWNER, **message, "name": name, "mode": st.st_mode}
        if size_known:
            entry["size"] = st.st_size
        number = self.table.add(REG, entry, key)
        if not found:
            self._remap(what, link, name, st, number)
        return number

    def _name(self, link: str, st: os.stat_result) -> tuple[str, bool]:
        """(path, whether the path leads to the file)."""
        target = os.readlink(link)
        for name in (target, target[: -len(DELETED)] if target.endswith(DELETED) else ""):
            if not name:
                continue
            try:
                there = os.stat(name, follow_symlinks=not stat.S_ISLNK(st.st_mode))
            except OSError:
                continue
            if (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino):
                return name, True
            if self.evasive_devices and st.st_rdev and _same_device(there, st):
                return name, True
        return (target[: -len(DELETED)] if target.endswith(DELETED) else target), False

    def _remap(self, what: str, link: str, name: str, st: os.stat_result, number: int) -> None:
        dead = process_of(name) if _is_procfs(st) else 0
        if not name.startswith("/"):
            self.obstacles.append(Obstacle(what, f"the path {name!r} leads out of its root"))
        elif dead and is_of_descriptor(name):
            self.obstacles.append(Obstacle(what, f"is {name}, of a descriptor that is closed", "close it too"))
        elif dead:
            # The descriptor keeps the file's place, so another one there is that of a later process.
            self.remaps.append({"orig_id": number, "remap_id": dead, "remap_type": PROCFS})
        elif reason := _why_out_of_reach(link, st):
            self.obstacles.append(Obstacle(what, f"{name} {reason}", "leave it, or close it before the dump"))
        elif stat.S_ISREG(st.st_mode) and st.st_nlink > 0:
            self._keep_link(what, link, name, st, number)
        elif stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode) or stat.S_ISFIFO(st.st_mode):
            self._keep_ghost(what, link, name, st, number)
        else:
            reason = f"{name} is gone or another file now, and it is neither a file nor a folder nor a FIFO"
            help = "restore its name, or close it before the dump"
            if st.st_rdev:
                help += "; --evasive-devices accepts another node of the same device"
            self.obstacles.append(Obstacle(what, reason, help))

    def _keep_ghost(self, what: str, link: str, name: str, st: os.stat_result, number: int) -> None:
        key = (st.st_dev, st.st_ino)
        ghost = self.ghosts.get(key)
        if ghost is None:
            if stat.S_ISREG(st.st_mode) and st.st_blocks * 512 > self.ghost_limit:
                self.obstacles.append(
                    Obstacle(
                        what, f"the unlinked file {name} takes {st.st_blocks * 512} bytes, more than the ghost limit"
                        f" of {self.ghost_limit}", f"raise it: --ghost-limit {st.st_blocks * 512}",
                    )
                )  # fmt: skip
                return
            fd = -1
            if not stat.S_ISFIFO(st.st_mode):
                fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                if _is_unchangeable(fd):
                    reason = f"the unlinked file {name} is immutable or append-only, which images cannot hold"
                    self.obstacles.append(Obstacle(what, reason, "change its attributes (FS_IOC_SETFLAGS)"))
            ghost = self.ghosts[key] = Ghost(len(self.ghosts) + 1, name, st, fd)
        self.remaps.append({"orig_id": number, "remap_id": ghost.id, "remap_type": GHOST})

    def _keep_link(self, what: str, link: str, name: str, st: os.stat_result, number: int) -> None:
        if not self.link_remap:
            self.obstacles.append(
                Obstacle(what, f"{name} is gone, but the file has {st.st_nlink} other name(s)", "use --link-remap")
            )
            return
        key = (st.st_dev, st.st_ino)
        if key not in self.links:
            remap_id = self.table.new_id()
            base = f"{os.path.dirname(name)}/link_remap."
            # Another checkpoint may have taken the name.
            suffix = next(
                (n for n in range(remap_id, remap_id + _MANY_LINKS) if not os.path.lexists(f"{base}{n}")), remap_id
            )
            path = f"{base}{suffix}"
            try:
                _link_to(link, path)
            except OSError as error:
                self.obstacles.append(Obstacle(what, f"cannot link {path}: {os.strerror(error.errno or 0)}"))
                return
            self.made_links.append(path)
            message = {"id": remap_id, "flags": 0, "pos": 0, "fown": NO_OWNER, "name": path}
            self.table.entries.append({"type": REG, "id": remap_id, "reg": message})
            self.links[key] = (path, remap_id)
        self.remaps.append({"orig_id": number, "remap_id": self.links[key][1], "remap_type": LINKED})

    def dead_process(self, number: int) -> int:
        """The pid of the dead process that file *number* in /proc belongs to; 0 if it belongs to none."""
        return next((r["remap_id"] for r in self.remaps if (r["orig_id"], r["remap_type"]) == (number, PROCFS)), 0)

    def undo(self) -> None:
        """Take back the links that were made (a failed dump, or one that leaves the target running)."""
        while self.made_links:
            path = self.made_links.pop()
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        self.close()

    def close(self) -> None:
        """Let go of the unlinked files."""
        for ghost in self.ghosts.values():
            if ghost.fd >= 0:
                os.close(ghost.fd)
                ghost.fd = -1

    def save(self, images: ImageDir) -> None:
        """Write remap-fpath.img and the ghost files."""
        if self.remaps:
            images.write_all("REMAP_FPATH", self.remaps)
        for ghost in self.ghosts.values():
            _save_ghost(images, ghost)


def _why_out_of_reach(link: str, st: os.stat_result) -> str:
    """Why the nameless file behind magic *link* cannot be kept as what it is; empty if it can.

    Contents and names can only be kept of files on mounts that are mounted somewhere; a folder that is not marked as
    deleted is there still, with all that is in it, but hidden.
    """
    fd = os.open(link, fc.O_PATH | fc.O_NOFOLLOW * stat.S_ISLNK(st.st_mode) | os.O_CLOEXEC)
    try:
        if statfs_type(fd) == MQUEUE_MAGIC:
            return "is a POSIX message queue, which is not supported"
        info = procfs.read(f"/proc/self/fdinfo/{fd}").decode()
    finally:
        os.close(fd)
    mount = next((line[7:].strip() for line in info.splitlines() if line.startswith("mnt_id:")), "")
    mounted = {line.split(b" ", 1)[0] for line in procfs.read("/proc/self/mountinfo").splitlines()}
    if mount.encode() not in mounted:
        return "is on a mount that is not mounted anywhere any more, or not yet"
    if stat.S_ISDIR(st.st_mode) and not os.readlink(link).endswith(DELETED):
        return "is hidden by what is mounted or put there now"
    return ""


def statfs_type(fd: int) -> int:
    """The f_type of statfs(2) of a descriptor's file system (include/uapi/linux/magic.h)."""
    buffer = bytearray(120)
    syscall("fstatfs", nr.fstatfs, fd, address_of(buffer))
    return int.from_bytes(buffer[:8], "little")


NO_OWNER: dict[str, int] = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}


def _is_unchangeable(fd: int) -> bool:
    """Whether the file has an attribute that forbids to write or unlink it (ioctl_iflags(2))."""
    flags = bytearray(8)
    try:
        syscall("FS_IOC_GETFLAGS", nr.ioctl, fd, FS_IOC_GETFLAGS, address_of(flags))
    except OSError:
        return False  # its file system has none
    return bool(flags[0] & _UNCHANGEABLE)


def _xattrs(fd: int) -> list[dict[str, Any]]:
    """The extended attributes of a file, without labels."""
    try:
        names = os.listxattr(fd)
    except OSError:
        return []  # its file system has none
    return [{"name": name, "value": os.getxattr(fd, name)} for name in names if name not in _LABELS]


def _save_ghost(images: ImageDir, ghost: Ghost) -> None:
    st = ghost.stat
    entry: dict[str, Any] = {
        "uid": st.st_uid, "gid": st.st_gid, "mode": st.st_mode, "dev": kernel_dev(st.st_dev), "ino": st.st_ino,
        "atim": _time(st.st_atime_ns), "mtim": _time(st.st_mtime_ns),
    }  # fmt: skip
    xattrs = _xattrs(ghost.fd) if ghost.fd >= 0 else []
    if xattrs:
        entry["firn"] = {"xattrs": xattrs}
    if not stat.S_ISREG(st.st_mode):
        images.write_one("GHOST_FILE", entry, ghost.id)
        return
    entry["firn"] = {"atime_ns": st.st_atime_ns, "mtime_ns": st.st_mtime_ns, "xattrs": xattrs}
    entry |= {"size": st.st_size, "chunks": st.st_size >= GHOST_CHUNKS_FROM}
    with images.writer("GHOST_FILE", ghost.id) as writer:
        writer.add(entry)
        if not entry["chunks"]:
            writer.payload((ghost.fd, 0, st.st_size))
            return
        for start, length in extents(ghost.fd, st.st_size):
            writer.add({"len": length, "off": start}, "ghost_chunk_entry")
            writer.payload((ghost.fd, start, length))


def _is_procfs(st: os.stat_result) -> bool:
    return st.st_dev == os.stat("/proc").st_dev


def _same_device(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two nodes are of one device."""
    return (one.st_rdev, stat.S_IFMT(one.st_mode)) == (other.st_rdev, stat.S_IFMT(other.st_mode))


def _link_to(link: str, path: str) -> None:
    """Give the file behind magic *link* the further name *path* (os.link does not follow the link)."""
    source, target = bytearray(os.fsencode(link) + b"\0"), bytearray(os.fsencode(path) + b"\0")
    syscall(
        f"link {path}",
        nr.linkat, fc.AT_FDCWD, address_of(source), fc.AT_FDCWD, address_of(target), fc.AT_SYMLINK_FOLLOW,
    )  # fmt: skip


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of the data of a sparse file (lseek(2) SEEK_DATA); all of it where holes are not reported."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == 6:  # ENXIO: only a hole is left
                return found
            return [(0, size)]
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, at - start))
    return found


def kernel_dev(dev: int) -> int:
    """A device number as the kernel encodes it inside (20 bits of minor)."""
    return os.major(dev) << 20 | os.minor(dev)


def _time(nanoseconds: int) -> dict[str, int]:
    return {"tv_sec": nanoseconds // 10**9, "tv_usec": nanoseconds % 10**9 // 1000}
