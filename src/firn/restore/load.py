"""The load stage: a checkpoint's images, read and checked against each other before anything is made."""

from __future__ import annotations

from firn.abi import mman
from firn.abi import signal as sig
from firn.errors import ImageError, NotBuilt, RestoreError
from firn.images.store import ImageDir, read_files
from firn.resources import births
from firn.resources.base import MEMFD
from firn.resources.memory import areas, attach, rebuild
from firn.resources.process import ALIVE, DEAD, STOPPED
from firn.resources.threads import exited
from firn.restore import older

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSIONS = (1, 2)
_NAMESPACE_NAMES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup")
_PID_LIMIT = 1 << 30
_OF_SOMETHING = (
    areas.FILE_PRIVATE | areas.FILE_SHARED | areas.MEMFD | areas.SYSVIPC | areas.SOCKET | areas.AIORING | areas.VSYSCALL
    | areas.VDSO | areas.VVAR
)  # fmt: skip
_OLD_SHARED = 1 << 32
"""Added to an inode number, it is an id that no file has."""


class Process:
    """One process of the checkpoint and its images. A zombie has only its core."""

    def __init__(self, images: ImageDir, item: dict[str, Any], inventory: dict[str, Any]) -> None:
        self.item = item
        self.pid: int = item["pid"]
        self.pgid: int = item["pgid"]
        self.sid: int = item["sid"]
        self.parent: Process | None = None
        self.children: list[Process] = []
        self.shared = 0
        """The CLONE_* flags of what is shared with who gives birth to this process."""
        leader = images.read_one("CORE", self.pid)
        if "tc" not in leader:
            raise ImageError(f"core-{self.pid}.img has no task part")
        self.tc: dict[str, Any] = leader["tc"]
        self.zombie = self.tc["task_state"] == DEAD
        self.tids: list[int] = [self.pid] if self.zombie else item.get("threads", [])
        self._check_ids()
        self.leader_exited = not self.zombie and exited.load(self.pid, self.tc, self.tids)
        self.cores = [leader] + [images.read_one("CORE", tid) for tid in self.tids[1:]]
        if self.zombie:
            return
        older.complete_cores(images, self.pid, self.tids, self.cores)
        self._check_cores()
        self.ids = older.read_ids(images, self.pid, leader)
        self._check_objects(inventory["root_ids"])
        self.mm = older.read_mm(images, self.pid)
        self.fs = images.read_one("FS", self.pid)
        self.fdinfo = sorted(images.read_all("FDINFO", self.ids["files_id"]), key=lambda entry: int(entry["fd"]))
        self._check_vmas()
        numbers = [entry["fd"] for entry in self.fdinfo]
        if len(set(numbers)) != len(numbers):
            raise ImageError(f"fdinfo-{self.ids['files_id']}.img: a descriptor is there twice")

    def member(self) -> births.Member:
        """The process as the plan of births wants it."""
        parent = self.parent.pid if self.parent else 0
        own = self.tc.get("firn", {}).get("exit_signal", sig.SIGCHLD)
        if not 0 <= own <= sig.LAST:
            raise ImageError(f"core-{self.pid}.img: the exit signal {own} is none")
        return births.Member(self.pid, parent, self.sid, self.zombie, None if self.zombie else self.ids, own)

    def _check_ids(self) -> None:
        if not self.tids or self.tids[0] != self.pid or len(set(self.tids)) != len(self.tids):
            raise ImageError(f"pstree.img: the threads of process {self.pid} do not begin with itself, or repeat")
        for number in (*self.tids, self.pgid, self.sid):
            if not 0 <= number < _PID_LIMIT:
                raise ImageError(f"pstree.img: process {self.pid} has the impossible id {number}")

    def _check_cores(self) -> None:
        if self.tc["task_state"] not in (ALIVE, STOPPED):
            raise ImageError(f"core-{self.pid}.img: the task state {self.tc['task_state']} is none")
        for tid, core in zip(self.tids, self.cores, strict=True):
            if core["mtype"] != 1:
                raise RestoreError(f"core-{tid}.img is of another processor architecture", "restore on that kind")
            for part in ("thread_core", "thread_info"):
                if part not in core:
                    raise ImageError(f"core-{tid}.img has no {part}")
            creds = core["thread_core"].get("creds")
            if creds is None:
                raise ImageError(f"core-{tid}.img has no credentials")
            label = creds.get("lsm_profile") or creds.get("lsm_sockcreate") or creds.get("apparmor_data")
            if label:
                raise NotBuilt(f"thread {tid} has the security label {label!r}, which cannot be given back yet")
        if "timers" not in self.tc or "rlimits" not in self.tc or not self.tc.get("sigactions"):
            raise ImageError(f"core-{self.pid}.img has no timers, no resource limits or no signal actions")

    def _check_objects(self, root: dict[str, Any]) -> None:
        for kind in _NAMESPACE_NAMES:
            if self.ids.get(f"{kind}_ns_id", 0) != root.get(f"{kind}_ns_id", 0):
                raise NotBuilt(f"process {self.pid} has a {kind} namespace of its own, which is not supported yet")

    def _check_vmas(self) -> None:
        vmas = self.mm.get("vmas", [])
        if not vmas:
            raise ImageError(f"mm-{self.pid}.img has no mappings")
        last = 0
        before: dict[str, Any] = {}
        for vma in vmas:
            start, end = vma["start"], vma["end"]
            if start >= end or start & 4095 or end & 4095 or (end > 1 << 47 and not vma["status"] & areas.VSYSCALL):
                raise ImageError(f"mm-{self.pid}.img: impossible mapping {start:#x}-{end:#x}")
            if vma["status"] & areas.GUARD:
                continue
            if vma["status"] & (areas.SHSTK | areas.UPROBES):
                what = "a shadow stack" if vma["status"] & areas.SHSTK else "a trampoline of uprobes"
                raise NotBuilt(f"process {self.pid} has {what} at {start:#x}, which is not supported yet")
            if not vma["flags"] & mman.MAP_ANONYMOUS and not vma["status"] & _OF_SOMETHING:
                raise ImageError(f"mm-{self.pid}.img: mapping {start:#x}-{end:#x} is neither anonymous nor of a file")
            if start < last:
                raise ImageError(f"mm-{self.pid}.img: mappings overlap or are not ascending at {start:#x}")
            if vma["status"] & areas.SOCKET and vma["pgoff"]:
                follows = before and before["end"] == start and rebuild.is_part(vma, before)
                if not follows or before["pgoff"] + before["end"] - before["start"] != vma["pgoff"]:
                    raise ImageError(f"mm-{self.pid}.img: mapping {start:#x}-{end:#x} is a piece of a packet ring")
            last, before = end, vma


