"""System V IPC: shared memory that lives on, is gone or another one's at the restore; calls that wait for semaphores,
messages and the like; semaphores to give back; damaged images."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command
from hypothesis import given
from hypothesis import strategies as st
from test_workloads import test_workload as run_workload
from workloads.table import AGAIN_WAY, PLAIN_WAYS, REFUSED_WAY, Workload

from firn.abi import ipc, nr
from firn.abi.libc import address_of, syscall
from firn.abi.sched import CLONE_NEWIPC
from firn.errors import KernelError
from firn.host.undolists import UndoLists
from firn.images.store import ImageDir
from firn.resources.files.segments import look_up
from firn.resources.semaphores import FAIL, HIGHEST, LOWEST, SemaphoreSet, all_sets, used_sets, within

TABLE = [Workload("segments", "kept"), Workload("segments", "marked", once=True)]
TABLE.append(Workload("interrupts", "calls", once=True, ways=(*PLAIN_WAYS, "dump", "leave", AGAIN_WAY)))
GIVES = r"process \d+: has to give back semaphores of set \d+ when it ends \(SEM_UNDO\), which cannot be saved: "
AMOUNTS = GIVES + r"\+2 to semaphore 0, -7 to semaphore 1, \+3 to semaphore 5, {}, -20000 to semaphore 69; have"
SEEN, ASKED = (
    AMOUNTS.format(high)
    for high in ("-32700 to semaphore 68", "perhaps something to semaphore 68, whose value is too high to tell")
)
DENIED = r"process \d+: may have to give back semaphores of set \d+ .*: it may not use the set now"
REFUSALS = {"shared": (SEEN, ASKED), "own": (SEEN, ASKED), "denied": (GIVES + r"\+2 to semaphore 0; have", DENIED)}
"""Mode -> what a dump says if the kernel lets it look, and if it does not."""
TABLE += [
    Workload("semaphores", mode, refused=(f"{seen}|{asked}",), ways=(*PLAIN_WAYS, REFUSED_WAY))
    for mode, (seen, asked) in REFUSALS.items()
]
TABLE.append(Workload("semaphores", "returned"))
KEY = 0x6669
_GETVAL = 12  # linux/sem.h
needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


def ids(kind: str = "shm") -> list[int]:
    """The objects that were made to stay."""
    lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
    return [int(line.split()[1]) for line in lines]


def remove(number: int, kind: str = "shm") -> None:
    # semctl(2) has a further argument, the number of the semaphore.
    call = {"shm": nr.shmctl, "sem": nr.semctl, "msg": nr.msgctl}[kind]
    args = (0, ipc.IPC_RMID) if kind == "sem" else (ipc.IPC_RMID,)
    syscall(f"remove {kind} {number}", call, number, *args)


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """In a namespace of our own, which ends with all that is in it. Among those of others who run these tests now, ids
    would be taken, and sets be used: at the end of a process the kernel notes the time in all that it was asked about.
    """
    if os.geteuid():
        pytest.skip("a namespace needs root")
    with open("/proc/thread-self/ns/ipc") as before:
        syscall("unshare", nr.unshare, CLONE_NEWIPC)
        yield
        syscall("setns", nr.setns, before.fileno(), CLONE_NEWIPC)


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


@pytest.fixture
def dumped(runner: Runner) -> tuple[Target, Path, int]:
    """A dumped workload, its images, and its segment."""
    target = runner.start(TABLE[0])
    (shmid,) = ids()
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
    assert syscall("shmget", nr.shmget, KEY, 4096, ipc.IPC_CREAT | 0o600) == shmid
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


# ---- semaphores

_USER = """
import ctypes, struct, sys, time
libc = ctypes.CDLL(None)
while True:
    for change in 1, -1:
        if libc.semop(int(sys.argv[1]), struct.pack("<Hhh", 0, change, 0x1000), 1):
            sys.exit(1)
    time.sleep(0.0001)
