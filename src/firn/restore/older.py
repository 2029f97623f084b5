"""Images that older versions of CRIU wrote, put into the present form when they are read.

What is in one message today was once in files of its own, or in another message. A present image has none of these, so
nothing is looked up twice. The list of old files is part of the image format (:mod:`firn.images.catalog`); the old
tables of open files are read by :func:`firn.images.store.read_files`.
"""

from __future__ import annotations

from firn.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

_CONNECTION = ("keepcnt", "keepidle", "keepintvl")


def complete_cores(images: ImageDir, pid: int, tids: list[int], cores: list[dict[str, Any]]) -> None:
    """Fill in what the core_entry messages *cores* of the threads *tids* of process *pid* lack.

    Raises :class:`ImageError` for damaged images, and for interval timers that are not three.
    """
    task = cores[0]["tc"]
    if not task.get("sigactions"):
        task["sigactions"] = images.read_all("SIGACT", pid)
    if "timers" not in task and images.exists("ITIMERS", pid):
        task["timers"] = _timers(images, pid)
    if "rlimits" not in task and images.exists("RLIMIT", pid):
        task["rlimits"] = {"rlimits": images.read_all("RLIMIT", pid)}
    if "signals_s" not in task:
        task["signals_s"] = {"signals": images.read_all("SIGNAL", pid)}
    for tid, core in zip(tids, cores, strict=True):
        thread = core.get("thread_core")
        if thread is None:
            continue
        if tid == pid and "creds" not in thread and images.exists("CREDS", pid):
            thread["creds"] = images.read_one("CREDS", pid)
        if "signals_p" not in thread:
            thread["signals_p"] = {"signals": images.read_all("PSIGNAL", tid)}
        if "seccomp_mode" not in thread and "old_seccomp_mode" in task:
            thread["seccomp_mode"] = task["old_seccomp_mode"]
            thread["seccomp_filter"] = task.get("old_seccomp_filter", 0)
        if "cg_set" not in thread and "cg_set" in task:
            thread["cg_set"] = task["cg_set"]


def _timers(images: ImageDir, pid: int) -> dict[str, Any]:
    intervals = images.read_all("ITIMERS", pid)
    if len(intervals) != 3:
        raise ImageError(f"itimers-{pid}.img: {len(intervals)} timers, not 3")
    named: dict[str, Any] = dict(zip(("real", "virt", "prof"), intervals, strict=True))
    return named | {"posix": images.read_all("POSIX_TIMERS", pid)}


def read_ids(images: ImageDir, pid: int, core: dict[str, Any]) -> dict[str, Any]:
    """The ids of a process: an image of its own, or a part of its core."""
    if "ids" in core and not images.exists("IDS", pid):
        inside: dict[str, Any] = core["ids"]
        return inside
    return images.read_one("IDS", pid)


def read_mm(images: ImageDir, pid: int) -> dict[str, Any]:
    """The mm_entry of a process with its mappings, which were once in a file of their own."""
    mm = images.read_one("MM", pid)
    if not mm.get("vmas"):
        mm["vmas"] = images.read_all("VMAS", pid)
    return mm


def complete_files(images: ImageDir, files: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Give TCP sockets their tcp_opts, which were once among the options of all sockets and in the stream's image."""
    for entry in files.values():
        sock = entry.get("isk")
        if sock is None or sock["proto"] != 6 or "tcp_opts" in sock:
            continue
        options = {name: sock["opts"][f"tcp_{name}"] for name in _CONNECTION if f"tcp_{name}" in sock["opts"]}
        if images.exists("TCP_STREAM", sock["ino"]):
            stream = images.read_one("TCP_STREAM", sock["ino"])
            options |= {name: stream[name] for name in ("cork", "nodelay") if name in stream}
        if options:
            sock["tcp_opts"] = options
