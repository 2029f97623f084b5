"""Who has to be born of whom, so that a tree of processes comes back with its sessions and with what it shares.

State owned: parents, sessions, and the tables that processes share with each other (memory, descriptors, directories,
signal handlers). Kernel: /proc/PID/stat and kcmp(2) show them. All of it is inherited at birth, and afterwards only
left (setsid(2), unshare(2), execve(2)), never joined. So a process must be cloned by somebody who is in the right
session and in the right tables at that moment, its *forker*, and still get the right parent:

child     the forker is the parent: clone(2)
sibling   the forker's parent is the parent: CLONE_PARENT, which also takes over the forker's exit signal
orphan    the parent is further up: the forker clones one in between, which clones the process and ends; the orphan goes
          to the nearest subreaper above, which the parent is for that moment (PR_SET_CHILD_SUBREAPER); its exit signal
          becomes SIGCHLD (reparent_leader in kernel/exit.c)

Every process that leads a session clones first those children that stay in the session that it was born in, then
becomes the leader, then clones the others. A session whose leader has ended is led by a helper with its pid, which ends
when all members of its groups are there.

What goes wrong: nothing that really happened on one kernel without unshare(2) is impossible, but a table that a common
ancestor has left by unshare or execve can be out of reach; such a tree is refused. The plan is made at the dump, so
that a checkpoint can be restored, and again at the restore, from the images.
"""

from __future__ import annotations

from firn.abi import sched
from firn.abi import signal as sig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TRIES = 200
"""How often at most a process is tried as the first of those who share a table."""
CHILD, SIBLING, ORPHAN = range(3)
"""How a process gets from its forker to its parent."""

SHARED = (
    ("vm_id", sched.CLONE_VM, "memory"), ("files_id", sched.CLONE_FILES, "descriptor table"),
    ("fs_id", sched.CLONE_FS, "directories"), ("sighand_id", sched.CLONE_SIGHAND, "signal handlers"),
)  # fmt: skip
"""What processes can share: its field in the images (task_kobj_ids_entry), the flag of clone(2), its name."""


class Member:
    """A process of the tree: ``parent`` is 0 for the root; ``dead`` a zombie; ``shares`` the ids of its tables (none of
    a zombie); ``helper`` one that only the restore knows. ``born_in`` is the session that a leader has to be born in,
    None if it does not matter."""

    __slots__ = ("born_in", "dead", "depth", "exit_signal", "helper", "parent", "pid", "shares", "sid")

    def __init__(
        self, pid: int, parent: int, sid: int, dead: bool = False, shares: dict[str, int] | None = None,
        exit_signal: int = sig.SIGCHLD, helper: bool = False,
    ) -> None:  # fmt: skip
        self.pid = pid
        self.parent = parent
        self.sid = sid
        self.dead = dead
        self.shares = {field: shares[field] for field, _, _ in SHARED} if shares else {}
        self.exit_signal = exit_signal
        self.helper = helper
        self.born_in: int | None = None
        self.depth = 0

    @property
    def leads(self) -> bool:
        """Whether this process leads its session."""
        return self.sid == self.pid

    def birth_session(self) -> int | None:
        """The session to be born in; None for any."""
        return self.born_in if self.leads else self.sid


class Birth:
    """*pid* is cloned by *forker*, in the *way* that makes *parent* its parent, with the CLONE_* *flags*; *late*:
    after the forker has become the leader of its session."""

    __slots__ = ("flags", "forker", "late", "member", "way")

    def __init__(self, member: Member, forker: int, way: int, late: bool, flags: int) -> None:
        self.member = member
        self.forker = forker
        self.way = way
        self.late = late
        self.flags = flags


