"""``dump --leave-running --fork-snapshot``: one moment of a target that never rests, and no trace of the copy in it."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
from harness import CACHE, Runner, Target, firn_command, lasting_differences, portrait
from test_workloads import test_workload as run_workload
from workloads.forest import children, descendants, descriptors
from workloads.table import PLAIN_WAYS, Workload

pytestmark = [
    pytest.mark.skipif(not firn_command(), reason="no firn command"),
    pytest.mark.xdist_group("snapshots"),  # they look at all processes of their program
]
OPTIONS = ("--leave-running", "--fork-snapshot")
MODES = ("torn", "subreaper", "pair", "adopter")
TABLE = [Workload("snapshot", mode, ways=PLAIN_WAYS) for mode in (*MODES, "limited")]
WALL = 0x40000000
# Its threads nap and write at any moment.
RESTLESS = (r".*\.Anonymous", r".*status\.(SigBlk|SigPnd|ShdPnd)")


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def _tree(target: Target) -> list[int]:
    return [target.pid, *descendants(target.pid)]


def _strangers(known: set[int]) -> list[str]:
    """Processes of this machine that run a workload's program and are none of *known*: clones that were forgotten."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) not in known:
            try:
                program = os.readlink(folder / "exe")
            except OSError:
                continue
            if Path(program).parent == CACHE and Path(program).name.startswith("snapshot-"):
                found.append(f"{folder.name} {program}")
    return found


def _snapshot(runner: Runner, target: Target) -> Path:
    """A snapshot; the clones were orphans, and we are the subreaper that got them: they must be dead."""
    own = children(os.getpid())
    images = runner.dump(target, *OPTIONS)
    clones = [pid for pid in children(os.getpid()) if pid not in own]
    assert len(clones) == len(_tree(target))
    for pid in clones:
        assert os.waitpid(pid, os.WNOHANG | WALL)[0] == pid, f"clone {pid} lives"
    return images


@pytest.mark.parametrize("mode", MODES)
def test_the_cut_is_one_moment(runner: Runner, mode: str) -> None:
    """Whatever moment it is, the restored writers find every page as they had left it, and so do the original ones."""
    target = runner.start(Workload("snapshot", mode))
    images = []
    for _ in range(3):
        images.append(_snapshot(runner, target))
        runner.assert_right(target, "left running")
    runner.kill(target)
    for folder in images:
        back = runner.restore(folder, target)
        runner.assert_right(back, f"restored from {folder.name}")
        runner.kill(back)


@pytest.mark.parametrize("mode", ["mlock", "onfault", "dontfork", "wipeonfork", "guard", "guard-shared"])
def test_what_a_clone_has_not_inherited(runner: Runner, mode: str) -> None:
    target = runner.start(Workload("memory_advice", mode))
    images = _snapshot(runner, target)
    runner.kill(target)
    back = runner.restore(images, target)
    runner.assert_right(back, "restored")
    runner.kill(back)


@pytest.mark.parametrize("mode", MODES)
def test_no_trace_is_left(runner: Runner, mode: str) -> None:
    """No new child, no new descriptor, no new mapping, and the clones are gone from the machine."""
    target = runner.start(Workload("snapshot", mode))
    before = [(pid, portrait(pid), descriptors(pid)) for pid in _tree(target)]
    _snapshot(runner, target)
    assert _tree(target) == [pid for pid, _, _ in before], "processes came or went"
    for pid, look, files in before:
        changed = lasting_differences(look, partial(portrait, pid), RESTLESS)
        assert not changed, f"process {pid}:\n" + "\n".join(changed)
        assert descriptors(pid) == files
    assert not _strangers(set(_tree(target)))
    runner.assert_right(target, "left running")
    runner.kill(target)


def test_a_limit_on_processes_is_named(runner: Runner) -> None:
    """A target that may not fork: the dump says so, and harms nothing; without the clone it works."""
    target = runner.start(Workload("snapshot", "limited"))
    before = portrait(target.pid)
    code, text, images = runner.try_dump(target, *OPTIONS)
    assert code != 0 and "Traceback" not in text and "internal error" not in text, text[-3000:]
    assert re.search(r"clone.*Resource temporarily unavailable|RLIMIT_NPROC", text), text[-3000:]
    assert not (images / "inventory.img").exists()
    assert target.state() not in "tT"
    changed = lasting_differences(before, lambda: portrait(target.pid), RESTLESS)
    assert not changed, "\n".join(changed)
    assert not children(target.pid)
    runner.assert_right(target, "after the failed dump")
    images = runner.dump(target)
    back = runner.restore(images, target)
    runner.assert_right(back, "restored")
    runner.kill(back)
