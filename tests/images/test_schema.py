"""The schema: sound in itself, and all of CRIU's."""

from __future__ import annotations

from typing import Any

import pytest
from images.shared import reference
from images.values import is_message

from firn.errors import ImageError
from firn.images import schema
from firn.images.schema import firn

_TYPES = {
    "uint32": "u32", "uint64": "u64", "int32": "i32", "int64": "i64", "sint32": "s32", "sint64": "s64", "bool": "bool",
    "string": "str", "bytes": "bytes", "fixed64": "f64",
}  # fmt: skip
_LABELS = {"required": schema.REQUIRED, "optional": schema.OPTIONAL, "repeated": schema.REPEATED}
_FLAGS = {"hex", "dev", "odev", "ipadd"}


def test_sound() -> None:
    messages, enums = schema.names()
    assert len(set(messages)) == len(messages)
    assert len(set(enums)) == len(enums)
    for message in messages:
        fields = schema.fields(message)
        numbers = [field.number for field in fields]
        assert numbers == sorted(set(numbers)), message
        assert len({field.name for field in fields}) == len(fields), message
        for field in fields:
            assert field.name.isidentifier() and 0 < field.number < 1 << 29
            if field.type.startswith("enum:"):
                assert schema.enum(field.type[5:])
            elif is_message(field.type):
                assert field.type in messages, (message, field.name)
            for hint in field.hints:
                assert hint in _FLAGS or hint.partition(":")[0] in {"default", "flags", "dict", "conv"}, hint


def test_what_is_ours_is_apart() -> None:
    ours = set(firn.MESSAGES)
    for message in schema.names()[0]:
        for field in schema.fields(message):
            if message not in ours:
                assert (field.type in ours) == (field.number >= 1000), (message, field.name)
                assert field.number < 1000 or field.label == schema.OPTIONAL, "CRIU's images have none of our fields"
    assert set(firn.EXTENSIONS) <= set(schema.names()[0]) - ours


def test_unknown_names() -> None:
    with pytest.raises(ImageError, match="no_such"):
        schema.fields("no_such")
    with pytest.raises(ImageError, match="no_such"):
        schema.enum("no_such")


def _expected(field: dict[str, Any], enums: dict[str, Any]) -> tuple[object, ...]:
    """(number, name, label, type, hints) as our schema would say it."""
    hints = set()
    if "default" in field:
        value = enums[field["type_name"]]["values"][field["default"]] if field["type"] == "enum" else field["default"]
        hints.add(f"default:{int(value)}")
    for name, argument in field.get("criu", {}).items():
        hints.add(name if argument is True else f"{name}:{argument}")
    type_ = _TYPES.get(field["type"]) or ("enum:" if field["type"] == "enum" else "") + field["type_name"]
    return field["number"], field["name"], _LABELS[field["label"]], type_, hints


def test_complete() -> None:
    """Every message and enumeration of CRIU 4.2, field by field, and nothing else but ours."""
    known = reference()
    messages, enums = schema.names()
    assert set(messages) - set(firn.MESSAGES) == set(known["messages"])
    for name, message in known["messages"].items():
        expected = [_expected(field, known["enums"]) for field in message["fields"]]
        actual = [
            (field.number, field.name, field.label, field.type, set(field.hints))
            for field in schema.fields(name)
            if field.number < 1000
        ]
        assert actual == sorted(expected, key=lambda row: int(str(row[0]))), name
    assert {name: schema.enum(name) for name in enums} == {
        name: enum["values"] for name, enum in known["enums"].items()
    }
