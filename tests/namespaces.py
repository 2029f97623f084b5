"""Two network namespaces joined by a veth pair: a tree under test in one, its peers in the other."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_OWN = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _new() -> int:
    """A descriptor of a new network namespace, which has no name, so no mount: other tests look at mounts."""
    back = os.open(_OWN, os.O_RDONLY)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespaces here: {os.strerror(ctypes.get_errno())}")
        made = os.open(_OWN, os.O_RDONLY)
        assert _libc.setns(back, _CLONE_NEWNET) == 0
        return made
    finally:
        os.close(back)


class Pair:
    """Namespace *here* has 10.91.0.1 and fd91::1, *there* has 10.91.0.2 and fd91::2. ``close`` lets go of both."""

    HERE, THERE = ("10.91.0.1", "fd91::1"), ("10.91.0.2", "fd91::2")

    def __init__(self) -> None:
        if not all(map(shutil.which, ("ip", "tc", "nsenter"))):
            pytest.skip("ip, tc (iproute2) and nsenter are not installed")
        self.here, self.there = _new(), _new()
        there = self._path(self.there)
        self._in(self.here, "ip", "link", "add", "veth", "type", "veth", "peer", "veth", "netns", there)
        for side, addresses in ((self.here, self.HERE), (self.there, self.THERE)):
            self._in(side, "ip", "address", "add", f"{addresses[0]}/24", "dev", "veth")
            self._in(side, "ip", "address", "add", f"{addresses[1]}/64", "dev", "veth", "nodad")
            for device in ("lo", "veth"):
                self._in(side, "ip", "link", "set", device, "up")

    def _path(self, side: int) -> str:
        return f"/proc/{os.getpid()}/fd/{side}"

    def _in(self, side: int, *words: str) -> None:
        _run("nsenter", f"--net={self._path(side)}", *words)

    def command(self, *words: str | Path) -> list[str]:
        """What runs *words* in namespace *here*; only the network is another."""
        return ["nsenter", f"--net={self._path(self.here)}", *map(str, words)]

    @contextmanager
    def _inside(self, side: int) -> Iterator[None]:
        back = os.open(_OWN, os.O_RDONLY)
        try:
            assert _libc.setns(side, _CLONE_NEWNET) == 0
            yield
        finally:
            assert _libc.setns(back, _CLONE_NEWNET) == 0
            os.close(back)

    def listener(self, address: str) -> socket.socket:
        """A listening socket in namespace *there*."""
        with self._inside(self.there):
            made = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.settimeout(20)
        return made

    def connect(self, address: tuple[str, int]) -> socket.socket:
        """A connection from *there* to *address*."""
        with self._inside(self.there):
            return socket.create_connection(address, timeout=20)

    def mute(self, on: bool) -> None:
        """Nothing leaves *here* any more: the peers hear nothing, not even acknowledgements or resets."""
        how = ("replace", "dev", "veth", "root", "pfifo", "limit", "0") if on else ("delete", "dev", "veth", "root")
        self._in(self.here, "tc", "qdisc", *how)

    def close(self) -> None:
        for side in (self.here, self.there):
            os.close(side)
