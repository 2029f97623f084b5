"""Faults on purpose, for the tests of what happens when something goes wrong at a certain point.

The environment variable FIRN_FAULT names one: ``fail:POINT`` makes the point raise an OSError, ``kill:POINT`` makes
firn kill itself there with SIGKILL, ``kill-all:POINT`` its children first (its guard, :mod:`firn.tracee.guard`).
Points are called ``dump.PHASE`` and ``restore.STAGE``, and with ``.done`` behind it at the phase's end; the phases are
those of the orchestrators.
"""

from __future__ import annotations

import errno
import os

from firn.abi import signal as sig

_kind, _, _wanted = os.environ.get("FIRN_FAULT", "").partition(":")


def point(name: str) -> None:
    """A place where a fault can be asked for."""
    if name != _wanted:
        return
    if _kind == "kill-all":
        with open("/proc/thread-self/children") as file:
            for pid in file.read().split():
                os.kill(int(pid), sig.SIGKILL)
    if _kind in ("kill", "kill-all"):
        os.kill(os.getpid(), sig.SIGKILL)
    if _kind == "fail":
        raise OSError(errno.EIO, f"fault at {name}, asked for by FIRN_FAULT")
