"""Every workload in every way: plain, with sabotage, dumped and restored, twice, and left running."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from harness import CannotRun, Runner, Target, differences, firn_command, portrait, wait_until
from workloads.table import AGAIN_WAY, PLAIN_WAYS, REFUSED_WAY, TABLE, Workload


def _cases() -> list[object]:
    return [
        pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways
    ]


def _start(runner: Runner, workload: Workload, broken: bool = False) -> Target:
    try:
        return runner.start(workload, broken)
    except CannotRun as reason:
        pytest.skip(str(reason))


def _stop(workload: Workload, target: Target) -> None:
    if workload.stop:
        os.kill(target.pid, signal.SIGSTOP)
        wait_until("it stops", lambda: target.state() == "T")


def _continue(workload: Workload, target: Target) -> None:
    if workload.stop:
        assert target.state() == "T", "a stopped task must come back stopped"
        assert target.beat
        target.beat.set_token(0, 1)
        os.kill(target.pid, signal.SIGCONT)


def _huge_pages(runner: Runner, count: int) -> None:
    """Asks the kernel for huge pages; it may not have enough memory in one piece."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    try:
        runner.set_tunable(pool, str(int(pool.read_text()) + count))
    except OSError as reason:
        pytest.skip(f"no pool of huge pages: {reason}")


def _plain(runner: Runner, workload: Workload) -> None:
    target = _start(runner, workload)
    first = portrait(target.pid)
    runner.wait_beats(target)
    changed = differences(first, portrait(target.pid), workload.unlike)
    assert not changed, "changes without any checkpoint:\n" + "\n".join(changed)
    _stop(workload, target)
    _continue(workload, target)
    runner.assert_right(target, "the first check")
    if not workload.once:
        runner.wait_beats(target)
        runner.assert_right(target, "the second check")
    runner.kill(target)


def _broken(runner: Runner, workload: Workload) -> None:
    target = _start(runner, workload, broken=True)
    _stop(workload, target)
    _continue(workload, target)
    verdict = runner.ask(target)
    assert verdict != 1, "the check did not notice the sabotage"
    runner.kill(target)


def _bring_back(runner: Runner, workload: Workload, target: Target, *options: str) -> Target:
    """Dump, restore, and compare with what was before."""
    before = portrait(target.pid)
    if workload.may_refuse:
        code, text, images = runner.try_dump(target, *workload.dump, "--leave-running")
        if code:
            assert re.search(workload.may_refuse, text), text[-3000:]
            runner.assert_right(target, "after the refused dump")
            runner.kill(target)
            pytest.skip(f"refused, as it may be: {workload.may_refuse}")
    images = runner.dump(target, *workload.dump, *options)
    if options:
        _continue(workload, target)
        runner.assert_right(target, "the original, left running")
        runner.kill(target)
    back = runner.restore(images, target, *workload.restore)
    changed = differences(before, portrait(back.pid), workload.unlike)
    assert not changed, "the restored process differs:\n" + "\n".join(changed)
    return back


def _need_firn(workload: Workload | None = None) -> None:
    if not firn_command():
        pytest.skip("no firn command (set FIRN or make the venv)")
    if workload and workload.needs:
        pytest.skip(f"needs {workload.needs}, which firn cannot checkpoint yet")


@pytest.mark.parametrize(("workload", "way"), _cases())
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    if way not in PLAIN_WAYS:
        _need_firn(workload)
    if workload.huge:
        _huge_pages(runner, workload.huge)
    if way == "plain":
        return _plain(runner, workload)
    if way == "break":
        return _broken(runner, workload)
    target = _start(runner, workload)
    _stop(workload, target)
    if way == REFUSED_WAY:
        return _refused(runner, workload, target)
    if way == AGAIN_WAY:
        runner.dump(target, *workload.dump, "--leave-running")
    back = _bring_back(runner, workload, target, *(["--leave-running"] if way == "leave" else []))
    if way == "twice":
        back = _bring_back(runner, workload, back)
    _continue(workload, back)
    runner.assert_right(back, "after the restore")
    runner.wait_beats(back)
    runner.kill(back)


def _refused(runner: Runner, workload: Workload, target: Target, patterns: tuple[str, ...] = ()) -> None:
    """A dump (without the options that would help) is refused, names everything, and harms nothing."""
    before = portrait(target.pid)
    code, text, images = runner.try_dump(target)
    assert code != 0, "the dump was not refused"
    missing = [pattern for pattern in patterns or workload.refused if not re.search(pattern, text)]
    assert not missing, f"not named in the refusal: {missing}\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    assert not (images / "inventory.img").exists(), "a refused dump left a checkpoint"
    changed = differences(before, portrait(target.pid), workload.unlike)
    assert not changed, "the refused dump changed its target:\n" + "\n".join(changed)
    runner.assert_right(target, "after the refused dump")
    runner.kill(target)
