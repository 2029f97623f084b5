"""Every workload in every way: plain, with sabotage, dumped and restored, twice, and left running."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from harness import Runner, Target, differences, firn_command, lasting_differences, portrait, wait_until
from workloads.table import AGAIN_WAY, PLAIN_WAYS, REFUSED_WAY, TABLE, Workload

MACHINE_WIDE = pytest.mark.xdist_group("machine-wide settings")
"""Tests with this mark run one after the other, whatever runs beside them."""


def _cases() -> list[object]:
    return [
        pytest.param(workload, way, id=f"{workload.name}-{way}", marks=MACHINE_WIDE if workload.huge else ())
        for workload in TABLE
        for way in workload.ways
    ]


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
    target = runner.start(workload)
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
    target = runner.start(workload, broken=True)
    _stop(workload, target)
    _continue(workload, target)
    verdict = runner.ask(target)
    assert verdict != 1, "the check did not notice the sabotage"
    runner.kill(target)


def _bring_back(runner: Runner, workload: Workload, target: Target, *options: str) -> Target:
    """Dump, restore, and compare with what was before."""
    before = portrait(target.pid)
    images = runner.dump(target, *workload.dump, *options)
    if options:
        _continue(workload, target)
        runner.assert_right(target, "the original, left running")
        runner.kill(target)
    back = runner.restore(images, target, *workload.restore)
    changed = lasting_differences(before, lambda: portrait(back.pid), workload.unlike)
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
    target = runner.start(workload)
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
    changed = lasting_differences(before, lambda: portrait(target.pid), workload.unlike)
    assert not changed, "the refused dump changed its target:\n" + "\n".join(changed)
    runner.assert_right(target, "after the refused dump")
    runner.kill(target)


# ---- what goes wrong around a checkpoint


def _workload(name: str) -> Workload:
    return next(workload for workload in TABLE if workload.name == name)


def test_a_changed_file_is_noticed(runner: Runner) -> None:
    """A file that has grown since the dump: the restore names it and leaves nothing behind; undone, it works."""
    _need_firn()
    target = runner.start(_workload("files-positions"))
    images = runner.dump(target)
    changed = runner.folder / "data"
    size = changed.stat().st_size
    with changed.open("ab") as file:
        file.write(b"more")
    code, text = runner.try_restore(images)
    assert code != 0, "the restore did not notice that a file has changed"
    assert str(changed) in text and "Traceback" not in text, text[-3000:]
    os.truncate(changed, size)
    back = runner.restore(images, target)
    runner.assert_right(back, "after the second restore")
    runner.kill(back)


def test_a_missing_file_is_named(runner: Runner) -> None:
    _need_firn()
    target = runner.start(_workload("files-positions"))
    images = runner.dump(target)
    gone = runner.folder / "data"
    gone.rename(runner.folder / "elsewhere")
    code, text = runner.try_restore(images)
    assert code != 0
    assert str(gone) in text and "Traceback" not in text, text[-3000:]


def test_a_taken_pid_is_refused(runner: Runner) -> None:
    """The original still runs: the restore must fail, name the pid, and not touch it."""
    _need_firn()
    target = runner.start(_workload("memory_basic-anon"))
    images = runner.dump(target, "--leave-running")
    before = portrait(target.pid)
    code, text = runner.try_restore(images)
    assert code != 0
    assert str(target.pid) in text and "Traceback" not in text, text[-3000:]
    changed = lasting_differences(before, lambda: portrait(target.pid))
    assert not changed, "\n".join(changed)
    runner.assert_right(target, "after the failed restore")
    runner.kill(target)


@pytest.mark.parametrize("missing", ["inventory.img", "core-{pid}.img", "mm-{pid}.img", "pages-1.img", "files.img"])
def test_a_missing_image_is_named(missing: str, runner: Runner) -> None:
    """Nothing is left of a restore that fails."""
    _need_firn()
    target = runner.start(_workload("memory_basic-anon"))
    images = runner.dump(target)
    name = missing.format(pid=target.pid)
    (images / name).unlink()
    code, text = runner.try_restore(images)
    assert code != 0
    assert name.partition(".")[0] in text and "Traceback" not in text, text[-3000:]


def test_left_stopped(runner: Runner) -> None:
    """``--leave-stopped``: the task is stopped after the dump, goes on with SIGCONT, and its images restore."""
    _need_firn()
    target = runner.start(_workload("memory_basic-anon"))
    images = runner.dump(target, "--leave-stopped")
    wait_until("it is stopped", lambda: target.state() == "T")
    os.kill(target.pid, signal.SIGCONT)
    runner.assert_right(target, "continued")
    runner.kill(target)
    back = runner.restore(images, target)
    runner.assert_right(back, "after the restore")
    runner.kill(back)


def test_restored_stopped(runner: Runner) -> None:
    """``restore --leave-stopped``: the restored task waits for SIGCONT."""
    _need_firn()
    target = runner.start(_workload("memory_basic-anon"))
    back = runner.restore(runner.dump(target), target, "--leave-stopped")
    wait_until("it is stopped", lambda: back.state() == "T")
    os.kill(back.pid, signal.SIGCONT)
    runner.assert_right(back, "continued")
    runner.kill(back)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workload", ["memory_basic-anon", "threads-tls", "waits-nanosleep"])
def test_a_killed_dump_harms_nothing(workload: str, name: str, runner: Runner) -> None:
    """firn is ended at many points of a dump; the target goes on as if nothing had been.

    Nobody can clean up after SIGKILL: the scratch mapping and a thread's mask may remain then, but it must run.
    """
    traces = (r"mapping\..*", r".*status\.(Vm(Size|Data)|SigBlk)") if name == "SIGKILL" else ()
    _need_firn()
    target = runner.start(_workload(workload))
    before = portrait(target.pid)
    for milliseconds in range(10, 100, 6):
        images = runner.folder / f"cut-{milliseconds}"
        images.mkdir()
        runner.interrupt(
            milliseconds / 1000,
            signal.Signals[name],
            *("dump", "-t", str(target.pid), "-D", str(images), "--leave-running", "-v4", "-o", "dump.log"),
        )
        runner.wait_beats(target)
        changed = lasting_differences(before, lambda: portrait(target.pid), traces)
        assert not changed, f"killed after {milliseconds} ms:\n" + "\n".join(changed)
    runner.assert_right(target, "in the end")
    runner.kill(target)


@MACHINE_WIDE
def test_huge_pages_come_only_where_they_fill(runner: Runner) -> None:
    """... also on a machine that gives them to everybody."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not firn_command() or not os.access(setting, os.W_OK):
        pytest.skip("needs firn, and a kernel with transparent huge pages")
    before = setting.read_text().partition("[")[2].partition("]")[0]
    workload = _workload("memory_layout-many")
    target = runner.start(workload)
    look = portrait(target.pid)
    images = runner.dump(target)
    setting.write_text("always")
    try:
        back = runner.restore(images, target)
    finally:
        setting.write_text(before)
    changed = lasting_differences(look, lambda: portrait(back.pid), workload.unlike)
    assert not changed, "the restored process differs:\n" + "\n".join(changed)
    runner.assert_right(back, "after the restore")
    runner.kill(back)
