"""``firn inspect DIR [--json]``: a checkpoint as text for people, or as JSON for programs (:mod:`firn.inspect`)."""

from __future__ import annotations

import sys

from firn.cli import commands
from firn.cli.values import ShortUsage
from firn.inspect import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Entry = dict[str, Any]

_SIGPIPE = 13
_MOST = 6
"""Holders of a description that are named."""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def run(request: commands.Request) -> int:
    """Print the checkpoint in the directory that the words name (or ``--images-dir``); the exit status.

    Raises ImageError for a damaged checkpoint; then nothing is printed.
    """
    more = request.words[1:]
    if len(more) > 1:
        raise ShortUsage("inspect takes one directory")
    encoding = sys.getfilesystemencoding()
    document = describe(more[0] if more else request.values.get("images_dir", "."))
    if request.values.get("json"):
        import json

        text = json.dumps(document, indent=2) + "\n"
    else:
        text = "".join(f"{line}\n" for line in render(document))
    try:
        # What the user's locale has no characters for is shown as escapes.
        commands.out(text.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:
        return 128 + _SIGPIPE  # head(1) has seen enough
    return 0


def render(document: Entry) -> list[str]:
    """The lines for people of what :func:`firn.inspect.describe` gives."""
    lines = [f"checkpoint {clean(document['directory'])}", _summary(document), ""]
    lines += _tree(document)
    if document["shared_memory"]:
        lines += ["", "shared memory", *_shared(document["shared_memory"])]
    return lines


def clean(text: str) -> str:
    """*text* without anything that a terminal would not just show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def size(count: int) -> str:
    """A number of bytes in words."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} byte{'' if count == 1 else 's'}"


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, with runs as ``first-last``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _plural(count: int, word: str) -> str:
    if count == 1:
        return f"1 {word}"
    return f"{count} {word}es" if word.endswith("s") else f"{count} {word}s"


def _summary(document: Entry) -> str:
    counts = document["counts"]
    zombies = f" ({_plural(counts['zombies'], 'zombie')})" if counts["zombies"] else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts["kinds"].items())
    parts = [
        _plural(counts["processes"], "process") + zombies,
        _plural(counts["threads"], "thread"),
        _plural(counts["descriptors"], "descriptor") + (f" ({kinds})" if kinds else ""),
        f"{size(document['stored_bytes'])} of pages",
    ]
    if document["parent"]:
        parts.append(f"{size(document['parent_bytes'])} of pages in the parent")
    return "; ".join(parts)


# -- the tree ----------------------------------------------------------------------------------------------------------


def _tree(document: Entry) -> list[str]:
    """Every process with what belongs to it, below its parent."""
    children: dict[int, list[Entry]] = {}
    for process in document["processes"]:
        children.setdefault(process["ppid"], []).append(process)
    details = _Details(document)
    lines: list[str] = []
    root = document["processes"][0]
    stack = [(root, "", "")]
    while stack:
        process, lead, below = stack.pop()
        lines.append(lead + _title(process))
        offspring = children.get(process["pid"], [])
        bar = "│   " if offspring else "    "
        lines += [below + bar + line for line in details.of(process)]
        for number, child in enumerate(reversed(offspring)):
            last = number == 0
            stack.append((child, below + ("└── " if last else "├── "), below + ("    " if last else "│   ")))
    return lines


def _title(process: Entry) -> str:
    parts = [process["state"]]
    if process["state"] == "zombie":
        signal = process.get("exit_signal")
        parts = [f"zombie, ended by signal {signal}" if signal else f"zombie, exit code {process['exit_code']}"]
    parts += [f"group {process['pgid']}", f"session {process['sid']}"]
    if process["state"] != "zombie":
        parts += [_plural(len(process["threads"]), "thread"), f"uid {process['uid']}", f"gid {process['gid']}"]
        if process["seccomp"] != "disabled":
            parts.append(f"seccomp {process['seccomp']}")
        if process["pending_signals"]:
            parts.append(_plural(process["pending_signals"], "pending signal"))
    return f"{process['pid']} {clean(process['comm'])}: {', '.join(parts)}"


