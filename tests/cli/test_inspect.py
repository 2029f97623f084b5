"""``firn inspect``: on made-up checkpoints, on CRIU's where they are at hand, on firn's own, and on damaged ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli.runner import Runner as Command
from harness import Runner, firn_command
from hypothesis import given
from hypothesis import strategies as st
from workloads.table import Workload

from firn.cli.inspect import clean, ranges, render, size
from firn.errors import FirnError, ImageError
from firn.images.store import ImageDir
from firn.inspect import describe

GOLDEN = Path("/opt/firn-golden/images")
MODES = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.exists() else []
ROOT, CHILD, TWIN, DEAD = 300, 301, 302, 303
FOWN = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
NO_TIMER = {"isec": 0, "iusec": 0, "vsec": 0, "vusec": 0}


def core(comm: str, state: int = 1, **more: Any) -> dict[str, Any]:
    timers = {"real": NO_TIMER | {"vsec": 2, "vusec": 5, "isec": 1}, "virt": NO_TIMER, "prof": NO_TIMER}
    posix = {"it_id": 0, "clock_id": 1, "si_signo": 10, "it_sigev_notify": 0, "sival_ptr": 0, "overrun": 0}
    timers["posix"] = [posix | {"isec": 0, "insec": 0, "vsec": 0, "vnsec": 7}]  # type: ignore[assignment]
    tc = {"task_state": state, "exit_code": 0, "personality": 0, "flags": 0, "blk_sigset": 0, "comm": comm}
    thread = {"futex_rla": 0, "futex_rla_len": 0, "comm": comm}
    return {"mtype": 1, "tc": tc | {"timers": timers} | more, "thread_core": thread}


def regular(number: int, name: str, flags: int = 0, pos: int = 0) -> dict[str, Any]:
    reg = {"id": number, "flags": flags, "pos": pos, "fown": FOWN, "name": name}
    return {"type": 1, "id": number, "reg": reg}


FILES = [
    regular(1, "/bin/program"),
    regular(2, "/"),
    regular(3, "/data\x1b[31m", 0o2002, 77),
    {"type": 2, "id": 4, "pipe": {"id": 4, "pipe_id": 9, "flags": 1, "fown": FOWN}},
    {"type": 18, "id": 5, "memfd": {"id": 5, "flags": 2, "pos": 0, "fown": FOWN, "inode_id": 1}},
]


def vma(start: int, end: int, status: int, shmid: int = 0) -> dict[str, Any]:
    return {"start": start, "end": end, "pgoff": 0, "shmid": shmid, "prot": 3, "flags": 2, "status": status, "fd": -1}


def process(images: ImageDir, pid: int, table: int, comm: str, state: int = 1) -> None:
    images.write_one("CORE", core(comm, state), pid)
    images.write_one("IDS", {"vm_id": pid, "files_id": table, "fs_id": pid, "sighand_id": pid}, pid)
    images.write_one("FS", {"cwd_id": 2, "root_id": 2, "umask": 0o22}, pid)
    names = "start_code end_code start_data end_data start_stack start_brk brk arg_start arg_end env_start env_end"
    mm: dict[str, Any] = {f"mm_{name}": 0 for name in names.split()}
    vmas = [vma(0x1000, 0x3000, 0x201), vma(0x5000, 0x9000, 0x4081, 5), vma(0x9000, 0xA000, 0x10000)]
    images.write_one("MM", mm | {"exe_file_id": 1, "mm_saved_auxv": [], "vmas": vmas}, pid)
    runs = [{"vaddr": 0x1000, "compat_nr_pages": 0, "nr_pages": 2, "flags": 4}]
    images.write_all("PAGEMAP", [{"pages_id": 1}, *runs], pid)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tree of a root, a child, a stopped process that shares the child's descriptors, and a zombie."""
    folder = tmp_path / "images"
    folder.mkdir()
    with ImageDir.open(str(folder), create_files=True) as images:
        processes = [(ROOT, 0), (CHILD, ROOT), (TWIN, CHILD), (DEAD, ROOT)]
        images.write_all(
            "PSTREE",
            [{"pid": pid, "ppid": ppid, "pgid": ROOT, "sid": ROOT, "threads": [pid]} for pid, ppid in processes],
        )
        process(images, ROOT, 2, "root")
        process(images, CHILD, 3, "child")
        process(images, TWIN, 3, "twin", 3)
        images.write_one("CORE", core("dead", 2, exit_code=9), DEAD)
        images.write_all("FILES", FILES)
        images.write_all(
            "FDINFO", [{"id": 3 + (fd == 7), "flags": fd == 7, "type": 1 + (fd == 7), "fd": fd} for fd in (0, 1, 7)], 2
        )
        images.write_all("FDINFO", [{"id": 3, "flags": 0, "type": 1, "fd": 2}], 3)
        memfd = {"name": "shared", "uid": 0, "gid": 0, "size": 16384, "shmid": 8, "seals": 0, "inode_id": 1}
        images.write_all("MEMFD_INODE", [memfd])
        images.write_all("PAGEMAP_SHMEM", [{"pages_id": 2}, {"vaddr": 0, "compat_nr_pages": 3, "flags": 4}], 8)
        images.write_all("FILE_LOCKS", [{"flag": 1, "type": 5, "pid": ROOT, "fd": 1, "start": 5, "len": 5}])
        with images.writer("PIPES_DATA") as writer:
            writer.add({"pipe_id": 9, "bytes": 3})
            writer.payload(b"abc")
        images.commit({"img_version": 2, "fdinfo_per_id": True})
    return folder


