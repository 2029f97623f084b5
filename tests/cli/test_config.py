"""Configuration files: their lines, their places, and their order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firn.cli import config
from firn.cli.parse import parse
from firn.cli.values import ShortUsage, ShowHelp, ShowVersion
from firn.errors import UsageError

if TYPE_CHECKING:
    from firn.cli.values import Values


def values_of(tmp_path: Path, text: str, *words: str) -> Values:
    (tmp_path / "file.conf").write_bytes(text.encode())
    return parse(["firn", f"--config={tmp_path / 'file.conf'}", *words], "firn")[1]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\n\n# comment\n   # another\n", {}),
        ("extra", {"extra": True}),
        ("  \textra\n", {"extra": True}),
        ("extra\nno-extra\n", {"extra": False}),
        ("extra # comment", {"extra": True}),
        ("tree 5\nimages-dir /x\n", {"tree": 5, "images_dir": "/x"}),
        ("feature uffd#x", {"feature": "uffd"}),
        ("feature uffd # x y", {"feature": "uffd"}),
        ("feature=uffd", {"feature": "uffd"}),
        ("feature    uffd", {"feature": "uffd"}),
        ("feature\tuffd", {"feature": "uffd"}),
        ("feature \tuffd", {"feature": "uffd"}),
        ("feature a\tb", {"feature": "a\tb"}),
        ("feature uffd\r\n", {"feature": "uffd\r"}),
        ('feature "two words"', {"feature": "two words"}),
        ('feature "a\\"b"', {"feature": 'a"b'}),
        ('feature ""', {"feature": ""}),
        ('feature " a "  # c', {"feature": " a "}),
        ('feature "a#b"', {"feature": "a#b"}),
        ("feature a\\b", {"feature": "a\\b"}),
        ("verbosity 4", {"verbosity": 3}),
        ("verbosity=4", {"verbosity": 4}),
        ("manage-cgroups full", {"manage_cgroups": "soft"}),
        ("manage-cgroups=full", {"manage_cgroups": "full"}),
        ("extra zork", {"extra": True}),
        ("fea uffd", {"feature": "uffd"}),
        ("action-script /a\naction-script /b", {"action_script": ["/a", "/b"]}),
    ],
)
def test_lines(tmp_path: Path, text: str, values: Values) -> None:
    assert values_of(tmp_path, text) == values


@pytest.mark.parametrize(
    "text",
    [
        'feature "',
        'feature "abc',
        'feature "a b\\"c"',
        "feature a b",
        'feature "a" b',
        'feature "a"b',
        'feature \\"a b\\"',
    ],
)
def test_rejected_lines(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"^Unsupported configuration file format: .*file.conf, line 2:") as caught:
        values_of(tmp_path, f"extra\n{text}\n")
    assert not isinstance(caught.value, ShortUsage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zork", r"^criu: unrecognized option '--zork'$"),
        ("extra#zork", r"^criu: unrecognized option '--extra#zork'$"),
        ("--extra", r"^criu: unrecognized option '----extra'$"),
        ("v", "^criu: option '--v' is ambiguous"),
        ("feature", "^criu: option '--feature' requires an argument$"),
        ("feature # zork", "requires an argument"),
    ],
)
def test_complaints_name_criu(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ShortUsage, match=message):
        values_of(tmp_path, text)


def test_help_and_version_act(tmp_path: Path) -> None:
    with pytest.raises(ShowHelp):
        values_of(tmp_path, "help")
    with pytest.raises(ShowVersion):
        values_of(tmp_path, "version")


def test_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line beats --config or the environment's file, which beats the home file."""
    (tmp_path / ".criu").mkdir()
    (tmp_path / ".criu/default.conf").write_text("feature home\ntree 1\nport 1\n")
    (tmp_path / "env.conf").write_text("feature env\ntree 2\n")
    assert parse(["firn"], "firn")[1] == {"feature": "home", "tree": 1, "port": 1}
    monkeypatch.setenv("CRIU_CONFIG_FILE", str(tmp_path / "env.conf"))
    assert parse(["firn"], "firn")[1] == {"feature": "env", "tree": 2, "port": 1}
    assert parse(["firn", "-t7"], "firn")[1]["tree"] == 7
    assert parse(["firn", "--no-default-config"], "firn")[1] == {"feature": "env", "tree": 2}
    assert values_of(tmp_path, "tree 3") == {"feature": "env", "tree": 3}
    assert values_of(tmp_path, "tree 3", "-t4")["tree"] == 4


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIU_CONFIG_FILE", "/nonexistent/file")
    assert parse(["firn", "--config", "/nonexistent/other"], "firn")[1] == {}
    assert parse(["firn", "--config", str(tmp_path)], "firn")[1] == {}
    monkeypatch.delenv("HOME")
    assert parse(["firn"], "firn")[1] == {}


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="larger than"):
        values_of(tmp_path, "#" * (1 << 20) + "\n")


@given(st.binary(max_size=60))
def test_no_content_makes_it_crash(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.conf"
    path.write_bytes(raw)
    try:
        assert all(isinstance(word, str) for word in config.words(str(path)))
    except UsageError:
        pass