class _Details:
    """The lines below a process."""

    def __init__(self, document: Entry) -> None:
        self.files = {(file["kind"], file["file"]): file for file in document["files"]}
        self.locks: dict[int, list[Entry]] = {}
        for lock in document["locks"]:
            self.locks.setdefault(lock["pid"], []).append(lock)
        self._tables: dict[int, int] = {}

    def of(self, process: Entry) -> list[str]:
        """One ``name  value`` line or more for everything that there is."""
        if process["state"] == "zombie":
            return []
        blocks = {
            "exe": [clean(process["exe"])],
            "cwd": [clean(process["cwd"])],
            "root": [clean(process["root"])],
            "threads": [_thread(thread) for thread in process["threads"][1:]],
            "memory": _memory(process["memory"]),
            "timers": [_timer(timer) for timer in process["timers"]],
            "locks": [_lock(lock) for lock in self.locks.get(process["pid"], [])],
            "fds": self._descriptors(process),
        }
        lines = []
        for name, block in blocks.items():
            lines += [f"{name if number == 0 else '':<9}{line}" for number, line in enumerate(block)]
        return lines

    def _descriptors(self, process: Entry) -> list[str]:
        pid, table = process["pid"], process["descriptor_table"]
        if self._tables.setdefault(table, pid) != pid:
            return [f"those of process {self._tables[table]}: one table"]
        rows: dict[tuple[str, int], list[int]] = {}
        for descriptor in process["descriptors"]:
            rows.setdefault((descriptor["kind"], descriptor["file"]), []).append(descriptor["fd"])
        cells = [(ranges(fds), key[0], self._text(key, pid)) for key, fds in rows.items()]
        widths = [max((len(row[column]) for row in cells), default=0) for column in (0, 1)]
        return [f"{fds:<{widths[0]}}  {kind:<{widths[1]}}  {text}".rstrip() for fds, kind, text in cells]

    def _text(self, key: tuple[str, int], pid: int) -> str:
        """What a description is, and who else has it."""
        file = self.files[key]
        parts = [clean(file["name"])]
        parts += [file["access"]] if "access" in file else []
        parts += [file["state"]] if "state" in file else []
        parts += file["flags"]
        parts += [f"at {file['position']}"] if file.get("position") else []
        parts += ["unlinked"] if file.get("unlinked") else []
        parts += [f"{size(file['queued_bytes'])} queued"] if file.get("queued_bytes") else []
        others = [holder for holder in file["holders"][: _MOST + 1] if holder["pid"] != pid][:_MOST]
        more = len(file["holders"]) - 1 - len(others)
        if others:
            names = " ".join(f"{holder['pid']}:{ranges(holder['fds'])}" for holder in others)
            parts.append(f"shared with {names}" + (f" and {more} more" if more else ""))
        return ", ".join(part for part in parts if part)


def _thread(thread: Entry) -> str:
    elsewhere = f", in {clean(thread['cwd'])}, root {clean(thread['root'])}" if "cwd" in thread else ""
    return f"{thread['tid']} {clean(thread['comm'])}{elsewhere}"


def _memory(memory: Entry) -> list[str]:
    stored = f"{size(memory['stored_bytes'])} stored"
    if memory["parent_bytes"]:
        stored += f", {size(memory['parent_bytes'])} in the parent"
    lines = [f"{_plural(memory['mappings'], 'mapping')} of {size(memory['mapped_bytes'])}; {stored}"]
    kinds = [f"{kind['mappings']} {name} ({size(kind['bytes'])})" for name, kind in memory["kinds"].items()]
    return [*lines, ", ".join(kinds)] if kinds else lines


def _timer(timer: Entry) -> str:
    if not timer["next_ns"]:
        return f"{timer['clock']}: not running; signal {timer['signal']}"
    every = f", then every {timer['interval_ns'] / 1e9:.3f} s" if timer["interval_ns"] else ""
    return f"{timer['clock']}: in {timer['next_ns'] / 1e9:.3f} s{every}; signal {timer['signal']}"


def _lock(lock: Entry) -> str:
    where = ""
    if lock["kind"] in ("posix", "ofd"):
        where = f" from {lock['start']}" + (f" to {lock['start'] + lock['length'] - 1}" if lock["length"] else "")
    breaking = ", breaking" if lock["breaking"] else ""
    return f"{lock['fd']}  {lock['type']} {lock['kind']}{where}{breaking}  {clean(lock['name'])}"


def _shared(objects: list[Entry]) -> list[str]:
    lines = []
    for each in objects:
        users = f"mapped by {' '.join(map(str, each['mapped_by']))}" if each["mapped_by"] else "not mapped"
        lines.append(f"    {clean(each['name'])}: {size(each['bytes'])}, {size(each['stored_bytes'])} stored, {users}")
    return lines
