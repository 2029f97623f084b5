"""Values of image messages, random but valid: what the tests feed to the codec."""

from __future__ import annotations

import random
from typing import Any

from firn.images import catalog, schema

_RANGES = {
    "u32": (0, 2**32 - 1), "u64": (0, 2**64 - 1), "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1),
    "s32": (-(2**31), 2**31 - 1), "s64": (-(2**63), 2**63 - 1), "f64": (0, 2**64 - 1),
}  # fmt: skip


def _scalar(type_: str, rng: random.Random) -> Any:
    if type_ == "bool":
        return rng.random() < 0.5
    if type_ == "bytes":
        return rng.randbytes(rng.choice((0, 1, 7, 130)))
    if type_ == "str":
        return "".join(rng.choice("a/ß✓\n\x7f𐍈") for _ in range(rng.choice((0, 1, 9, 128))))
    if type_.startswith("enum:"):
        return rng.choice(list(schema.enum(type_[5:]).values()))
    low, high = _RANGES[type_]
    number = rng.choice((low, high, 0, 1, 127, 128, 16383, 16384, 2**21, rng.randrange(low, high + 1)))
    return number if rng.random() < 0.8 or number == low else max(low, -number)


def is_message(type_: str) -> bool:
    """Whether a field's type is another message."""
    return type_ not in _RANGES and type_ not in ("bool", "bytes", "str") and not type_.startswith("enum:")


def random_value(message: str, rng: random.Random, *, full: bool = False, extensions: bool = True) -> dict[str, Any]:
    """A valid value of *message*; *full*: with every optional field; *extensions*: with firn's own fields."""
    return _value(message, rng, full, extensions, 0)


def _value(message: str, rng: random.Random, full: bool, extensions: bool, depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for field in schema.fields(message):
        nested = is_message(field.type)
        if field.label == schema.OPTIONAL and (depth > 3 or not (full or rng.random() < 0.5)):
            continue
        if field.name == "firn" and not extensions:
            continue

        def one(type_: str = field.type, nested: bool = nested) -> Any:
            return _value(type_, rng, full, extensions, depth + 1) if nested else _scalar(type_, rng)

        if field.label == schema.REPEATED:
            count = 0 if nested and depth > 2 else rng.choice((1, 2) if full else (0, 1, 3))
            value[field.name] = [one() for _ in range(count)]
        else:
            value[field.name] = one()
    return value


def random_entry(message: str, rng: random.Random, **options: bool) -> tuple[dict[str, Any], bytes]:
    """A value of *message* and a payload as long as it says; lengths are small."""
    entry = random_value(message, rng, **options)
    for field in ("bytes", "length", "inq_len", "outq_len", "keys_bytes", "values_bytes", "len", "msize", "nsems"):
        if isinstance(entry.get(field), int):
            entry[field] = rng.randrange(40)
    if message == "ipc_shm_entry":
        entry["size"] = rng.randrange(40)
    if message == "ipc_msg_entry":
        entry["qnum"] = rng.randrange(3)
    if message == "ghost_file_entry":
        entry["mode"] = 0o100644
    sizes = catalog.payload(message, entry)
    return entry, rng.randbytes(rng.randrange(40) if sizes is None else sizes[0])


def random_image(kind: catalog.Kind, rng: random.Random, **options: bool) -> list[tuple[str, dict[str, Any], bytes]]:
    """(message, value, payload) of every entry of an image of *kind*, those inside others included."""
    entries: list[tuple[str, dict[str, Any], bytes]] = []
    for number in range(1 if kind.shape == catalog.SINGLE else 3):
        message = kind.rest if number else kind.message
        entries.append((message, *random_entry(message, rng, **options)))
        inner, count = catalog.inner(message, entries[-1][1])
        for _ in range(2 if count is None else count):
            entries.append((inner, *random_entry(inner, rng, **options)))
    return entries


def typed_kinds() -> list[str]:
    """The kinds that have entries."""
    return [name for name in catalog.names() if catalog.kind(name).message]


def index_of(kind: catalog.Kind) -> int | None:
    """An index for a file of *kind*, None if it has none."""
    return 26 if kind.suffix else None
