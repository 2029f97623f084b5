"""The path of an inode that somebody watches, and the way back (images: fh_entry).

inotify and fanotify keep inodes, not paths. Kernel: fdinfo shows device, inode number and a file handle, which
open_by_handle_at(2) opens if the file system knows handles; of a directory, or of a file in use, that has a path
again. Otherwise likely places are searched: mount points, what the tree has open, the folders around that, and some
where configuration and data usually lie. Reading folders makes events of its own for whoever watches them, so that
comes last.
"""

from __future__ import annotations

import errno
import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError
from firn.host import procfs
from firn.resources.files.paths import GHOST, kernel_dev

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from firn.resources.base import DumpContext, RestoreContext

_WORDS = ev.MAX_HANDLE // 8
_PLACES = ("/etc", "/run", "/srv", "/tmp", "/var", "/home", "/root", "/opt", "/usr/share", "/usr/lib", "/usr/local")
_BUDGET = 100_000
"""Directory entries looked at, for one watch."""
_ESCAPES = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


class Mount:
    """A line of /proc/PID/mountinfo: ``id``, ``device`` in the kernel's encoding, ``point``."""

    __slots__ = ("device", "id", "point")

    def __init__(self, line: str) -> None:
        words = line.split(" ", 5)
        major, _, minor = words[2].partition(":")
        self.id = int(words[0])
        self.device = int(major) << 20 | int(minor)
        self.point = words[4]
        for escape, character in _ESCAPES:
            self.point = self.point.replace(escape, character)


def mounts(pid: int | str) -> list[Mount]:
    """The mounts that *pid* sees, in their order."""
    text = procfs.read(f"/proc/{pid}/mountinfo").decode("utf-8", "surrogateescape")
    return [Mount(line) for line in text.split("\n") if line]


def to_entry(item: dict[str, str], path: str) -> dict[str, Any]:
    """The fh_entry of an inode from the words of an fdinfo line; *path* is left out if it is empty."""
    raw = bytes.fromhex(item.get("f_handle", "")).ljust(ev.MAX_HANDLE, b"\0")
    entry: dict[str, Any] = {
        "bytes": int(item.get("fhandle-bytes", "0"), 16), "type": int(item.get("fhandle-type", "0"), 16),
        "handle": [int.from_bytes(raw[at : at + 8], "little") for at in range(0, _WORDS * 8, 8)],
    }  # fmt: skip
    if path:
        entry["path"] = path
    return entry


