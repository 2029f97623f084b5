"""Protocol Buffers (proto2) messages to and from plain dictionaries.

A value is a dict keyed by field name: integers and enumerations are int, ``bool`` is bool, ``bytes`` is bytes, messages
are dicts, repeated fields are lists. Strings are str in the manner of :func:`os.fsdecode` (bytes that are not UTF-8
survive as surrogates), because the format stores paths in them. An absent optional field is an absent key; a repeated
field without elements is an empty list after decoding and may be left out for encoding.

Fields are written in ascending field number and repeated scalars one by one, as CRIU does; packed ones are read as
well. Unknown fields are kept, as raw bytes, in a list under the key ``""`` and written back to their places, so that
decoding and encoding give the same bytes again.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from firn.errors import ImageError
from firn.images import schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Write = Callable[[Any, int], bytes]
    Row = tuple[str, int, bool, int, str]

MAX_DEPTH = 100
"""Messages inside messages; control groups and security policies nest, but never like this."""

MAX_MESSAGES = 1 << 21
"""Messages inside one that is decoded: an empty one has two bytes, but takes hundreds in memory."""

MAX_PACKED = 1 << 20
"""Bytes of a packed field: a byte becomes a number in a list. CRIU writes none, and no field has so many numbers."""

UNKNOWN = ""
"""The key of fields that the schema does not have."""

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_LIMITS = {"u32": _U32, "u64": _U64, "s32": _U32, "s64": _U64, "bool": 1}
_VARINT, _FIXED64, _BYTES = 0, 1, 2

# What is done with the number that begins every value but a fixed one. Scalars come first, then what has a length.
_UNSIGNED, _SIGNED32, _SIGNED64, _ZIGZAG, _BOOL, _FIXED, _RAW, _TEXT, _MESSAGE = range(9)
_KINDS = {
    "u32": _UNSIGNED, "u64": _UNSIGNED, "i32": _SIGNED32, "i64": _SIGNED64, "s32": _ZIGZAG, "s64": _ZIGZAG,
    "bool": _BOOL, "f64": _FIXED, "bytes": _RAW, "str": _TEXT,
}  # fmt: skip

_AT_ONCE = 15
"""Zeros that are looked for at once, behind one: arrays have a multiple of sixteen numbers."""

_ONE = [bytes((number,)) for number in range(128)]


def _varint(number: int) -> bytes:
    """A number that is not negative, seven bits a byte, lowest first."""
    if number < 128:
        return _ONE[number]
    if number < 16384:
        return bytes((number & 127 | 128, number >> 7))
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Message:
    """A compiled message: what encoding and decoding look up."""

    __slots__ = ("name", "names", "repeated", "required", "rows", "writes")

    def __init__(self, name: str, fields: list[schema.Field]) -> None:
        self.name = name
        self.names = {field.number: field.name for field in fields}
        self.required = frozenset(field.name for field in fields if field.label == schema.REQUIRED)
        self.repeated = [field.name for field in fields if field.label == schema.REPEATED]
        self.rows: dict[int, Row] = {}
        self.writes: list[tuple[str, int, str, Write, bytes]] = []


_reading: dict[str, _Message] = {}
_writing: dict[str, _Message] = {}


def _kind(field: schema.Field) -> int:
    return _SIGNED32 if field.type.startswith("enum:") else _KINDS.get(field.type, _MESSAGE)


def _wire_type(kind: int) -> int:
    if kind >= _RAW:
        return _BYTES
    return _FIXED64 if kind == _FIXED else _VARINT


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode(message: str, value: dict[str, Any]) -> bytes:
    """The bytes of *value* as a *message*.

    Raises :class:`ImageError` naming message and field for a missing required field, a key that the message does not
    have, a value of the wrong type or out of range, and messages nested too deeply.
    """
    return _encode(_writing.get(message) or _for_writing(message), value, 0)


def _for_writing(name: str) -> _Message:
    fields = schema.fields(name)
    message = _Message(name, fields)
    for field in fields:
        kind = _kind(field)
        tag = _varint(field.number << 3 | _wire_type(kind))
        zero = tag + b"\0" if field.label == schema.REPEATED and kind < _FIXED else b""
        message.writes.append((field.name, field.number, field.label, _WRITERS[kind](tag, field), zero))
    _writing[name] = message
    return message


def _encode(message: _Message, value: dict[str, Any], depth: int) -> bytes:
    if depth > MAX_DEPTH:
        raise ImageError(f"{message.name}: nested more than {MAX_DEPTH} deep")
    parts: list[bytes] = []
    found = 0
    name = UNKNOWN
    try:
        raw = _raw_fields(message, value) if UNKNOWN in value else None
        for name, number, label, write, zero in message.writes:
            while raw and raw[-1][0] < number:
                parts.append(raw.pop()[1])
            item = value.get(name)
            if item is None:
                if not label:
                    raise ImageError(f"{message.name}: the required field {name!r} is missing")
                continue
            found += 1
            if zero and item.count(0) == len(item):
                parts.append(zero * len(item))  # thousands of numbers in a core image: registers that are not in use
            elif label == "*":
                for one in item:
                    parts.append(write(one, depth))
            else:
                parts.append(write(item, depth))
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise ImageError(f"{message.name}.{name}: {error}") from None
    if raw is not None:
        found += 1
        parts.extend([piece for _, piece in reversed(raw)])
    if found != len(value):
        wrong = [key for key, item in value.items() if item is None or key not in message.names.values()]
        raise ImageError(f"{message.name}: no such field, or no value for it: {', '.join(map(repr, wrong))}")
    return b"".join(parts)


def _raw_fields(message: _Message, value: dict[str, Any]) -> list[tuple[int, bytes]]:
    """(number, bytes) of the unknown fields of *value*, the last one first."""
    pieces = []
    for raw in reversed(value[UNKNOWN]):
        number, end = _skip(raw, 0, len(raw), message.name)
        if end != len(raw) or number in message.names:
            raise ImageError(f"{message.name}: a raw field ({number}) is not one unknown field")
        pieces.append((number, bytes(raw)))
    return pieces


def _write_unsigned(tag: bytes, field: schema.Field) -> Write:
    limit = _LIMITS[field.type]

    def write(item: int, depth: int) -> bytes:
        if 0 <= item <= limit:
            return tag + _varint(item)
        raise ValueError(_does_not_fit(item, field))

    return write


def _write_signed(tag: bytes, field: schema.Field) -> Write:
    half = 1 << (63 if field.type == "i64" else 31)

    def write(item: int, depth: int) -> bytes:
        if -half <= item < half:
            return tag + _varint(item & _U64)
        raise ValueError(_does_not_fit(item, field))

    return write


def _write_zigzag(tag: bytes, field: schema.Field) -> Write:
    half = _LIMITS[field.type] // 2 + 1

    def write(item: int, depth: int) -> bytes:
        if -half <= item < half:
            return tag + _varint(item << 1 if item >= 0 else ~item << 1 | 1)
        raise ValueError(_does_not_fit(item, field))

    return write


def _write_fixed(tag: bytes, field: schema.Field) -> Write:
    def write(item: int, depth: int) -> bytes:
        if 0 <= item <= _U64:
            return tag + item.to_bytes(8, "little")
        raise ValueError(_does_not_fit(item, field))

    return write


def _write_raw(tag: bytes, field: schema.Field) -> Write:
    def write(item: bytes, depth: int) -> bytes:
        if not isinstance(item, bytes | bytearray | memoryview):
            raise TypeError(f"bytes expected, not {type(item).__name__}")
        raw = bytes(item)
        return tag + _varint(len(raw)) + raw

    return write


def _write_text(tag: bytes, field: schema.Field) -> Write:
    def write(item: str, depth: int) -> bytes:
        raw = item.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise ValueError("a NUL inside a string")
        return tag + _varint(len(raw)) + raw

    return write


def _write_message(tag: bytes, field: schema.Field) -> Write:
    name = field.type

    def write(item: dict[str, Any], depth: int) -> bytes:
        raw = _encode(_writing.get(name) or _for_writing(name), item, depth + 1)
        return tag + _varint(len(raw)) + raw

    return write


_WRITERS = (
    _write_unsigned, _write_signed, _write_signed, _write_zigzag, _write_unsigned, _write_fixed,
    _write_raw, _write_text, _write_message,
)  # fmt: skip
"""By kind."""


def _does_not_fit(item: int, field: schema.Field) -> str:
    return f"{item} does not fit in {field.type}"


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(message: str, data: bytes | memoryview) -> dict[str, Any]:
    """The value of a *message* in *data*, all of which it must fill.

    Raises :class:`ImageError` naming message and field for bytes that are cut short or malformed, a number that does
    not fit its field, a missing required field, a NUL in a string, messages nested too deeply and too many of them.
    """
    raw = bytes(data)
    try:
        return _decode(_reading.get(message) or _for_reading(message), raw, 0, len(raw), [MAX_MESSAGES, MAX_DEPTH])
    except IndexError:
        raise ImageError(f"{message}: cut short") from None


def _for_reading(name: str) -> _Message:
    fields = schema.fields(name)
    message = _Message(name, fields)
    for field in fields:
        kind = _kind(field)
        wire, repeated = _wire_type(kind), field.label == schema.REPEATED
        row = (field.name, kind, repeated, _LIMITS.get(field.type, _U64), field.type)
        message.rows[field.number << 3 | wire] = row
    _reading[name] = message
    return message


def _decode(message: _Message, data: bytes, at: int, end: int, left: list[int]) -> dict[str, Any]:
    """The value of *message* in data[at:end]; *left*: how many messages there may still be, and how deep."""
    value: dict[str, Any] = {name: [] for name in message.repeated}
    find = message.rows.get
    item: Any
    while at < end:
        start = at
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _read_varint(data, start, message.name)
        row = find(tag)
        if row is None:
            at = _decode_unusual(message, value, data, start, end)
            continue
        name, kind, repeated, limit, type_ = row
        if kind == _FIXED:
            item = int.from_bytes(data[at : at + 8], "little")
            at += 8
        else:
            item = data[at]
            at += 1
            if item > 127:
                item, at = _read_varint(data, at - 1, message.name)
            if kind >= _RAW:
                start = at
                at += item
                if at > end:
                    break
                if kind == _MESSAGE:
                    if name in value and not repeated:
                        raise ImageError(f"{message.name}.{name}: there twice")
                    left[0] -= 1
                    left[1] -= 1
                    if left[0] < 0 or left[1] < 0:
                        raise ImageError(f"{message.name}.{name}: too many messages inside each other, or too deep")
                    item = _decode(_reading.get(type_) or _for_reading(type_), data, start, at, left)
                    left[1] += 1
                else:
                    item = data[start:at] if kind == _RAW else _text(data[start:at], message.name, name)
            elif kind != _UNSIGNED:
                item = _convert(item, kind, limit, message.name, name)
            elif item > limit:
                raise ImageError(f"{message.name}.{name}: {item} does not fit in {type_}")
        if repeated:
            value[name].append(item)
            if not item and kind < _FIXED:
                at = _more_zeros(data, start, at, end, value[name])
        else:
            value[name] = item
    if at != end:
        raise ImageError(f"{message.name}: cut short")
    if not message.required <= value.keys():
        missing = ", ".join(sorted(message.required - value.keys()))
        raise ImageError(f"{message.name}: the required field {missing} is missing")
    return value


def _more_zeros(data: bytes, start: int, at: int, end: int, items: list[int]) -> int:
    """Add what follows the zero in data[start:at], as long as it is the same again and again; the offset behind it."""
    zeros, more = data[start:at] * _AT_ONCE, items[-1:] * _AT_ONCE
    while data.startswith(zeros, at, end):
        items += more
        at += len(zeros)
    return at


def _read_varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """(number, offset behind it)."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 63:
            raise ImageError(f"{where}: a number of more than ten bytes")
    if number > _U64:
        raise ImageError(f"{where}: a number of more than 64 bits")
    return number, at


