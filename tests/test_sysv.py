"""System V IPC: shared memory that lives on, is gone or another one's at the restore; calls that wait for semaphores,
messages and the like; damaged images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command
from test_workloads import test_workload as run_workload
from workloads.table import AGAIN_WAY, PLAIN_WAYS, Workload

from firn.abi import ipc, nr
from firn.abi.libc import syscall
from firn.images.store import ImageDir
from firn.resources.files.segments import look_up

TABLE = [Workload("segments", "kept"), Workload("segments", "marked", once=True)]
TABLE.append(Workload("interrupts", "calls", once=True, ways=(*PLAIN_WAYS, "dump", "leave", AGAIN_WAY)))
OURS = 0x6669
pytestmark = pytest.mark.xdist_group("machine-wide settings")  # ids are given out by the whole machine
needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


def ids(kind: str = "shm") -> list[int]:
    """The objects that workloads made to stay."""
    lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
    return [int(words[1]) for words in map(str.split, lines) if int(words[0]) >> 16 == OURS]


def remove(number: int, kind: str = "shm") -> None:
    # semctl(2) has a further argument, the number of the semaphore.
    call = {"shm": nr.shmctl, "sem": nr.semctl, "msg": nr.msgctl}[kind]
    syscall(f"remove {kind} {number}", call, number, *([0] if kind == "sem" else []), ipc.IPC_RMID, 0)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = {kind: ids(kind) for kind in ("shm", "sem", "msg")}
    yield
    for kind, old in before.items():
        for number in set(ids(kind)) - set(old):
            remove(number, kind)


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


@pytest.fixture
def dumped(runner: Runner) -> tuple[Target, Path, int]:
    """A dumped workload, its images, and its segment."""
    before = ids()
    target = runner.start(TABLE[0])
    (shmid,) = set(ids()) - set(before)
    return target, runner.dump(target), shmid


@needs_firn
def test_a_segment_that_is_gone_is_made_again(runner: Runner, dumped: tuple[Target, Path, int]) -> None:
    target, images, shmid = dumped
    remove(shmid)
    back = runner.restore(images, target)
    assert shmid in ids()
    runner.assert_right(back, "after the restore")
    runner.kill(back)


@needs_firn
def test_contents_of_the_trees_own_segment_come_back(runner: Runner, dumped: tuple[Target, Path, int]) -> None:
    target, images, shmid = dumped
    address = syscall("shmat", nr.shmat, shmid, 0, 0)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"x" * 8192)
    # As long as somebody has it, it is not the checkpoint's to change.
    back = runner.restore(images, target)
    assert runner.ask(back) == 101 + line_of("state.shm_nattch == 4")
    runner.kill(back)
    syscall("shmdt", nr.shmdt, address)
    back = runner.restore(images, target)
    runner.assert_right(back, "after the second restore")
    runner.kill(back)


def line_of(text: str) -> int:
    lines = (Path(__file__).parent / "workloads/segments.c").read_text().splitlines()
    return next(number for number, line in enumerate(lines) if text in line)


@needs_firn
def test_another_segment_is_left_alone(runner: Runner, dumped: tuple[Target, Path, int]) -> None:
    target, images, shmid = dumped
    found = look_up(shmid)
    assert found
    remove(shmid)
    # The same key, by another id.
    other = syscall("shmget", nr.shmget, found["key"], 4096, ipc.IPC_CREAT | 0o600)
    code, text = runner.try_restore(images)
    assert code and "is taken" in text and "Traceback" not in text, text[-3000:]
    assert not Path(f"/proc/{target.pid}").exists() and look_up(shmid) is None
    remove(other)
    # The same id, by another key.
    Path("/proc/sys/kernel/shm_next_id").write_text(str(shmid))
    assert syscall("shmget", nr.shmget, OURS << 16, 4096, ipc.IPC_CREAT | 0o600) == shmid
    code, text = runner.try_restore(images)
    assert code and "another segment" in text and "Traceback" not in text, text[-3000:]
    assert look_up(shmid)


@needs_firn
def test_a_failed_restore_leaves_no_segment(
    runner: Runner, dumped: tuple[Target, Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images, shmid = dumped
    remove(shmid)
    monkeypatch.setenv("FIRN_FAULT", "fail:restore.state")
    assert runner.try_restore(images)[0]
    assert look_up(shmid) is None


@needs_firn
@pytest.mark.parametrize("size", [0, 4096, 1 << 50])
def test_damaged_images(runner: Runner, dumped: tuple[Target, Path, int], size: int) -> None:
    _, images, shmid = dumped
    remove(shmid)
    damaged = images.with_name("damaged")
    shutil.copytree(images, damaged)
    directory = ImageDir.open(str(damaged))
    index = directory.read_one("INVENTORY")["root_ids"]["ipc_ns_id"]
    entries = directory.read_all("IPCNS_SHM", index)
    os.unlink(damaged / f"ipcns-shm-{index}.img")
    directory = ImageDir.open(str(damaged), create_files=True)
    directory.write_all("IPCNS_SHM", [{**entry, "size": size} for entry in entries], index)
    code, text = runner.try_restore(damaged)
    assert code and "Traceback" not in text and "image" in text, text[-3000:]
    assert look_up(shmid) is None
