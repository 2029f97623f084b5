"""Checkpoints in the form that older versions of CRIU wrote: made of firn's own, and restored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, firn_command
from workloads.table import Workload

from firn.images import catalog
from firn.images.store import ImageDir

pytestmark = pytest.mark.skipif(not firn_command() or os.geteuid() != 0, reason="needs firn, and root")

HEAD = (0x54564319).to_bytes(4, "little")
PER_TYPE = {
    1: ("REG_FILES", "reg"), 2: ("PIPES", "pipe"), 3: ("FIFO", "fifo"), 4: ("INETSK", "isk"), 5: ("UNIXSK", "usk"),
    6: ("EVENTFD_FILE", "efd"), 7: ("EVENTPOLL_FILE", "epfd"), 8: ("INOTIFY_FILE", "ify"), 9: ("SIGNALFD", "sgfd"),
    11: ("TTY_FILES", "tty"), 12: ("FANOTIFY_FILE", "ffy"), 13: ("NETLINK_SK", "nlsk"), 17: ("TIMERFD", "tfd"),
}  # fmt: skip
RECORDS = {7: ("EVENTPOLL_TFD", "tfd"), 8: ("INOTIFY_WD", "wd"), 12: ("FANOTIFY_MARK", "mark")}
GHOST = 1
Entry = dict[str, Any]


def age(folder: Path) -> None:
    """Rewrites the checkpoint in *folder* as the oldest CRIU whose images are still read would have written it."""
    with ImageDir.open(str(folder), create_files=True) as images:
        inventory = images.read_one("INVENTORY")
        tree = images.read_all("PSTREE")
        for name in sorted(os.listdir(folder)):
            kind, index = catalog.identify(name) or (None, None)
            if kind is not None and kind.name in ("PAGEMAP", "PAGEMAP_SHMEM"):
                _age_pages(images, kind.name, index)
        for item in tree:
            for tid in item["threads"]:
                _age_thread(images, item["pid"], tid)
        _age_files(images)
        images.commit({"img_version": 1, "fdinfo_per_id": True, "root_ids": inventory["root_ids"]})
    (folder / "timens-0.img").unlink()
    for path in folder.glob("*.img"):
        kind, _ = catalog.identify(path.name) or (None, None)
        if kind is not None and kind.message and kind.name != "INVENTORY":
            data = path.read_bytes()
            assert data.startswith(HEAD), path
            path.write_bytes(data[4:])


def _age_pages(images: ImageDir, kind: str, index: int | None) -> None:
    head, *runs = images.read_all(kind, index)
    with images.writer(kind, index) as writer:
        writer.add(head)
        for run in runs:
            writer.add({"vaddr": run["vaddr"], "compat_nr_pages": run["nr_pages"]})


def _age_thread(images: ImageDir, pid: int, tid: int) -> None:
    core = images.read_one("CORE", tid)
    if "thread_core" not in core:
        return
    thread = core["thread_core"]
    for name in ("firn", "cg_set", "comm"):
        thread.pop(name, None)
    images.write_all("PSIGNAL", thread.pop("signals_p", {}).get("signals", ()), tid)
    mode, filters = thread.pop("seccomp_mode", None), thread.pop("seccomp_filter", None)
    if tid == pid:
        task = core["tc"]
        task.pop("firn", None)
        if mode is not None:
            task["old_seccomp_mode"] = mode
        if filters is not None:
            task["old_seccomp_filter"] = filters
        images.write_one("CREDS", thread.pop("creds"), pid)
        _age_task(images, task, pid)
        core["ids"] = images.read_one("IDS", pid)
        os.unlink(catalog.kind("IDS").file(pid), dir_fd=images.fd)
        mm = images.read_one("MM", pid)
        mappings = mm.pop("vmas")
        for vma in mappings:
            vma.pop("fdflags", None)
        images.write_all("VMAS", mappings, pid)
        mm.pop("firn", None)
        images.write_one("MM", mm, pid)
    images.write_one("CORE", core, tid)


def _age_task(images: ImageDir, task: Entry, pid: int) -> None:
    images.write_all("SIGNAL", task.pop("signals_s", {}).get("signals", ()), pid)
    images.write_all("SIGACT", task.pop("sigactions"), pid)
    images.write_all("RLIMIT", task.pop("rlimits")["rlimits"], pid)
    timers = task.pop("timers")
    images.write_all("ITIMERS", [timers[name] for name in ("real", "virt", "prof")], pid)
    images.write_all("POSIX_TIMERS", timers.get("posix", ()), pid)


def _age_files(images: ImageDir) -> None:
    entries = images.read_all("FILES")
    assert {entry["type"] for entry in entries} <= PER_TYPE.keys(), "a type that old versions did not know"
    os.unlink("files.img", dir_fd=images.fd)
    for type_, (kind, field) in PER_TYPE.items():
        messages = [entry[field] for entry in entries if entry["type"] == type_]
        for message in messages:
            message.pop("firn", None)
            options = message.pop("tcp_opts", {})
            message.get("opts", {}).update({f"tcp_{name}": options[name] for name in options if "keep" in name})
        if type_ in RECORDS:
            records, name = RECORDS[type_]
            found = [record | {"id": message["id"]} for message in messages for record in message.pop(name, ())]
            images.write_all(records, found)
        if messages:
            images.write_all(kind, messages)
    remaps = images.read_all("REMAP_FPATH")
    for remap in remaps:
        if remap.pop("remap_type") == GHOST:
            remap["remap_id"] |= 1 << 31
    images.write_all("REMAP_FPATH", remaps)
    terminals = images.read_all("TTY_INFO")
    for terminal in terminals:
        terminal["type"] = 0
    images.write_all("TTY_INFO", terminals)


@pytest.mark.parametrize(
    "name",
    [
        "memory_basic-file-private", "memory_basic-file-shared", "memory_pages-presence", "threads-tls",
        "signals-handlers", "signals-pending-private", "signals-pending-shared", "timers-real", "timers-clocks",
        "identity-four-ids", "identity-bounding", "identity-limits", "seccomp-one", "seccomp-stacked", "seccomp-strict",
        "ghosts-ghost",
        "events-eventfd", "events-signalfd", "events-timerfd", "epoll-ways", "watches-folder", "watches-marks",
        "pipes-fifo", "pipes-stream", "unix_sockets-pairs", "unix_sockets-listen", "ttys-settings", "inet-listen",
    ],
)  # fmt: skip
def test_old_form(name: str, runner: Runner) -> None:
    program, _, mode = name.partition("-")
    target = runner.start(Workload(program, mode))
    images = runner.dump(target)
    age(images)
    code, text = runner.firn("inspect", str(images))
    assert code == 0, text
    back = runner.restore(images, target)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


def test_a_security_label_is_not_lost(runner: Runner) -> None:
    """CRIU saves labels of AppArmor and SELinux; a restore without them would give the program more rights."""
    target = runner.start(Workload("memory_basic", "anon"))
    images = runner.dump(target)
    with ImageDir.open(str(images), create_files=True) as folder:
        core = folder.read_one("CORE", target.pid)
        core["thread_core"]["creds"]["lsm_profile"] = "docker-default"
        folder.write_one("CORE", core, target.pid)
    code, text = runner.try_restore(images)
    assert code == 1 and "docker-default" in text and "Traceback" not in text, text[-3000:]