class Checkpoint:
    """What is in the image directory. ``processes`` are in the order of pstree.img, the root first."""

    def __init__(self, images: ImageDir) -> None:
        self.images = images
        self.inventory = images.read_inventory()
        _check_inventory(self.inventory)
        self.processes = [Process(images, item, self.inventory) for item in images.read_all("PSTREE")]
        self._link()
        self.plan = self._plan_births()
        self.files = read_files(images)
        older.complete_files(images, self.files)
        self.remaps = {entry["orig_id"]: entry for entry in images.read_all("REMAP_FPATH")}
        self.memfds = {entry["inode_id"]: entry for entry in images.read_all("MEMFD_INODE")}
        self._take_old_shared_memory()
        self.segments = self._load_segments()
        filters = images.read_one("SECCOMP") if images.exists("SECCOMP") else {}
        self.filters: list[dict[str, Any]] = filters.get("seccomp_filters", [])

    @property
    def root(self) -> Process:
        """The root of the tree."""
        return self.processes[0]

    def knows_sharing(self) -> bool:
        """Whether pages that are stored apart were not shared when they were dumped."""
        return bool(self.inventory.get("firn", {}).get("cow_known"))

    def session_keyring(self) -> dict[str, Any]:
        """The firn_keyring of the tree; empty if it had none of its own."""
        found: dict[str, Any] = self.inventory.get("firn", {}).get("session_keyring", {})
        return found

    def tids(self) -> list[int]:
        """All ids that the restore will give out."""
        return [tid for process in self.processes for tid in process.tids]

    def _link(self) -> None:
        """Tie parents and children together, and check that it is one tree."""
        known: dict[int, Process] = {}
        if not self.processes:
            raise ImageError("pstree.img holds no process")
        for process in self.processes:
            ppid = process.item["ppid"]
            if process is self.root:
                if ppid != 0 or process.zombie:
                    raise ImageError(f"pstree.img: the first process ({process.pid}) is no living root")
            elif ppid not in known or known[ppid].zombie:
                raise ImageError(f"pstree.img: process {process.pid} comes before its parent {ppid}, or has none")
            else:
                process.parent = known[ppid]
                known[ppid].children.append(process)
            known[process.pid] = process
        ids = self.tids()
        if len(set(ids)) != len(ids):
            raise ImageError("pstree.img: a pid or thread id is there twice")
        if self.root.ids["files_id"] == self.inventory["root_ids"]["files_id"]:
            raise ImageError("ids image: the root process shares its files with the dumping program (kIDs)")

    def _plan_births(self) -> births.Plan:
        """Who is born of whom."""
        plan = births.Plan([process.member() for process in self.processes])
        for pid, reason in plan.trouble:
            raise NotBuilt(f"process {pid} {reason}")
        for process in self.processes[1:]:
            process.shared = plan.births[process.pid].flags
        return plan

    def helpers(self) -> list[int]:
        """The pids of processes that live only during the restore: leaders of sessions and groups that have none."""
        known = {process.pid for process in self.processes}
        outer = {0} if self.root.sid == self.root.pid else {0, self.root.sid, self.root.pgid}
        groups = {process.pgid for process in self.processes}
        return sorted(groups.union(self.plan.helpers()) - known - outer)

    def _take_old_shared_memory(self) -> None:
        """Shared anonymous memory in its older form (no MEMFD entry, only an inode number): put into the present
        one."""
        for process in self.processes:
            for vma in [] if process.zombie else process.mm["vmas"]:
                status = vma["status"]
                if not status & areas.ANON_SHARED or status & areas.SYSVIPC:
                    continue
                shmid = vma["shmid"]
                number = _OLD_SHARED + shmid
                message = {"id": number, "flags": 2, "pos": 0, "inode_id": number}
                self.files[MEMFD, number] = {"type": MEMFD, "id": number, "memfd": message}
                entry = {
                    "name": "/dev/zero",
                    "uid": 0,
                    "gid": 0,
                    "size": 0,
                    "shmid": shmid,
                    "seals": 1,
                    "inode_id": number,
                }
                known = self.memfds.setdefault(number, entry)
                known["size"] = max(known["size"], vma["pgoff"] + vma["end"] - vma["start"])
                vma |= {"status": areas.REGULAR | areas.FILE_SHARED | areas.MEMFD, "shmid": number, "fdflags": 2}

    def _load_segments(self) -> dict[int, dict[str, Any]]:
        """Id -> ipc_shm_entry of the System V segments that are attached."""
        wanted = {
            shmid for process in self.processes if not process.zombie for shmid in attach.wanted(process.mm["vmas"])
        }
        if not wanted:
            return {}
        from firn.resources.files import segments

        return segments.load(self.images, self.inventory["root_ids"].get("ipc_ns_id", 0), wanted)

    def clocks(self) -> dict[str, Any] | None:
        """The timens_entry, or None for an image without."""
        index = self.root.ids.get("time_ns_id", 0)
        own = self.inventory["root_ids"].get("time_ns_id", 0)
        number = 0 if index == own else index
        return self.images.read_one("TIMENS", number) if self.images.exists("TIMENS", number) else None


def _check_inventory(inventory: dict[str, Any]) -> None:
    version = inventory["img_version"]
    if version not in VERSIONS:
        raise ImageError(f"inventory.img: image version {version} (a pre-dump has 0); versions 1 and 2 can be restored")
    if not inventory.get("fdinfo_per_id"):
        raise ImageError("inventory.img: too old, descriptors are not stored per table")
    if "root_ids" not in inventory:
        raise ImageError("inventory.img has no root_ids")
    if inventory.get("allow_uprobes"):
        raise NotBuilt("the checkpoint was made with --allow-uprobes, which is not supported yet")
    if inventory.get("plugins_entry", {}).get("plugins"):
        raise NotBuilt("the checkpoint needs plugins of CRIU")
