"""The table of image kinds."""

from __future__ import annotations

import random

import pytest
from images.shared import reference
from images.values import index_of, random_entry

from firn.errors import ImageError
from firn.images import catalog, schema

_RENAMED = {"SHMEM_PAGEMAP": "PAGEMAP_SHMEM"}
_PAYLOADS = {
    "bytes", "length", "len bytes", "ghost", "inq_len then outq_len", "keys_bytes then values_bytes",
    "size padded to 4, only when in_pagemaps is not true", "qnum times: framed ipc_msg + msize bytes padded to 8",
    "nsems u16 padded to 8",
}  # fmt: skip


def test_names_and_files() -> None:
    messages = schema.names()[0]
    seen = set()
    for name in catalog.names():
        kind = catalog.kind(name)
        index = index_of(kind)
        file = kind.file(index)
        assert file not in seen
        seen.add(file)
        assert catalog.identify(file) == (kind, index)
        assert bool(kind.message) == bool(kind.magic) == (kind.shape != catalog.RAW)
        assert not kind.message or {kind.message, kind.rest} <= set(messages)


def test_indices() -> None:
    assert catalog.kind("GHOST_FILE").file(31) == "ghost-file-1f.img"
    assert catalog.kind("TMPFS_DEV").file(44) == "tmpfs-dev-44.tar.gz.img"
    assert catalog.identify("ghost-file-1f.img") == (catalog.kind("GHOST_FILE"), 31)
    assert catalog.identify("tmpfs-dev-44.tar.gz.img") == (catalog.kind("TMPFS_DEV"), 44)
    for wrong in (("CORE", None), ("FILES", 1), ("CORE", -1), ("NO_SUCH", None)):
        with pytest.raises(ImageError, match=wrong[0]):
            catalog.kind(wrong[0]).file(wrong[1])


@pytest.mark.parametrize(
    "name",
    ["core-.img", "core-01.img", "core-+1.img", "core-1_0.img", "core- 1.img", "core-x.img", "core-1.img.bak",
     "core.img", "ghost-file-1F.img", "ghost-file-0x1.img", "core-\u0661.img", "core-1", "", "-", ".", "a/core-1.img",
     "parent", "core-123456789012345678901.img", "dump.log", "files-1.img", "inventory.img.new"],
)  # fmt: skip
def test_other_names_are_no_images(name: str) -> None:
    assert catalog.identify(name) is None


def test_payload_lengths() -> None:
    assert catalog.payload("ipc_sem_entry", {"nsems": 3}) == (6, 8)
    assert catalog.payload("ipc_msg", {"msize": 8}) == (8, 8)
    assert catalog.payload("ipc_shm_entry", {"size": 5}) == (5, 8)
    assert catalog.payload("ipc_shm_entry", {"size": 5, "in_pagemaps": True}) == (0, 0)
    assert catalog.payload("tcp_stream_entry", {"inq_len": 2, "outq_len": 3}) == (5, 5)
    assert catalog.payload("ghost_file_entry", {"mode": 0o100644}) is None
    assert catalog.payload("ghost_file_entry", {"mode": 0o100644, "chunks": True}) == (0, 0)
    assert catalog.payload("ghost_file_entry", {"mode": 0o010644}) == (0, 0)
    assert catalog.payload("core_entry", {}) == (0, 0)
    assert catalog.inner("ghost_file_entry", {"chunks": True}) == ("ghost_chunk_entry", None)
    assert catalog.inner("ghost_file_entry", {"chunks": False}) == ("", 0)
    assert catalog.inner("ipc_msg_entry", {"qnum": 4}) == ("ipc_msg", 4)


def test_complete() -> None:
    """Every image of CRIU 4.2."""
    known = {_RENAMED.get(image["name"], image["name"]): image for image in reference()["images"]}
    stats = known.pop("STATS")
    for file in stats["file"].split(" / "):
        known[file.upper().replace("-", "_")] = {**stats, "file": file}
    chunk = known.pop("GHOST_CHUNK")
    assert chunk["message"] == catalog.INNER["ghost_file_entry"]
    assert set(known) == set(catalog.names())
    for name, image in known.items():
        kind = catalog.kind(name)
        index = index_of(kind)
        assert kind.file(index) == image["file"].replace("%lu", "%u").replace("%u", "26").replace("%x", "1a")
        assert kind.shape == image["kind"].removeprefix("head+")
        assert kind.magic == int(image["magic"] or "0", 16)
        assert kind.message == image.get("message", "")
        if "head" in image:
            assert kind.head == int(image["head"], 16)
        assert image.get("payload", "bytes") in _PAYLOADS
        assert kind.payload == ("payload" in image)
        if kind.payload:
            random_entry(kind.message, random.Random(1))
