"""Sockets of the other kinds (netlink, packet, raw, ping), what is refused of them, and every option of every kind."""

from __future__ import annotations

import pytest
from harness import Runner
from test_workloads import test_workload as run_workload
from workloads.table import Workload

# The link of a socket's descriptor is its new inode.
UNLIKE = (r"fd\.\d+",)
TABLE = [Workload("sockets", mode, unlike=UNLIKE) for mode in ("netlink", "packet", "raw", "ping")]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)
