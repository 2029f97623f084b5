"""The launcher's shape, and what a start of it costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firn.cli import launcher


def test_it_runs_the_real_interpreter(tmp_path: Path) -> None:
    (tmp_path / "firn").symlink_to("nowhere")  # what was there is replaced
    launcher.write(str(tmp_path))
    first = (tmp_path / "firn").read_text().splitlines()[0]
    assert first == f"#!{os.path.realpath(sys.executable)} -IS"
    for name, version in (("firn", "firn 0.1.0\n"), ("criu", "Version: 4.2\n")):
        assert subprocess.run([tmp_path / name, "--version"], capture_output=True, text=True).stdout == version


@pytest.mark.parametrize("directory", ["d" * 200, "with blank", 'quote" dollar$tick`'])
def test_a_path_that_the_kernel_would_cut(tmp_path: Path, directory: str) -> None:
    (tmp_path / directory).mkdir()
    interpreter = tmp_path / directory / "python"
    interpreter.symlink_to(os.path.realpath(sys.executable))
    script = tmp_path / "script"
    script.write_text(launcher.shebang(str(interpreter)) + "import sys\nprint(sys.flags.isolated, sys.argv[1:])\n")
    script.chmod(0o755)
    assert script.read_text().startswith("#!/bin/sh\n")
    done = subprocess.run([script, "a b", "$c"], capture_output=True, text=True)
    assert done.stdout == "1 ['a b', '$c']\n"