def _convert(number: int, kind: int, limit: int, where: str, name: str) -> int:
    """A raw varint as the value of a scalar that is not plain unsigned."""
    if kind in (_SIGNED32, _SIGNED64):
        item = number - (1 << 64) if number >> 63 else number
        if kind == _SIGNED64 or -(1 << 31) <= item < 1 << 31:
            return item
    elif number <= limit:
        if kind == _BOOL:
            return number == 1
        return number >> 1 if not number & 1 else ~(number >> 1)
    raise ImageError(f"{where}.{name}: {number} is out of range")


def _text(raw: bytes, where: str, name: str) -> str:
    if b"\0" in raw:
        raise ImageError(f"{where}.{name}: a NUL inside a string")
    return raw.decode("utf-8", "surrogateescape")


def _skip(data: bytes, at: int, end: int, where: str) -> tuple[int, int]:
    """(number, offset behind it) of the field at *at*, of any type."""
    tag, at = _read_varint(data, at, where)
    number, wire = tag >> 3, tag & 7
    if not 0 < number < 1 << 29:
        raise ImageError(f"{where}: {number} is no field number")
    if wire == _VARINT:
        at = _read_varint(data, at, where)[1]
    elif wire == _FIXED64:
        at += 8
    elif wire == _BYTES:
        length, at = _read_varint(data, at, where)
        at += length
    elif wire == 5:
        at += 4
    else:
        raise ImageError(f"{where}: field {number} has the impossible wire type {wire}")
    if at > end:
        raise ImageError(f"{where}: cut short")
    return number, at


