"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.runner import Runner


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    """A :class:`Runner` in an empty directory."""
    return Runner(tmp_path)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of the machine's or the user's reaches a test."""
    for name in ("CRIU_CONFIG_FILE", "CRIU_DEPRECATED", "CRIU_LIBS_DIR", "CRIU_FAULT", "FIRN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
