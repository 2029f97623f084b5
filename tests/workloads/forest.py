"""Is a restored tree of processes the one that was dumped? :mod:`workloads.likeness` for every process of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from workloads.likeness import Portrait, portrait

# Fields of /proc/PID/stat by number (proc(5)) that a process still has when it is a zombie.
ZOMBIE_FIELDS = {4: "ppid", 5: "pgrp", 6: "session", 20: "num_threads", 38: "exit_signal", 52: "exit_code"}
DEAD = "ZX"
SYS_KCMP = 312
SHARED = {"memory": 1, "files": 2, "fs": 3, "sighand": 4}  # KCMP_* of kcmp(2)
_libc = ctypes.CDLL(None)
KILOBYTES = ("Anonymous", "Locked")


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


def _join(mappings: Portrait) -> Portrait:
    """Touching pieces of anonymous memory that differ in nothing as one mapping.

    Whether the kernel joins them depends on whether pages of theirs were there at a fork that is long forgotten. That
    what was one mapping has not become two is what the workload trees_sharing-resized checks, by mremap(2).
    """
    joined: Portrait = {}
    last, last_end = "", ""
    for name in sorted((name for name in mappings if name.count(".") == 1), key=_start):
        start, _, end = name.partition(".")[2].partition("-")
        parts = {kind: mappings.get(f"{name}.{kind}", "") for kind in ("VmFlags", "Anonymous", "Locked")}
        alike = last and (mappings[name], parts["VmFlags"]) == (joined[last], joined[f"{last}.VmFlags"])
        if alike and start == last_end and mappings[name].split()[3:] == ["0"]:
            sums = {kind: _kilobytes(parts[kind]) + _kilobytes(joined.pop(f"{last}.{kind}")) for kind in KILOBYTES}
            parts |= {kind: f"{total} kB" for kind, total in sums.items()}
            del joined[f"{last}.VmFlags"]
            text, name = joined.pop(last), f"{last.partition('-')[0]}-{end}"
        else:
            text = mappings[name]
        joined[name] = text
        joined |= {f"{name}.{kind}": value for kind, value in parts.items()}
        last, last_end = name, end
    return joined


def _start(name: str) -> int:
    return int(name.partition(".")[2].partition("-")[0], 16)


def _kilobytes(text: str) -> int:
    return int(text.split()[0])


def _one(pid: int) -> Portrait:
    comm, fields = _stat(pid)
    if fields[0] not in DEAD:
        look = portrait(pid)
        mappings = {name: look.pop(name) for name in list(look) if name.startswith("mapping.")}
        return {**look, **_join(mappings), "stopped": str(fields[0] == "T")}
    dead = {name: fields[number - 3] for number, name in ZOMBIE_FIELDS.items()}
    return {"zombie": "yes", "comm": comm, **dead}


def forest(root: int) -> Portrait:
    """The portraits of *root* and everybody below it as one; a field is called process.PID.FIELD."""
    result: Portrait = {}
    living: list[int] = []
    for pid in (root, *descendants(root)):
        result |= {f"process.{pid}.{name}": text for name, text in _one(pid).items()}
        if state(pid) not in DEAD:
            living.append(pid)
            result |= {f"process.{pid}.shared.{name}": str(_first(pid, living, code)) for name, code in SHARED.items()}
    return result


def _first(pid: int, others: list[int], what: int) -> int:
    """The first of *others* that shares the object of kind *what* with *pid*."""
    return next(other for other in others if _libc.syscall(SYS_KCMP, other, pid, what, 0, 0) == 0)


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