class Plan:
    """The births of a tree. ``trouble`` are (pid, reason) of what cannot come back."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.members = {member.pid: member for member in members}
        self.trouble: list[tuple[int, str]] = []
        self.births: dict[int, Birth] = {}
        self.root = next(iter(self.members.values()))
        self._children: dict[int, list[Member]] = {pid: [] for pid in self.members}
        for member in self.members.values():
            if member is not self.root:
                member.depth = self.members[member.parent].depth + 1
                self._children[member.parent].append(member)
        self._choose_sessions()
        self._lend_tables()
        if not self.trouble:
            _Placement(self)
        self._of: dict[int, list[Birth]] = {pid: [] for pid in self.members}
        for birth in self.births.values():
            self._of[birth.forker].append(birth)

    def helpers(self) -> list[int]:
        """The pids of the helpers that lead sessions."""
        return [member.pid for member in self.members.values() if member.helper]

    def born_of(self, pid: int, late: bool) -> list[Birth]:
        """Whom *pid* clones, before or (*late*) after it becomes the leader of its session."""
        return [birth for birth in self._of[pid] if birth.late == late]

    def order(self) -> Iterator[int]:
        """All pids, everybody after its forker."""
        waiting = [self.root.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            waiting += [birth.member.pid for birth in reversed(self._of[pid])]

    def memory_of(self, pid: int) -> int | None:
        """The living process whose memory *pid* has when it is born; None for the root."""
        birth = self.births.get(pid)
        while birth is not None:
            forker = self.members[birth.forker]
            if not forker.dead and not forker.helper:
                return forker.pid
            birth = self.births.get(forker.pid)
        return None

    def is_below(self, pid: int, above: int) -> bool:
        """Whether *above* is an ancestor of *pid*, or *pid* itself."""
        member, depth = self.members[pid], self.members[above].depth
        while member.depth > depth:
            member = self.members[member.parent]
        return member.pid == above

    # -- sessions ------------------------------------------------------------------------------------------------------

    def _choose_sessions(self) -> None:
        """Decide which session every leader is born in, and where the helpers of sessions without a leader are.

        A child in another session than its parent either comes from below the parent, where the leader is or can be
        put, or the parent was itself born in that session and has left it.
        """
        needs: dict[int, list[int]] = {}
        for parent in reversed(list(self.members.values())):
            wanted = {child.birth_session(): child.pid for child in self._children[parent.pid]}
            for session, child in wanted.items():
                if session is None or session == parent.sid:
                    continue
                if session in self.members:
                    if not self.is_below(session, parent.pid):
                        self._bear_in(parent, session, child)
                elif session == self.root.sid:
                    self._bear_in(parent, session, child)
                else:
                    needs.setdefault(session, []).append(parent.pid)
        for session, parents in needs.items():
            self._lead(session, parents)

    def _bear_in(self, member: Member, session: int, child: int) -> None:
        """*member* must be born in *session*, for the sake of *child*."""
        if member is self.root or not member.leads or member.born_in not in (None, session):
            self._session_trouble(child, session)
        else:
            member.born_in = session

    def _session_trouble(self, pid: int, session: int) -> None:
        self.trouble.append((pid, f"belongs to session {session}, which it cannot be born into"))

    def _lead(self, session: int, parents: list[int]) -> None:
        """Put a helper that leads *session* where all *parents* that have children in it are above it, or can be born
        in it themselves."""
        for bottom in sorted(parents if session else [], key=lambda pid: -self.members[pid].depth):
            lifted = self._lift(session, parents, bottom)
            if lifted is not None:
                for pid in lifted:
                    self.members[pid].born_in = session
                helper = Member(session, bottom, session, helper=True)
                helper.depth = self.members[bottom].depth + 1
                self.members[session] = helper
                self._children[session] = []
                return
        child = next(child for child in self._children[parents[0]] if child.birth_session() == session)
        self._session_trouble(child.pid, session)

    def _lift(self, session: int, parents: list[int], bottom: int) -> set[int] | None:
        """Who has to be born in *session* if its helper is a child of *bottom*; None if that is not possible."""
        above = self.members[bottom]
        while above.birth_session() != session and above is not self.root:
            above = self.members[above.parent]
        if above.birth_session() == session:
            return None  # it would have to be there before itself
        lifted: set[int] = set()
        waiting = [pid for pid in parents if not self.is_below(bottom, pid)]
        while waiting:
            member = self.members[waiting.pop()]
            if member.pid in lifted:
                continue
            if member is self.root or not member.leads or member.born_in not in (None, session):
                return None
            lifted.add(member.pid)
            above = self.members[member.parent]
            if session not in (above.sid, above.born_in) and not self.is_below(bottom, above.pid):
                waiting.append(above.pid)
        return lifted


    def _lend_tables(self) -> None:
        """A leader that is dead or a helper must have what those born of it share with their parents."""
        for member in self.members.values():
            above = self.members.get(member.parent)
            leader = self.members.get(member.birth_session() or 0)
            if above is None or leader is None or not (leader.dead or leader.helper) or leader is member:
                continue
            if leader.pid not in (above.sid, above.birth_session()):
                common = {field: table for field, table in member.shares.items() if above.shares.get(field) == table}
                leader.shares = common | leader.shares


class _Placement:
    """Finds a forker for everybody."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.placed: set[int] = set()
        self.offers: dict[int | None, list[tuple[Member, bool]]] = {}
        self.tables: dict[tuple[str, int], list[Member]] = {}
        self.tops = self._tops()
        self.tries = _TRIES
        self.order: list[int] = []
        self.reasons: list[tuple[int, str]] = []
        self._settle(plan.root)
        everybody = [member for member in plan.members.values() if member is not plan.root]
        if self._place_straight(everybody):
            return
        self._undo(0)
        if not self._place_all(everybody):
            plan.trouble += self.reasons

    def _place_straight(self, waiting: list[Member]) -> bool:
        """Place everybody in *waiting* without ever taking anything back; whether that worked."""
        while waiting:
            left = self._place_some(waiting)
            if len(left) == len(waiting):
                left = [member for member in self._founders(waiting) if not self._place(member, True)]
                if len(left) == len(waiting):
                    return False
            waiting = left
        return True

    def _place_all(self, waiting: list[Member]) -> bool:
        """Place everybody in *waiting*; whether that worked. If not, everything is as it was."""
        count = len(self.order)
        while waiting and len(left := self._place_some(waiting)) < len(waiting):
            waiting = left
        if not waiting:
            return True
        for member in self._founders(waiting):
            if self.tries and self._place(member, True):
                self.tries -= 1
                if self._place_all([other for other in waiting if other is not member]):
                    return True
                self._undo(len(self.order) - 1)
        self.reasons = self.reasons or self._why(waiting)
        self._undo(count)
        return False

    def _place_some(self, waiting: list[Member]) -> list[Member]:
        """Place those of *waiting* for whom it is certain; those who are left."""
        return [member for member in waiting if not self._place(member, False)]

    def _founders(self, waiting: list[Member]) -> list[Member]:
        """*waiting* in the order in which they should found tables: a process can be passed up in the tree, but not
        down, so the deepest first."""
        return sorted(waiting, key=lambda member: (-member.depth, -self._bonds(member)))

    def _bonds(self, member: Member) -> int:
        """In how many tables of *member* there is somebody already."""
        return sum(table in self.tables for table in member.shares.items())

    def _tops(self) -> dict[tuple[str, int], list[int]]:
        """Table -> those of its members whose parents do not share it. One of them is born first, the founder, who does
        not share it with its forker."""
        tops: dict[tuple[str, int], list[int]] = {}
        for member in self.plan.members.values():
            above = self.plan.members.get(member.parent)
            for table in member.shares.items():
                if above is None or above.shares.get(table[0]) != table[1]:
                    tops.setdefault(table, []).append(member.pid)
        return tops

    def _settle(self, member: Member) -> None:
        """*member* has its forker: from now on it can be one."""
        self.placed.add(member.pid)
        if member.dead and not member.leads:
            return
        self.offers.setdefault(member.sid, []).append((member, True))
        if member.leads and member.born_in is not None:
            self.offers.setdefault(member.born_in, []).append((member, False))
        for table in member.shares.items():
            self.tables.setdefault(table, []).append(member)

    def _undo(self, count: int) -> None:
        """Take back all placements but the first *count*."""
        for pid in self.order[count:]:
            member = self.plan.members[pid]
            del self.plan.births[pid]
            self.placed.discard(pid)
            for table in member.shares.items():
                self.tables[table].remove(member)
                if not self.tables[table]:
                    del self.tables[table]
            for session in {member.sid, member.born_in}:
                offers = self.offers.get(session, [])
                offers[:] = [offer for offer in offers if offer[0] is not member]
        del self.order[count:]

    def _place(self, member: Member, founds: bool) -> bool:
        """Find a forker for *member* among those who have one; whether there is. Unless it *founds* its tables, it
        waits until there is somebody to share them with."""
        if member.parent not in self.placed:
            return False
        needs = {}
        for table in member.shares.items():
            if table in self.tables:
                needs[table[0]] = table[1]
            elif member.pid not in self.tops[table] or not (founds or len(self.tops[table]) == 1):
                return False
        found = next(self._forkers(member, needs), None)
        if found is None:
            return False
        forker, way, late = found
        flags = sum(flag for field, flag, _ in SHARED if field in needs)
        self.plan.births[member.pid] = Birth(member, forker.pid, way, late, flags)
        self.order.append(member.pid)
        self._settle(member)
        return True

    def _forkers(self, member: Member, needs: dict[str, int]) -> Iterator[tuple[Member, int, bool]]:
        """(forker, way, late) that are possible, the best first."""
        orphans = []
        for forker, late in self._candidates(member, needs):
            if any(forker.shares.get(field) != number for field, number in needs.items()):
                continue
            if forker.pid == member.parent:
                yield forker, CHILD, late
            elif forker.parent == member.parent and forker.exit_signal == member.exit_signal:
                yield forker, SIBLING, late
            elif member.exit_signal == sig.SIGCHLD and self.plan.is_below(forker.pid, member.parent):
                orphans.append((forker, ORPHAN, late))
        yield from orphans

    def _candidates(self, member: Member, needs: dict[str, int]) -> Iterator[tuple[Member, bool]]:
        """Who is in the session that *member* has to be born in: the parent first, then in the order of birth."""
        session = member.birth_session()
        parent = self.plan.members[member.parent]
        if session in (None, parent.sid):
            yield parent, True
        elif parent.leads and parent.born_in == session:
            yield parent, False
        if session is not None:
            yield from self.offers.get(session, [])
            return
        for table in needs.items():
            for other in self.tables[table]:
                yield other, True

    def _why(self, left: list[Member]) -> list[tuple[int, str]]:
        """The reasons why those that are *left* could not be placed, of those whose parents could."""
        found = []
        for member in left:
            if member.parent not in self.placed:
                continue
            reason = f"belongs to session {member.sid}, which it cannot be born into"
            for field, _, name in SHARED:
                others = self.tables.get((field, member.shares.get(field, 0)), [])
                if others and self.plan.members[member.parent] not in others:
                    reason = f"shares its {name} with process {others[0].pid}, but not with a process between them"
            found.append((member.pid, reason))
        return found