def test_the_document(checkpoint: Path) -> None:
    found = describe(str(checkpoint))
    assert found["version"] == 1 and found["image_version"] == 2 and not found["parent"]
    assert found["stored_bytes"] == (3 * 2 + 3) * 4096 and found["parent_bytes"] == 0
    kinds = {"file": 1, "pipe": 1}
    assert found["counts"] == {"processes": 4, "zombies": 1, "threads": 3, "descriptors": 4, "kinds": kinds}
    root, child, twin, dead = found["processes"]
    assert (root["exe"], root["cwd"], root["umask"], root["state"]) == ("/bin/program", "/", 0o22, "running")
    assert root["memory"]["kinds"] == {
        "private": {"mappings": 1, "bytes": 0x2000},
        "shared memory": {"mappings": 1, "bytes": 0x4000},
    }
    assert root["memory"]["stored_bytes"] == 8192 and root["memory"]["shared"] == [1]
    assert root["descriptors"][2] == {"fd": 7, "file": 4, "kind": "pipe", "close_on_exec": True}
    assert [timer["clock"] for timer in root["timers"]] == ["itimer-real", "monotonic"]
    assert root["timers"][0]["next_ns"] == 2_000_005_000 and root["timers"][1]["next_ns"] == 7
    assert twin["state"] == "stopped" and twin["descriptor_table"] == child["descriptor_table"]
    assert dead == {
        "pid": DEAD, "ppid": ROOT, "pgid": ROOT, "sid": ROOT, "comm": "dead", "state": "zombie", "exit_signal": 9
    }  # fmt: skip
    data, pipe = found["files"]
    assert data["holders"] == [
        {"pid": ROOT, "fds": [0, 1]}, {"pid": CHILD, "fds": [2]}, {"pid": TWIN, "fds": [2]}
    ]  # fmt: skip
    assert (data["access"], data["position"], data["flags"]) == ("rw", 77, ["append"])
    assert (pipe["access"], pipe["pipe"], pipe["queued_bytes"]) == ("w", 9, 3)
    assert found["shared_memory"] == [
        {
            "inode": 1, "name": "shared", "bytes": 16384, "stored_bytes": 12288, "parent_bytes": 0,
            "mapped_by": [ROOT, CHILD, TWIN],
        }
    ]  # fmt: skip
    assert found["locks"] == [
        {
            "kind": "posix", "type": "write", "breaking": True, "pid": ROOT, "fd": 1, "start": 5, "length": 5,
            "name": "/data\x1b[31m",
        }
    ]  # fmt: skip


