"""What leads out of the tree: files that the caller of a restore supplies, and the options that say so, as callers of
``criu`` use them."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from harness import Runner, Target, firn_command, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import GONE_WAYS, PLAIN_WAYS, Workload

from firn.abi import tun
from firn.errors import FirnError
from firn.host import links
from firn.images.store import ImageDir
from firn.resources import cpu
from firn.resources.base import PIPE, REG, UNIXSK
from firn.resources.files.external import Inherited, inherit_key

pytestmark = pytest.mark.skipif(not firn_command(), reason="no firn command")

DEVICES = pytest.mark.xdist_group("network devices")
"""Each wants the same index and addresses again."""
TABLE = [
    # The restored tree has a time namespace of its own.
    Workload("outside", "namespaces", unlike=(r"fd\.\d+",)),
    Workload("outside", "devices"),
    # Two incarnations of one device cannot be at the same time.
    Workload("outside", "tun", ways=(*PLAIN_WAYS, *GONE_WAYS)),
]
Stream = int | IO[bytes]


@pytest.mark.parametrize(
    ("workload", "way"),
    [
        pytest.param(workload, way, id=f"{workload.name}-{way}", marks=[DEVICES] if workload.mode == "tun" else [])
        for workload in TABLE
        for way in workload.ways
    ],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def criu(runner: Runner, *words: str) -> tuple[int, str]:
    """Run the command under CRIU's name, with our inheritable descriptors; (exit status, output and log)."""
    command = Path(firn_command() or "").with_name("criu")
    log = runner.folder / "criu.log"
    words = (str(command), *words, "-v4", "-o", str(log))
    done = subprocess.run(words, close_fds=False, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


def start(runner: Runner, *command: str, stdin: Stream = subprocess.DEVNULL, stdout: Stream = subprocess.DEVNULL,
          pass_fds: tuple[int, ...] = ()) -> Target:  # fmt: skip
    """Start *command*; it sleeps when this returns."""
    process = subprocess.Popen(
        command, cwd=runner.folder, start_new_session=True, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL,
        pass_fds=pass_fds, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    process.returncode = 0
    name = os.path.basename(command[0])[:15]
    wait_until("it sleeps", lambda: f"({name}) S" in Path(f"/proc/{process.pid}/stat").read_text())
    return Target(process.pid, None)


def dump(runner: Runner, target: Target, *options: str) -> tuple[str, str]:
    """Dump, which must work and end the target: (image folder, log)."""
    images = runner.folder / "images"
    images.mkdir(exist_ok=True)
    code, text = criu(runner, "dump", "-t", str(target.pid), "-D", str(images), *options)
    assert code == 0, text
    wait_until("it ends", target.ended)
    return str(images), text


def restore(runner: Runner, images: str, target: Target, *options: str) -> tuple[Target, str]:
    code, text = criu(runner, "restore", "-d", "-D", images, *options)
    assert code == 0, text
    return Target(target.pid, None), text


def inherit(fd: int, key: str) -> tuple[str, str]:
    os.set_inheritable(fd, True)
    return "--inherit-fd", f"fd[{fd}]:{key}"


def link(target: Target, fd: int) -> str:
    return os.readlink(f"/proc/{target.pid}/fd/{fd}")


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Two pipes, four ends; those still open are closed at the end."""
    ends = [*os.pipe(), *os.pipe(), *os.pipe(), *os.pipe()]
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue


@pytest.mark.parametrize("wrong_end", [False, True])
def test_pipes_to_the_outside_are_supplied_by_the_caller(runner: Runner, pipes: list[int], wrong_end: bool) -> None:
    """As runc and Docker do with the standard streams: no option at the dump, --inherit-fd at the restore."""
    their_in, our_out, our_in, their_out, new_in, new_out, next_in, next_out = pipes
    target = start(runner, "/bin/cat", stdin=their_in, stdout=their_out)
    keys = [link(target, 0), link(target, 1)]
    os.write(our_out, b"one")
    assert os.read(our_in, 3) == b"one"
    images, text = dump(runner, target)
    assert f"process {os.getpid()} (" in text and f"--inherit-fd fd[N]:{keys[0]}" in text, text
    # Each end leads to both sides of its pipe.
    ends = (new_out, next_in) if wrong_end else (new_in, next_out)
    back, _ = restore(runner, images, target, *inherit(ends[0], keys[0]), *inherit(ends[1], keys[1]))
    os.write(new_out, b"two")
    assert os.read(next_in, 3) == b"two"
    assert link(back, 0) == os.readlink(f"/proc/self/fd/{new_in}")
    assert sorted(os.listdir(f"/proc/{back.pid}/fd")) == ["0", "1", "2"]
    runner.kill(back)


def test_an_attached_restore_does_not_keep_what_is_supplied(runner: Runner, pipes: list[int]) -> None:
    """... or this end would not come before the command's."""
    their_in, _, _, their_out, new_in, new_out, next_in, next_out = pipes
    target = start(runner, "/bin/cat", stdin=their_in, stdout=their_out)
    keys = [link(target, 0), link(target, 1)]
    images, _ = dump(runner, target)
    words = (*inherit(new_in, keys[0]), *inherit(next_out, keys[1]), "-v4", "-o", "attached.log")
    command = str(Path(firn_command() or "").with_name("criu"))
    process = subprocess.Popen(
        [command, "restore", "-D", images, *words], pass_fds=(new_in, next_out),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(next_out)
    os.write(new_out, b"x")
    assert os.read(next_in, 10) == b"x"
    assert not [path for path in Path(f"/proc/{process.pid}/fd").iterdir() if _is_pipe(path)]
    os.close(new_out)
    assert os.read(next_in, 10) == b""
    assert process.wait(20) == 0


def _is_pipe(path: Path) -> bool:
    try:
        return os.readlink(path).startswith("pipe:")
    except FileNotFoundError:
        return False  # the command closes what it has used


def test_pipes_to_the_outside_come_back_without_that_end(runner: Runner, pipes: list[int]) -> None:
    """... with a word in the log, and what was queued."""
    their_in, our_out, our_in, their_out, *_ = pipes
    target = start(runner, "/bin/cat", stdin=their_in, stdout=their_out)
    os.kill(target.pid, 19)
    wait_until("it stops", lambda: target.state() == "T")
    os.write(our_out, b"last words")
    images, _ = dump(runner, target)
    os.close(their_out)
    code, text = criu(runner, "restore", "-d", "-D", images)
    assert code == 0 and f"process {os.getpid()} (" in text and "comes back without its other end" in text, text
    back = Target(target.pid, None)
    assert os.read(our_in, 1) == b"", "the old pipe has no writer any more"
    fd = os.open(f"/proc/{back.pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    os.kill(back.pid, 18)
    wait_until("it ends", back.ended)
    assert os.read(fd, 100) == b"last words"
    os.close(fd)


def test_a_fifo_whose_writer_is_outside(runner: Runner) -> None:
    """It is opened by its name again, and what it holds stays there."""
    path = runner.folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    writer = os.open(path, os.O_WRONLY)
    out = (runner.folder / "out").open("wb")
    target = start(runner, "/bin/cat", stdin=reader, stdout=out)
    os.close(reader)
    os.kill(target.pid, 19)
    wait_until("it stops", lambda: target.state() == "T")
    os.write(writer, b"before ")
    images, text = dump(runner, target)
    assert f"process {os.getpid()} (" in text and f"descriptor {writer};" in text, text
    back, _ = restore(runner, images, target)
    os.write(writer, b"after")
    os.kill(back.pid, 18)
    os.close(writer)
    wait_until("it ends", back.ended)
    assert (runner.folder / "out").read_bytes() == b"before after"
    out.close()


def test_sockets_are_supplied_by_the_caller(runner: Runner) -> None:
    mine, theirs = socket.socketpair()
    target = start(runner, "/bin/cat", stdin=theirs.fileno())
    key, inode = link(target, 0), os.fstat(theirs.fileno()).st_ino
    theirs.close()
    images, _ = dump(runner, target, "--external", f"unix[{inode}]")
    assert mine.recv(1) == b""
    new, supplied = socket.socketpair()
    back, _ = restore(runner, images, target, *inherit(supplied.fileno(), key))
    wanted = os.fstat(supplied.fileno()).st_ino
    supplied.close()
    assert os.stat(f"/proc/{back.pid}/fd/0").st_ino == wanted
    new.close()
    wait_until("it sees the end and ends", back.ended)
    assert back.status == 0
    mine.close()


def test_files_are_supplied_by_the_caller(runner: Runner) -> None:
    """A file that is named external need not be there any more; any other one is looked for among those supplied."""
    for name in ("external", "other", "new"):
        (runner.folder / name).write_text(name)
    with (runner.folder / "external").open("rb") as external, (runner.folder / "other").open("rb") as other:
        target = start(runner, "/bin/sleep", "1000", stdin=external, stdout=other)
        at = os.stat(external.fileno())
        mount = Path(f"/proc/self/fdinfo/{external.fileno()}").read_text().split("mnt_id:")[1].split()[0]
    key = f"file[{int(mount):x}:{at.st_ino:x}]"
    images, _ = dump(runner, target, "--external", key, "--external", "zork[1]")
    (runner.folder / "external").unlink()
    (runner.folder / "other").unlink()
    with (runner.folder / "new").open("r+b") as new:
        new.seek(2)
        path = str(runner.folder / "other")
        code, text = criu(runner, "restore", "-d", "-D", images, *inherit(new.fileno(), path[1:]))
        assert code == 1 and f"--inherit-fd fd[N]:{key}" in text, text
        code, text = criu(runner, "restore", "-d", "-D", images, *inherit(new.fileno(), key))
        assert code == 1 and f"{path} cannot be opened" in text, text
        back, _ = restore(runner, images, target, *inherit(new.fileno(), key), *inherit(new.fileno(), path[1:]))
        assert link(back, 0) == link(back, 1) == str(runner.folder / "new")
        assert "pos:\t2" in Path(f"/proc/{back.pid}/fdinfo/0").read_text()
    runner.kill(back)


def test_containers_are_refused_by_name(runner: Runner) -> None:
    for text in ("mnt[/x]:y", "net[5]:y", "pid[5]:y", "dev[1/2]:y"):
        code, output = criu(runner, "dump", "-t", "1", "-D", str(runner.folder), "--external", text)
        assert code == 1 and f"--external (given: {text}) is not built yet" in output, output


@DEVICES
def test_a_tap_device_that_is_there_or_not(runner: Runner) -> None:
    """A persistent one is attached to, or made again with its offloads; one of another program is in the way."""
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun")
    name, flags = f"firnp{os.getpid()}", 0x1002  # IFF_TAP | IFF_NO_PI

    def attach(persist: bool | None) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ_FLAGS.pack(name.encode(), flags))
        if persist is not None:
            fcntl.ioctl(fd, tun.TUNSETPERSIST, int(persist))
        return fd

    def remove() -> None:
        os.close(attach(False))
        wait_until("it is gone", lambda: not os.path.exists(f"/sys/class/net/{name}"))

    offload = tun.TUN_F_CSUM | tun.TUN_F_TSO4 | tun.TUN_F_TSO6
    fd = attach(True)
    fcntl.ioctl(fd, tun.TUNSETOFFLOAD, offload)
    assert links.offloads(name) == offload
    target = start(runner, "/bin/sleep", "1000", stdin=fd)
    os.close(fd)
    try:
        images, _ = dump(runner, target)
        target, _ = restore(runner, images, target)
        images, _ = dump(runner, target)
        remove()
        taken = attach(None)
        code, text = criu(runner, "restore", "-d", "-D", images)
        assert code == 1 and f"the device {name} is there already, and belongs to a program" in text, text
        os.close(taken)
        target, _ = restore(runner, images, target)
        assert links.number(name, "tun_flags") & tun.IFF_PERSIST and links.offloads(name) == offload
        assert f"iff:\t{name}" in Path(f"/proc/{target.pid}/fdinfo/0").read_text()
        runner.kill(target)
    finally:
        remove()


def test_files_of_dead_processes_and_of_others(runner: Runner) -> None:
    """A dead process's come back as what they were: files of a dead process. Others are found by name."""
    dead, other = (subprocess.Popen(["/bin/sleep", "1000"]) for _ in range(2))
    opened = [os.open(f"/proc/{dead.pid}{name}", os.O_RDONLY) for name in ("/status", "")]
    opened.append(os.open(f"/proc/{other.pid}/comm", os.O_RDONLY))
    try:
        target = start(runner, "/bin/sleep", "1000", pass_fds=tuple(opened))
        dead.kill()
        dead.wait()
        images, text = dump(runner, target)
        assert f"is /proc/{other.pid}/comm, of a process outside" in text, text
        back, _ = restore(runner, images, target)
        assert not os.path.exists(f"/proc/{dead.pid}")
        with pytest.raises(ProcessLookupError):
            Path(f"/proc/{back.pid}/fd/{opened[0]}").read_bytes()
        assert link(back, opened[1]) == f"/proc/{dead.pid} (deleted)"
        assert Path(f"/proc/{back.pid}/fd/{opened[2]}").read_bytes() == b"sleep\n"
        runner.kill(back)
    finally:
        for fd in opened:
            os.close(fd)
        for process in (dead, other):
            process.kill()
            process.wait()


def test_another_node_of_a_device(runner: Runner) -> None:
    node = runner.folder / "null"
    os.mknod(node, 0o20600, os.makedev(1, 3))
    with node.open("rb") as opened:
        target = start(runner, "/bin/sleep", "1000", stdin=opened)
    node.unlink()
    os.mknod(node, 0o20600, os.makedev(1, 3))
    code, text, _ = runner.try_dump(target)
    assert code and "--evasive-devices" in text, text
    images, _ = dump(runner, target, "--evasive-devices")
    node.unlink()
    os.mknod(node, 0o20600, os.makedev(1, 5))
    code, text = criu(runner, "restore", "-d", "-D", images)
    assert code == 1 and "is the device 1:5 now, instead of 1:3" in text, text
    node.unlink()
    os.mknod(node, 0o20600, os.makedev(1, 3))
    back, _ = restore(runner, images, target)
    assert link(back, 0) == str(node)
    runner.kill(back)


def test_watched_files_are_searched_for(runner: Runner) -> None:
    """--force-irmap: not by file handle; among others in the folders that are named."""
    target = runner.start(Workload("watches", "file"))
    folder = str(runner.folder)
    images = runner.dump(target, "--force-irmap", "--irmap-scan-path", folder)
    shown = runner.firn("inspect", "--json", str(images))[1]
    assert "inotify" in shown
    back = runner.restore(images, target)
    runner.assert_right(back, "restored")
    runner.kill(back)


def test_a_controlling_terminal_without_a_descriptor(runner: Runner) -> None:
    """Refused; with --shell-job it is lost, and the log says so."""
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    process.returncode = 0
    target = Target(process.pid, None)
    code, text, _ = runner.try_dump(target)
    assert code and "has the controlling terminal 136:" in text and "--shell-job" in text, text
    images, text = dump(runner, target, "-j")
    assert "it comes back without" in text
    back, _ = restore(runner, images, target, "-j")
    assert Path(f"/proc/{back.pid}/stat").read_text().rpartition(")")[2].split()[4] == "0"
    runner.kill(back)
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize("path", ["/dev/console", "/dev/tty1", "/dev/ttyS0"])
def test_consoles_and_lines(runner: Runner, path: str) -> None:
    try:
        opened = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        pytest.skip(f"{path}: {error.strerror}")
    target = start(runner, "/bin/sleep", "1000", stdin=opened)
    os.close(opened)
    images, _ = dump(runner, target)
    back, _ = restore(runner, images, target)
    assert link(back, 0) == path
    flags = int(Path(f"/proc/{back.pid}/fdinfo/0").read_text().split("flags:")[1].split()[0], 8)
    assert flags & ~0o100000 == os.O_WRONLY | os.O_NONBLOCK
    runner.kill(back)


def test_a_foreign_namespace_is_refused(runner: Runner) -> None:
    process = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    path = f"/proc/{process.pid}/ns/net"
    try:
        wait_until("it has a namespace", lambda: os.readlink(path) != os.readlink("/proc/self/ns/net"))
        with open(path, "rb") as opened:
            target = start(runner, "/bin/sleep", "1000", stdin=opened)
            code, text, _ = runner.try_dump(target)
            assert code and f"is the namespace {os.readlink(path)}, in which neither" in text, text
            runner.kill(target)
    finally:
        process.kill()
        process.wait()


def test_the_processor_is_compared(runner: Runner) -> None:
    """cpuinfo dump and check; --cpu-cap on dump and restore."""
    folder = str(runner.folder)
    assert criu(runner, "cpuinfo", "dump", "-D", folder)[0] == 0
    assert criu(runner, "cpuinfo", "check", "-D", folder)[0] == 0
    assert criu(runner, "cpuinfo", "check", "-D", folder, "--cpu-cap=none")[0] == 0
    images = ImageDir.open(folder)
    entry = images.read_one("CPUINFO")["x86_entry"][0]
    images.close()
    assert entry["vendor_id"] in (1, 2) and entry["model_id"] in Path("/proc/cpuinfo").read_text()
    assert criu(runner, "cpuinfo", "dump", "-D", "/proc")[0] == 255
    target = start(runner, "/bin/sleep", "1000")
    made, _ = dump(runner, target)
    assert not (Path(made) / "cpuinfo.img").exists()
    code, text = criu(runner, "restore", "-d", "-D", made, "--cpu-cap")
    assert code == 1 and "cpuinfo.img is not there" in text, text
    back, _ = restore(runner, made, target, "--cpu-cap=none")
    made, _ = dump(runner, back, "--cpu-cap=all")
    back, _ = restore(runner, made, back, "--cpu-cap=all", "--log-pid", "--weak-sysctls")
    assert "restored with 1 threads, 3 descriptors" in Path(f"{runner.folder}/criu.log.{back.pid}").read_text()
    runner.kill(back)


def test_processors_that_do_not_match() -> None:
    mine = cpu.read()
    assert cpu.differences(mine, cpu.read(), 7) == []
    more = mine | {"capability": [*mine["capability"]]}
    more["capability"][9] |= 1 << 27
    assert not cpu.differences(more, mine, cpu.FPU)
    assert cpu.differences(more, mine, cpu.INS) == ["it lacks instructions (word 9, bits 0x8000000)"]
    assert not cpu.differences(mine, more, cpu.INS) and cpu.differences(mine, more, cpu.CPU)
    wider = mine | {"xfeatures_mask": 1 << 40, "xsave_size": 1}
    assert len(cpu.differences(wider, mine, cpu.FPU)) == 2 and not cpu.differences(wider, mine, cpu.INS)


def test_keys() -> None:
    assert inherit_key(PIPE, {"pipe_id": 5}) == "pipe:[5]"
    assert inherit_key(UNIXSK, {"ino": 5}) == "socket:[5]"
    assert inherit_key(REG, {"name": "/a/b"}) == "a/b"
    assert inherit_key(REG, {"name": "file[1:2]"}) == "file[1:2]"


def test_what_is_supplied_must_be_of_the_kind(pipes: list[int]) -> None:
    first, second = pipes[:2]
    given = Inherited([f"fd[{first}]:pipe:[5]", f"fd[{second}]:pipe:[5]", f"fd[{first}]:socket:[5]"])
    assert given.number("pipe:[5]") == first, "the first counts"
    assert not os.get_inheritable(first)
    with pytest.raises(FirnError, match=r"inherited for socket:\[5\], is no socket"):
        given.open("socket:[5]", UNIXSK, {"ino": 5})
    os.close(second)
    with pytest.raises(FirnError, match="descriptor"):
        Inherited([f"fd[{second}]:x"])


class Group:
    """A control group of our own with a freezer, of either version."""

    def __init__(self, version: int) -> None:
        top = Path("/sys/fs/cgroup/freezer" if version == 1 else "/sys/fs/cgroup/unified")
        if not top.is_dir():
            pytest.skip(f"no freezer of version {version}")
        self.path = top / f"firn-test-{os.getpid()}"
        self.path.mkdir()
        self.state = "freezer.state" if version == 1 else "cgroup.freeze"
        self.words = ("THAWED", "FROZEN") if version == 1 else ("0", "1")

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def frozen(self) -> bool:
        return (self.path / self.state).read_text().strip() == self.words[1]

    def freeze(self, frozen: bool) -> None:
        (self.path / self.state).write_text(self.words[frozen])
        wait_until("it freezes", lambda: self.frozen == frozen)

    def close(self) -> None:
        if self.frozen:
            self.freeze(False)
        for word in (self.path / "cgroup.procs").read_text().split():
            os.kill(int(word), signal.SIGKILL)
            os.waitpid(int(word), 0)
        wait_until("it is empty", lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()


@pytest.mark.parametrize("version", [1, 2])
def test_a_tree_is_frozen_by_its_control_group(runner: Runner, version: int) -> None:
    group = Group(version)
    target, stranger = start(runner, "/bin/sleep", "1000"), start(runner, "/bin/sleep", "1000")
    options = ("--freeze-cgroup", str(group.path))
    try:
        group.add(target.pid)
        group.add(stranger.pid)
        code, text, _ = runner.try_dump(target, "-R", *options)
        assert code == 0 and f"Unexpected process {stranger.pid} in the freezer cgroup" in text, text
        assert not group.frozen and target.state() == stranger.state() == "S"
        group.freeze(True)
        code, text, _ = runner.try_dump(target, "-R", *options)
        assert code == 0, text
        assert group.frozen, "it was frozen before"
        code, text, _ = runner.try_dump(target, "-R", "--fork-snapshot", *options)
        assert code and "needs a control group that is not frozen" in text and group.frozen, text
        for each in (target, stranger):
            assert "TracerPid:\t0" in Path(f"/proc/{each.pid}/status").read_text()
        images = runner.dump(target, *options)
        assert not group.frozen, "the tree is gone"
        back = runner.restore(images, target)
        runner.kill(back)
        code, text, _ = runner.try_dump(stranger, "--freeze-cgroup", "/sys")
        assert code == 1 and "no control group with a freezer" in text
    finally:
        group.close()