"""


@pytest.fixture
def busy_set() -> Iterator[int]:
    """A set that everybody may use, and that some process uses all the time, with SEM_UNDO."""
    number = syscall("semget", nr.semget, KEY, 3, ipc.IPC_CREAT | ipc.IPC_EXCL | 0o666)
    user = subprocess.Popen([sys.executable, "-c", _USER, str(number)])
    try:
        while number not in {each.id for each in used_sets()}:
            assert user.poll() is None
            time.sleep(0.01)
        yield number
        assert user.poll() is None, "the user of the set was disturbed"
    finally:
        user.kill()
        user.wait()


@pytest.mark.parametrize("way", ["plain", "break", "dump", "leave"])
def test_threads_without_undo(way: str, runner: Runner, busy_set: int) -> None:
    """Every program with threads has an undo list; one that holds nothing is no obstacle, whoever uses semaphores."""
    run_workload(Workload("semaphores", "threads"), way, runner)
    assert syscall("semctl", nr.semctl, busy_set, 0, ipc.GETPID, 0) != os.getpid()


@pytest.fixture
def sees() -> Iterator[UndoLists]:
    try:
        lists = UndoLists()
    except (KernelError, OSError) as error:
        pytest.skip(str(error))
    yield lists
    lists.close()


def test_a_high_value_elsewhere(runner: Runner, sees: UndoLists) -> None:
    """What others have done to sets that the tree has nothing to do with does not stand against its dump."""
    number = syscall("semget", nr.semget, KEY, 2, ipc.IPC_CREAT | ipc.IPC_EXCL | 0o666)
    for at in range(2):
        change = bytearray(ipc.SEMBUF.pack(at, HIGHEST, ipc.IPC_NOWAIT))
        syscall("semop", nr.semop, number, address_of(change), 1)
    run_workload(Workload("semaphores", "threads"), "dump", runner)
    assert [syscall("semctl", nr.semctl, number, at, _GETVAL, 0) for at in range(2)] == [HIGHEST] * 2


@needs_firn
@pytest.mark.parametrize("mode", REFUSALS)
def test_undo_lists_are_seen(mode: str, runner: Runner, sees: UndoLists) -> None:
    run_workload(Workload("semaphores", mode, refused=REFUSALS[mode][:1]), REFUSED_WAY, runner)


@needs_firn
@pytest.mark.parametrize("mode", REFUSALS)
def test_undo_lists_are_asked_about_where_nobody_may_look(mode: str, runner: Runner) -> None:
    deny = f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from host.sandbox import deny; deny([{nr.bpf}])"
    runner.within = [sys.executable, "-c", f"import os, sys; {deny}; os.execv(sys.argv[1], sys.argv[1:])"]
    run_workload(Workload("semaphores", mode, refused=REFUSALS[mode][1:]), REFUSED_WAY, runner)


def test_threads_have_their_tasks(sees: UndoLists) -> None:
    """A thread that has given something, one that shares its list, and one that was born with a list of its own."""
    number = syscall("semget", nr.semget, ipc.IPC_PRIVATE, 300, ipc.IPC_CREAT | 0o600)
    user = subprocess.Popen([sys.executable, "-c", _GIVER, str(number)], stdout=subprocess.PIPE, text=True)
    try:
        assert user.stdout
        tids = [int(word) for word in user.stdout.readline().split()]
        counts = {each.id: each.count for each in all_sets()}
        found = [sees.of(tid, counts) for tid in (user.pid, *tids)]
        assert found == [{number: [-1] + [0] * 298 + [-7]}] * 2 + [{number: [0, -2] + [0] * 298}]
        with pytest.raises(KernelError, match=f"set {number} is none"):
            sees.of(user.pid, {})
        remove(number, "sem")
        assert sees.of(user.pid, counts) == {}
    finally:
        user.kill()
        user.wait()
        if number in {each.id for each in all_sets()}:
            remove(number, "sem")
    with pytest.raises(OSError):
        sees.of(user.pid, counts)


class _OldMemory:
    """Of a kernel before Linux 6.7, whose undo entries have their amounts elsewhere: one set, and one that is gone."""

    def __init__(self) -> None:
        self.words = {100: 200, 200: 300, 300: 400, 400: 200, 308: 7, 408: 0xFFFFFFFF, 316: 500, 416: 0}

    def task_of(self, tid: int) -> int:
        return 100

    def number(self, address: int, size: int = 8) -> int:
        return self.words[address]

    def read(self, address: int, count: int) -> bytes:
        assert (address, count) == (500, 6)
        return struct.pack("<3h", 0, -32768, 5)


def test_amounts_behind_a_pointer(sees: UndoLists, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"_list": 0, "_head": 0, "_link": 0, "_set": 8, "_amounts": 16, "_apart": True}
    for name, value in ({"_memory": _OldMemory()} | changes).items():
        monkeypatch.setattr(sees, name, value)
    assert sees.of(1, {7: 3}) == {7: [0, -32768, 5]}


_GIVER = """
import ctypes, struct, sys, threading, time
libc = ctypes.CDLL(None)
tids = []
def give(at, change):
    assert not libc.semop(int(sys.argv[1]), struct.pack("<Hhh", at, change, 0x1000), 1)
