"""Probes of what the kernel tells about open files. For the rules of a probe see :mod:`probes_tracing`."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import termios

from firn.abi import nr
from firn.abi import probe_consts as pc
from firn.abi.fcntl import AT_FDCWD, F_GETOWNER_UIDS, KCMP_FILE
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.host import procfs


def _fdinfo(fd: int) -> dict[str, str]:
    return procfs.fdinfo(os.getpid(), fd)


def _need(lines: dict[str, str], key: str, what: str) -> str:
    if key not in lines:
        raise KernelError(f"fdinfo of {what} has no {key!r}")
    return lines[key]


def map_files() -> None:
    """/proc/PID/map_files: a mapped file opened by its mapping (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN)."""
    directory = "/proc/self/map_files"
    names = os.listdir(directory)
    if not names:
        raise KernelError(f"{directory} is empty")
    os.close(os.open(f"{directory}/{names[0]}", os.O_RDONLY | os.O_CLOEXEC))


def mount_id() -> None:
    """The mount of an open file in its fdinfo (Linux 3.15)."""
    _need(_fdinfo(os.open("/", os.O_RDONLY)), "mnt_id", "a directory")


def file_locks() -> None:
    """The locks of an open file in its fdinfo (Linux 4.1)."""
    fd = os.memfd_create("lock", os.MFD_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    if "FLOCK" not in _need(_fdinfo(fd), "lock", "a locked file"):
        raise KernelError("fdinfo shows another lock than the one that was taken")


def file_owner() -> None:
    """fcntl(2) F_GETOWNER_UIDS: who set the receiver of a file's signals."""
    reader, _writer = os.pipe()
    uids = fcntl.fcntl(reader, F_GETOWNER_UIDS, bytes(8))
    if len(uids) != 8:
        raise KernelError("F_GETOWNER_UIDS gives no pair of user ids")


def special_files() -> None:
    """fdinfo of an eventfd, an epoll, a signalfd and an inotify file."""
    event = os.eventfd(7)
    if int(_need(_fdinfo(event), "eventfd-count", "an eventfd"), 16) != 7:
        raise KernelError("fdinfo of an eventfd shows another count")
    with select.epoll() as epoll:
        epoll.register(event, select.EPOLLIN)
        target = _need(_fdinfo(epoll.fileno()), "tfd", "an epoll file").split()[0]
    if int(target) != event:
        raise KernelError("fdinfo of an epoll file shows another target")
    mask = bytearray((1 << (signal.SIGUSR1 - 1)).to_bytes(8, "little"))
    signals = syscall("signalfd4", nr.signalfd4, -1, address_of(mask), 8, 0)
    if int(_need(_fdinfo(signals), "sigmask", "a signalfd"), 16) != int.from_bytes(mask, "little"):
        raise KernelError("fdinfo of a signalfd shows another mask")
    watcher = _inotify()
    _watch(watcher)
    if "inotify wd:" not in _fdinfo(watcher)["lines"]:
        raise KernelError("fdinfo of an inotify file shows no watches")


def _inotify() -> int:
    return syscall("inotify_init1", nr.inotify_init1, os.O_CLOEXEC | os.O_NONBLOCK)


def _watch(fd: int) -> int:
    path = ctypes.create_string_buffer(b"/")
    delete_self = 0x400
    return syscall("inotify_add_watch", nr.inotify_add_watch, fd, ctypes.addressof(path), delete_self)


def inotify_numbers() -> None:
    """INOTIFY_IOC_SETNEXTWD (Linux 4.16): the number of the next watch."""
    fd = _inotify()
    fcntl.ioctl(fd, pc.INOTIFY_IOC_SETNEXTWD, 10)
    if _watch(fd) != 10:
        raise KernelError("INOTIFY_IOC_SETNEXTWD does not set the next watch number")


def timerfd() -> None:
    """A timerfd in fdinfo, and TFD_IOC_SET_TICKS (Linux 3.17), which faults on a null pointer where it is known."""
    realtime = 0
    fd = syscall("timerfd_create", nr.timerfd_create, realtime, os.O_CLOEXEC)
    _need(_fdinfo(fd), "ticks", "a timerfd")
    try:
        syscall("TFD_IOC_SET_TICKS", nr.ioctl, fd, pc.TFD_IOC_SET_TICKS, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


def tun() -> None:
    """/dev/net/tun with TUNSETIFINDEX; no interface is made."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, pc.TUNSETIFINDEX, struct.pack("<i", 10))


def tun_namespace() -> None:
    """SIOCGSKNS on /dev/net/tun (Linux 4.17): the network namespace of a tun file."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    os.close(fcntl.ioctl(fd, pc.SIOCGSKNS))


def locked_terminal() -> None:
    """A pseudoterminal whose slave cannot be opened while it is locked, and whose settings can be read."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    number = struct.unpack("<I", fcntl.ioctl(master, pc.TIOCGPTN, bytes(4)))[0]
    termios.tcgetattr(master)
    fcntl.ioctl(master, pc.TIOCSPTLCK, struct.pack("<i", 1))
    try:
        os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    else:
        raise KernelError("a locked pseudoterminal can be opened")


def same_file() -> None:
    """kcmp(2) (Linux 3.5): equal and different open files told apart."""
    one = os.open("/", os.O_RDONLY)
    pid = os.getpid()
    if syscall("kcmp", nr.kcmp, pid, pid, KCMP_FILE, one, os.dup(one)):
        raise KernelError("kcmp takes one open file for two")
    if not syscall("kcmp", nr.kcmp, pid, pid, KCMP_FILE, one, os.open("/", os.O_RDONLY)):
        raise KernelError("kcmp takes two open files for one")


def same_epoll_target() -> None:
    """kcmp(2) KCMP_EPOLL_TFD (Linux 4.13): which open file an epoll watches."""
    event = os.eventfd(0)
    pid = os.getpid()
    with select.epoll() as epoll:
        epoll.register(event, select.EPOLLIN)
        slot = bytearray(pc.KCMP_EPOLL_SLOT.pack(epoll.fileno(), event, 0))
        if syscall("KCMP_EPOLL_TFD", nr.kcmp, pid, pid, pc.KCMP_EPOLL_TFD, event, address_of(slot)):
            raise KernelError("kcmp does not recognise the target of an epoll file")


def openat2() -> None:
    """openat2(2) (Linux 5.6) with a RESOLVE_* flag."""
    path = ctypes.create_string_buffer(b"/")
    how = bytearray(pc.OPEN_HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, pc.RESOLVE_IN_ROOT))
    os.close(syscall("openat2", nr.openat2, AT_FDCWD, ctypes.addressof(path), address_of(how), len(how)))


def descriptor_table_copy() -> None:
    """close_range(2) with CLOSE_RANGE_UNSHARE (Linux 5.9)."""
    unshare = 2
    syscall("close_range", nr.close_range, 1 << 20, (1 << 32) - 1, unshare)
