"""The messages of the image format, as text that is compiled one message at a time when it is first used.

A message is a block of lines, one field each, in ascending field number::

    NUMBER NAME TYPE[?|*] [HINT ...]

``?`` marks an optional field and ``*`` a repeated one; a field without a mark is required. TYPE is ``u32 u64 i32 i64``
(varints), ``s32 s64`` (zigzag varints), ``f64`` (eight fixed bytes), ``bool``, ``str``, ``bytes``, ``enum:NAME`` or the
name of a message. HINTs say how a viewer shows the value (``hex``, ``dev``, ``odev``, ``ipadd``, ``flags:TABLE``,
``dict:TABLE``, ``conv:NAME``) and which value stands for an absent field (``default:VALUE``); they do not change the
bytes. An enumeration is a list of ``NAME VALUE``.

CRIU's messages are in the modules beside this one, by theme; what firn adds is in :mod:`firn.images.schema.firn` alone.
"""

from __future__ import annotations

from firn.errors import ImageError
from firn.images.schema import firn, tasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRED, OPTIONAL, REPEATED = "", "?", "*"


class Field:
    """One field of a message; *type* is the word of the text without its mark, *hints* the words behind it."""

    __slots__ = ("hints", "label", "name", "number", "type")

    def __init__(self, line: str) -> None:
        number, name, type_, *self.hints = line.split()
        self.number = int(number)
        self.name = name
        self.label = type_[-1] if type_[-1] in "?*" else REQUIRED
        self.type = type_.rstrip("?*")


def _themes() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """(messages, enumerations) of each theme, those that every checkpoint needs first, the rest imported on demand."""
    yield tasks.MESSAGES, tasks.ENUMS
    yield firn.MESSAGES, firn.ENUMS
    from firn.images.schema import registers

    yield registers.MESSAGES, registers.ENUMS
    from firn.images.schema import files

    yield files.MESSAGES, files.ENUMS
    from firn.images.schema import namespaces

    yield namespaces.MESSAGES, namespaces.ENUMS
    from firn.images.schema import sockets

    yield sockets.MESSAGES, sockets.ENUMS
    from firn.images.schema import misc

    yield misc.MESSAGES, misc.ENUMS


def fields(message: str) -> list[Field]:
    """The fields of *message* in ascending field number, firn's own ones last.

    Raises :class:`ImageError` for a name that is no message.
    """
    for messages, _ in _themes():
        text = messages.get(message)
        if text is not None:
            lines = text.strip().splitlines()
            if message in firn.EXTENSIONS:
                lines += firn.EXTENSIONS[message].strip().splitlines()
            return [Field(line) for line in lines]
    raise ImageError(f"there is no image message {message!r}")


def enum(name: str) -> dict[str, int]:
    """The values of an enumeration by their names, in the order of the format.

    Raises :class:`ImageError` for a name that is no enumeration.
    """
    for _, enums in _themes():
        text = enums.get(name)
        if text is not None:
            pairs = (pair.split() for pair in text.split(","))
            return {word: int(value) for word, value in pairs}
    raise ImageError(f"there is no image enumeration {name!r}")


def names() -> tuple[list[str], list[str]]:
    """The names of all messages and of all enumerations."""
    themes = list(_themes())
    return [name for messages, _ in themes for name in messages], [name for _, enums in themes for name in enums]
