"""Packet sockets whose rings are mapped: what comes back in them, and what is refused."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Runner, firn_command, open_descriptors
from test_sockets import PACKET_ENTRY, RING, UNLIKE
from test_workloads import test_workload as run_workload
from workloads.table import PLAIN_WAYS, REFUSED_WAY, Workload

from firn.errors import FirnError, KernelError
from firn.images.store import ImageDir
from firn.resources.base import RestoreContext
from firn.resources.sockets import rings
from firn.resources.sockets.packet import PacketSockets

REFUSED = (*PLAIN_WAYS, REFUSED_WAY)
TABLE = [
    *(
        Workload("rings", mode, unlike=UNLIKE)
        for mode in ("first", "second", "full", "unused", "blocks", "blocks-full", "send", "send-third", "shared")
    ),
    Workload("rings", "closed", refused=("to which no descriptor of the tree leads",), ways=REFUSED),
    Workload("rings", "part", refused=("can only be mapped whole",), ways=REFUSED),
]
KIND = 0x9FFE
V3_RING = RING | {"block_nr": 4, "frame_nr": 8}


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


@pytest.mark.skipif(not firn_command(), reason="no firn command")
def test_a_ring_whose_contents_are_not_told(runner: Runner) -> None:
    """As in an image of CRIU's: the ring begins anew, and the log says so."""
    target = runner.start(Workload("rings", "unused"))
    images = runner.dump(target)
    with ImageDir.open(str(images), create_files=True) as folder:
        entries = folder.read_all("FILES")
        for entry in entries:
            if "psk" in entry:
                entry["psk"].pop("firn", None)
        os.unlink(images / "files.img")
        folder.write_all("FILES", entries)
    target = runner.restore(images, target)
    assert "has a ring whose contents the images do not tell" in (images / "restore.log").read_text()
    runner.assert_right(target, "afterwards")
    runner.kill(target)


def _opened(entry: dict[str, Any]) -> socket.socket:
    told: list[str] = []
    made = PacketSockets().open(5, entry, cast(RestoreContext, SimpleNamespace(warn=told.append)))
    return socket.socket(fileno=made)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_without_a_view_of_the_kernel_only_an_unused_ring_is_saved(version: int) -> None:
    words = tuple((V3_RING | {"retire_tmo": 10000}).values())
    entry = PACKET_ENTRY | {"version": version, "rx_ring": dict(zip(V3_RING, words, strict=True))}
    with _opened(entry) as sock, socket.socket(17, 2, 0) as sender:
        sock.bind(("lo", KIND + version % 2))
        (ring,) = rings.rings(version, words, ())
        assert rings.collect(sock.fileno(), [ring], None) == {"rx_place": 0, "stretches": []}
        sender.sendto(b"frame", ("lo", KIND + version % 2))
        with pytest.raises(KernelError, match="cannot be seen"):
            rings.collect(sock.fileno(), [ring], None)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_place_can_be_reached(version: int) -> None:
    """The kernel goes on exactly where it is told to, and finds there what is put there."""
    places = rings.sight()
    if places is None:
        pytest.skip("nobody may look at the kernel's memory here")
    for kind in (2, 3):
        for place in range(4 if version == 2 else 8):
            entry = PACKET_ENTRY | {
                "type": kind, "version": version, "rx_ring": V3_RING, "protocol": socket.htons(KIND),
                "firn": {"rx_place": place},
            }  # fmt: skip
            with _opened(entry) as sock:
                (ring,) = rings.rings(version, tuple(V3_RING.values()), ())
                with mmap.mmap(sock.fileno(), ring.size) as view:
                    ring.view = view
                    assert places.watch(sock.fileno(), ring)() == place
                    assert not any(ring.word(unit, ring.status) for unit in range(ring.units))
                    assert sock.getsockopt(rings.SOL_PACKET, rings.PACKET_STATISTICS, 8) == bytes(8)
                # No filter is left.
                assert struct.unpack("I", sock.getsockopt(1, 26, 4) or bytes(4)) == (0,)
    places.close()


@pytest.mark.parametrize(
    "damage",
    [
        {"firn": {"rx_place": 2}}, {"firn": {"rx_place": 0, "stretches": [{"offset": 4096, "data": b"x"}]}},
        {"firn": {"rx_place": 0, "stretches": [{"offset": 1 << 63, "data": b"x"}]}},
        {"firn": {"rx_place": 1}}, {"tx_ring": RING, "firn": {"tx_place": 1 << 31}},
        {"version": 2, "firn": {"rx_place": 1}},
        {"rx_ring": RING | {"block_nr": 0, "frame_nr": 0}, "firn": {"rx_place": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_ring_is_one_error(damage: dict[str, Any]) -> None:
    before = open_descriptors()
    with pytest.raises(FirnError):
        _opened(PACKET_ENTRY | {"rx_ring": RING} | damage)
    assert open_descriptors() == before
