"""Debian's crit (CRIU 3.17) as a second reader: it decodes what our store writes, and sees the same values."""

from __future__ import annotations

import base64
import json
import quopri
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from images.values import index_of, is_message, random_image, typed_kinds

from firn.images import catalog, schema
from firn.images.schema import firn
from firn.images.store import ImageDir

Image = list[tuple[str, dict[str, Any], bytes]]

_PYTHON, _CRIU = "/usr/bin/python3", "/usr/sbin/criu"
_LOAD = """
import json, sys
from pycriu import images
found = {}
for path in sys.argv[1:]:
    try:
        with open(path, "rb") as file:
            found[path] = images.load(file)
    except Exception as error:
        found[path] = {"error": repr(error)}
print(json.dumps(found))
"""

_NEW_FIELDS = {
    "cg_controller_entry.is_threaded", "core_entry.ti_loongarch64", "core_entry.ti_riscv64", "creds_entry.cap_amb",
    "creds_entry.no_new_privs", "file_entry.pidfd", "inet_sk_entry.tcp_opts", "inventory_entry.allow_uprobes",
    "inventory_entry.dump_criu_run_id", "inventory_entry.plugins_entry", "ip_opts_entry.pktinfo", "ip_opts_entry.tos",
    "ip_opts_entry.ttl", "memfd_inode_entry.mode", "netns_entry.ipv4_sysctl",
    "task_core_entry.membarrier_registration_mask", "task_core_entry.stop_signo", "thread_core_entry.cg_set",
    "thread_info_aarch64.pac_keys", "user_x86_xsave_entry.cet",
}  # fmt: skip
"""Fields that came after 3.17; it skips them, as it does our own."""

_UNKNOWN_KINDS = {"BINFMT_MISC", "BINFMT_MISC_OLD", "SIGNAL", "PSIGNAL", "PIDFD"}
"""Images that crit 3.17 has no reader for."""

_MAGIC_NAMES = {"PAGEMAP_SHMEM": "PAGEMAP", "STATS_DUMP": "STATS", "STATS_RESTORE": "STATS"}
_OLD_VALUES = {"fd_types": 19, "core_entry.march": 6}
"""The highest values that 3.17 knows of enumerations that have grown."""


def _as_crit(message: str, value: dict[str, Any]) -> dict[str, Any]:
    """A value as crit shows it, without its hints for beauty."""
    shown: dict[str, Any] = {}
    for field in schema.fields(message):
        if field.name in value:
            item = value[field.name]
            if field.label != schema.REPEATED:
                shown[field.name] = _item_as_crit(field, item)
            elif item:
                shown[field.name] = [_item_as_crit(field, one) for one in item]
    if message == "pagemap_entry":  # what 3.17 calls nr_pages is compat_nr_pages today
        shown["nr_pages"] = shown.pop("compat_nr_pages")
    return shown


def _item_as_crit(field: schema.Field, item: Any) -> Any:
    if is_message(field.type):
        return _as_crit(field.type, item)
    if field.type.startswith("enum:"):
        return next(name for name, number in schema.enum(field.type[5:]).items() if number == item)
    if field.type == "bytes":
        return (quopri.encodestring if "conv:unix_name" in field.hints else base64.encodebytes)(item).decode()
    return item


def _extra(payload: bytes) -> str:
    return base64.encodebytes(payload).decode()


def _expected(kind: catalog.Kind, entries: Image) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for message, entry, payload in entries:
        one = _as_crit(message, entry)
        if message == "ipc_msg":
            shown[-1]["extra"] += [one, _extra(payload)]
            continue
        if message == "tcp_stream_entry":
            one["extra"] = {"inq": _extra(payload[: entry["inq_len"]]), "outq": _extra(payload[entry["inq_len"] :])}
        elif message == "ipc_sem_entry":
            one["extra"] = [int.from_bytes(payload[at : at + 2], "little") for at in range(0, len(payload), 2)]
        elif message == "ipc_msg_entry":
            one["extra"] = []
        elif kind.payload and not entry.get("chunks"):
            one["extra"] = _extra(payload)
        shown.append(one)
    return shown


