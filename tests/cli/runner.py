"""Runs the commands as their users do: a process of its own, started the way the launcher does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"

# Stands in for the orchestrators: writes down what it was given, then does what the test says.
DRIVER = """\
import sys
sys.path.insert(0, {source!r})
import os, types
{fake}
for name in ("dump", "restore"):
    if name in globals():
        module = types.ModuleType("firn." + name + ".orchestrator")
        setattr(module, name, globals()[name])
        sys.modules[module.__name__] = module
if "check" in globals():
    module = types.ModuleType("firn.check")
    module.check = check
    import firn
    sys.modules["firn.check"] = firn.check = module
sys.argv = {argv!r}
from firn.cli.main import console
console()
"""


class Runner:
    """Starts ``firn`` or ``criu`` with fake work behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(
        self, *argv: str, fake: str = "", environment: dict[str, str] | None = None, closed: tuple[int, ...] = ()
    ) -> subprocess.Popen[str]:
        """A running command; *argv* begins with its name, *fake* is Python that may define dump, restore, check."""

        def close() -> None:
            for number in closed:
                os.close(number)

        code = DRIVER.format(source=str(SOURCE), fake=fake, argv=list(argv))
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=None if 1 in closed else subprocess.PIPE,
            stderr=None if 2 in closed else subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory), **(environment or {})},
            preexec_fn=close if closed else None,
        )

    def __call__(
        self, *argv: str, fake: str = "", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The ended command, with its output."""
        process = self.start(*argv, fake=fake, environment=environment)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)
