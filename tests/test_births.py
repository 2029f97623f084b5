"""The plan of births, tried on histories made up at random: what really happened on one kernel can be made again.

A history of forks, sessions, shared tables and deaths is played in a small model of the kernel; from what is left of it
a plan is made, and played in the same model; both must show the same tree.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from firn.resources import births
from firn.resources.births import CHILD, ORPHAN, SIBLING, Member, Plan

FIELDS = [field for field, _, _ in births.SHARED]
ROOT = 100


class Task:
    """A process of the model; ``tables`` are objects that can be shared."""

    def __init__(self, pid: int, parent: Task | None, sid: int, tables: dict[str, object]) -> None:
        self.pid = pid
        self.parent = parent
        self.sid = sid
        self.tables = tables
        self.state = "alive"
        self.reaper = False


class Kernel:
    """Births, sessions and deaths as fork(2), clone(2), setsid(2), exit(2) and the reaping of orphans have them."""

    def __init__(self, sid: int) -> None:
        self.root = Task(ROOT, None, sid, self.tables({}, 0))
        self.root.reaper = True
        self.tasks = {ROOT: self.root}

    @staticmethod
    def tables(old: dict[str, object], flags: int) -> dict[str, object]:
        return {field: old[field] if flags & flag else object() for field, flag, _ in births.SHARED}

    def clone(self, forker: Task, pid: int, flags: int, sibling: bool = False) -> Task:
        assert pid not in self.tasks
        parent = forker.parent if sibling else forker
        assert parent is not None
        task = Task(pid, parent, forker.sid, self.tables(forker.tables, flags))
        self.tasks[pid] = task
        return task

    def exit(self, task: Task, reap: bool) -> None:
        task.state = "dead"
        task.tables = {}
        heir = task.parent
        while heir is not None and not (heir.reaper and heir.state == "alive"):
            heir = heir.parent
        assert heir is not None
        for other in self.tasks.values():
            if other.parent is task:
                other.parent = heir
        if reap:
            del self.tasks[task.pid]

    def show(self) -> dict[int, tuple[Any, ...]]:
        """Parent, session, state, and the first who has each table."""
        first: dict[object, int] = {}
        shown = {}
        for pid in sorted(self.tasks):
            task = self.tasks[pid]
            shared = [first.setdefault(task.tables[field], pid) for field in FIELDS if task.tables]
            shown[pid] = (task.parent.pid if task.parent else 0, task.sid, task.state, *shared)
        return shown

    def members(self) -> list[Member]:
        """What a dump sees, parents first."""
        numbers: dict[object, int] = {}
        found, waiting = [], [self.root]
        while waiting:
            task = waiting.pop()
            ids = {field: numbers.setdefault(table, len(numbers)) for field, table in task.tables.items()}
            parent = task.parent.pid if task.parent else 0
            found.append(Member(task.pid, parent, task.sid, task.state == "dead", ids or None))
            waiting += [other for other in self.tasks.values() if other.parent is task]
        return found


FLAGS = st.lists(st.sampled_from([flag for _, flag, _ in births.SHARED]), max_size=2).map(sum)
STEP = st.tuples(st.sampled_from(["fork"] * 5 + ["sibling", "setsid", "setsid", "exit", "exit", "reap", "reaper"]),
                 st.integers(0, 30), FLAGS)  # fmt: skip


def _happen(steps: list[tuple[str, int, int]], shares: bool) -> Kernel:
    kernel = Kernel(ROOT)
    number = ROOT
    for what, who, flags in steps:
        alive = [task for task in kernel.tasks.values() if task.state == "alive"]
        task = alive[who % len(alive)]
        flags = flags if shares else 0
        if what in ("fork", "sibling"):
            number += 1
            kernel.clone(task, number, flags, what == "sibling" and task is not kernel.root)
        elif what == "setsid" and not any(t.sid == task.pid for t in kernel.tasks.values()):
            task.sid = task.pid
        elif what == "reaper":
            task.reaper = True
        elif what in ("exit", "reap") and task is not kernel.root:
            kernel.exit(task, what == "reap")
    return kernel


def _play(plan: Plan) -> Kernel:
    """Carry the plan out."""
    kernel = Kernel(0 if not plan.root.leads else -1)
    kernel.root.sid = plan.root.sid if not plan.root.leads else -1
    for pid in plan.order():
        task = kernel.tasks[pid]
        for late in (False, True):
            if late and plan.members[pid].leads:
                assert not any(t.sid == pid for t in kernel.tasks.values())
                task.sid = pid
            for birth in plan.born_of(pid, late):
                member = birth.member
                if birth.way == ORPHAN:
                    for other in kernel.tasks.values():
                        other.reaper = other.pid == member.parent
                    between = kernel.clone(task, -member.pid, birth.flags)
                    kernel.clone(between, member.pid, birth.flags)
                    kernel.exit(between, reap=True)
                else:
                    kernel.clone(task, member.pid, birth.flags, birth.way == SIBLING)
                    assert birth.way in (CHILD, SIBLING)
    kernel.root.reaper = True
    for pid, member in plan.members.items():
        if member.helper:
            kernel.exit(kernel.tasks[pid], reap=True)
    for pid, member in plan.members.items():
        if member.dead:
            kernel.exit(kernel.tasks[pid], reap=False)
    return kernel


@pytest.mark.parametrize("number", range(2))
def test_what_happened_can_happen_again(number: int) -> None:
    """Sessions, parents and deaths of any history come back."""

    @seed(number)
    @settings(
        max_examples=200, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(STEP, max_size=25))
    def again(steps: list[tuple[str, int, int]]) -> None:
        kernel = _happen(steps, shares=bool(number))
        plan = Plan(kernel.members())
        assert not plan.trouble
        assert _play(plan).show() == kernel.show()

    again()


def _ids(number: int, **shared: int) -> dict[str, int]:
    return dict.fromkeys(FIELDS, number) | shared


def test_what_nobody_can_be_born_into() -> None:
    """A table that every common ancestor has left, and sessions that no history leads to, are told by name."""
    cousins = [
        Member(1, 0, 1, shares=_ids(1)), Member(2, 1, 1, shares=_ids(2)), Member(3, 1, 1, shares=_ids(3)),
        Member(4, 2, 1, shares=_ids(4, files_id=9)), Member(5, 3, 1, shares=_ids(5, files_id=9)),
    ]  # fmt: skip
    trouble = Plan(cousins).trouble
    assert [reason for _, reason in trouble if "shares its descriptor table" in reason], trouble
    for session in (0, 2):  # nobody's, and that of one who leads none
        strangers = [Member(1, 0, 1, shares=_ids(1)), Member(2, 1, 1, shares=_ids(2)), Member(3, 1, session)]
        assert [pid for pid, _ in Plan(strangers).trouble] == [3]


def test_many_tables_of_siblings() -> None:
    """Pairs of siblings that share, by the hundred."""
    members = [Member(1, 0, 1, shares=_ids(1))]
    members += [Member(pid, 1, 1, shares=_ids(pid, fs_id=pid // 2)) for pid in range(1000, 2000)]
    plan = Plan(members)
    assert not plan.trouble
    assert sum(birth.way == SIBLING for birth in plan.births.values()) == 500
