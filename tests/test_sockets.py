"""Sockets of the other kinds (netlink, packet, raw, ping), what is refused of them, and every option of every kind."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Runner, Target, firn_command, open_descriptors, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import FirnError
from firn.resources.base import RestoreContext
from firn.resources.sockets.netlink import NetlinkSockets
from firn.resources.sockets.packet import PacketSockets

# The link of a socket's descriptor is its new inode.
UNLIKE = (r"fd\.\d+",)
TABLE = [Workload("sockets", mode, unlike=UNLIKE) for mode in ("netlink", "packet", "raw", "ping")]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")

# -- all options -----------------------------------------------------------------------------------------------------

KINDS = {
    "tcp": (2, 1, 6), "tcp6": (10, 1, 6), "udp": (2, 2, 17), "udp6": (10, 2, 17), "udplite": (2, 2, 136),
    "raw": (2, 3, 254), "raw6": (10, 3, 254), "unix": (1, 1, 0), "unix-datagram": (1, 2, 0), "netlink": (16, 3, 0),
    "packet": (17, 3, 0),
}  # fmt: skip
SO, IP, TCP, UDP, IPV6, UDPLITE, RAW, PACKET, NETLINK = 1, 0, 6, 17, 41, 136, 255, 263, 270
LEVELS = {
    "tcp": (SO, IP, TCP), "tcp6": (SO, IP, IPV6, TCP), "udp": (SO, IP, UDP), "udp6": (SO, IP, IPV6, UDP),
    "udplite": (SO, IP, UDP, UDPLITE), "raw": (SO, IP), "raw6": (SO, IPV6, RAW), "unix": (SO,), "unix-datagram": (SO,),
    "netlink": (SO, NETLINK), "packet": (SO, PACKET),
}  # fmt: skip
# SO_ERROR (reading clears it), _GET_FILTER (another length), _MEMINFO, _INCOMING_NAPI_ID, _COOKIE; TCP_INFO,
# _TIMESTAMP, _CC_INFO, _SAVED_SYN: what they tell belongs to the moment, the kernel or a connection.
UNASKED = {(SO, 4), (SO, 26), (SO, 55), (SO, 56), (SO, 57), (TCP, 11), (TCP, 24), (TCP, 26), (TCP, 28)}
# TCP_REPAIR and UDP_CORK, which are refused.
UNSET = {(TCP, 19), (UDP, 1), (UDPLITE, 1)}
# The whole range is tried, so that it is the kernel who tells what there is.
END = {SO: 96, IP: 60, TCP: 56, UDP: 112, IPV6: 84, UDPLITE: 112, RAW: 40, PACKET: 32, NETLINK: 20}
VALUES = [
    *(struct.pack("<I", value) for value in (1, 0, 2, 5, 20, 100, 1000, 4096)), b"lo", b"reno",
    struct.pack("<Q", 5000), struct.pack("<II", 1, 7), struct.pack("<qq", 3, 500000), bytes(range(16)),
    struct.pack("<II", 0, 1), bytes([0, 0, 1, 4, 0, 0, 0, 0]), bytes([0, 0, 5, 2, 0, 0, 1, 0]),
]  # fmt: skip


def known(sock: socket.socket, kind: str) -> dict[tuple[int, int], bytes]:
    """All options that can be read of a socket."""
    found = {}
    for level in LEVELS[kind]:
        for number in range(END[level]):
            if (level, number) not in UNASKED:
                try:
                    found[level, number] = sock.getsockopt(level, number, 256)
                except OSError:
                    pass
    return found


def changed(kind: str, level: int, number: int) -> socket.socket | None:
    """A socket of which one option is no more what it is in a new one; None if nobody can set it."""
    made = socket.socket(*KINDS[kind])
    try:
        before = made.getsockopt(level, number, 256)
    except OSError:
        before = None
    for value in VALUES if before is not None and (level, number) not in UNSET | UNASKED else ():
        try:
            made.setsockopt(level, number, value)
        except OSError:
            continue
        if made.getsockopt(level, number, 256) != before:
            return made
    made.close()
    return None


def holder(runner: Runner, socks: list[socket.socket]) -> Target:
    """A process that has *socks* under the same numbers, and we no more."""
    process = subprocess.Popen(
        ["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[sock.fileno() for sock in socks],
    )  # fmt: skip
    process.returncode = 0
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    for sock in socks:
        sock.close()
    return Target(process.pid, None)


def taken(target: Target, numbers: list[int], kind: tuple[int, int, int]) -> list[socket.socket]:
    """Our own descriptors of a process's sockets."""
    pidfd = os.pidfd_open(target.pid)
    try:
        return [socket.socket(*kind, syscall("getfd", nr.pidfd_getfd, pidfd, number, 0)) for number in numbers]
    finally:
        os.close(pidfd)


