"""CRIU's configuration files: one option per line, its long name and perhaps a value."""

from __future__ import annotations

from firn.errors import UsageError

_LIMIT = 1 << 20  # bytes; a larger file is something else
_BLANKS = " \t"


def words(path: str) -> list[str]:
    """The command-line words that the file *path* stands for; a file that cannot be read stands for none.

    Raises :class:`UsageError` for a line that is no option line.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError:
        return []
    if len(raw) > _LIMIT:
        raise UsageError(f"Unsupported configuration file format: {path} is larger than {_LIMIT} bytes")
    found = []
    for number, line in enumerate(raw.decode("utf-8", "surrogateescape").split("\n"), 1):
        try:
            found += _line(line)
        except ValueError as error:
            raise UsageError(f"Unsupported configuration file format: {path}, line {number}: {error}") from None
    return found


def _line(line: str) -> list[str]:
    """One line's words; :class:`ValueError` says what is wrong with it."""
    line = line.lstrip(_BLANKS)
    if not line or line[0] == "#":
        return []
    # A tab parts name and value only where there is no space.
    name, _, rest = line.partition(" " if " " in line else "\t")
    value = _value(rest.lstrip(_BLANKS))
    return [f"--{name}"] if value is None else [f"--{name}", value]


def _value(text: str) -> str | None:
    """The value that *text* says, None if it says none. In quotes, a backslash keeps a quote from ending the value."""
    if not text or text[0] == "#":
        return None
    if text[0] == '"':
        end = 1
        while end < len(text) and text[end] != '"':
            end += 2 if text.startswith('\\"', end) else 1
        if end >= len(text):
            raise ValueError("a quote does not end")
        value, after = text[1:end], text[end + 1 :]
        if '\\"' in value and any(blank in value for blank in _BLANKS):
            raise ValueError("blanks and escaped quotes in one value")
    else:
        # Only a space ends a bare word: tabs and carriage returns belong to it.
        value, _, after = text.partition(" ")
        value, mark, _ = value.partition("#")
        after = "" if mark else after
    after = after.strip(_BLANKS)
    if after and after[0] != "#":
        raise ValueError(f"a word after the value: {after}")
    return value.replace('\\"', '"')
