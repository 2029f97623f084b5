"""Network namespaces joined by veth pairs: a tree under test in one, its peers in another."""

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


class _Namespaces:
    """What is common: commands and sockets in a namespace, which is a descriptor."""

    @staticmethod
    def _path(side: int) -> str:
        return f"/proc/{os.getpid()}/fd/{side}"

    def _command(self, side: int, *words: str | Path) -> list[str]:
        return ["nsenter", f"--net={self._path(side)}", *map(str, words)]

    def _in(self, side: int, *words: str) -> None:
        _run(*self._command(side, *words))

    @contextmanager
    def _inside(self, side: int) -> Iterator[None]:
        back = os.open(_OWN, os.O_RDONLY)
        try:
            assert _libc.setns(side, _CLONE_NEWNET) == 0
            yield
        finally:
            assert _libc.setns(back, _CLONE_NEWNET) == 0
            os.close(back)


class Pair(_Namespaces):
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

    def command(self, *words: str | Path) -> list[str]:
        """What runs *words* in namespace *here*; only the network is another."""
        return self._command(self.here, *words)

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


class Hosts(_Namespaces):
    """Two hosts, each in a namespace, and clients in a third one, on one bridge. One host at a time has the ADDRESSES
    and is plugged in, at first host 0: ``move`` gives them to the other one, ``plug`` lets it be heard of."""

    ADDRESSES, CLIENT = ("10.92.0.9", "fd92::9"), ("10.92.0.1", "fd92::1")
    _CARD = "02:00:00:00:92:09"
    """The hardware address, which moves along: so no client's table of neighbours becomes wrong."""

    def __init__(self) -> None:
        if not all(map(shutil.which, ("ip", "nsenter"))):
            pytest.skip("ip (iproute2) and nsenter are not installed")
        self.client = _new()
        self.hosts = _new(), _new()
        self.active = 0
        try:
            self._in(self.client, "ip", "link", "add", "bridge", "type", "bridge")
        except AssertionError as error:
            self.close()
            pytest.skip(f"no bridges here: {error}")
        for number, host in enumerate(self.hosts):
            far = ("peer", "veth", "address", self._CARD, "netns", self._path(host))
            self._in(self.client, "ip", "link", "add", f"port{number}", "type", "veth", *far)
            self._in(self.client, "ip", "link", "set", f"port{number}", "master", "bridge")
            for device in ("lo", "veth"):
                self._in(host, "ip", "link", "set", device, "up")
        self._addresses("add", self.client, "bridge", self.CLIENT)
        self._in(self.client, "ip", "link", "set", "bridge", "up")
        self._addresses("add", self.hosts[0], "veth", self.ADDRESSES)
        self.plug()

    def _addresses(self, what: str, side: int, device: str, addresses: tuple[str, str]) -> None:
        self._in(side, "ip", "address", what, f"{addresses[0]}/24", "dev", device)
        self._in(
            side, "ip", "address", what, f"{addresses[1]}/64", "dev", device, *(["nodad"] if what == "add" else [])
        )

    def command(self) -> list[str]:
        """What goes before a command that shall run on the active host."""
        return self._command(self.hosts[self.active])

    def move(self) -> None:
        """The other host becomes active and has the addresses, but is not plugged in yet: no client reaches any."""
        self._in(self.client, "ip", "link", "set", f"port{self.active}", "down")
        self._addresses("delete", self.hosts[self.active], "veth", self.ADDRESSES)
        self.active = 1 - self.active
        self._addresses("add", self.hosts[self.active], "veth", self.ADDRESSES)

    def plug(self) -> None:
        """The active host is on the bridge."""
        self._in(self.client, "ip", "link", "set", f"port{self.active}", "up")

    def connect(self, address: tuple[str, int]) -> socket.socket:
        """A connection of a client."""
        with self._inside(self.client):
            return socket.create_connection(address, timeout=20)

    def close(self) -> None:
        """Lets go of all namespaces."""
        for side in (self.client, *self.hosts):
            os.close(side)
