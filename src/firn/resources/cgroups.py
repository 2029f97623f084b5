"""Control groups: which ones a process is in (images: cgroup.img, thread_core_entry.cg_set).

State owned: the membership per hierarchy, of each thread. Kernel: /proc/PID/cgroup. It comes back by writing the pid to
cgroup.procs; the id of a thread that is elsewhere (v1, or a threaded group of v2) to tasks or cgroup.threads.
Membership equal to our own is not recorded, as in CRIU: such a process comes back in the restorer's groups. The groups'
properties belong to whoever made the groups and are not recorded yet.
"""

from __future__ import annotations

import os

from firn.errors import RestoreError
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir
    from firn.log import Log

ROOT_SET = 1
"""The id of the set that we are in ourselves; never stored."""


def membership(pid: int | str) -> list[tuple[str, str]]:
    """(controllers, path) per hierarchy; "" is the unified one."""
    found = []
    for line in procfs.read(f"/proc/{pid}/cgroup").decode("utf-8", "surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        found.append((controllers, path))
    return sorted(found)


class Cgroups:
    """The membership of one process, with the id *pid* (:func:`.procfs.speaker`)."""

    __slots__ = ("apart", "pid", "theirs")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.theirs = membership(pid)
        self.apart = any(controllers for controllers, _ in self.theirs) or self._is_threaded()
        """Whether threads may be in other groups: in all hierarchies of v1, and where it was asked for in v2."""

    def _is_threaded(self) -> bool:
        try:
            kind = procfs.read(f"{mount_point('') or ''}{dict(self.theirs).get('', '')}/cgroup.type")
        except OSError:
            return False  # the root has none
        return b"threaded" in kind

    def of_thread(self, tid: int, early: dict[int, Cgroups]) -> Cgroups:
        """The membership of thread *tid*, if need be from what was read *early* (:func:`observe`)."""
        if tid == self.pid or not self.apart:
            return self
        return early.get(tid) or Cgroups(tid)


def observe(pid: int) -> dict[int, Cgroups]:
    """The membership of the threads of a running process: others move them, so it may as well be read before the
    freeze, and that takes its time with many hierarchies."""
    tids = procfs.threads(pid)
    first = Cgroups(tids[0]) if len(tids) > 1 else None
    return {tid: Cgroups(tid) for tid in tids[1:]} if first is not None and first.apart else {}


class Sets:
    """The different memberships of a tree, each under a number; ours is ROOT_SET."""

    def __init__(self) -> None:
        self._sets = {tuple(membership("self")): ROOT_SET}

    def number(self, groups: Cgroups) -> int:
        """The id of the set that *groups* is."""
        return self._sets.setdefault(tuple(groups.theirs), len(self._sets) + 1)

    def save(self, images: ImageDir) -> None:
        """Write cgroup.img if there is something to say."""
        stored = {number: groups for groups, number in self._sets.items() if number != ROOT_SET}
        if not stored:
            return
        paths: dict[str, set[str]] = {}
        for groups in stored.values():
            for names, path in groups:
                paths.setdefault(names, set()).add(path)
        controllers = []
        for names, wanted in paths.items():
            where = mount_point(names)
            entry: dict[str, Any] = {"cnames": names.split(",")}
            if where is not None:
                entry["dirs"] = [_directory(where, path) for path in sorted(wanted) if path != "/"]
            controllers.append(entry)
        sets = [
            {"id": number, "ctls": [{"name": names, "path": path} for names, path in groups]}
            for number, groups in stored.items()
        ]
        images.write_one("CGROUP", {"sets": sets, "controllers": controllers})


def _directory(mount: str, path: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"dir_name": path.lstrip("/")}
    try:
        st = os.stat(mount + path)
    except OSError:
        return entry
    entry["dir_perms"] = {"mode": st.st_mode & 0o7777, "uid": st.st_uid, "gid": st.st_gid}
    return entry


def mount_point(controllers: str) -> str | None:
    """Where the hierarchy of *controllers* ("" for cgroup v2) is mounted, seen from its root."""
    wanted = set(controllers.removeprefix("name=").split(","))
    for line in procfs.read("/proc/self/mountinfo").decode("utf-8", "surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ", 2)
        if fields[3] != "/":
            continue
        if controllers == "" and kind == "cgroup2":
            return fields[4]
        given = {word.removeprefix("name=") for word in options.split(",")}
        if kind == "cgroup" and controllers and wanted <= given:
            return fields[4]
    return None


def plan(images: ImageDir, set_id: int, mode: str, now: int = ROOT_SET) -> list[tuple[str, str]]:
    """The (directory, hierarchy) pairs that a task of set *set_id* has to be moved into, out of those of set *now*.
    Checked, nothing done."""
    if set_id == now or mode == "ignore":
        return []
    wanted, there = _groups(images, set_id), _groups(images, now)
    moves = []
    for name, path in wanted.items():
        if there.get(name) == path:
            continue
        where = mount_point(name)
        if where is None:
            raise RestoreError(f"cgroup hierarchy {name or 'v2'!r} is not mounted here", "--manage-cgroups=ignore")
        path = where + path
        if not os.path.isdir(path) and mode in ("none", "props"):
            raise RestoreError(f"cgroup {path} does not exist", "create it, or use --manage-cgroups")
        moves.append((path, name))
    return moves


def _groups(images: ImageDir, set_id: int) -> dict[str, str]:
    """Hierarchy -> path of set *set_id*."""
    if set_id <= ROOT_SET:
        return dict(membership("self"))
    sets = images.read_one("CGROUP").get("sets", []) if images.exists("CGROUP") else []
    chosen = next((item for item in sets if item["id"] == set_id), None)
    if chosen is None:
        raise RestoreError(
            f"the checkpoint names cgroup set {set_id}, which it does not hold", "--manage-cgroups=ignore"
        )
    return {ctl["name"]: ctl["path"] for ctl in chosen.get("ctls", [])}


def move(pid: int, moves: list[tuple[str, str]], log: Log, thread: bool = False) -> None:
    """Put process *pid*, or only that *thread*, where *moves* says; missing groups are made."""
    for path, name in moves:
        os.makedirs(path, exist_ok=True)
        list_file = ("tasks" if name else "cgroup.threads") if thread else "cgroup.procs"
        fd = os.open(f"{path}/{list_file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(pid).encode())
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise RestoreError(f"task {pid} cannot be put into cgroup {path}: {why}") from error
        finally:
            os.close(fd)
        log.debug(f"task {pid} is in cgroup {path}")