def share():
    give(299, 7)
    tids.append(threading.get_native_id())
    threading.Event().wait()
def part():
    assert not libc.unshare(0x40000)  # CLONE_SYSVSEM
    give(1, 2)
    tids.append(threading.get_native_id())
    threading.Event().wait()
give(0, 1)
for task in share, part:
    count = len(tids)
    threading.Thread(target=task, daemon=True).start()
    while len(tids) == count:
        time.sleep(0.001)
print(*tids, flush=True)
threading.Event().wait()
"""


def semop(value: int, amount: int, steps: list[tuple[int, int]]) -> int:
    """What the kernel answers to these operations (change, flags) on one semaphore: semop(2)."""
    for change, flags in steps:
        assert flags & ipc.IPC_NOWAIT
        if (not change and value) or value + change < 0:
            return errno.EAGAIN
        value += change
        if flags & ipc.SEM_UNDO:
            amount -= change
        if value > 32767 or not LOWEST <= amount <= HIGHEST:
            return errno.ERANGE
    return 0


amounts = st.integers(LOWEST, HIGHEST)


@given(st.integers(0, 32767), amounts, amounts, amounts, st.sampled_from([16384, 4096, 1000]))
def test_a_question_never_lies(value: int, amount: int, one: int, other: int, stride: int) -> None:
    for low, high in {(min(one, other), max(one, other)), (0, 0), (amount, amount), (LOWEST, amount)}:
        steps = within(low, high, stride)
        assert len(steps) <= 4 * 65536 / stride + 4
        said = semop(value, amount, steps + FAIL)
        assert said in (errno.EAGAIN, errno.ERANGE)
        if value <= 32767 - stride:
            assert (said == errno.EAGAIN) == (low <= amount <= high)
        elif said == errno.EAGAIN:
            assert low <= amount <= high


@pytest.mark.parametrize(
    ("line", "changes", "lets"),
    [
        ("0 1 600 1 5 6 7 8 9 9", {}, False),
        ("0 1 606 1 4 6 7 8 9 9", {}, True),
        ("0 1 600 1 5 6 7 8 9 9", {"Uid": "1\t5\t1\t1"}, True),  # the owner's
        ("0 1 066 1 7 6 5 8 9 9", {"Uid": "1\t1\t5\t1"}, True),  # the maker's, but his like may not
        ("0 1 400 1 7 6 5 8 9 9", {"Uid": "1\t1\t5\t1"}, False),
        ("0 1 660 1 4 12 7 8 9 9", {"Groups": "11 12 "}, True),
        ("0 1 660 1 4 12 7 8 9 9", {"Gid": "2\t2\t12\t2"}, True),
        ("0 1 000 1 5 6 7 8 9 9", {"CapPrm": "0000000000008000"}, True),
    ],
)
def test_who_might_use_semaphores(line: str, changes: dict[str, str], lets: bool) -> None:
    status = {"Uid": "1\t1\t1\t1", "Gid": "2\t2\t2\t2", "Groups": "", "CapPrm": "0000000000000000"}
    assert SemaphoreSet(line).could_let(status | changes) == lets
