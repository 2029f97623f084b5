"""Help for the tests of probes: kernels that lack something, and a look at what is left behind."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable, Iterable
from functools import cache

from firn.abi import nr, prctl
from firn.abi import probe_consts as pc
from firn.abi.libc import address_of, syscall
from firn.host import features

_LOAD_NUMBER = pc.BPF_RETURN.pack(0x20, 0, 0, 0)  # BPF_LD | BPF_W | BPF_ABS: struct seccomp_data.nr
_RET_ERRNO = 0x00050000


def deny(calls: Iterable[int], code: int = errno.ENOSYS) -> None:
    """From now on the system *calls* fail with errno *code* in this process and its children: a poorer kernel."""
    filters = [_LOAD_NUMBER]
    for call in calls:
        filters.append(pc.BPF_RETURN.pack(0x15, 0, 1, call))  # BPF_JMP | BPF_JEQ | BPF_K
        filters.append(pc.BPF_RETURN.pack(pc.BPF_RET_K, 0, 0, _RET_ERRNO | code))
    filters.append(pc.BPF_RETURN.pack(pc.BPF_RET_K, 0, 0, pc.SECCOMP_RET_ALLOW))
    code_bytes = bytearray(b"".join(filters))
    program = bytearray(pc.SOCK_FPROG.pack(len(filters), address_of(code_bytes)))
    syscall("no_new_privs", nr.prctl, prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    syscall("seccomp", nr.seccomp, prctl.SECCOMP_SET_MODE_FILTER, 0, address_of(program))


def denied(probe: Callable[[], str | None], calls: Iterable[int], code: int = errno.ENOSYS) -> Callable[[], str | None]:
    """*probe* in a process that may not make *calls* and has asked nothing yet; to be run in a child only."""

    def poorer() -> str | None:
        features._answers.clear()
        features._uffd.clear()
        deny(calls, code)
        return probe()

    return poorer


@cache
def kernel_config() -> dict[str, str]:
    """The options that this kernel was built with (``y`` or ``m``); empty if it does not tell."""
    try:
        with gzip.open("/proc/config.gz", "rt") as file:
            lines = [line.strip() for line in file if line.startswith("CONFIG_")]
    except OSError:
        return {}
    return {name.removeprefix("CONFIG_"): value for name, _, value in (line.partition("=") for line in lines)}


def traces() -> dict[str, object]:
    """What a probe might leave behind, as this process sees it."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        children = file.read()
    found: dict[str, object] = {"children": children}
    found["descriptors"] = _descriptors()
    found["namespaces"] = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    found["interfaces"] = sorted(os.listdir("/sys/class/net"))
    for path in ("self/mountinfo", "self/loginuid", "self/uid_map", "net/tcp", "net/unix"):
        with open(f"/proc/{path}") as file:
            found[path] = file.read()
    for path in ("/tmp", "/dev/shm"):
        found[path] = sorted(os.listdir(path))
    with open("/proc/self/status") as file:
        wanted = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Cap", "NoNewPrivs", "Seccomp", "Uid", "Threads")
        found["status"] = [line for line in file if line.startswith(wanted)]
    return found


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # The listing's own.
    return found


def alone() -> None:
    """Put this process where nobody else changes what :func:`traces` looks at; needs root."""
    syscall("unshare", nr.unshare, pc.CLONE_NEWNS | pc.CLONE_NEWNET)
    syscall("subreaper", nr.prctl, prctl.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _mount("/", "", pc.MS_REC | pc.MS_PRIVATE)
    _mount("/tmp", "tmpfs", 0)
    _mount("/dev/shm", "tmpfs", 0)


def _mount(target: str, kind: str, flags: int) -> None:
    words = [bytearray(os.fsencode(word) + b"\0") for word in ("none", target, kind)]
    at = [address_of(word) for word in words]
    syscall(f"mount on {target}", nr.mount, at[0], at[1], at[2], flags, 0)


def capability(number: int) -> bool:
    """Whether this process has capability *number* in effect, from /proc/self/status."""
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:")).split()[1]
    return bool(int(effective, 16) >> number & 1)


FULL = capability(pc.CAP_SYS_ADMIN) and capability(pc.CAP_SYS_PTRACE)
"""Whether this process may do what firn needs; without it most probes truly find nothing."""
