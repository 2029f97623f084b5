"""Damaged images of every kind: an ImageError or a value, nothing else, in little time and memory."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from images.values import index_of, random_image, typed_kinds

import firn
from firn.errors import ImageError
from firn.images import catalog
from firn.images.pages import PagemapReader
from firn.images.store import ImageDir, read_files

_HOSTILE = [b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x04", b"\x00\x00\x00\x80", b"\x00" * 4]
"""Sizes of entries that the file does not have."""


def _valid(kind: catalog.Kind, directory: Path, seed: str) -> bytes:
    entries = random_image(kind, random.Random(seed))
    with ImageDir.open(str(directory), create_files=True) as images:
        if kind.name == "INVENTORY":
            images.commit({**entries[0][1], "img_version": 2})
        else:
            with images.writer(kind.name, index_of(kind)) as writer:
                for message, entry, payload in entries:
                    writer.add(entry, message if message in catalog.INNER.values() else "")
                    writer.payload(payload)
    return (directory / kind.file(index_of(kind))).read_bytes()


def _damaged(data: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(25):
        yield data[: rng.randrange(len(data))]
    for _ in range(50):
        at = rng.randrange(len(data))
        yield data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
    for size in _HOSTILE:
        yield data[:8] + size + data[12:]
        at = rng.randrange(8, len(data) + 1)
        yield data[:at] + size + data[at:]
    yield data + rng.randbytes(9)
    yield data[:12] + rng.randbytes(len(data) - 12)


def _read(images: ImageDir, kind: catalog.Kind) -> None:
    index = index_of(kind)
    for call in (images.read_one, images.read_all):
        try:
            call(kind.name, index)
        except ImageError as error:
            assert kind.file(index) in str(error) or kind.name == "INVENTORY"
    try:
        size = os.stat(kind.file(index), dir_fd=images.fd).st_size
        for _, ref in images.read_with_payload(kind.name, index):
            assert min(ref.offset, ref.length) >= 0 and ref.offset + ref.length <= size
        if kind.name.startswith("PAGEMAP"):
            PagemapReader(images, kind.name, index or 0).close()
        read_files(images)
    except ImageError:
        pass


@pytest.mark.parametrize("name", typed_kinds())
def test_damaged(name: str, tmp_path: Path) -> None:
    kind, rng = catalog.kind(name), random.Random(f"fuzz {name}")
    path = tmp_path / kind.file(index_of(kind))
    start = time.process_time()
    for round_ in range(3):
        data = _valid(kind, tmp_path, f"{name} {round_}")
        for damaged in _damaged(data, rng):
            path.write_bytes(damaged)
            with ImageDir.open(str(tmp_path)) as images:
                _read(images, kind)
    assert time.process_time() - start < 10


_SAMPLE = ("FILES", "MM", "SECCOMP", "CGROUP", "PAGEMAP", "SK_QUEUES", "GHOST_FILE", "IPCNS_MSG", "STATS_DUMP")

_HUGE = """
import os, resource, sys
sys.path[:0] = sys.argv[2:]
from firn.errors import ImageError
from firn.images import catalog
from firn.images.store import ImageDir
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
with ImageDir.open(sys.argv[1]) as images:
    for name in os.listdir(images.fd):
        kind, index = catalog.identify(name)
        for call in (images.read_one, images.read_all, images.read_with_payload):
            try:
                call(kind.name, index)
            except ImageError:
                pass
print("fine")
"""


@pytest.mark.parametrize("size", [b"", *_HOSTILE, b"\x00\x00\x00\x02"])
def test_huge_sparse_files(size: bytes, tmp_path: Path) -> None:
    """A terabyte of nothing behind a valid beginning: neither read nor allocated."""
    for kind in map(catalog.kind, _SAMPLE):
        path = tmp_path / kind.file(index_of(kind))
        data = _valid(kind, tmp_path, kind.name)
        path.write_bytes(data[:8] + size if size else data)
        os.truncate(path, 1 << 40)
    source = str(Path(firn.__file__).parents[1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _HUGE, str(tmp_path), source], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "fine\n", done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 20
