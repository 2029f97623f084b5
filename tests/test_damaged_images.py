"""Checkpoints that were damaged or made up: a restore says so in one error and leaves nothing, or it works."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, Target, children, firn_command, wait_until
from workloads.table import Workload

from firn.images.store import ImageDir
from firn.resources.memory import areas

pytestmark = pytest.mark.skipif(not firn_command() or os.geteuid() != 0, reason="needs firn, and root")

ROUNDS = 16
Entry = dict[str, Any]


def _workload(name: str) -> Workload:
    program, _, mode = name.partition("-")
    return Workload(program, mode)


def _restore(runner: Runner, images: Path, what: str) -> str:
    """Restores what may be damaged; what it said if it was refused, else empty."""
    code, text = runner.firn("restore", "-d", "-D", str(images))
    if code == 0:
        for pid in children():
            runner.kill(Target(pid, None))
        return ""
    assert code == 1, f"{what}: exit status {code}\n{text}"
    assert "Traceback" not in text and "internal error" not in text, f"{what}: {text}"
    assert text.count("firn: error: ") == 1, f"{what}: {text}"
    for pid in children():
        # A process that was a child of the restored root becomes ours when both are ended.
        wait_until(f"{what}: {pid} is left, and ends", Target(pid, None).ended)
    return text


@pytest.mark.parametrize("name", ["epoll-ways", "pipes-stream", "ttys-settings", "unix_sockets-pairs", "threads-tls"])
def test_flipped_and_cut(name: str, runner: Runner) -> None:
    chance = random.Random(name)
    images = runner.dump(runner.start(_workload(name)))
    names = sorted(path.name for path in images.glob("*.img") if not path.name.startswith("pages"))
    refused = 0
    for number in range(ROUNDS):
        path = images / names[chance.randrange(len(names))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if chance.random() < 0.7:
            damaged[chance.randrange(8, len(damaged))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        refused += bool(_restore(runner, images, f"round {number}, {path.name}"))
        path.write_bytes(whole)
    assert refused > ROUNDS // 4


def test_every_image_is_missed(runner: Runner) -> None:
    """Also those that CRIU takes for empty ones."""
    images = runner.dump(runner.start(_workload("unix_sockets-pairs")))
    names = [path.name for path in images.glob("*.img")]
    assert "sk-queues.img" in names
    for name in names:
        kept = (images / name).rename(images / "kept")
        assert name.partition(".")[0] in _restore(runner, images, f"without {name}")
        kept.rename(images / name)


def _read_only(mm: Entry) -> None:
    for vma in mm["vmas"]:
        if vma["status"] & areas.ANON_PRIVATE and vma["prot"] == 3:
            vma["prot"] = 1


def _no_file(mm: Entry) -> None:
    for vma in mm["vmas"]:
        vma["flags"] &= ~0x20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_read_only, "cannot run: signal 11"),  # the kernel cannot write the area of rseq(2), which glibc has there
        (_no_file, "neither anonymous nor of a file"),
        (lambda mm: mm["vmas"].reverse(), "not ascending"),
        (lambda mm: mm.pop("vmas"), "no mappings"),
        (lambda mm: mm.update(exe_file_id=99), "file 99"),
        (lambda mm: mm.update(mm_start_code=0), "PR_SET_MM_MAP"),
    ],
)
def test_impossible_memory(change: Callable[[Entry], object], message: str, runner: Runner) -> None:
    target = runner.start(_workload("threads-rseq"))
    images = runner.dump(target)
    with ImageDir.open(str(images), create_files=True) as folder:
        mm = folder.read_one("MM", target.pid)
        change(mm)
        folder.write_one("MM", mm, target.pid)
    assert message in _restore(runner, images, "changed")


def test_impossible_tables(runner: Runner) -> None:
    """A descriptor that is there twice; a ghost file's image without any entry."""
    images = runner.dump(runner.start(_workload("ghosts-ghost")))
    with ImageDir.open(str(images), create_files=True) as folder:
        table = folder.read_all("FDINFO", 2)
        folder.write_all("FDINFO", [*table, table[0]], 2)
        assert "is there twice" in _restore(runner, images, "twice")
        folder.write_all("FDINFO", table, 2)
    ghost = images / "ghost-file-1.img"
    ghost.write_bytes(ghost.read_bytes()[:8])
    assert "ghost-file-1.img" in _restore(runner, images, "no ghost")
