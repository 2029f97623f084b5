"""The contents and save phases: records into image files."""

from __future__ import annotations

from firn.resources import threads
from firn.resources.files.buildid import add_build_ids
from firn.resources.memory import areas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.collect import Collected
    from firn.images.store import ImageDir
    from firn.log import Log


def save_contents(images: ImageDir, got: Collected) -> None:
    """What must be copied while the target stands still besides its pages: unlinked files, shared memory."""
    got.finder.save(images)
    got.objects.save(images, 2)


def _add_registers(core: dict[str, Any]) -> None:
    """Turn the raw registers into their message: many numbers, so not done while the target stands still."""
    core["thread_info"], raw = threads.save_info(*core["thread_info"])
    if raw:
        core["thread_core"]["firn"]["xsave"] = raw


def save_records(images: ImageDir, got: Collected, log: Log) -> None:
    """Everything else; the target may be running again."""
    pid = got.pid
    got.memory.save(images)
    got.mm["vmas"] = [areas.build_entry(area) for area in got.areas] + got.memory.guard_entries()
    add_build_ids(got.table.entries)
    got.namespaces.save(images)
    for tid, core in got.cores:
        _add_registers(core)
        images.write_one("CORE", core, tid)
    images.write_one("IDS", got.ids, pid)
    images.write_one("MM", got.mm, pid)
    images.write_one("FS", got.fs, pid)
    images.write_all("FDINFO", [descriptor.save() for descriptor in got.descriptors], got.ids["files_id"])
    images.write_all("FILES", got.table.entries)
    images.write_all("PSTREE", [got.pstree])
    images.write_one("SECCOMP", {"seccomp_filters": got.filters.entries} if got.filters.entries else {})
    got.cgroups.save(images)
    if got.collector is not None:
        got.collector.save(images)
    log.info(f"saved process {pid}: {len(got.cores)} threads, {len(got.descriptors)} descriptors")