def test_the_text(checkpoint: Path) -> None:
    lines = render(describe(str(checkpoint)))
    text = "\n".join(lines)
    assert "4 processes (1 zombie); 3 threads; 4 descriptors (1 file, 1 pipe); 36.0 KiB of pages" in text
    assert f"{ROOT} root: running, group {ROOT}, session {ROOT}, 1 thread" in lines[3]
    assert any(line.startswith(f"├── {CHILD} child: running") for line in lines)
    assert any(line.startswith(f"│   └── {TWIN} twin: stopped") for line in lines)
    assert f"└── {DEAD} dead: zombie, ended by signal 9, group {ROOT}, session {ROOT}" in lines
    shared = f"shared with {CHILD}:2 {TWIN}:2"
    assert f"│   fds      0-1  file  /data\\x1b[31m, rw, append, at 77, {shared}" in lines
    assert "│            7    pipe  pipe:[9], w, 3 bytes queued" in lines
    assert f"        fds      those of process {CHILD}: one table" in text
    assert "│   locks    1  write posix from 5 to 9, breaking  /data\\x1b[31m" in lines
    assert "itimer-real: in 2.000 s, then every 1.000 s; signal 14" in text
    assert f"    shared: 16.0 KiB, 12.0 KiB stored, mapped by {ROOT} {CHILD} {TWIN}" in lines
    assert "\x1b" not in text


def test_the_command(checkpoint: Path, run: Command) -> None:
    done = run("firn", "inspect", str(checkpoint))
    assert done.returncode == 0 and not done.stderr and f"├── {CHILD} child" in done.stdout
    for words in (["inspect", "--json", str(checkpoint)], ["inspect", "-D", str(checkpoint), "--json"]):
        done = run("firn", *words)
        assert done.returncode == 0 and not done.stderr
        assert json.loads(done.stdout) == describe(str(checkpoint))


def test_other_locales(checkpoint: Path, run: Command) -> None:
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run("firn", "inspect", str(checkpoint), environment=environment)
    assert done.returncode == 0 and not done.stderr and f"{CHILD} child" in done.stdout


def test_mistakes(tmp_path: Path, run: Command) -> None:
    for words, message in (
        ((str(tmp_path),), "is no checkpoint: it has no inventory.img"),
        ((str(tmp_path / "gone"),), "cannot open the images directory"),
        ((str(tmp_path), "more"), "inspect takes one directory"),
    ):
        done = run("firn", "inspect", *words)
        assert done.returncode == 1 and not done.stdout and message in done.stderr
        assert len(done.stderr.splitlines()) <= 2


def test_criu_has_no_such_command(checkpoint: Path, run: Command) -> None:
    done = run("criu", "inspect", str(checkpoint))
    assert done.returncode == 1 and "unknown command: inspect" in done.stderr
    assert "inspect" not in done.stdout
    assert "unrecognized option '--json'" in run("criu", "check", "--json").stderr
    assert "inspect DIR" in run("firn", "--help").stdout


def changed(checkpoint: Path, kind: str, index: int | None = None, **values: Any) -> None:
    """Gives the first entry of an image other *values*."""
    with ImageDir.open(str(checkpoint), create_files=True) as images:
        entries = images.read_all(kind, index)
        entries[0].update(values)
        images.write_all(kind, entries, index)


@pytest.mark.parametrize(
    ("kind", "index", "values", "message"),
    [
        ("PSTREE", None, {"ppid": 5}, "process 300 comes before its parent 5"),
        ("PSTREE", None, {"pid": CHILD}, "twice|before its parent"),
        ("CORE", ROOT, {"tc": core("x", 77)["tc"]}, "task state 77"),
        ("MM", ROOT, {"exe_file_id": 99}, r"mm-300.img: file 99"),
        ("MM", ROOT, {"vmas": [vma(0x3000, 0x1000, 1)]}, "impossible mapping"),
        ("MM", ROOT, {"vmas": [vma(0x1000, 0x3000, 0x4081, 77)]}, "memfd 77"),
        ("FS", CHILD, {"cwd_id": 99}, "fs-301.img: file 99"),
        ("FDINFO", 2, {"id": 99}, r"fdinfo-2.img: file 99 \(descriptor 0\)"),
        ("FILE_LOCKS", None, {"fd": 99}, "no descriptor 99"),
    ],
)
def test_contradictions(checkpoint: Path, kind: str, index: int | None, values: dict[str, Any], message: str) -> None:
    changed(checkpoint, kind, index, **values)
    with pytest.raises(ImageError, match=message):
        describe(str(checkpoint))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"{name}.img") for name in ("pstree", "core-301", "mm-300", "fs-300", "ids-302")),
        ("pagemap-300", "page list of process 300"),
        ("files", "not in the file table"),
    ],
)
def test_a_missing_image_is_named(checkpoint: Path, name: str, message: str) -> None:
    (checkpoint / f"{name}.img").unlink()
    with pytest.raises(ImageError, match=message):
        describe(str(checkpoint))


