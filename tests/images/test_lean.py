"""The image code is on the way of every dump and restore: what it imports, and how long it takes to begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import firn

_SOURCE = str(Path(firn.__file__).parents[1])
_ALLOWED = {"os", "sys", "ctypes", "struct", "errno", "stat", "time", "__future__"}


def _run(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {_SOURCE!r})\n{code}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout


def test_imports() -> None:
    report = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    bare = set(_run(f"import {', '.join(sorted(_ALLOWED))}\n{report}").split())
    full = set(_run(f"import firn.images.store, firn.images.pages\n{report}").split())
    assert full - bare == {"firn"}


def test_no_theme_is_imported_without_need() -> None:
    loaded = _run(
        "from firn.images import wire\nwire.encode('pstree_entry', dict(pid=1, ppid=0, pgid=1, sid=1))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('firn.images.schema.')))"
    )
    assert loaded.split() == ["firn.images.schema.firn", "firn.images.schema.tasks"]