def _decode_unusual(message: _Message, value: dict[str, Any], data: bytes, start: int, end: int) -> int:
    """A packed or an unknown field at *start*; returns the offset behind it."""
    number, stop = _skip(data, start, end, message.name)
    name = message.names.get(number)
    if name is None:
        value.setdefault(UNKNOWN, []).append(data[start:stop])
        return stop
    tag, at = _read_varint(data, start, message.name)
    row = message.rows.get(number << 3 | _VARINT) or message.rows.get(number << 3 | _FIXED64)
    if row is None or not row[2] or tag & 7 != _BYTES:
        raise ImageError(f"{message.name}.{name}: wire type {tag & 7} does not fit")
    _, kind, _, limit, type_ = row
    items = value[name]
    length, at = _read_varint(data, at, message.name)
    if length > MAX_PACKED:
        raise ImageError(f"{message.name}.{name}: {length} bytes of packed numbers")
    while at < stop:
        if kind == _FIXED:
            items.append(int.from_bytes(data[at : at + 8], "little"))
            at += 8
            continue
        item, at = _read_varint(data, at, message.name)
        if kind != _UNSIGNED:
            item = _convert(item, kind, limit, message.name, name)
        elif item > limit:
            raise ImageError(f"{message.name}.{name}: {item} does not fit in {type_}")
        items.append(item)
    if at != stop:
        raise ImageError(f"{message.name}.{name}: cut short")
    return stop
