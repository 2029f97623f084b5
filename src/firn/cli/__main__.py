"""``python -m firn.cli`` is the command ``firn``."""

from __future__ import annotations

from firn.cli.main import console

console()
