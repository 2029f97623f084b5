"""Directories of images: reading, writing, and what happens when something is wrong with them."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from images.values import index_of, random_image, random_value, typed_kinds

from firn.errors import ImageError, UsageError
from firn.images import catalog, reader, wire
from firn.images.store import ImageDir, read_files

INVENTORY = {"img_version": 2}
PSTREE = {"pid": 1, "ppid": 0, "pgid": 1, "sid": 1, "threads": [1]}


@pytest.fixture
def images(tmp_path: Path) -> Iterator[ImageDir]:
    with ImageDir.open(str(tmp_path), create_files=True) as directory:
        yield directory


def _write(images: ImageDir, kind: catalog.Kind, entries: list[tuple[str, dict[str, Any], bytes]]) -> None:
    if kind.name == "INVENTORY":
        images.commit(entries[0][1])
        return
    with images.writer(kind.name, index_of(kind)) as writer:
        for message, entry, payload in entries:
            writer.add(entry, message if message in catalog.INNER.values() else "")
            if payload:
                writer.payload(payload)


@pytest.mark.parametrize("name", typed_kinds())
def test_written_and_read(name: str, images: ImageDir) -> None:
    kind, rng = catalog.kind(name), random.Random(name)
    for _ in range(5):
        entries = random_image(kind, rng)
        if name == "INVENTORY":
            entries[0][1]["img_version"] = 2
        _write(images, kind, entries)
        assert images.exists(name, index_of(kind))
        read = images.read_with_payload(name, index_of(kind))
        assert [(entry, images.read_payload(ref, 1000)) for entry, ref in read] == [row[1:] for row in entries]
        assert images.read_all(name, index_of(kind)) == [row[1] for row in entries]
        assert images.read_one(name, index_of(kind)) == entries[0][1]


def test_layout_of_a_file(images: ImageDir, tmp_path: Path) -> None:
    images.write_all("IPCNS_SEM", [], 3)
    assert (tmp_path / "ipcns-sem-3.img").read_bytes() == bytes.fromhex("19435654 19305759")
    with images.writer("PIPES_DATA") as writer:
        writer.add({"pipe_id": 1, "bytes": 3, "size": 4})
        writer.payload(b"ab")
        writer.payload(memoryview(bytearray(b"c")))
        writer.add({"pipe_id": 2, "bytes": 0})
    assert (tmp_path / "pipes-data.img").read_bytes() == bytes.fromhex(
        "19435654 09374556 06000000 080110031804 616263 04000000 08021000"
    )
    images.write_one("STATS_DUMP", {})
    assert (tmp_path / "stats-dump").read_bytes() == bytes.fromhex("40591055 06330957 00000000")
    images.commit(INVENTORY)
    assert (tmp_path / "inventory.img").read_bytes() == bytes.fromhex("16313158 02000000 0802")


def test_large_files(images: ImageDir, tmp_path: Path) -> None:
    """Many entries and large payloads: more than one buffer."""
    entries = [{**PSTREE, "pid": number} for number in range(100_000)]
    images.write_all("PSTREE", entries)
    assert images.read_all("PSTREE") == entries
    data = random.Random(1).randbytes(3 << 20)
    (tmp_path / "source").write_bytes(data)
    with open(tmp_path / "source", "rb") as source, images.writer("FIFO_DATA") as writer:
        writer.add({"pipe_id": 1, "bytes": len(data) - 5})
        writer.payload((source.fileno(), 5, len(data) - 5))
        writer.add({"pipe_id": 2, "bytes": len(data)})
        writer.payload(data)
    (_, first), (_, second) = images.read_with_payload("FIFO_DATA")
    assert images.read_payload(first, len(data)) == data[5:]
    assert images.read_payload(second, len(data)) == data


def test_permissions(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("SECCOMP", {})
    os.close(images.open_raw("pages-1.img", os.O_WRONLY | os.O_CREAT))
    images.commit(INVENTORY)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UsageError, match=path.name):
            ImageDir.open(str(path))
    with pytest.raises(UsageError):
        ImageDir.open("a\0b")
    with ImageDir.open(str(tmp_path)) as images, pytest.raises(ImageError, match="reading only"):
        images.write_one("SECCOMP", {})


def test_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *path, **how: False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError, match="cannot create files"):
        ImageDir.open(str(tmp_path), create_files=True)
    assert os.listdir("/proc/self/fd") == before
    ImageDir.open(str(tmp_path)).close()


def test_links_are_not_followed(images: ImageDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("seccomp.img", "pages-1.img", "inventory.img", "inventory.img.new"):
        (tmp_path / name).symlink_to(victim)
    for call in (lambda: images.read_one("INVENTORY"), lambda: images.open_raw("pages-1.img", os.O_RDONLY)):
        with pytest.raises(ImageError, match="symbolic link"):
            call()
    images.write_one("SECCOMP", {})
    os.close(images.open_raw("pages-1.img", os.O_RDWR | os.O_CREAT))
    images.commit(INVENTORY)
    assert victim.read_text() == "precious"
    assert not any((tmp_path / name).is_symlink() for name in ("seccomp.img", "pages-1.img", "inventory.img"))


def test_old_files_are_replaced_not_overwritten(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("SECCOMP", {})
    os.link(tmp_path / "seccomp.img", tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    images.write_one("SECCOMP", {"seccomp_filters": [{"filter": b"x", "prev": 1}]})
    assert (tmp_path / "other").read_bytes() == before


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(make: Any, images: ImageDir, tmp_path: Path) -> None:
    make(tmp_path / "seccomp.img")
    with pytest.raises(ImageError, match=r"seccomp\.img: not a regular file"):
        images.read_one("SECCOMP")


def test_names_stay_in_the_directory(images: ImageDir) -> None:
    for name in ("../seccomp.img", "/etc/passwd", "a\0b", "..", "."):
        with pytest.raises(ImageError):
            images.open_raw(name, os.O_RDONLY)
        with pytest.raises(ImageError, match="no name"):
            images.open_raw(name, os.O_RDWR | os.O_CREAT)
    with pytest.raises(ImageError, match="no name"):
        images.open_raw("page-1.img", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ImageError, match="missing"):
        images.open_raw("pages-1.img", os.O_RDWR)


def test_missing_and_empty_files(images: ImageDir, tmp_path: Path) -> None:
    assert images.read_all("FILES") == [] and images.read_with_payload("SK_QUEUES") == []
    assert not images.exists("FILES")
    with pytest.raises(ImageError, match=r"files\.img: missing"):
        images.read_one("FILES")
    images.write_all("FILES", [])
    assert images.read_all("FILES") == []
    with pytest.raises(ImageError, match=r"files\.img: cut short"):
        images.read_one("FILES")
    (tmp_path / "files.img").write_bytes(b"")
    with pytest.raises(ImageError, match=r"files\.img: cut short"):
        images.read_all("FILES")


def test_wrong_use_of_kinds(images: ImageDir) -> None:
    for kind, index in (("NONE", None), ("PAGES", 1), ("CORE", None), ("FILES", 1)):
        with pytest.raises(ImageError):
            images.read_all(kind, index)
        with pytest.raises(ImageError):
            images.write_all(kind, [], index)
    with pytest.raises(ImageError, match="commit"):
        images.write_one("INVENTORY", INVENTORY)
    with images.writer("GHOST_FILE", 1) as writer, pytest.raises(ImageError, match="belong"):
        writer.add({}, "core_entry")


def test_versions(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("PSTREE", PSTREE)
    new = (tmp_path / "pstree.img").read_bytes()
    for version, data, good in ((2, new, True), (2, new[4:], False), (1, new, False), (1, new[4:], True)):
        images.commit({"img_version": version})
        (tmp_path / "pstree.img").write_bytes(data)
        with ImageDir.open(str(tmp_path)) as again:
            if good:
                assert again.read_one("PSTREE") == PSTREE
            else:
                with pytest.raises(ImageError, match=r"pstree\.img"):
                    again.read_one("PSTREE")
    (tmp_path / "inventory.img").unlink()
    for data in (new, new[4:]):
        (tmp_path / "pstree.img").write_bytes(data)
        with ImageDir.open(str(tmp_path)) as again:
            assert again.read_one("PSTREE") == PSTREE
    images.commit({"img_version": 3})
    with ImageDir.open(str(tmp_path)) as again, pytest.raises(ImageError, match="version 3"):
        again.read_all("PSTREE")


def test_work_directory_needs_no_version(images: ImageDir) -> None:
    images.commit({"img_version": 3})
    images.write_one("STATS_RESTORE", {})
    assert images.read_one("STATS_RESTORE") == {}


def test_other_magics(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("SECCOMP", {})
    shutil.copy(tmp_path / "seccomp.img", tmp_path / "cgroup.img")
    with pytest.raises(ImageError, match=r"cgroup\.img: another kind"):
        images.read_one("CGROUP")
    (tmp_path / "inventory.img").write_bytes((tmp_path / "seccomp.img").read_bytes())
    with pytest.raises(ImageError, match=r"inventory\.img"):
        images.read_one("INVENTORY")


def test_single_images_may_have_more(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("FS", {"cwd_id": 1, "root_id": 2}, 5)
    with open(tmp_path / "fs-5.img", "ab") as file:
        file.write(b"garbage")
    assert images.read_all("FS", 5) == [{"cwd_id": 1, "root_id": 2}]
    assert len(images.read_with_payload("FS", 5)) == 1


def test_payload_is_as_long_as_said(images: ImageDir) -> None:
    for data in (b"", b"ab", b"abcd"):
        error = pytest.raises(ImageError, match=r"pipes-data\.img: . bytes of payload .* 3")
        with error, images.writer("PIPES_DATA") as writer:
            writer.add({"pipe_id": 1, "bytes": 3})
            writer.payload(data)
            writer.add({"pipe_id": 2, "bytes": 0})
    with pytest.raises(ImageError, match="payload"), images.writer("PIPES_DATA") as writer:
        writer.payload(b"early")
    with pytest.raises(ImageError, match="payload"), images.writer("FILES") as writer:
        writer.add(random_value("file_entry", random.Random(1)))
        writer.payload(b"x")
    with images.writer("IPCNS_SEM", 1) as writer:  # the padding may also come from the caller
        writer.add({"desc": random_value("ipc_desc_entry", random.Random(1)), "nsems": 1})
        writer.payload(bytes(8))
    assert images.read_with_payload("IPCNS_SEM", 1)[0][1].length == 2


def test_sources_that_cannot_be_sent(images: ImageDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"0123456789" * 1000)

    def no_sendfile(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "cannot be sent")

    monkeypatch.setattr(os, "sendfile", no_sendfile)
    with open(tmp_path / "source", "rb") as source:
        with images.writer("PIPES_DATA") as writer:
            writer.add({"pipe_id": 1, "bytes": 9000})
            writer.payload((source.fileno(), 500, 9000))
        assert images.read_payload(images.read_with_payload("PIPES_DATA")[0][1], 9000) == b"0123456789" * 900
        with pytest.raises(ImageError, match="ended 1 bytes early"), images.writer("PIPES_DATA") as writer:
            writer.add({"pipe_id": 1, "bytes": 10001})
            writer.payload((source.fileno(), 0, 10001))


def test_short_source(images: ImageDir, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    error = pytest.raises(ImageError, match="ended 2 bytes early")
    with open(tmp_path / "source", "rb") as source, error, images.writer("PIPES_DATA") as writer:
        writer.add({"pipe_id": 1, "bytes": 5})
        writer.payload((source.fileno(), 0, 5))


def test_short_writes_are_finished(images: ImageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    images.write_all("PSTREE", [PSTREE] * 10)
    assert images.read_all("PSTREE") == [PSTREE] * 10


@pytest.fixture
def full_disk() -> Iterator[None]:
    """A limit on the size of files: what goes over it fails as on a full disk (SIGXFSZ is ignored by Python)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.usefixtures("full_disk")
