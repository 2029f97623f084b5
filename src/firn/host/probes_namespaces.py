"""Probes of namespaces and mounts, in namespaces of their own. For the rules of a probe see :mod:`probes_tracing`."""

from __future__ import annotations

import ctypes
import mmap
import os

from firn.abi import mman, nr, sched
from firn.abi import probe_consts as pc
from firn.abi.fcntl import AT_FDCWD
from firn.abi.libc import syscall
from firn.errors import KernelError
from firn.host import features, procfs


def _unshare(flag: int, name: str) -> None:
    syscall(f"unshare of the {name} namespace", nr.unshare, flag)


def _mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    words = [ctypes.create_string_buffer(os.fsencode(word)) for word in (source, target, kind, data)]
    at = [ctypes.addressof(word) for word in words]
    syscall(f"mount of {kind or source} on {target}", nr.mount, at[0], at[1], at[2], flags, at[3])


def _playground() -> str:
    """An empty tmpfs that only this process sees, and that vanishes with it; its path."""
    _unshare(pc.CLONE_NEWNS, "mount")
    _mount("none", "/", "", pc.MS_REC | pc.MS_PRIVATE)
    # Any directory will do as a mount point: what lies below it is out of our sight, and of nobody else's.
    where = os.path.realpath(next((path for path in ("/tmp", "/mnt") if os.path.isdir(path)), "/sys"))
    _mount("probe", where, "tmpfs", 0, "size=1m,mode=700")
    return where


def _refusal(flag: int, name: str) -> str | None:
    """Why a namespace that the kernel knows cannot be made here; None if it can."""
    try:
        _unshare(flag, name)
    except OSError as error:
        return f"no new {name} namespace can be made here: {error.strerror}"
    return None


def user_namespace() -> str | None:
    """User namespaces (user_namespaces(7)), and whether one can be made here."""
    os.stat("/proc/self/ns/user")
    return _refusal(pc.CLONE_NEWUSER, "user")


def time_namespace() -> str | None:
    """Time namespaces (time_namespaces(7)), and whether one can be made here."""
    if not features.time_namespace():
        raise KernelError(features.refusals["time_namespace"])
    return _refusal(sched.CLONE_NEWTIME, "time")


def cgroup_namespace() -> None:
    """Cgroup namespaces (cgroup_namespaces(7), Linux 4.6)."""
    os.stat("/proc/self/ns/cgroup")


def set_group() -> None:
    """move_mount(2) with MOVE_MOUNT_SET_GROUP (Linux 5.15): a private mount joins the peer group of another."""
    base = _playground()
    paths = [f"{base}/one", f"{base}/other"]
    for path in paths:
        os.mkdir(path)
        _mount(paths[0], path, "", pc.MS_BIND)
    _mount("none", paths[0], "", pc.MS_SHARED)
    _mount("none", paths[1], "", pc.MS_PRIVATE)
    one, other = (ctypes.create_string_buffer(os.fsencode(path)) for path in paths)
    syscall(
        "move_mount with MOVE_MOUNT_SET_GROUP", nr.move_mount,
        AT_FDCWD, ctypes.addressof(one), AT_FDCWD, ctypes.addressof(other), pc.MOVE_MOUNT_SET_GROUP,
    )  # fmt: skip
    if _mount_field(paths[0], "shared:") != _mount_field(paths[1], "shared:"):
        raise KernelError("MOVE_MOUNT_SET_GROUP does not join the peer groups")


def _mount_field(point: str, prefix: str) -> str | None:
    """The word of /proc/self/mountinfo that begins with *prefix*, of the last mount on *point*."""
    found = None
    for line in procfs.read("/proc/self/mountinfo").decode("utf-8", "surrogateescape").splitlines():
        words = line.split()
        if words[4] == point:
            found = next((w for word in words for w in word.split(",") if w.startswith(prefix)), None)
    return found


def autofs_pipe() -> None:
    """The pipe of an autofs mount in mountinfo, pipe_ino (Linux 4.13)."""
    base = _playground()
    _reader, writer = os.pipe()
    _mount("none", base, "autofs", 0, f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct")
    shown = _mount_field(base, "pipe_ino=")
    if shown is None:
        raise KernelError("mountinfo does not show the pipe of an autofs mount")
    if int(shown.partition("=")[2]) != os.fstat(writer).st_ino:
        raise KernelError("mountinfo shows another pipe for an autofs mount")


def overlay_maps() -> str | None:
    """/proc/PID/maps names a file on overlayfs by the numbers that stat(2) gives (Linux 6.8)."""
    try:
        base = _playground()
        names = ("lower", "upper", "work", "merged")
        lower, upper, work, merged = (f"{base}/{name}" for name in names)
        for path in (lower, upper, work, merged):
            os.mkdir(path)
        with open(f"{lower}/file", "wb") as file:
            file.write(bytes(mman.PAGE))
        _mount("overlay", merged, "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work}")
    except OSError as error:
        return f"no overlayfs can be made here to try it: {features.described(error)}"
    with open(f"{merged}/file", "rb") as file:
        area = mmap.mmap(file.fileno(), mman.PAGE, mmap.MAP_PRIVATE, mman.PROT_READ | mman.PROT_WRITE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        status = os.fstat(file.fileno())
    found = next(m for m in procfs.maps(os.getpid()) if m.start == address)
    if (found.device, found.inode) != ((os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino):
        raise KernelError("maps shows another file than stat for a mapping on overlayfs")
    return None


def apparmor_stacking() -> None:
    """AppArmor's stacked profiles (domain/stack of its features, domain version 1.2 or later)."""
    directory = "/sys/kernel/security/apparmor/features/domain"
    if procfs.read(f"{directory}/stack").strip() != b"yes":
        raise KernelError("AppArmor does not stack profiles")
    version = procfs.read(f"{directory}/version").strip()
    major, _, minor = version.partition(b".")
    if int(major) < 1 or (int(major) == 1 and int(minor or b"0") < 2):
        raise KernelError(f"AppArmor's domain version is {version.decode()}, not 1.2 or later")
