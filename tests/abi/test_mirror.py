"""Every constant and structure of :mod:`firn.abi` against the kernel's headers, by a compiled C program per module."""

from __future__ import annotations

import importlib
import keyword
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from abi.mirrors import MIRRORS, NEWER_CALLS, OTHERS, Mirror

import firn.abi
from firn.abi import nr, signal

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
FOLDER = Path(firn.abi.__file__).parent
WORD = (1 << 64) - 1
COMMON = ("stddef.h", "stdint.h", "stdio.h", "unistd.h")
Row = tuple[str, str, int]
"""The name in our module, a C expression, and our value."""


def _facts(name: str) -> dict[str, int | struct.Struct]:
    """The public constants of one module that are numbers or structures."""
    module = vars(importlib.import_module(f"firn.abi.{name}"))
    return {
        key: value
        for key, value in module.items()
        if not key.startswith("_") and key.isupper() and isinstance(value, (int, struct.Struct))
    }


def _expression(mirror: Mirror, name: str) -> str:
    if name in mirror.expressions:
        return mirror.expressions[name]
    begins = [prefix for prefix in mirror.prefixes if name.startswith(prefix)]
    return mirror.prefixes[max(begins, key=len)] + name if begins else name


def _offsets(format_: str) -> list[tuple[int, int]]:
    """(Offset, size) of every field of a struct format without native alignment."""
    assert format_[0] == "<"
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", format_[1:]):
        size = struct.calcsize("<" + kind)
        if kind in "sx":
            found.append((at, size * int(count or 1)))
        else:
            found += [(at + size * index, size) for index in range(int(count or 1))]
        at = found[-1][0] + found[-1][1]
    return found


def _struct_rows(mirror: Mirror, name: str, value: struct.Struct) -> list[Row]:
    kind, members = mirror.structs[name]
    fields = _offsets(value.format)
    listed = members.split()
    assert len(listed) == len(fields), f"{name} has {len(fields)} fields, its mirror {len(listed)}"
    rows: list[Row] = [(name, f"sizeof({kind})", value.size)]
    for member, (offset, size) in zip(listed, fields, strict=True):
        if member != "-":
            rows.append((name, f"offsetof({kind}, {member})", offset))
            rows.append((name, f"sizeof((({kind} *)0)->{member})", size))
    return rows


def _rows(mirror: Mirror, name: str) -> list[Row]:
    rows: list[Row] = []
    for key, value in _facts(name).items():
        if key in mirror.own:
            continue
        if isinstance(value, struct.Struct):
            rows += _struct_rows(mirror, key, value)
        else:
            rows.append((key, _expression(mirror, key), value))
    return rows


def _source(headers: tuple[str, ...], types: str, expressions: list[str]) -> str:
    lines = ["#define _GNU_SOURCE", *(f"#include <{header}>" for header in (*COMMON, *headers))]
    lines += [types, "int main(void) {"]
    lines += [
        f'#line {number + 1} "row"\nprintf("%llu\\n", (unsigned long long)(int64_t)({text}));'
        for number, text in enumerate(expressions)
    ]
    return "\n".join([*lines, "return 0; }", ""])


def _compile(source: str, program: Path) -> str:
    done = subprocess.run(
        ["gcc", "-w", "-fmax-errors=0", "-x", "c", "-o", program, "-"],
        input=source, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def measure(headers: tuple[str, ...], expressions: list[str], folder: Path, types: str = "") -> list[int | None]:
    """The value of each C expression as an unsigned 64-bit number; None for what these headers do not know."""
    program = folder / "mirror"
    errors = _compile(_source(headers, types, expressions), program)
    unknown = {int(line) - 1 for line in re.findall(r"^row:(\d+):\d+: error:", errors, re.MULTILINE)}
    known = [number for number in range(len(expressions)) if number not in unknown]
    if unknown:
        errors = _compile(_source(headers, types, [expressions[number] for number in known]), program)
    assert not errors, errors
    printed = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    values: list[int | None] = [None] * len(expressions)
    for number, text in zip(known, printed, strict=True):
        values[number] = int(text)
    return values


def test_every_module_has_a_mirror() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")}
    assert modules == set(MIRRORS) | OTHERS


@pytest.mark.parametrize("name", sorted(MIRRORS))
def test_constants(name: str, tmp_path: Path) -> None:
    mirror = MIRRORS[name]
    rows = _rows(mirror, name)
    values = measure(mirror.headers, [text for _, text, _ in rows], tmp_path, mirror.types)
    wrong = []
    for (key, text, ours), theirs in zip(rows, values, strict=True):
        if theirs is None and key not in mirror.newer:
            wrong.append(f"{key}: these headers do not know {text}")
        elif theirs is not None and theirs != ours & WORD:
            wrong.append(f"{key} is {ours:#x}, {text} is {theirs:#x}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(MIRRORS))
def test_newer_constants(name: str) -> None:
    """What the headers here may lack has the value of the source that is cited for it."""
    facts = _facts(name)
    for key, (source, value) in MIRRORS[name].newer.items():
        ours = facts[key]
        assert (ours.size if isinstance(ours, struct.Struct) else ours) == value, f"{key}: {source}"


@pytest.mark.parametrize("name", sorted(MIRRORS))
def test_mirrors_are_of_something(name: str) -> None:
    """No table names what the module no longer has."""
    mirror, module = MIRRORS[name], vars(importlib.import_module(f"firn.abi.{name}"))
    named = {*mirror.expressions, *mirror.structs, *mirror.newer, *mirror.own}
    assert not sorted(named - set(module))


def test_a_wrong_value_is_noticed(tmp_path: Path) -> None:
    assert measure(("linux/mman.h",), ["MAP_SHARED", "NO_SUCH_NAME", "MAP_PRIVATE"], tmp_path) == [1, None, 2]


def test_system_call_numbers(tmp_path: Path) -> None:
    calls = {key: value for key, value in vars(nr).items() if isinstance(value, int) and not key.startswith("__")}
    assert len(calls) > 300
    names = [key[:-1] if key.endswith("_") and keyword.iskeyword(key[:-1]) else key for key in calls]
    values = measure(("asm/unistd_64.h",), [f"__NR_{name}" for name in names], tmp_path)
    wrong = []
    for name, ours, theirs in zip(names, calls.values(), values, strict=True):
        expected = theirs if theirs is not None else NEWER_CALLS.get(name, ("", None))[1]
        if ours != expected:
            wrong.append(f"{name} is {ours}, the kernel's is {expected}")
    assert not wrong, "\n".join(wrong)
    assert len(set(calls.values())) == len(calls), "a number is there twice"


def test_signal_sets() -> None:
    assert {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU} == signal.STOP_SIGNALS
    assert signal.bit(1) == 1 and signal.bit(64) == 1 << 63
