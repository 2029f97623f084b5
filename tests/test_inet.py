"""Internet sockets: the workloads, servers that are reached after the restore, and what is refused."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Runner, Target, firn_command, open_descriptors, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import GONE_WAYS, PLAIN_WAYS, REFUSED_WAY, Workload

from firn.errors import FirnError
from firn.host import sockdiag
from firn.resources.base import INETSK, RestoreContext
from firn.resources.files.external import Inherited
from firn.resources.sockets import datagrams, inet_options
from firn.resources.sockets.inet import InetSockets

# The link of a socket's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
TABLE = [Workload("inet", mode, unlike=UNLIKE) for mode in ("listen", "udp", "options", "groups")]
TABLE += [Workload("inet", mode, unlike=UNLIKE, once=True) for mode in ("bound", "queue", "crowd")]
TABLE += [
    Workload(
        "inet", "connection", unlike=UNLIKE, dump=("--tcp-close",), restore=("--tcp-close",), once=True,
        refused=(r"is a TCP connection \(established\)", "--tcp-close"), ways=(*PLAIN_WAYS, REFUSED_WAY, *GONE_WAYS),
    )
]  # fmt: skip

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def sleeper(runner: Runner, sock: socket.socket) -> Target:
    """A process that has *sock* as its standard input, and we no more."""
    process = subprocess.Popen(
        ["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, stdin=sock.fileno(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.returncode = 0
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    sock.close()
    return Target(process.pid, None)


def listener() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", 0))
    made.listen(5)
    return made


def refused(runner: Runner, sock: socket.socket, *words: str, options: tuple[str, ...] = ()) -> None:
    target = sleeper(runner, sock)
    code, text, _ = runner.try_dump(target, *options)
    assert code and "Traceback" not in text and "descriptor 0" in text, text
    for word in words:
        assert word in text, text
    assert not target.ended()
    runner.kill(target)


@needs_firn
def test_connections_that_wait_are_refused_or_dropped(runner: Runner) -> None:
    server = listener()
    where = server.getsockname()
    client = socket.create_connection(where)
    target = sleeper(runner, server)
    code, text, _ = runner.try_dump(target)
    assert code and "1 connection waits" in text and "--skip-in-flight" in text, text
    back = runner.restore(runner.dump(target, "--skip-in-flight"), target)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    socket.create_connection(where).close()
    runner.kill(back)


@needs_firn
def test_a_port_that_is_taken_is_one_clear_error(runner: Runner) -> None:
    server = listener()
    where = server.getsockname()
    target = sleeper(runner, server)
    images = runner.dump(target)
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(where)
    other.listen()
    code, text = runner.try_restore(images)
    assert code and f"127.0.0.1:{where[1]}" in text and "in use" in text and "Traceback" not in text, text
    assert not Path(f"/proc/{target.pid}").exists()
    other.close()
    runner.kill(runner.restore(images, target))


@needs_firn
def test_closed_connections_do_not_keep_the_port(runner: Runner) -> None:
    server = listener()
    where = server.getsockname()
    client = socket.create_connection(where)
    served = server.accept()[0]
    # The server closes first: TIME-WAIT is on its side.
    served.close()
    client.close()
    target = sleeper(runner, server)
    back = runner.restore(runner.dump(target), target)
    socket.create_connection(where).close()
    runner.kill(back)


@needs_firn
@pytest.mark.parametrize("kind", ["mptcp", "vsock", "xdp", "alg", "sctp"])
def test_other_kinds_are_refused_by_name(runner: Runner, kind: str) -> None:
    kinds = {
        "mptcp": (socket.AF_INET, socket.SOCK_STREAM, 262, "an MPTCP socket"),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM, 0, "vsock"),
        "xdp": (44, socket.SOCK_RAW, 0, "XDP"),
        "alg": (socket.AF_ALG, socket.SOCK_SEQPACKET, 0, "AF_ALG"),
        "sctp": (socket.AF_INET, socket.SOCK_STREAM, 132, "SCTP"),
    }
    *words, name = kinds[kind]
    try:
        made = socket.socket(*words)
    except OSError as error:
        pytest.skip(f"no such sockets here: {error.strerror}")
    refused(runner, made, name)


@needs_firn
@pytest.mark.parametrize("reason", ["corked", "error", "connected", "connecting", "group", "signed", "signing"])
def test_what_cannot_be_saved_is_refused(runner: Runner, reason: str) -> None:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    word = reason
    if reason == "corked":
        made.connect(("127.0.0.1", 9))
        made.send(b"x", socket.MSG_MORE)
    elif reason == "error":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            made.connect(closed.getsockname())
        made.send(b"x")
    elif reason == "group":
        made.bind(("", 0))
        group = socket.inet_aton("239.7.7.7") + socket.inet_aton("127.0.0.1")
        made.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(b"x", ("239.7.7.7", made.getsockname()[1]))
        word = "sent to 239.7.7.7"
    elif reason.startswith("sign"):
        made = server = listener()
        try:
            made.setsockopt(socket.IPPROTO_TCP, 14, KEY)
        except OSError as error:
            pytest.skip(f"no TCP_MD5SIG here: {error.strerror}")
        if reason == "signing":
            made = socket.socket()
            made.setsockopt(socket.IPPROTO_TCP, 14, KEY)
            made.connect(server.getsockname())
        word = "TCP_MD5SIG"
    else:
        made = socket.socket()
        if reason == "connecting":
            full = listener()
            full.listen(0)
            made.setblocking(False)
            others = [socket.create_connection(full.getsockname())]
            made.connect_ex(full.getsockname())
            word = "SYN-SENT"
        else:
            server = listener()
            made.connect(server.getsockname())
            word = "TCP connection (established); --tcp-established"
    refused(runner, made, word, options=("--tcp-established",) if reason == "signing" else ())
    if reason == "connecting":
        full.close()
        others[0].close()


KEY = (
    socket.AF_INET.to_bytes(2, "little") + bytes(2) + socket.inet_aton("127.0.0.1").ljust(124, b"\0")
    + bytes((0, 0, 3, 0, 0, 0, 0, 0)) + b"key".ljust(80, b"\0")
)  # fmt: skip
"""A struct tcp_md5sig (linux/tcp.h)."""
LABEL = struct.pack("<16s4sBBHHHI", socket.inet_pton(socket.AF_INET6, "::1"), b"", 0, 255, 1, 6, 6, 0)
"""A struct in6_flowlabel_req (linux/in6.h): any new label, for everybody (IPV6_FL_S_ANY)."""


@needs_firn
@pytest.mark.parametrize(
    ("kind", "option", "word"),
    [
        ((2, 1, 6), (6, 14, KEY), "TCP_MD5SIG"),
        ((2, 2, 17), (1, 60, 1), "SO_ZEROCOPY"),
        ((2, 2, 17), (1, 37, 0x80), "SOF_TIMESTAMPING_OPT_ID"),
        ((17, 3, 0), (1, 37, 0x80), "SOF_TIMESTAMPING_OPT_ID"),
        ((10, 2, 17), (41, 32, LABEL), "a lease of a flow label"),
        ((2, 3, 2), (0, 200, 1), "multicast routing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernel_hides_is_refused(
    runner: Runner, kind: tuple[int, int, int], option: tuple[int, int, Any], word: str
) -> None:
    made = socket.socket(*kind)
    try:
        made.setsockopt(*option)
    except OSError as error:
        pytest.skip(f"not here, or not now: {error.strerror}")
    if kind[1:] == (2, 17):
        made.bind(("", 0))
    refused(runner, made, word)


@needs_firn
def test_a_syn_that_was_not_read_is_refused(runner: Runner) -> None:
    server = listener()
    server.setsockopt(socket.IPPROTO_TCP, 27, 1)  # TCP_SAVE_SYN
    with socket.create_connection(server.getsockname()):
        refused(runner, server.accept()[0], "TCP_SAVE_SYN", options=("--tcp-established",))
    server.close()


@needs_firn
def test_a_datagram_from_afar_keeps_its_sender(runner: Runner) -> None:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    own = {"source": socket.inet_aton("198.51.100.9"), "port": 4242, "destination": socket.inet_aton("127.0.0.1"),
           "data": b"far", "hops": 17, "kind": 4}  # fmt: skip
    message = {"proto": 17, "src_port": made.getsockname()[1], "opts": {"so_rcvbuf": 212992},
               "firn": {"datagrams": [own]}}  # fmt: skip
    datagrams.fill(made, "it", message)
    assert datagrams.peek(made) == [own]
    assert made.recvfrom(9) == (b"far", ("198.51.100.9", 4242))
    assert made.getsockopt(socket.IPPROTO_IP, 8) == 0 and made.getsockopt(socket.SOL_SOCKET, 42) == -1


def test_options_find_their_network_device_by_its_name() -> None:
    index, elsewhere = socket.if_nametoindex("lo"), 4242
    options = [{"level": 0, "number": 50, "value": elsewhere.to_bytes(4, "big")},
               {"level": 41, "number": 17, "value": elsewhere.to_bytes(4, "little")}]  # fmt: skip
    entry = {"family": 10, "type": 2, "proto": 17, "opts": {}, "firn": {
        "options": options, "devices": [{"index": elsewhere, "name": "lo"}]}}  # fmt: skip
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        inet_options.restore(made, entry)
        assert socket.ntohl(made.getsockopt(0, 50)) == made.getsockopt(41, 17) == index
        assert inet_options.collect(made, False)["firn"]["devices"] == [{"index": index, "name": "lo"}]
        entry["firn"]["devices"] = [{"index": elsewhere, "name": "nowhere"}]  # type: ignore[index]
        with pytest.raises(OSError, match="nowhere is not there"):
            inet_options.restore(made, entry)


def test_diag_tells_how_sockets_are_shut() -> None:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
    for sock in made:
        sock.bind(("127.0.0.1", 0))
    for sock, how in zip(made, (socket.SHUT_RD, socket.SHUT_WR), strict=False):
        with pytest.raises(OSError):
            sock.shutdown(how)
    found = sockdiag.inet_shutdowns(socket.AF_INET, socket.IPPROTO_UDP)
    assert [found.get(os.fstat(sock.fileno()).st_ino, 0) for sock in made] == [1, 2, 0]


def test_a_new_socket_has_no_options() -> None:
    for family, kind, protocol in ((2, 1, 6), (10, 1, 6), (2, 2, 17), (10, 2, 17), (10, 2, 136)):
        with socket.socket(family, kind, protocol) as made:
            assert inet_options.collect(made, False) == {"ip_opts": {}}
            if kind == socket.SOCK_DGRAM:
                assert inet_options.memberships(made) == []


ENTRY: dict[str, Any] = {
    "id": 5, "ino": 9, "family": 2, "type": 1, "proto": 6, "state": 10, "src_port": 0, "dst_port": 0, "flags": 2,
    "backlog": 3, "src_addr": [0x0100007F], "dst_addr": [0], "fown": {"pid": 0, "signum": 0},
    "opts": {"so_sndbuf": 16384, "so_rcvbuf": 131072, **{f"so_{way}_tmo_{unit}": 0 for way in ("snd", "rcv")
             for unit in ("sec", "usec")}},
}  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        {"family": 3}, {"type": 3}, {"proto": 1}, {"state": 6}, {"state": 99}, {"src_addr": [1, 2]},
        {"dst_addr": [1, 2]}, {"src_port": 65536}, {"opts": ENTRY["opts"] | {"so_buf_lock": 1 << 31}},
        {"shutdown": 9}, {"ifname": "a\0b"}, {"state": 1}, {"ip_opts": {"ttl": 1 << 31}},
        {"ip_opts": {"ttl": 1000}}, {"opts": ENTRY["opts"] | {"so_bound_dev": "nowhere"}},
        {"opts": ENTRY["opts"] | {"so_snd_tmo_sec": 1 << 63}}, {"firn": {"options": [{"level": 1, "number": 8}]}},
        {"firn": {"groups": [{"group": b"abc"}]}}, {"firn": {"groups": [{"group": bytes(4), "interface": "nowhere"}]}},
        {"type": 2, "proto": 17, "state": 7, "firn": {"datagrams": [{"source": bytes(3)}]}}, {"src_addr": [0x01020304]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_entry_is_one_error(damage: dict[str, Any]) -> None:
    before = open_descriptors()
    options = SimpleNamespace(tcp_close=False, tcp_established=False)
    files = {(INETSK, 5): {"isk": ENTRY | damage}}
    images = SimpleNamespace(files=files, options=options, images=None, inherited=Inherited([]))
    kind = InetSockets()
    with pytest.raises(FirnError):
        kind.open(5, {}, cast(RestoreContext, images))
    kind.close()
    assert open_descriptors() == before


def _fetch(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/page", timeout=10) as answer:
        return bytes(answer.read())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serves(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@needs_firn
def test_a_web_server_goes_on(runner: Runner) -> None:
    (runner.folder / "page").write_bytes(b"content")
    port = _free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    target = runner.spawn(command)
    wait_until("it serves", lambda: _serves(port))
    assert _fetch(port) == b"content"
    for _ in range(2):
        target = runner.restore(runner.dump(target), target)
        assert _fetch(port) == b"content"
    runner.kill(target)


PREFORKED = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.fork()
while True:
    client, _ = server.accept()
    with client:
        client.sendall(b"%d" % os.getpid())
        client.recv(1)
"""