def test_damage_is_an_error_or_is_shown(checkpoint: Path, tmp_path: Path) -> None:
    """Flipped and lost bytes anywhere: never anything but an error of firn's own."""
    chance = random.Random(7)
    names = sorted(path.name for path in checkpoint.iterdir() if not path.name.startswith("pages"))
    refused = 0
    for number in range(600):
        name = names[number % len(names)]
        path = checkpoint / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            if damaged and chance.random() < 0.7:
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            else:
                del damaged[chance.randrange(len(damaged) + 1) :]
        path.write_bytes(damaged)
        try:
            render(describe(str(checkpoint)))
        except FirnError:
            refused += 1
        path.write_bytes(whole)
    assert 100 < refused < 600


@pytest.mark.parametrize("mode", MODES)
def test_what_criu_wrote(mode: str, run: Command) -> None:
    done = run("firn", "inspect", str(GOLDEN / mode), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert render(found)
    living = [process for process in found["processes"] if process["state"] != "zombie"]
    assert all(process["exe"] == "/opt/firn-golden/golden" for process in living)
    assert all(process["descriptors"][0]["kind"] == "file" for process in living)
    pages = sum(path.stat().st_size for path in (GOLDEN / mode).glob("pages-*.img"))
    assert found["stored_bytes"] == pages
    if mode == "tree":
        assert found["counts"]["processes"] == 6 and found["counts"]["zombies"] == 1
    if mode == "threads":
        assert [thread["comm"] for thread in living[0]["threads"]].count("sleeper") == 1
    if mode == "tcp":
        assert [file["state"] for file in found["files"][1:]] == ["listening", "established", "established"]


@pytest.mark.skipif(not firn_command() or os.geteuid() != 0, reason="a dump needs firn and root")
def test_what_firn_writes(runner: Runner) -> None:
    """A dump of a tree with locks, and ``head`` on its text."""
    target = runner.start(Workload("locks", "tree"))
    images = runner.dump(target, "-l")
    code, output = runner.firn("inspect", str(images), "--json")
    found = json.loads(output)
    assert code == 0 and [process["ppid"] for process in found["processes"]] == [0, target.pid]
    assert sorted(lock["kind"] for lock in found["locks"]) == ["flock", "ofd", "posix", "posix"]
    assert {Path(lock["name"]).name for lock in found["locks"]} == {"data", "flocked", "described"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([str(firn_command()), "inspect", images], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141 and not done.stderr
    shutil.rmtree(images)


@pytest.mark.skipif(not firn_command() or os.geteuid() != 0, reason="a dump needs firn and root")
def test_threads_with_directories_of_their_own(runner: Runner) -> None:
    target = runner.start(Workload("apart", "chroot"))
    images = runner.dump(target)
    found = describe(str(images))
    first, *others = found["processes"][0]["threads"]
    assert "cwd" not in first and [thread["umask"] for thread in others] == [0o1, 0o2]
    place = f"{runner.folder}/own-0"
    assert (others[0]["cwd"], others[0]["root"]) == (place, f"{place}/root")
    assert any(line.endswith(f", in {place}, root {place}/root") for line in render(found))


@given(st.text())
def test_clean_text_is_printable(text: str) -> None:
    assert clean(text).isprintable() and (clean(text) == text) == text.isprintable()


@given(st.sets(st.integers(0, 300)))
def test_ranges(numbers: set[int]) -> None:
    back: set[int] = set()
    for part in ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        back |= set(range(int(first), int(last or first) + 1)) if first else set()
    assert back == numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1 << 20, "1.0 MiB"), (1 << 64, "16384.0 PiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
