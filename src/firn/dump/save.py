"""The contents and save phases: records into image files."""

from __future__ import annotations

from firn.resources.files.buildid import add_build_ids
from firn.resources.memory import areas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.dump.collect import Collected
    from firn.images.store import ImageDir
    from firn.log import Log


def save_contents(images: ImageDir, got: Collected) -> None:
    """What must be copied while the target stands still besides its pages: unlinked files, shared memory, clocks."""
    got.finder.save(images)
    got.objects.save(images, 2)
    got.namespaces.save(images)


def save_records(images: ImageDir, got: Collected, log: Log) -> None:
    """Everything else; the target may be running again."""
    pid = got.pid
    got.memory.save(images)
    got.mm["vmas"] = [areas.build_entry(area) for area in got.areas] + got.memory.guard_entries()
    add_build_ids(got.table.entries)
    for tid, core in got.cores:
        images.write_one("CORE", core, tid)
    images.write_one("IDS", got.ids, pid)
    images.write_one("MM", got.mm, pid)
    images.write_one("FS", got.fs, pid)
    images.write_all("FDINFO", [descriptor.save() for descriptor in got.descriptors], got.ids["files_id"])
    images.write_all("FILES", got.table.entries)
    images.write_all("PSTREE", [got.pstree])
    images.write_one("SECCOMP", {"seccomp_filters": got.filters.entries} if got.filters.entries else {})
    got.cgroups.save(images)
    log.info(f"saved process {pid}: {len(got.cores)} threads, {len(got.descriptors)} descriptors")
