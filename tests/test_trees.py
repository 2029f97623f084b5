"""Trees of processes: every workload in every way, what a whole tree may cost, and trees made up at random."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, wait_until
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from test_workloads import test_workload as run_workload
from workloads.forest import children, descendants, forest, proportional_size
from workloads.likeness import EXCEPTIONS, Portrait, lasting_differences
from workloads.table import CHECKPOINT_WAYS, GONE_WAYS, PLAIN_WAYS, Workload

from firn.images.pages import PAGE, PE_PARENT, PE_PRESENT, PagemapReader, write_pagemap
from firn.images.store import ImageDir

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")

MODES = "fan chain sessions groups gone adopted daemon sibling zombies core stopped told continued users programs"
SHARING = "table vm sighand directories anon memfd offset kin resized"
TABLE = [
    *(Workload("trees", mode) for mode in MODES.split()),
    *(Workload("trees_sharing", mode) for mode in SHARING.split()),
    # Fifty processes: dumped and restored once in test_copy_on_write_is_kept.
    Workload("trees_sharing", "cow", ways=(*PLAIN_WAYS, "twice", "leave")),
    *(Workload("memory_shared", mode) for mode in ("parted", "private")),
    # Part of what they check lives in a file, where a program that was left running has gone on.
    Workload("trees", "waiting", ways=GONE_WAYS),
    Workload("trees_sharing", "file", ways=(*PLAIN_WAYS, *GONE_WAYS)),
]
FOREST_EXCEPTIONS = tuple(rf"process\.\d+\.(?:{pattern})" for pattern in EXCEPTIONS)
# Pages of shared memory count for nobody in particular; the rest is the kernel's own share per process.
MOST_GROWTH = 1.3


def _differences(before: Portrait, root: int) -> list[str]:
    return lasting_differences(before, lambda: forest(root), FOREST_EXCEPTIONS)


def _bring_back(runner: Runner, target: Target, *options: str) -> Target:
    """Dump and restore the tree below *target* and compare all of it with what was before."""
    before = forest(target.pid)
    images = runner.dump(target, *options)
    if options:
        changed = _differences(before, target.pid)
        assert not changed, "the original differs:\n" + "\n".join(changed)
        runner.assert_right(target, "the original, left running")
        runner.kill(target)
    back = runner.restore(images, target)
    changed = _differences(before, back.pid)
    assert not changed, "the restored tree differs:\n" + "\n".join(changed)
    return back


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_tree(workload: Workload, way: str, runner: Runner) -> None:
    if way not in CHECKPOINT_WAYS:
        return run_workload(workload, way, runner)
    if not firn_command():
        pytest.skip("no firn command")
    target = runner.start(workload)
    back = _bring_back(runner, target, *(["--leave-running"] if way == "leave" else []))
    if way == "twice":
        back = _bring_back(runner, back)
    runner.assert_right(back, "after the restore")
    runner.wait_beats(back)
    _end(back)


@needs_firn
def test_the_dumped_tree_is_gone(runner: Runner) -> None:
    target = runner.start(Workload("trees", "chain"))
    tree = [target.pid, *descendants(target.pid)]
    assert len(tree) == 11
    runner.dump(target)
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]


@needs_firn
@pytest.mark.parametrize(
    ("mode", "options"), [("cow", ()), ("kin", ()), ("kin", ("--leave-running", "--fork-snapshot"))]
)
def test_copy_on_write_is_kept(mode: str, options: tuple[str, ...], runner: Runner) -> None:
    """A prefork parent with 64 MB and fifty children; families in families, orphans: memory that they shared is once in
    the images, and they share it again."""
    target = runner.start(Workload("trees_sharing", mode))
    before = proportional_size(target.pid)
    assert before < 120 << 10, "the workload shares nothing by itself"
    images = runner.dump(target, *options)
    if options:
        runner.kill(target)
        _reap_all()
    stored = sum(path.stat().st_blocks * 512 for path in images.rglob("*.img")) >> 10
    back = runner.restore(images, target)
    after = proportional_size(back.pid)
    print(f"KiB: proportional set size {before} before, {after} after; images {stored}")
    assert after <= MOST_GROWTH * before and stored <= MOST_GROWTH * before
    runner.assert_right(back, "after the restore")
    runner.kill(back)


def _reap_all() -> None:
    """Copy-on-write clones of a tree are nobody's children but ours, once they are dead."""
    while children(os.getpid()):
        os.waitpid(-1, 0)


