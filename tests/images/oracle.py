"""The protobuf library as an oracle: classes built from our schema, values to and from its messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from images.values import is_message

from firn.images import schema

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "u32": _Field.TYPE_UINT32, "u64": _Field.TYPE_UINT64, "i32": _Field.TYPE_INT32, "i64": _Field.TYPE_INT64,
    "s32": _Field.TYPE_SINT32, "s64": _Field.TYPE_SINT64, "f64": _Field.TYPE_FIXED64, "bool": _Field.TYPE_BOOL,
    "str": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES,
}  # fmt: skip
_LABELS = {"": _Field.LABEL_REQUIRED, "?": _Field.LABEL_OPTIONAL, "*": _Field.LABEL_REPEATED}


class Oracle:
    """The messages of the format as the protobuf library understands them."""

    def __init__(self, *, extensions: bool = True, packed: bool = False) -> None:
        """*extensions*: with firn's own fields; *packed*: repeated numbers are written packed."""
        file = descriptor_pb2.FileDescriptorProto(name="images.proto", package="images", syntax="proto2")
        messages, enums = schema.names()
        for name in enums:
            # The library keeps the values of an enumeration in the scope around it, so each gets a scope of its own.
            scope = file.message_type.add(name=_scope(name))
            values = scope.enum_type.add(name="Values")
            for word, number in schema.enum(name).items():
                values.value.add(name=word, number=number)
        for name in messages:
            message = file.message_type.add(name=name)
            for field in schema.fields(name):
                if extensions or field.name != "firn":
                    _add_field(message, field, packed)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._classes = {
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"images.{name}")) for name in messages
        }

    def encode(self, name: str, value: dict[str, Any]) -> bytes:
        """The bytes of *value*."""
        message = self._classes[name]()
        _fill(message, name, value)
        data: bytes = message.SerializeToString(deterministic=True)
        return data

    def decode(self, name: str, data: bytes) -> dict[str, Any]:
        """The value of *data*; fields that these classes do not know are left out."""
        return _value(self._classes[name].FromString(data), name)

    def recode(self, name: str, data: bytes) -> bytes:
        """*data* read and written again."""
        again: bytes = self._classes[name].FromString(data).SerializeToString(deterministic=True)
        return again


def _scope(enum: str) -> str:
    return "enum_" + enum.replace(".", "_")


def _add_field(message: Any, field: schema.Field, packed: bool) -> None:
    added = message.field.add(name=field.name, number=field.number, label=_LABELS[field.label])
    if field.type.startswith("enum:"):
        added.type = _Field.TYPE_ENUM
        added.type_name = f".images.{_scope(field.type[5:])}.Values"
    elif is_message(field.type):
        added.type = _Field.TYPE_MESSAGE
        added.type_name = f".images.{field.type}"
    else:
        added.type = _TYPES[field.type]
    if packed and field.label == schema.REPEATED and not is_message(field.type) and field.type not in ("str", "bytes"):
        added.options.packed = True


def _fill(message: Any, name: str, value: dict[str, Any]) -> None:
    message.SetInParent()
    for field in schema.fields(name):
        if field.name not in value:
            continue
        item = value[field.name]
        target = getattr(message, field.name)
        if not is_message(field.type):
            if field.label == schema.REPEATED:
                target.extend(item)
            else:
                setattr(message, field.name, item)
        elif field.label == schema.REPEATED:
            for one in item:
                _fill(target.add(), field.type, one)
        else:
            _fill(target, field.type, item)


def _items(message: Any, field: schema.Field) -> Iterator[Any]:
    item = getattr(message, field.name)
    for one in item if field.label == schema.REPEATED else (item,):
        yield _value(one, field.type) if is_message(field.type) else one


def _value(message: Any, name: str) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for field in schema.fields(name):
        if field.name not in message.DESCRIPTOR.fields_by_name:
            continue
        if field.label == schema.REPEATED:
            value[field.name] = list(_items(message, field))
        elif message.HasField(field.name):
            value[field.name] = next(_items(message, field))
    return value