def open_handle(device: int, entry: dict[str, Any], all_mounts: list[Mount]) -> int:
    """An O_PATH descriptor of the inode of fh_entry *entry* on *device* (kernel encoding); -1 if there is none."""
    size = entry["bytes"]
    if not 0 < size <= ev.MAX_HANDLE or len(entry["handle"]) * 8 < size:
        return -1
    raw = b"".join(word.to_bytes(8, "little") for word in entry["handle"])[:size]
    handle = bytearray(ev.FILE_HANDLE.pack(size, entry["type"] - ((entry["type"] >> 31) << 32)) + raw)
    for mount in all_mounts:
        if mount.device != device:
            continue
        try:
            root = os.open(mount.point, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            return syscall(
                "open_by_handle_at", nr.open_by_handle_at, root, address_of(handle), fc.O_PATH | fc.O_CLOEXEC
            )
        except OSError:
            continue
        finally:
            os.close(root)
    return -1


class Finder:
    """Finds the paths of watched inodes, during one dump."""

    def __init__(self, context: DumpContext) -> None:
        self.context = context
        self.mounts = mounts("self")

    def find(self, pid: int, device: int, inode: int, entry: dict[str, Any]) -> str | None:
        """The path of *inode* on *device* (kernel encoding), which process *pid* watches; "" if it has none but the
        checkpoint keeps it as an unlinked file; None if nothing is found."""
        if not self.context.options.force_irmap:
            found = self._by_handle(device, entry)
            if found is not None:
                return found
        for path in self._likely(pid, device):
            st = _lstat(path)
            if st is not None and st.st_ino == inode and kernel_dev(st.st_dev) == device:
                return path
        found = self._search(pid, device, inode)
        # Whatever was asked for, an unlinked file has no other way.
        return self._by_handle(device, entry) if found is None and self.context.options.force_irmap else found

    def _by_handle(self, device: int, entry: dict[str, Any]) -> str | None:
        """The path that the kernel gives the inode of the file handle, as in :meth:`find`."""
        fd = open_handle(device, entry, self.mounts)
        if fd < 0:
            return None
        try:
            return self._path_of(fd)
        finally:
            os.close(fd)

    def _path_of(self, fd: int) -> str | None:
        link = f"/proc/self/fd/{fd}"
        wanted = os.stat(link)
        if not wanted.st_nlink:
            if not self._is_open(wanted):
                # A mapping, or a working directory, keeps an inode as well.
                self.context.add_path("watched file", link, wanted, {"flags": os.O_RDONLY})
            return ""
        path = os.readlink(link)
        there = _lstat(path)
        if there is None or (there.st_dev, there.st_ino) != (wanted.st_dev, wanted.st_ino):
            return None
        return path

    def _is_open(self, wanted: os.stat_result) -> bool:
        """Whether a process has the file open: then it is in the checkpoint already."""
        for link in self._links():
            try:
                st = os.stat(link)
            except OSError:
                continue
            if (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
        return False

    def _links(self) -> Iterator[str]:
        """The magic links of all descriptors of all processes."""
        for pid in self.context.pids:
            try:
                speaker = procfs.speaker(pid)
                names = os.listdir(f"/proc/{speaker}/fd")
            except OSError:
                continue  # a zombie
            yield from (f"/proc/{speaker}/fd/{name}" for name in names)

    def _likely(self, pid: int, device: int) -> Iterator[str]:
        for mount in self.mounts:
            if mount.device == device:
                yield mount.point
        yield from self._open_places()
        yield from (f"/proc/{pid}", *_PLACES)

    def _open_places(self) -> Iterator[str]:
        """What the processes have open, and the folders that it lies in, nearest first."""
        paths = dict[str, None]()
        links = [f"/proc/{procfs.speaker(pid)}/{name}" for pid in self.context.pids for name in ("cwd", "exe")]
        for link in (*links, *self._links()):
            try:
                path = os.readlink(link)
            except OSError:
                continue  # a zombie's
            if path.startswith("/"):
                paths[path] = None
        for path in list(paths):
            paths[os.path.dirname(path)] = None
        return iter(paths)

    def _search(self, pid: int, device: int, inode: int) -> str | None:
        """Walk through the likely folders, breadth first."""
        queue = [*self.context.options.irmap_scan_path]
        queue += [path for path in (*self._open_places(), *_PLACES) if not path.startswith(("/proc", "/dev"))]
        seen: set[str] = set()
        left = _BUDGET
        for folder in queue:
            st = _lstat(folder)
            if folder in seen or st is None or kernel_dev(st.st_dev) != device:
                continue
            seen.add(folder)
            try:
                entries = list(os.scandir(folder))
            except OSError:
                continue
            for entry in entries:
                if entry.inode() == inode:
                    there = _lstat(entry.path)
                    if there is not None and kernel_dev(there.st_dev) == device:
                        return str(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    queue.append(entry.path)
            left -= len(entries)
            if left < 0:
                break
        return None


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


class Places:
    """Where watched inodes are now, during one restore."""

    def __init__(self, context: RestoreContext) -> None:
        self.context = context
        self._ghosts: dict[tuple[int, int], int] | None = None
        self._mounts: list[Mount] | None = None

    def open(self, device: int, inode: int, entry: dict[str, Any], follow: bool) -> int:
        """A new O_PATH descriptor of the inode; OSError if it is not there any more, ImageError for an impossible path.
        *follow*: it is no symbolic link.

        An unlinked file of the checkpoint with the recorded numbers comes first, then the path, then the file handle.
        """
        if self._ghosts is None:
            self._ghosts = _read_ghosts(self.context)
        ghost = self._ghosts.get((device, inode))
        if ghost is not None:
            return os.open(f"/proc/self/fd/{self.context.open(1, ghost)}", fc.O_PATH | os.O_CLOEXEC)
        path = entry.get("path", "")
        if "\0" in path:
            raise ImageError(f"files image: watched file with an impossible path {path!r}")
        if path:
            return os.open("/" + path[1:], fc.O_PATH | os.O_CLOEXEC | (0 if follow else fc.O_NOFOLLOW))
        if self._mounts is None:
            self._mounts = mounts("self")
        fd = open_handle(device, entry, self._mounts)
        if fd < 0:
            raise FileNotFoundError(errno.ENOENT, "it has no path, and its file handle leads nowhere")
        return fd


def _read_ghosts(context: RestoreContext) -> dict[tuple[int, int], int]:
    """(Device, inode number) at the dump -> file id, of the checkpoint's unlinked files."""
    images, found = context.images, dict[tuple[int, int], int]()
    if not images.exists("REMAP_FPATH"):
        return found
    for remap in images.read_all("REMAP_FPATH"):
        number = remap["remap_id"]
        if remap.get("remap_type", GHOST) == GHOST and images.exists("GHOST_FILE", number & 0x7FFFFFFF):
            ghost = images.read_with_payload("GHOST_FILE", number & 0x7FFFFFFF)[0][0]
            # The first one is open already: files that are only watched are recorded after those that are open.
            found.setdefault((ghost.get("dev", 0), ghost.get("ino", 0)), remap["orig_id"])
    return found