def documented() -> set[str]:
    """The options that docs/socket-options.md calls saved, as level:number."""
    levels: list[str] = []
    found = set()
    for line in (Path(__file__).parents[1] / "docs/socket-options.md").read_text().splitlines():
        if line.startswith("## "):
            levels = re.findall(r"\((\d+)\)", line)
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and (cells[3].startswith("saved") or cells[4].startswith("SO_")):
            found |= {f"{level}:{cells[2]}" for level in levels}
    return found


@needs_firn
def test_every_option_of_every_kind_comes_back(runner: Runner) -> None:
    """One socket for each option that can be read and set, and all that can be read of it is the same afterwards."""
    made: list[tuple[str, int, int, socket.socket]] = []
    for kind, levels in LEVELS.items():
        for level in levels:
            for number in range(END[level]):
                sock = changed(kind, level, number)
                if sock is not None:
                    os.fchown(sock.fileno(), 1234, 5678)
                    made.append((kind, level, number, sock))
    assert len(made) > 300
    before = [known(sock, kind) for kind, _, _, sock in made]
    numbers = [sock.fileno() for *_, sock in made]
    target = holder(runner, [sock for *_, sock in made])
    target = runner.restore(runner.dump(target), target)
    wrong = []
    for (kind, level, number, _), place, wanted in zip(made, numbers, before, strict=True):
        (sock,) = taken(target, [place], KINDS[kind])
        with sock:
            now = known(sock, kind)
            wrong += [
                f"{kind} with {level}:{number} set: {key} is {now.get(key)!r}, was {value!r}"
                for key, value in wanted.items() if now.get(key) != value
            ]  # fmt: skip
            st = os.fstat(sock.fileno())
            assert (st.st_uid, st.st_gid) == (1234, 5678)
    runner.kill(target)
    assert not wrong, "\n".join(wrong)
    saved = documented()
    assert not {f"{level}:{number}" for _, level, number, _ in made} - saved, "docs/socket-options.md does not say so"


# -- what is refused, and damage -------------------------------------------------------------------------------------


def refused(runner: Runner, sock: socket.socket, *words: str) -> None:
    target = holder(runner, [sock])
    code, text, _ = runner.try_dump(target)
    assert code and "Traceback" not in text, text
    for word in words:
        assert word in text, text
    assert not target.ended()
    runner.kill(target)


