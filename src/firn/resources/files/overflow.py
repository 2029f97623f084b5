"""The event that says that events were lost: IN_Q_OVERFLOW of inotify(7), FAN_Q_OVERFLOW of fanotify(7).

State owned: queued events of a watching instance, which can be read only by taking them away and cannot be put back.
Their reader is told so instead, by the event that the kernel puts behind a full queue: the queue of the new instance is
filled with events of our own, and read until only that one is left. What goes wrong: a queue without limit, or with one
so high that filling it would take seconds.
"""

from __future__ import annotations

import os

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.host import procfs

_LIMIT = "/proc/sys/fs/{}/max_queued_events"
_DEFAULT_LIMIT = 16384
"""Of fanotify before Linux 5.13, which had no file for it."""
_MOST = 1 << 18
_INOTIFY_EVENT = 16
"""Bytes of struct inotify_event without a name."""
_CHUNK = 1 << 16
_FOLDERS = ("/dev/shm", "/tmp", "/var/tmp")


def unread(fd: int) -> int:
    """Bytes of events that wait to be read; a fanotify group counts each as its fixed part (FANOTIFY_EVENT.size)."""
    size = bytearray(4)
    syscall("FIONREAD of a watcher", nr.ioctl, fd, ev.FIONREAD, address_of(size))
    return int.from_bytes(size, "little")


def inotify(fd: int) -> bool:
    """Leave nothing but an IN_Q_OVERFLOW event in the new instance *fd*; False if its queue is too long."""
    limit = _limit("inotify")
    if limit > _MOST:
        return False
    file = os.memfd_create("firn", os.MFD_CLOEXEC)
    try:
        path = bytearray(f"/proc/self/fd/{file}\0".encode())
        watch = syscall("inotify_add_watch", nr.inotify_add_watch, fd, address_of(path), ev.IN_ATTRIB | ev.IN_MODIFY)
        for _ in range(limit // 2 + 1):
            # Equal events one after the other would become one.
            os.fchmod(file, 0o600)
            os.ftruncate(file, 0)
        # This makes an event too, which is lost like any other now.
        syscall("inotify_rm_watch", nr.inotify_rm_watch, fd, watch)
    finally:
        os.close(file)
    while (left := unread(fd) - _INOTIFY_EVENT) > 0:
        os.read(fd, min(left, _CHUNK))
    return True


def _limit(what: str) -> int:
    try:
        return int(procfs.read(_LIMIT.format(what)))
    except FileNotFoundError:
        return _DEFAULT_LIMIT


def fanotify(fd: int) -> bool:
    """Leave nothing but a FAN_Q_OVERFLOW event in the new group *fd*; False if that cannot be done."""
    limit = _limit("fanotify")
    if limit > _MOST:
        return False
    for top in _FOLDERS:
        folder = f"{top}/.firn-{os.getpid()}"
        try:
            os.mkdir(folder, 0o700)
        except OSError:
            continue
        try:
            if _mark(fd, ev.FAN_MARK_ADD, folder):
                _write_files(folder, limit + 1)
                _mark(fd, ev.FAN_MARK_REMOVE, folder)
                _take_all_but_one(fd)
                return True
        finally:
            os.rmdir(folder)
    return False


def _mark(fd: int, how: int, folder: str) -> bool:
    """Mark the files in *folder*, or take the mark away; False if the group cannot watch that file system."""
    path = bytearray(os.fsencode(folder) + b"\0")
    mask = ev.FAN_CLOSE_WRITE | ev.FAN_EVENT_ON_CHILD
    try:
        syscall("fanotify_mark", nr.fanotify_mark, fd, how, mask, fc.AT_FDCWD, address_of(path))
    except OSError:
        return False
    return True


def _write_files(folder: str, count: int) -> None:
    """An event for each of *count* files: those of one file would be joined. Their names have one length."""
    for number in range(count):
        path = f"{folder}/{number:08}"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(path)


def _take_all_but_one(fd: int) -> None:
    size = ev.MAX_FANOTIFY_EVENT
    while (count := unread(fd) // ev.FANOTIFY_EVENT.size) > 1:
        # All but the last are of one size, known after the first read: so none can be read too many.
        data = os.read(fd, min(count - 1, max(_CHUNK // size, 1)) * size)
        at = 0
        while at < len(data):
            size, _, _, _, _, file, _ = ev.FANOTIFY_EVENT.unpack_from(data, at)
            if file >= 0:
                os.close(file)
            at += size
