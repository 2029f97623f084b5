"""The load phase: a checkpoint's images, read and checked against each other before anything is made."""

from __future__ import annotations

import os

from firn.errors import ImageError, NotBuilt, RestoreError
from firn.images.store import ImageDir, read_files
from firn.resources.memory import areas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSIONS = (1, 2)
_NAMESPACE_NAMES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup")


class Checkpoint:
    """What is in the image directory: one process, its threads, its files."""

    def __init__(self, images: ImageDir) -> None:
        self.images = images
        if not images.exists("INVENTORY"):
            raise ImageError(f"{images.path} is no checkpoint: it has no inventory.img")
        self.inventory = images.read_one("INVENTORY")
        _check_inventory(self.inventory)
        items = images.read_all("PSTREE")
        if not items:
            raise ImageError("pstree.img holds no process")
        if len(items) > 1:
            raise NotBuilt(f"the checkpoint holds {len(items)} processes; trees are not supported yet")
        self.item = items[0]
        self.pid: int = self.item["pid"]
        self.tids: list[int] = self.item.get("threads", [])
        if not self.tids or self.tids[0] != self.pid or len(set(self.tids)) != len(self.tids):
            raise ImageError(f"pstree.img: the threads of process {self.pid} do not begin with itself, or repeat")
        if any(not 0 < tid < 1 << 30 for tid in self.tids):
            raise ImageError("pstree.img: impossible thread id")
        self.cores = [images.read_one("CORE", tid) for tid in self.tids]
        self._check_cores()
        self.ids = images.read_one("IDS", self.pid)
        self._check_ids()
        self.mm = images.read_one("MM", self.pid)
        self.fs = images.read_one("FS", self.pid)
        self.fdinfo = images.read_all("FDINFO", self.ids["files_id"])
        self.files = read_files(images)
        self.remaps = {entry["orig_id"]: entry for entry in images.read_all("REMAP_FPATH")}
        self.memfds = {entry["inode_id"]: entry for entry in images.read_all("MEMFD_INODE")}
        filters = images.read_one("SECCOMP") if images.exists("SECCOMP") else {}
        self.filters: list[dict[str, Any]] = filters.get("seccomp_filters", [])
        self._check_vmas()

    @property
    def tc(self) -> dict[str, Any]:
        """The task_core_entry."""
        tc: dict[str, Any] = self.cores[0]["tc"]
        return tc

    def clocks(self) -> dict[str, Any] | None:
        """The timens_entry, or None for an image without."""
        index = self.ids.get("time_ns_id", 0)
        root = self.inventory["root_ids"].get("time_ns_id", 0)
        number = 0 if index == root else index
        return self.images.read_one("TIMENS", number) if self.images.exists("TIMENS", number) else None

    def _check_cores(self) -> None:
        for tid, core in zip(self.tids, self.cores, strict=True):
            if core["mtype"] != 1:
                raise RestoreError(f"core-{tid}.img is of another processor architecture", "restore on that kind")
            for part in ("thread_core", "thread_info"):
                if part not in core:
                    raise ImageError(f"core-{tid}.img has no {part}")
            if "creds" not in core["thread_core"]:
                raise ImageError(f"core-{tid}.img has no credentials")
        if "tc" not in self.cores[0]:
            raise ImageError(f"core-{self.pid}.img has no task part")
        if self.tc["task_state"] not in (1, 3):
            raise ImageError(f"core-{self.pid}.img: task state {self.tc['task_state']} cannot be restored alone")
        for part in ("sigactions", "timers"):
            if part not in self.tc:
                raise ImageError(f"core-{self.pid}.img has no {part}")

    def _check_ids(self) -> None:
        root = self.inventory["root_ids"]
        if self.ids["files_id"] == root["files_id"]:
            raise ImageError(f"ids-{self.pid}.img: the process shares its files with the dumping program")
        for kind in _NAMESPACE_NAMES:
            if self.ids.get(f"{kind}_ns_id", 0) != root.get(f"{kind}_ns_id", 0):
                raise NotBuilt(f"the process has a {kind} namespace of its own, which is not supported yet")

    def _check_vmas(self) -> None:
        vmas = self.mm.get("vmas", [])
        if not vmas:
            raise ImageError(f"mm-{self.pid}.img has no mappings")
        last = 0
        for vma in vmas:
            start, end = vma["start"], vma["end"]
            if start >= end or start & 4095 or end & 4095 or (end > 1 << 47 and not vma["status"] & areas.VSYSCALL):
                raise ImageError(f"mm-{self.pid}.img: impossible mapping {start:#x}-{end:#x}")
            if vma["status"] & areas.GUARD:
                continue
            if start < last:
                raise ImageError(f"mm-{self.pid}.img: mappings overlap or are not ascending at {start:#x}")
            last = end


def _check_inventory(inventory: dict[str, Any]) -> None:
    version = inventory["img_version"]
    if version not in VERSIONS:
        raise ImageError(f"inventory.img: image version {version} (a pre-dump has 0); versions 1 and 2 can be restored")
    if not inventory.get("fdinfo_per_id"):
        raise ImageError("inventory.img: too old, descriptors are not stored per table")
    if "root_ids" not in inventory:
        raise ImageError("inventory.img has no root_ids")
    for field, option in (("tcp_close", "--tcp-close"), ("allow_uprobes", "--allow-uprobes")):
        if inventory.get(field):
            raise NotBuilt(f"the checkpoint was made with {option}, which is not supported yet")
    if inventory.get("plugins_entry", {}).get("plugins"):
        raise NotBuilt("the checkpoint needs plugins of CRIU")


def open_images(path: str) -> ImageDir:
    """The image directory at *path*, for reading."""
    return ImageDir.open(os.fspath(path))
