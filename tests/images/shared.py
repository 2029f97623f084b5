"""The reference material beside the checkout; tests that need it are skipped where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared(*names: str) -> Path:
    """The path of a file of the reference material."""
    path = _SHARED.joinpath(*names)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(names)} is not beside the checkout")
    return path


def reference() -> dict[str, Any]:
    """Every message, enumeration and image of CRIU 4.2."""
    found: dict[str, Any] = json.loads(shared("criu-images", "messages.json").read_text())
    return found