def _without(ours: Any, theirs: Any, message: str, missing: set[str]) -> Any:
    """*ours* reduced to the fields that crit shows; what that takes away is added to *missing*."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        types = {field.name: field.type for field in schema.fields(message)} if message else {}
        missing |= {f"{message}.{name}" for name in ours.keys() - theirs.keys()}
        return {
            name: _without(item, theirs[name], types.get(name, ""), missing)
            for name, item in ours.items()
            if name in theirs
        }
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [_without(one, other, message, missing) for one, other in zip(ours, theirs, strict=True)]
    return ours


@pytest.fixture
def crit_3_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only values that crit 3.17 knows."""
    if not (Path("/usr/bin/crit").exists() and Path(_CRIU).exists()):
        pytest.skip("Debian's criu package is not installed")
    version = subprocess.run([_CRIU, "--version"], capture_output=True, text=True, check=True).stdout
    if "3.17" not in version:
        pytest.skip(f"written for crit 3.17, not for {version.strip()}")
    everything = schema.enum

    def old(name: str) -> dict[str, int]:
        limit = _OLD_VALUES.get(name, 1 << 31)
        return {word: number for word, number in everything(name).items() if number <= limit}

    monkeypatch.setattr(schema, "enum", old)


def _image(kind: catalog.Kind) -> Image:
    entries = random_image(kind, random.Random(f"crit {kind.name}"), full=True)
    if kind.name == "IPCNS_SHM":  # crit looks for a payload even where in_pagemaps says that there is none
        entries = [
            (message, {**entry, "in_pagemaps": False}, bytes(entry["size"])) for message, entry, _ in entries
        ]
    return entries


def _write(directory: Path) -> dict[str, tuple[catalog.Kind, Image]]:
    """One image of every kind; returns what is in them, by path."""
    written: dict[str, tuple[catalog.Kind, Image]] = {}
    with ImageDir.open(str(directory), create_files=True) as images:
        for kind in map(catalog.kind, typed_kinds()):
            entries = _image(kind)
            written[str(directory / kind.file(index_of(kind)))] = kind, entries
            if kind.name == "INVENTORY":
                images.commit(entries[0][1])
                continue
            with images.writer(kind.name, index_of(kind)) as writer:
                for message, entry, payload in entries:
                    writer.add(entry, message if message in catalog.INNER.values() else "")
                    writer.payload(payload)
    return written


@pytest.mark.usefixtures("crit_3_17")
def test_crit_sees_the_same(tmp_path: Path) -> None:
    written = _write(tmp_path)
    done = subprocess.run([_PYTHON, "-c", _LOAD, *written], capture_output=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    missing: set[str] = set()
    unknown = set()
    for path, (kind, entries) in written.items():
        if "error" in found[path]:
            assert "No handler" in found[path]["error"] or "MagicException" in found[path]["error"], found[path]
            unknown.add(kind.name)
            continue
        assert found[path]["magic"] == _MAGIC_NAMES.get(kind.name, kind.name)
        theirs = found[path]["entries"]
        messages = [message for message, _, _ in entries if message != "ipc_msg"]
        ours = [
            _without(one, other, message, missing)
            for message, one, other in zip(messages, _expected(kind, entries), theirs, strict=True)
        ]
        assert ours == theirs, path
    assert unknown == _UNKNOWN_KINDS
    assert {field for field in missing if not field.endswith(".firn")} == _NEW_FIELDS
    assert {field for field in missing if field.endswith(".firn")} == {f"{name}.firn" for name in firn.EXTENSIONS}


@pytest.mark.usefixtures("crit_3_17")
def test_the_command(tmp_path: Path) -> None:
    with ImageDir.open(str(tmp_path), create_files=True) as images:
        vma = {"start": 4096, "end": 8192, "pgoff": 0, "shmid": 0, "prot": 5, "flags": 34, "status": 513, "fd": -1}
        images.write_one("VMAS", vma, 7)
    done = subprocess.run(
        ["/usr/bin/crit", "decode", "--pretty", "-i", str(tmp_path / "vmas-7.img")],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == {
        "magic": "VMAS",
        "entries": [
            {
                "start": "0x1000", "end": "0x2000", "pgoff": 0, "shmid": 0, "prot": "PROT_READ | PROT_EXEC",
                "flags": "MAP_PRIVATE | MAP_ANON", "status": "VMA_AREA_REGULAR | VMA_ANON_PRIVATE", "fd": -1,
            }
        ],
    }  # fmt: skip
