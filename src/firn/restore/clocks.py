"""Clocks that go on: a time namespace for the restored tasks.

CLOCK_MONOTONIC and CLOCK_BOOTTIME of a restored tree continue from what they were at the dump, as with CRIU: absolute
timeouts keep their meaning, also after a reboot or on another machine. Kernel: unshare(CLONE_NEWTIME) prepares a
namespace for our next children; its offsets are written before the first of them is born (time_namespaces(7)).
"""

from __future__ import annotations

import os
import time

from firn.abi import nr, sched
from firn.abi.libc import syscall
from firn.errors import ImageError
from firn.resources.namespaces import clock_offsets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.log import Log


class TimeNamespace:
    """A time namespace for the children born inside the ``with`` block."""

    def __init__(self, image: dict[str, Any] | None, log: Log) -> None:
        self.image = image
        self.log = log
        self._own = -1

    def __enter__(self) -> None:
        if self.image is None:
            return
        try:
            own = os.open("/proc/self/ns/time", os.O_RDONLY | os.O_CLOEXEC)
            syscall("unshare time namespace", nr.unshare, sched.CLONE_NEWTIME)
        except OSError as error:
            self.log.warn(f"no time namespace, clocks will jump: {error.strerror}")
            return
        self._own = own
        current = clock_offsets("self")
        lines = []
        for name, clock, offset in zip(
            ("monotonic", "boottime"), (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME), current, strict=True
        ):
            then = self.image[name]["tv_sec"] * 10**9 + self.image[name]["tv_nsec"]
            wanted = then - (time.clock_gettime_ns(clock) - offset)
            lines.append(f"{name} {wanted // 10**9} {wanted % 10**9}\n")
        fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, "".join(lines).encode())
        except OSError as error:
            self.__exit__()
            raise ImageError(
                f"timens image: clocks {' '.join(lines).split()} cannot be set: {error.strerror}"
            ) from None
        finally:
            os.close(fd)

    def __exit__(self, *_: object) -> None:
        if self._own >= 0:
            try:
                syscall("return to our time namespace", nr.setns, self._own, sched.CLONE_NEWTIME)
            except OSError:
                # Only a process with one thread can go back; nothing of ours depends on it.
                self.log.debug("later children stay in the new time namespace")
            os.close(self._own)
            self._own = -1