def test_full_disk(images: ImageDir, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pstree\.img: cannot be written"):
        images.write_all("PSTREE", [PSTREE] * 2000)
    error = pytest.raises(ImageError, match=r"pipes-data\.img: cannot be written")
    with open("/proc/self/exe", "rb") as source, error, images.writer("PIPES_DATA") as writer:
        writer.add({"pipe_id": 1, "bytes": 20_000})
        writer.payload((source.fileno(), 0, 20_000))
    images.abort()
    assert list(tmp_path.iterdir()) == []


def test_abort_removes_what_was_made(images: ImageDir, tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_text("old")
    images.write_one("SECCOMP", {})
    images.write_one("SECCOMP", {})
    os.close(images.open_raw("pages-1.img", os.O_RDWR | os.O_CREAT))
    with pytest.raises(ImageError):
        images.write_one("PSTREE", {"pid": 1})
    with pytest.raises(ImageError):
        images.commit({})
    os.unlink(tmp_path / "seccomp.img")
    images.abort()
    assert [file.name for file in tmp_path.iterdir()] == ["core-1.img"]


def test_abort_after_commit_keeps_the_checkpoint(images: ImageDir, tmp_path: Path) -> None:
    images.write_one("SECCOMP", {})
    images.commit(INVENTORY)
    images.abort()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["inventory.img", "seccomp.img"]


def test_clear_old_removes_only_images(images: ImageDir, tmp_path: Path) -> None:
    kept = ["notes.txt", "core-1.img.bak", "core-x.img", "stats-restore", "irmap-cache", "dump.log"]
    gone = ["core-12.img", "pages-3.img", "ghost-file-1f.img", "tmpfs-dev-44.tar.gz.img", "signal-s-3.img", "files.img"]
    for name in [*kept, *gone, "inventory.img", "inventory.img.new"]:
        (tmp_path / name).touch()
    (tmp_path / "parent").symlink_to("..")
    (tmp_path / "mm-1.img").symlink_to("notes.txt")
    images.clear_old()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*kept, "parent"])


