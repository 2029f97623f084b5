"""Namespaces, as far as one host goes (images: task_kobj_ids_entry, timens-N.img).

State owned: which namespaces a task is in, compared with ours. Kernel: /proc/PID/ns links. A time namespace of its own
is what every restored process has (see :mod:`firn.restore.clocks`); its clocks are saved as it sees them. Tasks in any
other namespace than ours are refused until these are supported.
"""

from __future__ import annotations

import os
import time

from firn.errors import Obstacle
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.images.store import ImageDir

KINDS = ("pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup")
"""In the order in which ids are given out; ours come first, from 1."""


def links(pid: int | str) -> dict[str, str]:
    """Kind -> link text of the namespaces of a process; kinds that the kernel lacks are left out."""
    found = {}
    for kind in KINDS:
        try:
            found[kind] = os.readlink(f"/proc/{pid}/ns/{kind}")
        except FileNotFoundError:
            continue
    return found


class Namespaces:
    """Ours and the tree's, whose tasks must all be in the same ones."""

    __slots__ = ("clocks", "own", "task_ids")

    def __init__(self, pids: list[int], obstacles: list[Obstacle]) -> None:
        self.own = links("self")
        self.task_ids = self.root_ids()
        root = links(pids[0])
        offsets = (0, 0)
        for kind, link in root.items():
            if link == self.own.get(kind):
                continue
            if kind == "time":
                self.task_ids["time_ns_id"] = len(self.own) + 1
                offsets = _relative_offsets(pids[0])
            else:
                obstacles.append(
                    Obstacle(f"process {pids[0]}", f"is in a {kind} namespace of its own ({link})", "not supported yet")
                )
        for pid in pids[1:]:
            obstacles += [
                Obstacle(
                    f"process {pid}", f"is in another {kind} namespace than the root of the tree", "not supported yet"
                )
                for kind, link in links(pid).items()
                if link != root[kind]
            ]
        now = (time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self.clocks = [clock + offset for clock, offset in zip(now, offsets, strict=True)]

    def root_ids(self) -> dict[str, int]:
        """The namespace ids of our own environment."""
        return {f"{kind}_ns_id": number for number, kind in enumerate(self.own, 1)}

    def save(self, images: ImageDir) -> None:
        """Write timens-N.img: the clocks as the task saw them when it was collected."""
        number = self.task_ids.get("time_ns_id")
        if number is None:
            return
        index = number if number != self.root_ids()["time_ns_id"] else 0
        monotonic, boottime = ({"tv_sec": now // 10**9, "tv_nsec": now % 10**9} for now in self.clocks)
        images.write_one("TIMENS", {"monotonic": monotonic, "boottime": boottime}, index)


def clock_offsets(pid: int | str) -> tuple[int, int]:
    """The offsets of CLOCK_MONOTONIC and CLOCK_BOOTTIME of a process's time namespace, in ns (time_namespaces(7))."""
    found = {}
    for line in procfs.read(f"/proc/{pid}/timens_offsets").decode().splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = int(seconds) * 10**9 + int(nanoseconds)
    return found.get("monotonic", found.get("1", 0)), found.get("boottime", found.get("7", 0))


def _relative_offsets(pid: int) -> tuple[int, int]:
    """What to add to our clocks to get those of *pid*."""
    theirs, ours = clock_offsets(pid), clock_offsets("self")
    return theirs[0] - ours[0], theirs[1] - ours[1]
