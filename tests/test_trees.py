"""Trees of processes: every workload in every way, what a whole tree may cost, and trees that were made up at random."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from harness import Beat, Runner, Target, firn_command, wait_until
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from test_workloads import test_workload as run_workload
from workloads.forest import descendants, forest, proportional_size, state
from workloads.likeness import EXCEPTIONS, Portrait, differences
from workloads.table import CHECKPOINT_WAYS, PLAIN_WAYS, Workload

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")

MODES = "fan chain sessions groups gone adopted zombies stopped users programs waiting"
SHARING = "table anon memfd file offset cow"
TABLE = [
    *(Workload("trees", mode) for mode in MODES.split()),
    # Its processes come and go, so there is no portrait of it.
    Workload("trees", "forking", unlike=(".*",)),
    *(Workload("trees", mode) for mode in ("daemon", "sibling")),
    *(Workload("trees_sharing", mode) for mode in SHARING.split()),
]
FOREST_EXCEPTIONS = tuple(rf"process\.\d+\.(?:{pattern})" for pattern in EXCEPTIONS)
# Pages of shared memory count for nobody in particular; the rest is the kernel's own share per process.
MOST_GROWTH = 1.3


def _differences(before: Portrait, after: Portrait, workload: Workload | None = None) -> list[str]:
    unlike = () if workload is None else workload.unlike
    return differences(before, after, (*FOREST_EXCEPTIONS, *unlike))


def _bring_back(runner: Runner, target: Target, workload: Workload | None = None, *options: str) -> Target:
    """Dump and restore the tree below *target* and compare all of it with what was before."""
    before = forest(target.pid) if workload is None or ".*" not in workload.unlike else {}
    images = runner.dump(target, *options)
    if options:
        runner.assert_right(target, "the original, left running")
        changed = _differences(before, forest(target.pid), workload) if before else []
        assert not changed, "the original differs:\n" + "\n".join(changed)
        runner.kill(target)
    back = runner.restore(images, target)
    changed = _differences(before, forest(back.pid), workload) if before else []
    assert not changed, "the restored tree differs:\n" + "\n".join(changed)
    return back


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_tree(workload: Workload, way: str, runner: Runner) -> None:
    if way in PLAIN_WAYS:
        return run_workload(workload, way, runner)
    if not firn_command():
        pytest.skip("no firn command")
    assert way in CHECKPOINT_WAYS
    target = runner.start(workload)
    back = _bring_back(runner, target, workload, *(["--leave-running"] if way == "leave" else []))
    if way == "twice":
        back = _bring_back(runner, back, workload)
    runner.assert_right(back, "after the restore")
    runner.wait_beats(back)
    runner.kill(back)


@needs_firn
def test_the_dumped_tree_is_gone(runner: Runner) -> None:
    target = runner.start(Workload("trees", "chain"))
    tree = [target.pid, *descendants(target.pid)]
    assert len(tree) == 11
    runner.dump(target)
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]


@needs_firn
def test_copy_on_write_is_kept(runner: Runner) -> None:
    """A prefork parent with 64 MB and ten children: memory that they shared, they share again."""
    target = runner.start(Workload("trees_sharing", "cow"))
    before = proportional_size(target.pid)
    assert before < 100 << 10, "the workload shares nothing by itself"
    back = runner.restore(runner.dump(target), target)
    after = proportional_size(back.pid)
    print(f"proportional set size: {before} KiB before, {after} KiB after")
    assert after <= MOST_GROWTH * before
    runner.assert_right(back, "after the restore")
    runner.kill(back)


@needs_firn
@pytest.mark.parametrize("turn", range(4))
def test_births_during_the_freeze(runner: Runner, turn: int) -> None:
    """A tree that forks without end is dumped at any moment, and neither goes wrong: the original nor the restored."""
    target = runner.start(Workload("trees", "forking"))
    for _ in range(3):
        runner.dump(target, "--leave-running")
        runner.assert_right(target, "left running")
    back = runner.restore(runner.dump(target), target)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


# ---- trees made up at random

QUIET = "PPAFDTUJG"


def _grow(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A process: steps and children in any order, in brackets that say how it is born, ended or left as *last* says."""
    step = st.sampled_from([*QUIET, "S"])
    body = st.lists(st.one_of(step, children), max_size=5).map("".join)
    return st.builds(lambda how, inner, last: how[0] + inner + last + how[1], HOW, body, LAST)


HOW = st.sampled_from(["()", "()", "()", "[]"])
LAST = st.sampled_from(["", "", "", "W"])
# Only who has no children may be dead: a dead process's children belong to somebody else.
LEAF = st.builds(
    lambda steps, end: f"({steps}{end})", st.text(QUIET + "S", max_size=3), st.sampled_from(["", "", "X", "K"])
)
TREES = st.lists(
    st.one_of(st.sampled_from(list(QUIET.replace("U", ""))), st.recursive(LEAF, _grow, max_leaves=8)), min_size=1, max_size=6
).map("".join)


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
        max_examples=4, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
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
        "(TUW)(SGT(W)W)",
        "((S)((S(S))G)S((S)))",
    ],
)
def test_plans(plan: str, runner: Runner) -> None:
    """Trees that once were hard."""
    _run_plan(runner, plan)
