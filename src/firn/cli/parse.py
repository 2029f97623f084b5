"""The command line as getopt_long(3) and CRIU read it: permutation, unique prefixes, glued values, ``--no-`` forms."""

from __future__ import annotations

import os

from firn.api import TABLE, Option
from firn.cli.values import READERS, ShortUsage, ShowHelp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn.cli.values import Values


class Names:
    """What one program's options may be called. ``long``: name -> (row, value of a flag); ``short``: letter -> row."""

    __slots__ = ("long", "program", "short")

    def __init__(self, program: str) -> None:
        self.program = program
        self.long: dict[str, tuple[Option, bool]] = {}
        self.short: dict[str, Option] = {}
        for row in TABLE:
            if row.firn_only and program == "criu":
                continue
            self.long[row.long] = row, True
            if row.no:
                self.long["no-" + row.long] = row, False
            if row.short:
                self.short[row.short] = row

    def find(self, name: str, program: str) -> tuple[Option, bool]:
        """The option that *name* is, or the only one that it is the beginning of; :class:`ShortUsage` if none."""
        if name in self.long:
            return self.long[name]
        fitting = [full for full in self.long if full.startswith(name)]
        if not fitting:
            raise ShortUsage(f"{program}: unrecognized option '--{name}'", raw=True)
        # Several names of one thing are not ambiguous.
        if len({(row.attribute or row.long, value) for row, value in map(self.long.__getitem__, fitting)}) > 1:
            possible = "".join(f" '--{full}'" for full in fitting)
            raise ShortUsage(f"{program}: option '--{name}' is ambiguous; possibilities:{possible}", raw=True)
        return self.long[fitting[0]]


def takes(row: Option) -> str:
    """``""`` for an option without a value, ``":"`` with one, ``"::"`` with one that may be left out."""
    return "" if row.kind == "flag" else READERS[row.kind][0]


def read(words: list[str], names: Names, values: Values, program: str) -> list[str]:
    """Read option *words* into *values*; the result are the other words. *program* leads getopt's complaints."""
    others: list[str] = []
    queue = iter(words)
    for word in queue:
        if word == "--":
            return [*others, *queue]
        if word.startswith("--"):
            name, equals, glued = word[2:].partition("=")
            row, flag = names.find(name, program)
            spelled = f"--{row.long}" if flag else f"--no-{row.long}"
            if equals and not takes(row):
                raise ShortUsage(f"{program}: option '{spelled}' doesn't allow an argument", raw=True)
            text = glued if equals else None
            if takes(row) == ":" and text is None:
                text = next(queue, None)
                if text is None:
                    raise ShortUsage(f"{program}: option '{spelled}' requires an argument", raw=True)
            _take(row, spelled, flag, text, values)
        elif word.startswith("-") and word != "-":
            _read_letters(word[1:], queue, names, values, program)
        else:
            others.append(word)
    return others


def _read_letters(letters: str, queue: Iterator[str], names: Names, values: Values, program: str) -> None:
    """Read a word of short options; the rest of the word is the value of the first letter that takes one."""
    while letters:
        letter, letters = letters[0], letters[1:]
        row = names.short.get(letter)
        if row is None:
            raise ShortUsage(f"{program}: invalid option -- '{letter}'", raw=True)
        text: str | None = None
        if takes(row):
            text, letters = letters or None, ""
            if text is None and takes(row) == ":":
                text = next(queue, None)
                if text is None:
                    raise ShortUsage(f"{program}: option requires an argument -- '{letter}'", raw=True)
        _take(row, f"-{letter}", True, text, values)


def _take(row: Option, spelled: str, flag: bool, text: str | None, values: Values) -> None:
    if row.kind == "flag":
        values[row.attribute or ""] = flag
    else:
        READERS[row.kind][1](row, spelled, text, values)


def prescan(words: list[str]) -> tuple[bool, str | None]:
    """What must be known before anything else: whether default files are read, and the file named by ``--config``.

    Raises :class:`ShowHelp` for ``-h`` and ``--help``. CRIU finds ``--config=`` anywhere in a word, so does this.
    """
    use_defaults, file = True, None
    for index, word in enumerate(words):
        if word in ("-h", "--help"):
            raise ShowHelp
        if word == "--no-default-config":
            use_defaults = False
        elif word == "--config":
            file = words[index + 1] if index + 1 < len(words) else file
        elif "--config=" in word:
            file = word.partition("--config=")[2]
    return use_defaults and file is None, file


def parse(argv: list[str], program: str) -> tuple[list[str], Values]:
    """Read the configuration files, then *argv*: the words that are no options, and the values by attribute.

    Raises :class:`UsageError` (also :class:`ShortUsage`), :class:`ShowHelp` and :class:`ShowVersion`.
    """
    words = argv[1:]
    values: Values = {}
    if os.environ.get("CRIU_DEPRECATED") is not None:
        values["deprecated"] = True
    # What follows "--" is a command for --exec-cmd; CRIU looks for its options there too, firn does not.
    own = words[: words.index("--")] if program != "criu" and "--" in words else words
    use_defaults, file = prescan(own)
    names = Names(program)
    paths = []
    if use_defaults:
        home = os.environ.get("HOME")
        paths += ["/etc/criu/default.conf", *([f"{home}/.criu/default.conf"] if home is not None else [])]
    if os.environ.get("CRIU_CONFIG_FILE"):
        paths.append(os.environ["CRIU_CONFIG_FILE"])
    if file is not None:
        paths.append(file)
    for path in paths:
        if os.access(path, os.R_OK):
            from firn.cli import config

            # A word without a meaning is no command here; CRIU drops it.
            read(config.words(path), names, values, "criu")
    return read(words, names, values, argv[0]), values
