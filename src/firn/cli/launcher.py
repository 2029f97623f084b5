"""Writes the lean launcher: ``python -m firn.cli.launcher BIN_DIR`` makes BIN_DIR/firn and the link BIN_DIR/criu.

A console script as pip makes it starts the interpreter with ``site`` (tens of milliseconds on some machines) and
imports helpers of its own. This launcher runs the real interpreter, behind virtual environments and shims, with
``-I -S``, and finds the package itself.
"""

from __future__ import annotations

import os
import sys

# The kernel cuts a "#!" line at BINPRM_BUF_SIZE (linux/binfmts.h): 256 bytes since Linux 5.1, 128 before.
SHEBANG_LIMIT = 127

BODY = """\
import gc
import sys

gc.disable()  # one short command: its few reference cycles go with the process
sys.path.insert(0, {source!r})
from firn.cli.main import console

console()
"""


def shebang(interpreter: str) -> str:
    """The first line (or two) of a script that *interpreter* runs with ``-I -S``, however long its path is."""
    line = f"#!{interpreter} -IS\n"
    if len(line) <= SHEBANG_LIMIT and not any(character.isspace() for character in interpreter):
        return line
    # The second line is an exec to sh and a string to Python. Single quotes must not occur in it.
    quoted = interpreter.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
    return f"#!/bin/sh\n''''exec \"{quoted}\" -IS \"$0\" \"$@\" # '''\n"


def write(directory: str) -> None:
    """Make ``firn`` and ``criu`` in *directory*; raises :class:`OSError`."""
    source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    firn, criu = os.path.join(directory, "firn"), os.path.join(directory, "criu")
    for path in (firn, criu):
        if os.path.lexists(path):
            os.unlink(path)
    descriptor = os.open(firn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    with open(descriptor, "w", encoding="utf-8") as launcher:
        launcher.write(shebang(os.path.realpath(sys.executable)) + BODY.format(source=source))
    os.symlink("firn", criu)


if __name__ == "__main__":
    write(sys.argv[1])
