"""Watches on files: inotify and fanotify (images: INOTIFY, FANOTIFY entries).

State owned: the watches of an instance, each with its inode, events and (inotify) number; a fanotify group's flags.
Kernel: the ``inotify`` and ``fanotify`` lines of fdinfo. Watches are set again by the controller when the files of the
checkpoint are in place, so that making those is not reported; inotify's numbers are chosen (INOTIFY_IOC_SETNEXTWD).

What goes wrong: queued events cannot be put back. An instance that had some comes back with the event in their place
that says that events were lost, so its reader has to look at the files again (:mod:`firn.resources.files.overflow`).
The number that a later inotify_add_watch(2) gets may have been in use before, by a watch that was removed.
"""

from __future__ import annotations

import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, KernelError, RestoreError
from firn.host import procfs
from firn.resources.base import Kind
from firn.resources.files import overflow
from firn.resources.files.events import set_status
from firn.resources.files.handles import Finder, Mount, Places, mounts, to_entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.base import DumpContext, Open, RestoreContext

_INODE, _MOUNT = 1, 2
"""mark_type of fanotify_mark_entry."""


def _note_unread(open: Open, what: str, event: str, context: DumpContext) -> bool:
    """Whether events wait to be read; the log is told what becomes of them."""
    count = overflow.unread(open.copy())
    if count:
        context.warn(
            f"{open.what} is a {what} with {count} bytes of unread events: it comes back with {event} in their place"
        )
    return bool(count)


def _lines(open: Open, name: str) -> list[dict[str, str]]:
    """The fdinfo lines that begin with word *name*, as mappings of their ``key:value`` words."""
    lines = [line for line in open.info["lines"].splitlines() if line.startswith(name + " ")]
    return [{key: value for key, _, value in (word.partition(":") for word in line.split()[1:])} for line in lines]


class _Watcher(Kind):
    """What inotify and fanotify have in common."""

    def __init__(self) -> None:
        self._instances: list[tuple[Open, list[dict[str, str]], list[dict[str, Any]]]] = []
        self._places: Places | None = None

    def finish(self, context: DumpContext) -> None:
        """Find the paths, now that all instances have been seen to have no events: the search may make some."""
        if not any(lines for _, lines, _ in self._instances):
            return
        finder = Finder(context)
        for open, lines, entries in self._instances:
            for item in lines:
                entry = self._entry(open, item, finder)
                if entry is not None:
                    entries.append(entry)

    def _entry(self, open: Open, item: dict[str, str], finder: Finder) -> dict[str, Any] | None:
        """The image entry of one fdinfo line; None if it was refused."""
        raise NotImplementedError

    def _handle(self, open: Open, item: dict[str, str], finder: Finder) -> dict[str, Any] | None:
        """The fh_entry of the inode of an fdinfo line, with its path; None if it was refused."""
        device, inode = int(item["sdev"], 16), int(item["ino"], 16)
        path = finder.find(open.tid, device, inode, to_entry(item, ""))
        if path is None:
            reason = f"watches inode {inode} of device {device >> 20}:{device & 0xFFFFF}, whose path cannot be found"
            finder.context.refuse(open, reason, "open the file, or name its folder with --irmap-scan-path")
            return None
        return to_entry(item, path)

    def _open_inode(
        self, what: str, device: int, inode: int, handle: dict[str, Any], follow: bool, context: RestoreContext
    ) -> int:
        """Our descriptor of a watched inode."""
        if self._places is None:
            self._places = Places(context)
        try:
            return self._places.open(device, inode, handle, follow)
        except OSError as error:
            name = handle.get("path", f"inode {inode}")
            raise RestoreError(f"{what}: {name} cannot be watched again: {error.strerror}", "put it back") from None