@needs_firn
def test_workers_share_a_listening_socket(runner: Runner) -> None:
    port = _free_port()

    def answer() -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            return client.recv(9)

    target = runner.spawn([sys.executable, "-c", PREFORKED, str(port)])
    wait_until("it serves", lambda: _serves(port))
    found: set[bytes] = set()
    wait_until("both serve", lambda: _both(found, answer()))
    before = found.copy()
    target = runner.restore(runner.dump(target), target)
    found.clear()
    wait_until("both serve again", lambda: _both(found, answer()))
    assert found == before
    runner.kill(target)


def _both(found: set[bytes], who: bytes) -> bool:
    found.add(who)
    return len(found) == 2


@needs_firn
def test_redis_goes_on(runner: Runner) -> None:
    program = shutil.which("redis-server")
    if not program:
        pytest.skip("redis-server is not installed")
    port = _free_port()

    def ask(words: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(words + b"\r\n")
            return client.recv(100)

    target = runner.spawn([program, "--port", str(port), "--save", ""])
    wait_until("it serves", lambda: _serves(port))
    assert ask(b"SET key value") == b"+OK\r\n"
    for _ in range(2):
        wait_until("its clients are gone", lambda: b"connected_clients:1" in ask(b"INFO clients"))
        target = runner.restore(runner.dump(target), target)
        assert ask(b"GET key") == b"$5\r\nvalue\r\n"
    runner.kill(target)
