"""``make bench``: measures firn and prints a table of medians of paired runs.

    bench/run.py [--only NAME]... [--json FILE] [--dir FOLDER]

CRIU=PATH in the environment names another criu-compatible command to compare with; FIRN=PATH another firn. Images go
to a folder below FOLDER (default: the system's temporary one), which is removed. Exit status 1: a limit was not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from machine import Machine, Tool
from measures import MEASURES, Bench
from table import HEADER, Row, render

FIRN = Path(__file__).parent.parent / ".venv" / "bin" / "firn"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure firn.")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="only this measure; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument("--dir", metavar="FOLDER", help="where the images go (below it)")
    return parser.parse_args()


def _measure(bench: Bench, names: list[str]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        started = time.monotonic()
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
        rows += MEASURES[name](bench)
        print(f" {time.monotonic() - started:.0f} s", file=sys.stderr)
    return rows


def _print(rows: list[Row], other: Tool | None) -> None:
    header = list(HEADER)
    header[5] = other.label if other else ""
    lines = [tuple(header), *(row.cells() for row in rows)]
    if other is None:
        lines = [(*line[:5], *line[7:]) for line in lines]
    print(render(lines))
    for row in rows:
        if row.failure:
            print(f"{row.name}: n/a: {row.failure}")
        if row.other_failure:
            print(f"{row.name}: {other.label if other else ''} fails: {row.other_failure}")


def main() -> int:
    """Run the chosen measures; the exit status."""
    wanted = _arguments()
    if os.geteuid() != 0:
        print("bench: needs root: processes are frozen and restored with their pids", file=sys.stderr)
        return 2
    machine = Machine(wanted.dir)
    try:
        other = None
        if os.environ.get("CRIU"):
            path = shutil.which(os.environ["CRIU"])
            if path is None:
                print(f"bench: CRIU={os.environ['CRIU']}: no such command", file=sys.stderr)
                return 2
            other = Tool(os.path.basename(path), os.path.abspath(path), machine)
        own = Tool("firn", os.environ.get("FIRN", str(FIRN)), machine)
        rows = _measure(Bench(machine, own, other), wanted.only or list(MEASURES))
        _print(rows, other)
        if wanted.json:
            report = {"uname": list(os.uname()), "cpus": os.cpu_count(), "rows": [row.record() for row in rows]}
            Path(wanted.json).write_text(json.dumps(report, indent=1))
    finally:
        machine.close()
    return 1 if any(row.over for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
