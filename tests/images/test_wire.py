"""The wire format: against the protobuf library both ways, and what must be refused."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images.oracle import Oracle
from images.values import random_value

from firn.errors import ImageError
from firn.images import schema, wire

MESSAGES = schema.names()[0]
SEEDS = st.integers(0, 2**32 - 1)
CALM = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="module")
def packing() -> Oracle:
    return Oracle(packed=True)


@pytest.fixture(scope="module")
def criu() -> Oracle:
    return Oracle(extensions=False)


@pytest.mark.parametrize("message", MESSAGES)
@CALM
@given(seed=SEEDS)
def test_differential(message: str, seed: int, oracle: Oracle, packing: Oracle) -> None:
    value = random_value(message, random.Random(seed))
    data = wire.encode(message, value)
    assert data == oracle.encode(message, value)
    assert wire.decode(message, data) == value == oracle.decode(message, data)
    assert wire.decode(message, memoryview(packing.encode(message, value))) == value


@pytest.mark.parametrize("message", MESSAGES)
def test_every_field(message: str, oracle: Oracle) -> None:
    value = random_value(message, random.Random(message), full=True)
    assert {field.name for field in schema.fields(message)} == set(value)
    assert wire.encode(message, value) == oracle.encode(message, value)
    assert wire.decode(message, oracle.encode(message, value)) == value


def test_criu_skips_and_keeps_our_fields(criu: Oracle) -> None:
    for message in MESSAGES:
        rng = random.Random(message)
        value = random_value(message, rng, full=True)
        data = wire.encode(message, value)
        plain = random_value(message, random.Random(message), full=True, extensions=False)
        assert criu.recode(message, data) == data
        assert set(criu.decode(message, data)) == set(plain)


@given(raw=st.binary().filter(lambda raw: b"\0" not in raw))
def test_strings_are_file_names(raw: bytes) -> None:
    data = wire.encode("aa_policy", {"name": raw.decode("utf-8", "surrogateescape"), "blob": b"\0"})
    assert raw in data
    value = wire.decode("aa_policy", data)
    assert value["name"].encode("utf-8", "surrogateescape") == raw
    assert wire.encode("aa_policy", value) == data


@given(raw=st.lists(st.binary(max_size=300), max_size=5))
def test_decoding_random_bytes(raw: list[bytes]) -> None:
    data = b"".join(raw)
    for message in ("core_entry", "cgroup_entry", "inventory_entry", "CRIU_Opts"):
        try:
            value = wire.decode(message, data)
        except ImageError as error:
            assert str(error)
        else:
            assert wire.decode(message, wire.encode(message, value)) == value


PSTREE = {"pid": 1, "ppid": 0, "pgid": 1, "sid": 1, "threads": [1]}


def test_unknown_fields_keep_their_place() -> None:
    known = wire.encode("core_entry", {"mtype": 1})
    sixth = wire.encode("core_entry", {"mtype": 1, "ti_arm": _arm()})[len(known) :]
    eighth = wire.encode("core_entry", {"mtype": 1, "ti_aarch64": _aarch64()})[len(known) :]
    for unknown in (b"\x38\x05", b"\x3a\x02hi", b"\x39" + bytes(8), b"\x3d" + bytes(4), b"\x38\x05\x3a\x00"):
        data = known + sixth + unknown + eighth
        value = wire.decode("core_entry", data)
        assert b"".join(value[wire.UNKNOWN]) == unknown
        assert wire.encode("core_entry", value) == data
    high = known + eighth + b"\xf8\xff\xff\xff\x0f\x01"
    assert wire.encode("core_entry", wire.decode("core_entry", high)) == high


def _arm() -> dict[str, object]:
    return random_value("thread_info_arm", random.Random(1))


def _aarch64() -> dict[str, object]:
    return random_value("thread_info_aarch64", random.Random(1))


@pytest.mark.parametrize(
    "raw", [[b"\x08\x01"], [b"\x38"], [b"\x38\x01\x38"], [b""], ["x"], [b"\x3b"], [None], 5, [b"\x07"], [b"\x02\x01"]]
)
def test_bad_raw_fields_are_refused(raw: object) -> None:
    with pytest.raises(ImageError, match="core_entry"):
        wire.encode("core_entry", {"mtype": 1, "": raw})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({**PSTREE, "tread": 1}, "tread"),
        ({**PSTREE, "pid": None}, "pid"),
        ({**PSTREE, "threads": None}, "threads"),
        ({k: v for k, v in PSTREE.items() if k != "sid"}, "sid"),
        ({**PSTREE, "pid": -1}, "pid: -1"),
        ({**PSTREE, "pid": 2**32}, "pid: 4294967296"),
        ({**PSTREE, "pid": "1"}, "pid"),
        ({**PSTREE, "pid": 1.0}, "pid"),
        ({**PSTREE, "pid": 1000.0}, "pid"),
        ({**PSTREE, "threads": 1}, "threads"),
        ({**PSTREE, "threads": ["1"]}, "threads"),
        ({**PSTREE, "threads": "12"}, "threads"),
    ],
)
def test_wrong_values_are_refused(value: dict[str, object], text: str) -> None:
    with pytest.raises(ImageError, match=rf"pstree_entry.*{text}"):
        wire.encode("pstree_entry", value)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("sa_entry", {"sigaction": 0, "flags": 0, "restorer": 0, "mask": 0, "compat_sigaction": 2}),
        ("siginfo_entry", {"siginfo": "text"}),
        ("siginfo_entry", {"siginfo": 5}),
        ("siginfo_entry", {"siginfo": [1, 2]}),
        ("aa_policy", {"name": b"bytes", "blob": b""}),
        ("aa_policy", {"name": "a\0b", "blob": b""}),
        ("aa_policy", {"name": "\ud800", "blob": b""}),
        ("core_entry", {"mtype": 2**31}),
        ("core_entry", {"mtype": 1, "tc": 5}),
        ("core_entry", {"mtype": 1, "tc": []}),
        ("core_entry", {"mtype": 1, "tc": {"task_state": 1}}),
        ("seccomp_entry", {"seccomp_filters": {"filter": b""}}),
    ],
)
def test_wrong_types_are_refused(message: str, value: dict[str, object]) -> None:
    with pytest.raises(ImageError):
        wire.encode(message, value)


def test_unknown_message() -> None:
    with pytest.raises(ImageError, match="no_such"):
        wire.encode("no_such", {})
    with pytest.raises(ImageError, match="no_such"):
        wire.decode("no_such", b"")


@pytest.mark.parametrize(
    ("message", "data", "text"),
    [
        ("pstree_entry", b"\x08", "cut short"),
        ("pstree_entry", b"\x08\x80", "cut short"),
        ("pstree_entry", b"\x88", "cut short"),
        ("pstree_entry", b"\x08\x01", "pgid, ppid, sid"),
        ("pstree_entry", b"\x08\x80\x80\x80\x80\x10", "4294967296"),
        ("pstree_entry", b"\x08" + b"\xff" * 9 + b"\x02", "64 bits"),
        ("pstree_entry", b"\x08" + b"\x80" * 4096 + b"\x00", "ten bytes"),
        ("pstree_entry", b"\x80" * 4096, "ten bytes"),
        ("pstree_entry", b"\x0a\x01\x01", "pid: wire type 2"),
        ("pstree_entry", b"\x0d\x01\x01\x01\x01", "wire type 5"),
        ("pstree_entry", b"\x00\x01", "field number"),
        ("pstree_entry", b"\x2a\x05\x01", "cut short"),
        ("pstree_entry", b"\x2a\x02\x01\x80", "cut short"),
        ("pstree_entry", b"\x2a\x01\x80\x01", "cut short"),
        ("pstree_entry", b"\xa3\x06\x01", "wire type 3"),
        ("pstree_entry", b"\xa2\x06\x7f", "cut short"),
        ("sa_entry", b"\x28\x02", "compat_sigaction: 2"),
        ("core_entry", b"\x08\x80\x80\x80\x80\x08", "2147483648"),
        ("core_entry", b"\x08\x01\x1a\x05\x08\x01", "cut short"),
        ("core_entry", b"\x08\x01\x1a\x02\x08\x01", "task_core_entry"),
        ("core_entry", b"\x08\x01\x22\x08\x08\x01\x10\x01\x18\x01\x20\x01" * 2, "ids: there twice"),
        ("aa_policy", b"\x0a\x03a\0b\x12\x00", "NUL"),
        ("aa_policy", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "cut short"),
        ("sk_opts_entry", b"\x82\x01\x02\x01\x02", "so_filter: cut short"),
    ],
)
def test_malformed_bytes_are_refused(message: str, data: bytes, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        wire.decode(message, data)


def test_depth_is_bounded() -> None:
    data = b""
    value: dict[str, object] = {"name": "n", "policies": [], "namespaces": []}
    for _ in range(wire.MAX_DEPTH):
        value = {"name": "n", "policies": [], "namespaces": [value]}
    data = wire.encode("aa_namespace", value)
    assert wire.decode("aa_namespace", data) == value
    with pytest.raises(ImageError, match="deep"):
        wire.encode("aa_namespace", {"name": "n", "namespaces": [value]})
    outer = next(field for field in schema.fields("aa_namespace") if field.name == "namespaces")
    assert 16384 > len(data) > 127
    length = bytes((len(data) & 127 | 128, len(data) >> 7))
    tag = bytes((outer.number << 3 | 2,))
    for brothers in (b"", (tag + b"\x03\x0a\x01n") * 300):
        with pytest.raises(ImageError, match="deep"):
            wire.decode("aa_namespace", b"\x0a\x01n" + brothers + tag + length + data)


def test_number_of_messages_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    controllers = next(field for field in schema.fields("cgroup_entry") if field.name == "controllers")
    empty = bytes((controllers.number << 3 | 2, 0))
    monkeypatch.setattr(wire, "MAX_MESSAGES", 100)
    assert len(wire.decode("cgroup_entry", empty * 100)["controllers"]) == 100
    with pytest.raises(ImageError, match="too many"):
        wire.decode("cgroup_entry", empty * 101)


def test_packed_numbers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PACKED", 100)
    head = wire.encode("pstree_entry", {**PSTREE, "threads": []})
    assert len(wire.decode("pstree_entry", head + b"\x2a\x64" + bytes(100))["threads"]) == 100
    with pytest.raises(ImageError, match="packed"):
        wire.decode("pstree_entry", head + b"\x2a\x65" + bytes(101))


def test_large_memory_map_is_quick() -> None:
    """Ten thousand mappings take some 50 ms each way; ten times that is a mistake, not a busy machine."""
    value = random_value("mm_entry", random.Random(1))
    vma = {"start": 2**46, "end": 2**46 + 4096, "pgoff": 0, "shmid": 9, "prot": 3, "flags": 34, "status": 513, "fd": -1}
    value["vmas"] = [{**vma, "start": 2**46 + i * 4096, "end": 2**46 + (i + 1) * 4096} for i in range(10000)]
    start = time.process_time()
    assert wire.decode("mm_entry", wire.encode("mm_entry", value)) == value
    assert time.process_time() - start < 1
