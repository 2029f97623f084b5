"""The contents and save phases: records into image files."""

from __future__ import annotations

from firn.resources import threads
from firn.resources.files.buildid import add_build_ids
from firn.resources.memory import areas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.dump.collect import Collected
    from firn.dump.task import CollectedTask
    from firn.images.store import ImageDir
    from firn.log import Log


def save_contents(images: ImageDir, got: Collected) -> None:
    """What must be copied while the target stands still besides its pages: unlinked files, shared memory."""
    got.finder.save(images)
    following = got.objects.save(images, len(got.tasks) + 1)
    if got.segments is not None:
        got.segments.save(images, got.namespaces.root_ids()["ipc_ns_id"], following)


def save_records(images: ImageDir, got: Collected, log: Log) -> None:
    """Everything else; the target may be running again."""
    nobody = got.collector.locks.leased
    leased = {entry["id"] for entry in got.table.entries if entry.get("reg", {}).get("name") in nobody}
    add_build_ids(got.table.entries, leased | {remap["orig_id"] for remap in got.finder.remaps})
    got.namespaces.save(images)
    tables: set[int] = set()
    for mine in got.tasks:
        _save_task(images, mine, tables)
    for pid, core in got.zombies:
        images.write_one("CORE", core, pid)
    images.write_all("FILES", got.table.entries)
    images.write_all("PSTREE", got.pstree)
    images.write_one("SECCOMP", {"seccomp_filters": got.filters.entries} if got.filters.entries else {})
    got.cgroup_sets.save(images)
    got.collector.save(images)
    log.info(f"saved {len(got.tasks)} processes, {sum(len(mine.cores) for mine in got.tasks)} threads")


def _save_task(images: ImageDir, mine: CollectedTask, tables: set[int]) -> None:
    pid = mine.pid
    if mine.sharer is None:
        # CRIU would give those who share a memory one each; without a page list it refuses them.
        mine.memory.save(images)
        mine.mm["vmas"] = [areas.build_entry(area) for area in mine.areas] + mine.memory.guard_entries()
    for tid, core in mine.cores:
        _add_registers(core)
        images.write_one("CORE", core, tid)
    images.write_one("IDS", mine.ids, pid)
    images.write_one("MM", mine.mm, pid)
    images.write_one("FS", mine.fs, pid)
    if mine.ids["files_id"] not in tables:
        tables.add(mine.ids["files_id"])
        images.write_all("FDINFO", [descriptor.save() for descriptor in mine.descriptors], mine.ids["files_id"])


def _add_registers(core: dict[str, Any]) -> None:
    """Turn the raw registers into their message: many numbers, so not done while the target stands still."""
    core["thread_info"], raw = threads.save_info(*core["thread_info"])
    if raw:
        core["thread_core"]["firn"]["xsave"] = raw
