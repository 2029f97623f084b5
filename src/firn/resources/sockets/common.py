"""What sockets of all families share on their way out and back."""

from __future__ import annotations

import fcntl
import os

from firn.abi import fcntl as fc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIOCGSKNS = 0x894C
"""Opens a socket's network namespace (linux/sockios.h)."""


def is_elsewhere(fd: int) -> bool:
    """Whether the socket *fd* belongs to another network namespace than we do. Needs CAP_NET_ADMIN."""
    namespace = fcntl.ioctl(fd, _SIOCGSKNS)
    try:
        return not os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/net"))
    finally:
        os.close(namespace)


def set_flags(fd: int, entry: dict[str, Any]) -> None:
    """Give socket *fd* the status flags of its message; O_ASYNC comes with the owner, if it has one."""
    owner, flags = entry["fown"], entry["flags"]
    if owner.get("pid") or owner.get("signum"):
        flags &= ~fc.FASYNC
    fcntl.fcntl(fd, fc.F_SETFL, flags)


def filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Those *fields* that are not empty."""
    return {name: value for name, value in fields.items() if value}


def own_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The field with firn's own additions to a message: those *fields* that are not empty; nothing if all are."""
    own = filled(fields)
    return {"firn": own} if own else {}
