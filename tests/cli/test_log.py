"""The log: CRIU's line shapes in files, words for people on stderr."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firn.log import DEBUG, INFO, Log

STAMP = re.compile(r"^\(\d\d\.\d{6}\) ")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def lines_of(tmp_path: Path, level: int, program: str = "criu") -> list[str]:
    """What is in the file after one message of each level."""
    log = Log(level, program)
    log.open(str(tmp_path / "log"))
    log.error("an error")
    log.warn("a warning")
    log.info("some information")
    log.debug("a detail")
    log.close()
    return (tmp_path / "log").read_text().splitlines()


def test_levels(tmp_path: Path) -> None:
    assert lines_of(tmp_path, 0) == []
    assert [line.partition("(")[0] for line in lines_of(tmp_path, 1)] == ["Error "]
    assert [line.partition("(")[0] for line in lines_of(tmp_path, 2)] == ["Error ", "Warn  "]
    assert len(lines_of(tmp_path, 3)) == 3 + 3
    assert len(lines_of(tmp_path, 4)) == 3 + 4
    assert all(STAMP.match(line) for line in lines_of(tmp_path, 3))


def test_line_shapes(tmp_path: Path) -> None:
    lines = [STAMP.sub("", line) for line in lines_of(tmp_path, 4)]
    assert re.fullmatch(rf"CRIU run id = {UUID.pattern}", lines[0])
    assert lines[1] == "Version: 4.2 (gitid 0)"
    host = os.uname()
    assert lines[2] == f"Running on {host.nodename} Linux {host.release} {host.version} {host.machine}"
    assert re.fullmatch(r"Error \(.*test_log\.py:\d+\): an error", lines[3])
    assert re.fullmatch(r"Warn  \(.*test_log\.py:\d+\): a warning", lines[4])
    assert lines[5:] == ["some information", "a detail"]


def test_firn_says_its_own_version(tmp_path: Path) -> None:
    lines = [STAMP.sub("", line) for line in lines_of(tmp_path, 4, "firn")]
    assert lines[0].startswith("firn run id = ") and lines[1] == "Version: 0.1.0 (gitid 0)"


def test_the_file(tmp_path: Path) -> None:
    """Private, and new each time."""
    path = tmp_path / "log"
    before = os.umask(0)
    try:
        lines_of(tmp_path, 2)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("old\n" * 1000)
    assert len(lines_of(tmp_path, 2)) == 2
    with pytest.raises(FileNotFoundError):
        Log().open(str(tmp_path / "missing" / "log"))


def test_early_messages_pass_the_final_level(tmp_path: Path) -> None:
    log = Log(2, "criu")
    log.info("early information")
    log.warn("early warning")
    log.debug("early detail")
    log.level = INFO
    log.open(str(tmp_path / "log"))
    log.close()
    first, second, *_ = (tmp_path / "log").read_text().splitlines()
    assert first == "(00.000000) early information"
    assert re.fullmatch(r"Warn  \(.*\): early warning", second)
    assert "early detail" not in (tmp_path / "log").read_text()


def test_early_messages_go_to_stderr_in_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(2, "criu")
    log.info("early information")
    log.error("early error")
    log.close()
    assert re.fullmatch(r"Error \(.*test_log.py:\d+\): early error\n", capfd.readouterr().err)


def test_too_many_early_messages(tmp_path: Path) -> None:
    log = Log(2, "criu")
    for number in range(200):
        log.warn(f"message {number}")
    log.open(str(tmp_path / "log"))
    log.close()
    text = (tmp_path / "log").read_text()
    assert "message 50" in text and "message 150" not in text
    assert "are lost" in text.splitlines()[-1]


def test_friendly(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(2, "firn")
    log.open()
    with log.step("freeze", 42):
        log.error("no such process\n  2nd line")
    log.warn("odd\x1b[31m name \udcff")
    log.info("not shown")
    log.close()
    captured = capfd.readouterr()
    assert captured.err.splitlines() == [
        "firn: error: no such process",
        "  2nd line",
        "firn: warning: odd\\x1b[31m name \\udcff",
    ]
    assert captured.out == ""


def test_friendly_with_more_to_say(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(3, "firn")
    log.open()
    log.step("freeze", 42)
    log.info("seized")
    log.close()
    assert re.search(r"^\(\d\d\.\d{6}\) freeze: 42: seized$", capfd.readouterr().err, re.M)


def test_friendly_and_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(3, "firn")
    log.open(str(tmp_path / "log"))
    log.error("broken")
    log.info("detail")
    log.close()
    assert capfd.readouterr().err == "firn: error: broken\n"
    assert "): broken\n" in (tmp_path / "log").read_text() and "detail\n" in (tmp_path / "log").read_text()


def test_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(1, "criu")
    log.open("-")
    log.error("broken")
    log.close()
    assert "): broken\n" in capfd.readouterr().out


def test_steps(tmp_path: Path) -> None:
    log = Log(INFO, "criu")
    log.open(str(tmp_path / "log"))
    with log.step("outer"):
        with log.step("inner", 7):
            log.info("one")
        log.info("two")
    log.info("three")
    log.step("last")
    log.warn("four")
    log.close()
    lines = [STAMP.sub("", line) for line in (tmp_path / "log").read_text().splitlines()[3:]]
    assert lines[:3] == ["inner: 7: one", "outer: two", "three"]
    assert lines[3].endswith("): last: four")


def test_every_line_of_an_error_is_found(tmp_path: Path) -> None:
    log = Log(2, "criu")
    log.open(str(tmp_path / "log"))
    log.error("2 obstacles:\n  one\n  two")
    log.record(1, "Dumping FAILED.")
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith("Error (") for line in lines)


def test_the_stamp_is_ten_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = Log(DEBUG, "criu")
    log.open(str(tmp_path / "log"))
    log._started = time.monotonic() - 123.4
    log.info("late")
    log.close()
    assert re.fullmatch(r"\(123\.\d{5}\) late", (tmp_path / "log").read_text().splitlines()[-1])


def test_long_lines_are_cut(tmp_path: Path) -> None:
    log = Log(2, "criu")
    log.open(str(tmp_path / "log"))
    log.error("x" * 20000)
    log.close()
    raw = (tmp_path / "log").read_bytes()
    assert len(raw) == 8192 and raw.endswith(b"...\n")


@given(st.text(max_size=20))
def test_any_text_can_be_logged(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.log"
    log = Log(2, "criu")
    log.open(str(path))
    log.error(text)
    log.close()
    assert path.read_bytes().endswith(b"\n")


def test_a_full_disk_is_not_the_logs_business() -> None:
    log = Log(2, "criu")
    log.open("/dev/full")
    log.error("broken")
    log.close()


def test_run_ids_differ() -> None:
    assert UUID.fullmatch(Log().run_id) and Log().run_id != Log().run_id
