"""Is a restored tree of processes the one that was dumped? :mod:`workloads.likeness` for every process of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from workloads.likeness import Portrait, portrait

# Fields of /proc/PID/stat by number (proc(5)) that a process still has when it is a zombie.
ZOMBIE_FIELDS = {4: "ppid", 5: "pgrp", 6: "session", 20: "num_threads", 38: "exit_signal", 52: "exit_code"}
DEAD = "ZX"


def children(pid: int) -> list[int]:
    """The children of *pid*, zombies among them, whichever thread started them; ascending."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (thread / "children").read_text().split()]
    return sorted(found)


def descendants(pid: int) -> Iterator[int]:
    """Everybody below *pid*, parents first."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def _stat(pid: int) -> tuple[str, list[str]]:
    head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    return head.partition("(")[2], rest.split()


def state(pid: int) -> str:
    """The state letter of /proc/PID/stat."""
    return _stat(pid)[1][0]


def _one(pid: int) -> Portrait:
    comm, fields = _stat(pid)
    if fields[0] not in DEAD:
        result = {**portrait(pid), "stopped": str(fields[0] == "T")}
        # A dump that leaves the process running may have written behind the end of the vdso's code.
        for vdso in [name for name, text in result.items() if text.endswith("[vdso]")]:
            result.pop(f"{vdso}.Anonymous")
        return result
    dead = {name: fields[number - 3] for number, name in ZOMBIE_FIELDS.items()}
    return {"zombie": "yes", "comm": comm, **dead}


def forest(root: int) -> Portrait:
    """The portraits of *root* and everybody below it as one; a field is called process.PID.FIELD."""
    result: Portrait = {}
    for pid in (root, *descendants(root)):
        result |= {f"process.{pid}.{name}": text for name, text in _one(pid).items()}
    return result


def proportional_size(root: int) -> int:
    """The sum of the proportional set sizes (smaps_rollup, proc(5)) of the whole tree in KiB."""
    total = 0
    for pid in (root, *descendants(root)):
        if state(pid) not in DEAD:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def descriptors(pid: int) -> dict[str, str]:
    """What the open descriptors of *pid* lead to."""
    folder = f"/proc/{pid}/fd"
    return {name: os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
