"""How unix sockets get the names of a checkpoint again (unix(7)): on disk, abstract, or out of sight.

Names that are not on disk any more are bound in a root directory of our own, so that nothing that has the name now is
touched.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import time

from firn.errors import RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import Any

_TRIES, _PAUSE = 20, 0.005
"""How often, and how many seconds apart, an abstract name that is in use is asked for."""



def bind(sock: socket, name: bytes, entry: dict[str, Any], what: str) -> int:
    """Bind *sock*, called *what*, to the *name* of its unix_sk_entry; an O_PATH descriptor of its file, or -1.

    Raises :class:`RestoreError`, with the OSError as its cause.
    """
    at = -1
    try:
        if name[:1] == b"\0":
            _abstract(sock, name)
        elif entry.get("deleted"):
            at = out_of_sight(sock, name)
        else:
            at = _on_disk(sock, name, entry.get("name_dir", "."))
    except OSError as error:
        shown = os.fsdecode(name).replace("\0", "@")
        help = "end the process that has it" if error.errno == errno.EADDRINUSE else ""
        raise RestoreError(f"{what} cannot be bound to {shown}: {os.strerror(error.errno or 0)}", help) from error
    perms = entry.get("file_perms")
    if perms and at >= 0:
        os.chown(f"/proc/self/fd/{at}", perms["uid"], perms["gid"])
        os.chmod(f"/proc/self/fd/{at}", perms["mode"] & 0o7777)
    return at


def _abstract(sock: socket, name: bytes) -> None:
    """Bind to an abstract name. A socket that was on its way through its own queue still has it after its process has
    ended, until the kernel looks for such ones, which it does when some unix socket is closed (net/unix/garbage.c)."""
    for _ in range(_TRIES):
        try:
            return sock.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        _socket.socket(sock.family, sock.type | _socket.SOCK_CLOEXEC).close()
        time.sleep(_PAUSE)
    sock.bind(name)


def _on_disk(sock: socket, name: bytes, directory: str) -> int:
    """Bind to a path, relative ones in *directory*; a socket that has the name is replaced. An O_PATH descriptor."""
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        try:
            if stat.S_ISSOCK(os.lstat(name).st_mode):
                os.unlink(name)
        except FileNotFoundError:
            pass
        sock.bind(name)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    finally:
        os.fchdir(here)
        os.close(here)


def out_of_sight(sock: socket, name: bytes) -> int:
    """Bind to a path in a directory that is the root meanwhile, and gone again afterwards. An O_PATH descriptor."""
    top = f"/tmp/.firn-{os.getpid()}"
    os.mkdir(top, 0o700)
    root, here = (os.open(path, os.O_PATH | os.O_CLOEXEC) for path in ("/", "."))
    folder = os.path.join(b"/", os.path.dirname(name))
    try:
        os.chroot(top)
        os.chdir("/")
        os.makedirs(folder, exist_ok=True)
        sock.bind(name)
        at = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.unlink(name)
        try:
            os.removedirs(folder)
        except OSError:  # the name has no folder: this is the root itself
            pass
        return at
    finally:
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(here)
        os.close(root)
        os.close(here)
        try:
            os.rmdir(top)
        except OSError:
            pass
