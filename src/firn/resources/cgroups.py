"""Control groups: which ones a process is in (images: cgroup.img, thread_core_entry.cg_set).

State owned: the membership per hierarchy. Kernel: /proc/PID/cgroup. It comes back by writing the pid to cgroup.procs.
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


_memberships: dict[bytes, list[tuple[str, str]]] = {}
"""What texts say that were seen before: most processes of a tree are in the same groups."""


def membership(pid: int | str) -> list[tuple[str, str]]:
    """(controllers, path) per hierarchy; "" is the unified one."""
    text = procfs.read_record(f"/proc/{pid}/cgroup")
    if text not in _memberships:
        lines = [line.split(":", 2) for line in text.decode("utf-8", "surrogateescape").splitlines()]
        _memberships[text] = sorted((controllers, path) for _, controllers, path in lines)
    return _memberships[text]


class Cgroups:
    """The membership of one process."""

    __slots__ = ("theirs",)

    def __init__(self, pid: int) -> None:
        self.theirs = membership(pid)


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
            entry: dict[str, Any] = {"cnames": [names]}
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


def plan(images: ImageDir, set_id: int, mode: str) -> list[tuple[str, str]]:
    """The (directory, hierarchy) pairs that a process of set *set_id* has to be moved into. Checked, nothing done."""
    if set_id <= ROOT_SET or mode == "ignore":
        return []
    sets = images.read_one("CGROUP").get("sets", []) if images.exists("CGROUP") else []
    chosen = next((item for item in sets if item["id"] == set_id), None)
    if chosen is None:
        raise RestoreError(
            f"the checkpoint names cgroup set {set_id}, which it does not hold", "--manage-cgroups=ignore"
        )
    ours = dict(membership("self"))
    moves = []
    for ctl in chosen.get("ctls", []):
        if ours.get(ctl["name"]) == ctl["path"]:
            continue
        where = mount_point(ctl["name"])
        if where is None:
            raise RestoreError(
                f"cgroup hierarchy {ctl['name'] or 'v2'!r} is not mounted here", "--manage-cgroups=ignore"
            )
        path = where + ctl["path"]
        if not os.path.isdir(path) and mode in ("none", "props"):
            raise RestoreError(f"cgroup {path} does not exist", "create it, or use --manage-cgroups")
        moves.append((path, ctl["name"]))
    return moves


def move(pid: int, moves: list[tuple[str, str]], log: Log) -> None:
    """Put process *pid* where *moves* says; missing groups are made."""
    for path, _ in moves:
        os.makedirs(path, exist_ok=True)
        fd = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(pid).encode())
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise RestoreError(f"process {pid} cannot be put into cgroup {path}: {why}") from error
        finally:
            os.close(fd)
        log.debug(f"process {pid} is in cgroup {path}")