@needs_firn
@pytest.mark.parametrize("reason", ["netlink", "netlink-events", "packet", "raw", "bpf"])
def test_what_cannot_be_saved_is_refused(runner: Runner, reason: str) -> None:
    if reason == "netlink":
        made = socket.socket(16, 3, 0)
        made.send(struct.pack("<IHHIIBxHiII", 32, 18, 1, 1, 0, 0, 0, 1, 0, 0))  # RTM_GETLINK of the loopback device
        refused(runner, made, "netlink socket with messages")
    elif reason == "netlink-events":
        made = socket.socket(16, 2, 11)
        made.bind((0, 1))
        refused(runner, made, "listens to process events")
    elif reason == "packet":
        made = socket.socket(17, 3, 0)
        made.bind(("lo", 0x88B6))
        with socket.socket(17, 3, 0) as other:
            other.bind(("lo", 0))
            other.send(bytes(12) + b"\x88\xb6" + b"payload")
        refused(runner, made, "packets or an error in its queue")
    elif reason == "bpf":
        made = socket.socket(2, 2)
        # BPF_PROG_LOAD of a socket filter (linux/bpf.h): r0 = 0; exit
        code = bytearray(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
        licence = bytearray(b"GPL\0")
        load = bytearray(struct.pack("<IIQQ", 1, 2, address_of(code), address_of(licence)).ljust(128, b"\0"))
        try:
            program = syscall("bpf", nr.bpf, 5, address_of(load), len(load))
        except OSError as error:
            pytest.skip(f"no BPF here: {error.strerror}")
        made.setsockopt(1, 50, program)
        os.close(program)
        refused(runner, made, "it may have an eBPF filter")
    else:
        made = socket.socket(2, 3, 253)
        made.bind(("127.0.0.77", 0))
        with socket.socket(2, 3, 253) as other:
            other.sendto(b"payload", ("127.0.0.77", 0))
        refused(runner, made, "has packets in its queue")


OPTS = {"so_sndbuf": 0, "so_rcvbuf": 0, **{f"so_{way}_tmo_{unit}": 0 for way in ("snd", "rcv") for unit in
                                          ("sec", "usec")}}  # fmt: skip
COMMON: dict[str, Any] = {"id": 5, "flags": 2, "fown": {"pid": 0, "signum": 0}, "opts": OPTS}
NETLINK_ENTRY = COMMON | {"ino": 9, "protocol": 0, "state": 7, "portid": 0, "groups": [], "dst_portid": 0,
                          "dst_group": 0}  # fmt: skip
PACKET_ENTRY = COMMON | {"type": 3, "protocol": 0, "ifindex": 0, "version": 0, "reserve": 0, "aux_data": False,
                         "orig_dev": False, "vnet_hdr": False, "loss": False, "timestamp": 0, "copy_thresh": 0,
                         "mclist": []}  # fmt: skip
RING = {"block_size": 4096, "block_nr": 1, "frame_size": 2048, "frame_nr": 2, "retire_tmo": 0, "sizeof_priv": 0,
        "features": 0}  # fmt: skip
MEMBER = {"index": 1, "type": 1, "addr": b""}


@pytest.mark.parametrize(
    ("entry", "damage"),
    [
        *((NETLINK_ENTRY, damage) for damage in (
            {"protocol": 9999}, {"groups": [1, 2]}, {"dst_group": 40}, {"firn": {"groups": b"\xff" * 5000}},
            {"firn": {"options": [{"level": 270, "number": 1}]}}, {"firn": {"groups": bytes(4) + b"\x00\x80" * 9}},
        )),
        *((PACKET_ENTRY, damage) for damage in (
            {"type": 1}, {"protocol": 1 << 16}, {"ifindex": 987654}, {"version": 9}, {"fanout": 7 << 16},
            {"rx_ring": RING | {"frame_nr": 3}}, {"tx_ring": RING | {"block_size": 1 << 40}},
            {"mclist": [MEMBER | {"addr": b"a" * 33}]}, {"mclist": [MEMBER | {"index": 987654}]},
            {"mclist": [MEMBER] * 70000}, {"firn": {"options": [{"level": 263, "number": 5}]}},
            {"ifindex": 7, "firn": {"devices": [{"index": 7, "name": "nowhere"}]}},
            {"ifindex": 7, "firn": {"devices": [{"index": 7, "name": "a\0b"}]}},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_entry_is_one_error(entry: dict[str, Any], damage: dict[str, Any]) -> None:
    before = open_descriptors()
    kind = NetlinkSockets() if "portid" in entry else PacketSockets()
    with pytest.raises(FirnError):
        kind.open(5, entry | damage, cast(RestoreContext, SimpleNamespace()))
    assert open_descriptors() == before