class Inotify(_Watcher):
    """inotify(7)."""

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The message; its watches are filled in by :meth:`finish`."""
        watches: list[dict[str, Any]] = []
        message = {"flags": open.flags, "fown": context.owner(open), "wd": watches}
        if _note_unread(open, "inotify instance", "IN_Q_OVERFLOW", context):
            message["firn"] = {"overflow": True}
        lines = sorted(_lines(open, "inotify"), key=lambda item: int(item["wd"], 16))
        self._instances.append((open, lines, watches))
        return message

    def _entry(self, open: Open, item: dict[str, str], finder: Finder) -> dict[str, Any] | None:
        handle = self._handle(open, item, finder)
        if handle is None:
            return None
        mask = int(item["mask"], 16) & ev.IN_USER_MASK
        if os.path.islink(handle.get("path", "")):
            mask |= ev.IN_DONT_FOLLOW
        return {
            "id": 0, "i_ino": int(item["ino"], 16), "mask": mask, "ignored_mask": int(item["ignored_mask"], 16),
            "s_dev": int(item["sdev"], 16), "wd": int(item["wd"], 16), "f_handle": handle,
        }  # fmt: skip

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether there are watches: they would see the restore's own work on files."""
        return bool(message.get("wd"))

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """An instance with the watches."""
        fd = syscall(f"inotify_init1 {number}", nr.inotify_init1, fc.O_CLOEXEC)
        set_status(fd, message["flags"])
        if message.get("firn", {}).get("overflow") and not overflow.inotify(fd):
            context.warn(f"inotify {number} had unread events, which are lost, and cannot be told so")
        for watch in message.get("wd", []):
            self._add(fd, f"inotify {number}, watch {watch['wd']}", watch, context)
        return fd

    def _add(self, fd: int, what: str, watch: dict[str, Any], context: RestoreContext) -> None:
        if not 0 < watch["wd"] < 1 << 31:
            raise ImageError(f"files image: {what}: impossible number")
        follow = not watch["mask"] & ev.IN_DONT_FOLLOW
        target = self._open_inode(what, watch["s_dev"], watch["i_ino"], watch["f_handle"], follow, context)
        try:
            try:
                syscall(what, nr.ioctl, fd, ev.INOTIFY_IOC_SETNEXTWD, watch["wd"])
            except OSError as error:
                reason = f"{what}: its number cannot be chosen: {error.strerror}"
                raise KernelError(reason, "Linux 4.16 or later") from None
            path = bytearray(f"/proc/self/fd/{target}\0".encode())
            got = syscall(what, nr.inotify_add_watch, fd, address_of(path), watch["mask"] & ev.IN_USER_MASK)
        finally:
            os.close(target)
        if got != watch["wd"]:
            raise RestoreError(f"{what}: its file is now the same as that of watch {got}", "put the files back")