def test_what_cannot_be_removed(images: ImageDir, tmp_path: Path) -> None:
    (tmp_path / "core-1.img").mkdir()
    with pytest.raises(ImageError, match=r"core-1\.img: cannot be removed"):
        images.clear_old()
    with pytest.raises(ImageError, match=r"core-1\.img: cannot be removed"):
        images.write_one("CORE", {"mtype": 1}, 1)
    images.abort()


def test_parent(images: ImageDir, tmp_path: Path) -> None:
    assert images.parent() is None
    (tmp_path / "parent").symlink_to("first")
    with pytest.raises(ImageError, match="parent"):
        images.parent()
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "seccomp.img").write_bytes(bytes.fromhex("19435654 49304164 00000000"))
    parent = images.parent()
    assert parent is not None
    with parent:
        assert parent.read_one("SECCOMP") == {"seccomp_filters": []}


def test_no_descriptor_is_left_open(images: ImageDir, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    images.write_one("PSTREE", PSTREE)
    images.read_one("PSTREE")
    (tmp_path / "files.img").write_bytes(b"broken image")
    (tmp_path / "core-1.img").mkdir()
    for call in (
        lambda: images.read_one("FILES"),
        lambda: images.read_one("CORE", 1),
        lambda: images.write_one("MM", {}, 1),
        lambda: images.commit({}),
    ):
        with pytest.raises(ImageError):
            call()
    assert os.listdir("/proc/self/fd") == before


def test_entries_that_could_not_be_read_back(images: ImageDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("firn.images.writer.MAX_ENTRY", 100)
    with pytest.raises(ImageError, match="at most 100"):
        images.write_one("TTY_DATA", {"tty_id": 1, "data": bytes(100)})
    monkeypatch.undo()
    images.write_one("TTY_DATA", {"tty_id": 1, "data": bytes(100)})
    monkeypatch.setattr(reader, "MAX_ENTRY", 100)
    with pytest.raises(ImageError, match=r"tty-data\.img: an entry of"):
        images.read_one("TTY_DATA")


# --- the file table ---------------------------------------------------------------------------------------------------


def test_every_type_of_file_has_an_id() -> None:
    from firn.images import schema

    for field in schema.fields("file_entry")[2:]:
        assert "id" in {inner.name for inner in schema.fields(field.type)}


def _file(kind: str, number: int, **more: Any) -> dict[str, Any]:
    return {**random_value(catalog.kind(kind).message, random.Random(kind)), "id": number, **more}


def test_old_files_images(images: ImageDir) -> None:
    """Version 1 of the format had one image per type of file."""
    expected = {}
    kinds = [
        "REG_FILES", "PIPES", "FIFO", "INETSK", "UNIXSK", "EVENTFD_FILE", "EVENTPOLL_FILE", "INOTIFY_FILE", "SIGNALFD",
        "PACKETSK", "TTY_FILES", "FANOTIFY_FILE", "NETLINK_SK", "NS_FILES", "TUNFILE", "EXT_FILES", "TIMERFD",
    ]  # fmt: skip
    for type_, kind in [*enumerate(kinds, 1), (20, "PIDFD")]:
        entry = _file(kind, type_)
        images.write_one(kind, entry)
        expected[type_, type_] = entry
    for kind, owner, field in (("EVENTPOLL_TFD", 7, "tfd"), ("INOTIFY_WD", 8, "wd"), ("FANOTIFY_MARK", 12, "mark")):
        record = _file(kind, owner)
        images.write_one(kind, record)
        expected[owner, owner][field] = [*expected[owner, owner][field], record]
    found = read_files(images)
    assert found.keys() == expected.keys()
    for key, entry in found.items():
        assert next(item for name, item in entry.items() if name not in ("type", "id")) == expected[key]
        assert wire.encode("file_entry", entry)
    images.write_one("FILES", {"type": 1, "id": 77, "reg": _file("REG_FILES", 77)})
    assert set(read_files(images)) == {(1, 77)}


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([{"type": 1, "id": 1}], "'reg'"),
        ([{"type": 1, "id": 1, "reg": _file("REG_FILES", 2)}], "'reg'"),
        ([{"type": 2, "id": 1, "reg": _file("REG_FILES", 1)}], "'pipe'"),
        ([{"type": 99, "id": 1}], "type 99"),
        ([{"type": 1, "id": 1, "reg": _file("REG_FILES", 1)}] * 2, "twice"),
    ],
)
def test_damaged_file_tables(entries: list[dict[str, Any]], text: str, images: ImageDir) -> None:
    images.write_all("FILES", entries)
    with pytest.raises(ImageError, match=text):
        read_files(images)


def test_old_record_without_owner(images: ImageDir) -> None:
    images.write_one("INOTIFY_WD", _file("INOTIFY_WD", 5))
    with pytest.raises(ImageError, match=r"inotify-wd\.img.* 5"):
        read_files(images)
