"""Is a restored process indistinguishable from the one that was dumped?

:func:`portrait` reads everything the kernel tells about a process and its threads that a checkpoint has to bring
back; :func:`differences` compares two portraits field by field. What may differ, and why, is in :data:`EXCEPTIONS`.
Sources: proc(5), the kernel's Documentation/filesystems/proc.rst, sched_setattr(2), ioprio_set(2).
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

Portrait = dict[str, str]

PATIENCE = 3.0  # seconds

# Field of a portrait (a regular expression, matched in full) -> why a restored process may differ there.
EXCEPTIONS: dict[str, str] = {
    r".*status\.(Vm(Peak|HWM|RSS|Pin|PTE|Swap)|Rss\w+|HugetlbPages)": "high-water marks, what is in memory now",
    r".*status\.(State|FDSize|SigQ|(non)?voluntary_ctxt_switches)": "changes from moment to moment",
    r".*status\.(CoreDumping|TracerPid)": "only of interest while somebody traces the task",
    r".*status\.Ngid": "the NUMA balancer's group",
    r"ns\.time": "a restored task's monotonic clock continues from the dump, which takes a time namespace of its own",
    r".*status\.Mems_allowed.*": "a file of the cpuset cgroup, not of the task",
}

# Fields of /proc/PID/stat by number (proc(5)) that a restored process must keep.
STAT_FIELDS = {
    4: "ppid", 5: "pgrp", 6: "session", 7: "tty_nr", 18: "priority", 19: "nice", 20: "num_threads",
    26: "startcode", 27: "endcode", 28: "startstack", 38: "exit_signal", 40: "rt_priority", 41: "policy",
    45: "start_data", 46: "end_data", 47: "start_brk", 48: "arg_start", 49: "arg_end", 50: "env_start", 51: "env_end",
}  # fmt: skip

PLAIN_FILES = (
    "auxv", "cgroup", "cmdline", "comm", "coredump_filter", "environ", "limits", "loginuid", "oom_score_adj",
    "personality", "timerslack_ns", "timers",
)  # fmt: skip

THREAD_FILES = ("comm", "personality", "timerslack_ns")
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
MOST = 30
SYS_IOPRIO_GET = 252
SYS_SCHED_GETATTR = 315
_libc = ctypes.CDLL(None, use_errno=True)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        return f"<{error.strerror}>"


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        return f"<{error.strerror}>"


def _status(text: str, prefix: str, into: Portrait) -> None:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        into[f"{prefix}status.{name}"] = " ".join(value.split())


def _scheduling(tid: int) -> str:
    attributes = ctypes.create_string_buffer(56)
    if _libc.syscall(SYS_SCHED_GETATTR, tid, attributes, 56, 0) < 0:
        return f"<{os.strerror(ctypes.get_errno())}>"
    size, policy, flags, nice, priority, runtime, deadline, period, low, high = (
        int.from_bytes(attributes.raw[at : at + width], "little")
        for at, width in ((0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 4), (52, 4))
    )
    affinity = sorted(os.sched_getaffinity(tid))
    ioprio = _libc.syscall(SYS_IOPRIO_GET, 1, tid)
    return (
        f"size {size} policy {policy} flags {flags:x} nice {nice} priority {priority} runtime {runtime} deadline "
        f"{deadline} period {period} clamp {low}-{high} affinity {affinity} ioprio {ioprio:#x}"
    )


def _mappings(proc: Path, into: Portrait) -> None:
    """One field per mapping: its line of maps (no inode numbers of nameless files), VmFlags and anonymous pages.

    Touching mappings that differ in nothing are one mapping here: whether the kernel merges them depends on the order
    in which they were made.
    """
    head = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) (\S+) (\S+) (\d+) *(.*)")
    place = ""
    for line in _read(proc / "smaps").splitlines():
        match = head.fullmatch(line)
        if match:
            start, end, rights, offset, device, inode, name = match.groups()
            if name.startswith(("[vvar", "[vdso")):
                rights = offset = device = "-"
            if name.endswith("(deleted)") or name.startswith("/memfd:"):
                inode = "-"
            elif name.startswith("socket:"):
                inode, name = "-", "socket"
            place = f"mapping.{start}-{end}"
            into[place] = f"{rights} {offset} {device} {inode} {name}"
        elif line.startswith(("Anonymous:", "VmFlags:", "Locked:")) and not into[place].endswith("[vdso]"):
            name, _, value = line.partition(":")
            flags = " ".join(flag for flag in value.split() if flag != "sd")
            into[f"{place}.{name}"] = flags


def _descriptors(proc: Path, into: Portrait) -> None:
    """One field per descriptor. Of a nameless object (``pipe:[12]``) only which descriptors share it is told."""
    first: dict[str, str] = {}
    for name in sorted(os.listdir(proc / "fd"), key=int):
        target = _link(proc / "fd" / name)
        if re.fullmatch(r"\w+:\[\d+\]", target):
            target = f"{target.partition(':')[0]} of {first.setdefault(target, name)}"
        info = {
            key: " ".join(value.split())
            for key, _, value in (line.partition(":") for line in _read(proc / "fdinfo" / name).splitlines())
        }
        into[f"fd.{name}"] = f"{target} pos {info.get('pos')} flags {info.get('flags')}"


def speaker(pid: int) -> int:
    """The thread that shows what the process has: the first one, or if that has exited another one."""
    tids = [pid, *sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))]
    return next((tid for tid in tids if _read(Path(f"/proc/{tid}/stat")).rpartition(")")[2][1] not in "ZX"), pid)


def portrait(pid: int) -> Portrait:
    """Everything comparable about process *pid*: field name -> text. Raises OSError if it is gone."""
    proc = Path(f"/proc/{pid}")
    result: Portrait = {}
    _status(_read(proc / "status"), "", result)
    stat = _read(proc / "stat").rpartition(")")[2].split()
    for number, name in STAT_FIELDS.items():
        result[f"stat.{name}"] = stat[number - 3]
    proc = Path(f"/proc/{speaker(pid)}")
    for name in PLAIN_FILES:
        result[name] = _read(proc / name)
    for name in ("exe", "cwd", "root"):
        result[name] = _link(proc / name)
    for name in NAMESPACES:
        result[f"ns.{name}"] = _link(proc / "ns" / name)
    _mappings(proc, result)
    _descriptors(proc, result)
    for tid in sorted(map(int, os.listdir(proc / "task"))):
        thread = proc / "task" / str(tid)
        _status(_read(thread / "status"), f"thread.{tid}.", result)
        for name in ("cwd", "root"):
            result[f"thread.{tid}.{name}"] = _link(thread / name)
        for name in THREAD_FILES:
            # The slack is under /proc/TID only.
            result[f"thread.{tid}.{name}"] = _read(Path(f"/proc/{tid}") / name)
        try:
            result[f"thread.{tid}.scheduling"] = _scheduling(tid)
        except ProcessLookupError as error:
            result[f"thread.{tid}.scheduling"] = f"<{error.strerror}>"
    return result


def lasting_differences(before: Portrait, look: Callable[[], Portrait], also: tuple[str, ...] = ()) -> list[str]:
    """:func:`differences` to what *look* answers, once there are none or they stay: a thread whose call was interrupted
    makes it again in a moment, and shows another mask in sigtimedwait(2), say, than before it."""
    end = time.monotonic() + PATIENCE
    while (found := differences(before, look(), also)) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def differences(before: Portrait, after: Portrait, also: tuple[str, ...] = ()) -> list[str]:
    """The fields in which two portraits differ, one line each (the first :data:`MOST` of them).

    *also* adds to the excepted field patterns.
    """
    excepted = re.compile("|".join([*EXCEPTIONS, *also]))
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "<absent>"), after.get(name, "<absent>")
        if old != new and not excepted.fullmatch(name):
            found.append(f"{name}: was {old!r}, is {new!r}")
    return [*found[:MOST], f"and {len(found) - MOST} more"] if len(found) > MOST else found