class Fanotify(_Watcher):
    """fanotify(7)."""

    def __init__(self) -> None:
        super().__init__()
        self._mounts: list[Mount] = []

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The message; its marks are filled in by :meth:`finish`."""
        lines = _lines(open, "fanotify")
        group, lines = lines[0], lines[1:]
        lost = bool(overflow.unread(open.copy()))
        if lost and int(group["flags"], 16) & (ev.FAN_UNLIMITED_QUEUE | ev.FAN_REPORT_PIDFD):
            reason = "is a fanotify group with unread events, whose loss it cannot be told"
            context.refuse(open, reason, "have it read them first, or try again", passing=True)
            return None
        if lost:
            _note_unread(open, "fanotify group", "FAN_Q_OVERFLOW", context)
        for item in lines:
            if "ino" not in item and "mnt_id" not in item:
                what = "a whole file system" if "sdev" in item else "a namespace"
                context.refuse(open, f"is a fanotify group that watches {what}", "close it before the dump")
                return None
            if (int(item["mask"], 16) | int(item["ignored_mask"], 16)) & ev.FAN_PERMISSION:
                reason = "is a fanotify group that decides about accesses, for which others may be waiting"
                context.refuse(open, reason, "close it before the dump")
                return None
        marks: list[dict[str, Any]] = []
        self._instances.append((open, lines, marks))
        return {
            "flags": open.flags, "fown": context.owner(open), "faflags": int(group["flags"], 16),
            "evflags": int(group["event-flags"], 16), "mark": marks, **({"firn": {"overflow": True}} if lost else {}),
        }  # fmt: skip

    def _entry(self, open: Open, item: dict[str, str], finder: Finder) -> dict[str, Any] | None:
        entry: dict[str, Any] = {
            "id": 0, "mflags": int(item["mflags"], 16), "mask": int(item["mask"], 16),
            "ignored_mask": int(item["ignored_mask"], 16),
        }  # fmt: skip
        if "mnt_id" in item:
            number = int(item["mnt_id"], 16)
            point = next((mount.point for mount in finder.mounts if mount.id == number), "")
            if not point or _mount_of(point) != number:
                reason = f"is a fanotify group that watches mount {number}, which has no path any more"
                finder.context.refuse(open, reason)
                return None
            return entry | {"type": _MOUNT, "s_dev": 0, "me": {"mnt_id": number, "path": point}}
        handle = self._handle(open, item, finder)
        if handle is None:
            return None
        if os.path.islink(handle.get("path", "")):
            entry["mflags"] |= ev.FAN_MARK_DONT_FOLLOW
        return entry | {
            "type": _INODE, "s_dev": int(item["sdev"], 16), "ie": {"i_ino": int(item["ino"], 16), "f_handle": handle},
        }  # fmt: skip

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether there are marks: they would see the restore's own work on files."""
        return bool(message.get("mark"))

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """A group with the marks."""
        flags = message["faflags"] & ~ev.FAN_NONBLOCK | ev.FAN_CLOEXEC
        fd = syscall(f"fanotify_init {number}", nr.fanotify_init, flags, message["evflags"])
        if message.get("firn", {}).get("overflow") and not overflow.fanotify(fd):
            context.warn(f"fanotify {number} had unread events, which are lost, and cannot be told so")
        set_status(fd, message["flags"])
        for mark in message.get("mark", []):
            self._add(fd, f"fanotify {number}", mark, context)
        return fd

    def _add(self, fd: int, what: str, mark: dict[str, Any], context: RestoreContext) -> None:
        if (mark["mask"] | mark["ignored_mask"]) & ev.FAN_PERMISSION:
            # Its owner is stopped: the first to touch such a file, we most likely, would wait for it for ever.
            raise RestoreError(f"{what} decides about accesses, which cannot be restored")
        kind = 0
        if mark["type"] == _INODE and "ie" in mark:
            inode, follow = mark["ie"], not mark["mflags"] & ev.FAN_MARK_DONT_FOLLOW
            target = self._open_inode(what, mark["s_dev"], inode["i_ino"], inode["f_handle"], follow, context)
        elif mark["type"] == _MOUNT and "me" in mark:
            kind, target = ev.FAN_MARK_MOUNT, self._open_mount(what, mark["me"].get("path", ""))
        else:
            raise ImageError(f"files image: {what}: a mark of unknown type {mark['type']}")
        flags = ev.FAN_MARK_ADD | kind | mark["mflags"] & ev.FAN_MARK_EVICTABLE
        ignore = mark["mflags"] & (ev.FAN_MARK_IGNORE | ev.FAN_MARK_IGNORED_SURV_MODIFY)
        if not ignore & ev.FAN_MARK_IGNORE:
            ignore |= ev.FAN_MARK_IGNORED_MASK
        path = bytearray(f"/proc/self/fd/{target}\0".encode())
        try:
            for mask, how in ((mark["mask"], flags), (mark["ignored_mask"], flags | ignore)):
                if mask:
                    syscall(f"{what}: fanotify_mark", nr.fanotify_mark, fd, how, mask, fc.AT_FDCWD, address_of(path))
        finally:
            os.close(target)

    def _open_mount(self, what: str, path: str) -> int:
        """Our descriptor of a mount point; RestoreError if nothing is mounted there."""
        self._mounts = self._mounts or mounts("self")
        if not any(mount.point == path for mount in self._mounts):
            raise RestoreError(f"{what}: nothing is mounted on {path!r}, which it watches", "mount it again")
        return os.open(path, fc.O_PATH | os.O_CLOEXEC)


def _mount_of(path: str) -> int:
    """The id of the mount that *path* leads to."""
    try:
        fd = os.open(path, fc.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return int(procfs.read(f"/proc/self/fdinfo/{fd}").decode().split("mnt_id:")[1].split()[0])
    finally:
        os.close(fd)
