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
_FOLDER = Path("/run/netns")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


class Pair:
    """Namespace *here* has 10.91.0.1 and fd91::1, namespace *there* 10.91.0.2 and fd91::2. ``close`` removes both."""

    HERE, THERE = ("10.91.0.1", "fd91::1"), ("10.91.0.2", "fd91::2")

    def __init__(self) -> None:
        if not shutil.which("ip") or not shutil.which("tc"):
            pytest.skip("ip and tc (iproute2) are not installed")
        self.here, self.there = (f"firn-test-{os.getpid()}-{side}" for side in "ab")
        made = subprocess.run(["ip", "netns", "add", self.here], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr}")
        _run("ip", "netns", "add", self.there)
        _run("ip", "-n", self.here, "link", "add", "veth", "type", "veth", "peer", "veth", "netns", self.there)
        for name, addresses in ((self.here, self.HERE), (self.there, self.THERE)):
            _run("ip", "-n", name, "address", "add", f"{addresses[0]}/24", "dev", "veth")
            _run("ip", "-n", name, "address", "add", f"{addresses[1]}/64", "dev", "veth", "nodad")
            for device in ("lo", "veth"):
                _run("ip", "-n", name, "link", "set", device, "up")

    def command(self, *words: str | Path) -> list[str]:
        """What runs *words* in namespace *here*; only the network is another."""
        return ["nsenter", f"--net={_FOLDER / self.here}", *map(str, words)]

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        libc = ctypes.CDLL(None, use_errno=True)
        back, to = (os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/ns/net", _FOLDER / name))
        try:
            assert libc.setns(to, _CLONE_NEWNET) == 0
            yield
        finally:
            assert libc.setns(back, _CLONE_NEWNET) == 0
            os.close(back)
            os.close(to)

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
        if on:
            _run("tc", "-n", self.here, "qdisc", "replace", "dev", "veth", "root", "pfifo", "limit", "0")
        else:
            _run("tc", "-n", self.here, "qdisc", "delete", "dev", "veth", "root")

    def close(self) -> None:
        for name in (self.here, self.there):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)
