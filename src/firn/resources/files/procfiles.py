"""Files below /proc/PID: whose they are.

Kernel: the names are those of proc(5). A file of a dead process or thread is still there for who has it open, and most
calls on it fail with ESRCH; its name is the old one, mostly with ``(deleted)`` behind it (fs/proc/base.c). It is made
again by opening that name while a process with this pid, and with a thread of this id, stands in for the dead one.
"""

from __future__ import annotations

_OF_DESCRIPTORS = ("fd", "fdinfo", "map_files")


def process_of(name: str) -> int:
    """The process that the path *name* in /proc belongs to, 0 for none."""
    words = name.split("/")
    return int(words[2]) if words[:2] == ["", "proc"] and len(words) > 2 and words[2].isdecimal() else 0


def thread_of(name: str) -> int:
    """The thread that the path *name* of a process in /proc belongs to, 0 for none."""
    words = name.split("/")
    return int(words[4]) if process_of(name) and words[3:4] == ["task"] and words[4:5] != [""] and len(words) > 4 else 0


def is_of_descriptor(name: str) -> bool:
    """Whether *name* in /proc is there only as long as a descriptor or mapping is."""
    words = name.split("/")
    return process_of(name) != 0 and words[-2] in _OF_DESCRIPTORS and len(words) > 4