@needs_firn
def test_generations_of_images(runner: Runner, tmp_path: Path) -> None:
    """Incremental images as CRIU makes them: pages in the directory itself, its parent and its parent's parent, the
    links relative and absolute. What was shared is not told, and found out by contents."""
    target = runner.start(Workload("trees_sharing", "kin"))
    pids = [target.pid, *descendants(target.pid)]
    before = proportional_size(target.pid)
    made = runner.dump(target)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    for number, pid in enumerate(pids, 1):
        _spread(made, pid, number, [first, second])
    shutil.rmtree(made / "parent")
    (second / "parent").symlink_to("../first")
    (made / "parent").symlink_to(second)
    with ImageDir.open(str(made), create_files=True) as images:
        inventory = images.read_one("INVENTORY")
        assert inventory.pop("firn")["cow_known"]
        images.commit(inventory)
    back = runner.restore(made, target)
    after = proportional_size(back.pid)
    # What the four orphans have in common cannot be seen by comparing with their new parent.
    assert after <= MOST_GROWTH * before + (3 * 16 << 10)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


def _spread(made: Path, pid: int, number: int, parents: list[Path]) -> None:
    """Put the pages of process *pid* in *made* apart: runs of some pages in turn into it and into *parents*."""
    folders = [made, *reversed(parents)]
    lists: list[list[tuple[int, int, int]]] = [[], [], []]
    contents = [bytearray(), bytearray(), bytearray()]
    with ImageDir.open(str(made)) as images, PagemapReader(images, "PAGEMAP", pid) as reader:
        turn = 0
        for run in reader:
            for first in range(0, run.nr_pages, 100):
                count, turn = min(100, run.nr_pages - first), turn + 1
                at = run.vaddr + first * PAGE
                for level in range(turn % 3):
                    lists[level].append((at, count, PE_PARENT))
                lists[turn % 3].append((at, count, PE_PRESENT))
                contents[turn % 3] += os.pread(run.fd, count * PAGE, run.offset + first * PAGE)
    for folder, listed, content in zip(folders, lists, contents, strict=True):
        with ImageDir.open(str(folder), create_files=True) as images:
            write_pagemap(images, "PAGEMAP", pid, 1000 + number, listed)
        (folder / f"pages-{1000 + number}.img").write_bytes(content)


# ---- trees whose processes come and go, or reap each other: there is no list of whom to reap

FORKING = Workload("trees", "forking")


def _dump_restless(runner: Runner, target: Target) -> Path:
    """A dump that ends a tree whose processes come and go: who they are is only known when they are ours."""
    code, output, images = runner.try_dump(target)
    assert code == 0, output[-3000:]
    wait_until("the dumped task ends", target.ended)
    while children(os.getpid()):
        os.waitpid(-1, 0)
    return images


@needs_firn
@pytest.mark.parametrize("turn", range(5))
def test_births_during_the_freeze(runner: Runner, turn: int) -> None:
    """A tree that forks without end is dumped at any moment, and neither goes wrong: the original nor the restored."""
    target = runner.start(FORKING)
    for _ in range(3):
        code, output, _ = runner.try_dump(target, "--leave-running")
        assert code == 0, output[-3000:]
        runner.assert_right(target, "left running")
    back = target
    for _ in range(2):
        back = runner.restore(_dump_restless(runner, back), back)
        runner.assert_right(back, "after the restore")
    _end(back)


@needs_firn
def test_a_growing_tree_is_caught_whole(runner: Runner) -> None:
    """Processes that are born while others are frozen are neither lost nor born twice."""
    target = runner.start(Workload("trees", "bomb"))
    back = runner.restore(_dump_restless(runner, target), target)
    runner.assert_right(back, "after the restore")
    _end(back)


