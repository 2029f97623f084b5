"""/dev/kmsg: the place of each opener in the kernel's log (Documentation/ABI/testing/dev-kmsg).

State owned: the sequence number of the record that a description reads next (images: firn's own field of
reg_file_entry). Kernel: nothing shows it, but a record bears its number; so one record is read, and the description is
taken back to it. At the end of the log nothing can be read, and the next number follows from the last record. After a
reboot the log is another one: it is read from its start.
"""

from __future__ import annotations

import errno
import os

from firn.abi import poll
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_RECORD = 8192
"""Enough for any record: a read with less room fails (EINVAL)."""


def _boot() -> str:
    return procfs.read("/proc/sys/kernel/random/boot_id").strip().decode()


def _next(fd: int) -> int | None:
    """Read a record; its number, or None at the end."""
    while poll.state(fd, poll.POLLIN) & poll.POLLIN:
        try:
            # "priority,number,microseconds,flags;text"
            return int(os.read(fd, _RECORD).split(b",", 2)[1])
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise  # else records were overwritten meanwhile: the next read gives the oldest that is left
    return None


def position(fd: int) -> dict[str, Any]:
    """Where description *fd* stands, as fields of firn_reg. If we are killed in between, it may read records again."""
    number = _next(fd)
    if number is not None:
        _go(fd, number)
        return {"kmsg": number, "boot": _boot()}
    own = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        last = -1
        while (number := _next(own)) is not None:
            last = number
    finally:
        os.close(own)
    return {"kmsg": last + 1, "boot": _boot()}


def seek(fd: int, firn: dict[str, Any]) -> None:
    """Take the new description *fd* to where *firn* (from :func:`position`) says."""
    if firn.get("boot") == _boot():
        _go(fd, firn["kmsg"])


def _go(fd: int, wanted: int) -> None:
    os.lseek(fd, 0, os.SEEK_SET)
    while (number := _next(fd)) is not None and number < wanted - 1:
        pass
    if number is not None and number >= wanted:
        os.lseek(fd, 0, os.SEEK_SET)  # what is wanted is the oldest record, or lost