@needs_firn
def test_vfork(runner: Runner) -> None:
    """A parent that waits in vfork cannot be stopped: a dump waits for the end of that, or names it and gives up."""
    target = runner.start(Workload("trees", "vfork"))
    code, output, _ = runner.try_dump(target, "--timeout", "1")
    assert code != 0
    assert "vfork" in output and "Traceback" not in output, output[-3000:]
    runner.assert_right(target, "after the refused dump")
    _end(target)
    target = runner.start(Workload("trees", "vfork-short"))
    back = runner.restore(_dump_restless(runner, target), target)
    runner.assert_right(back, "after the restore")
    _end(back)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("workload", [FORKING, Workload("trees", "bomb"), Workload("trees", "waiting")])
def test_comings_and_goings_are_watched(runner: Runner, workload: Workload, broken: bool) -> None:
    target = runner.start(workload, broken)
    assert (runner.ask(target) == 1) == (not broken)
    _end(target)


def _end(target: Target) -> None:
    """Ends a tree whose processes come and go: once their parents are gone they are ours."""
    os.kill(target.pid, signal.SIGKILL)
    while ours := children(os.getpid()):
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# ---- trees made up at random

QUIET = "PPAFDTUJGCR"


# How a process is born: by fork, sharing descriptors or directories, as a sibling; one in braces ends when set up.
HOW = st.sampled_from(["()", "()", "()", "[]", "<>", "{}", "{}", "^()", "^[]"])
# Only who has no children may be dead: a dead process's children belong to somebody else.
LEAF = st.builds(
    lambda how, steps, end: how[:-1] + steps + end + how[-1],
    HOW, st.text(QUIET + "S", max_size=3), st.sampled_from(["", "", "", "W", "X", "K"]),
)  # fmt: skip


def _grow(below: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A process: steps and children in any order, in brackets that say how it is born."""
    body = st.lists(st.one_of(st.sampled_from([*QUIET, "S"]), below), max_size=5).map("".join)
    return st.builds(lambda how, inner: how[:-1] + inner + how[-1], HOW, body)


BRANCH = st.recursive(LEAF, _grow, max_leaves=8)
TREES = st.lists(st.one_of(st.sampled_from([*QUIET.replace("U", "")]), BRANCH), min_size=1, max_size=6).map("".join)


def _run_plan(runner: Runner, plan: str) -> None:
    (runner.folder / "plan").write_text(plan)
    beat = runner.folder / "beat"
    beat.unlink(missing_ok=True)
    target = runner.start(Workload("trees_plan", "plan"))
    back = _bring_back(runner, target)
    runner.assert_right(back, f"plan {plan}")
    runner.kill(back)


@needs_firn
@pytest.mark.parametrize("number", range(3))
def test_random_trees(number: int, tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> None:
    """Random trees with random sharing, sessions and groups are the same before and after, by all that /proc shows."""

    @seed(number)
    @settings(
        max_examples=5, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(TREES)
    def bring_back(plan: str) -> None:
        note(f"seed {number}, plan {plan}")
        _run_plan(runner, plan)

    bring_back()


@needs_firn
@pytest.mark.parametrize(
    "plan",
    [
        "(S(G(J))(J))",
        "A(P(P)[P])",
        "F([D(D)]D)F(D)",
        "(SX)(GX)(JK)(J)",
        "(TUW)(SGT(W))",
        "((S)((S(S))G)S((S)))",
        # Daemons: one forks twice, one leaves a sibling in its session, one was adopted by a subreaper further down.
        "{S(P)}({S(^(G))})(R{S{(F)(SX)}S[D]})",
        # Two leaders that were born in one session whose leader is gone, and the children they left in it.
        "{S(S{(P)})((J)S(G))}({S((P)S)}S)",
        # Tables that siblings share, but not their parents.
        "F(N[[D]^[C]]N)<C^<(S)>>({[^[S]]})",
    ],
)
def test_plans(plan: str, runner: Runner) -> None:
    """Trees that once were hard."""
    _run_plan(runner, plan)
