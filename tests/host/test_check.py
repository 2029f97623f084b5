"""The verdicts of ``check``: CRIU's words and exit statuses, and firn's own lines."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from host.sandbox import FULL, kernel_config

from firn import check as module
from firn.api import CheckOptions
from firn.check import table
from firn.check.table import ALONE, EXPERIMENTAL, EXTRA, NEEDED, REQUIRED, UNUSED, USED, Ability
from firn.errors import KernelError
from firn.log import DEBUG, Log

# CLI.md of the interface facts, section 9.
FEATURES = {
    "aio_remap", "apparmor_stacking", "autofs", "breakpoints", "can_map_vdso", "cgroupns", "clone3_set_tid",
    "compat_cr", "external_net_ns", "fdinfo_lock", "get_rseq_conf", "has_ipt_legacy", "ipv6_freebind",
    "kcmp_epoll", "link_nsid", "loginuid", "mem_dirty_track", "memfd_hugetlb", "mnt_id", "move_mount_set_group",
    "net_diag_raw", "network_lock_nftables", "newifindex", "nftables", "ns_pid", "nsid", "openat2",
    "overlayfs_maps", "pagemap_scan", "pagemap_scan_guard_pages", "pidfd_store", "seccomp_filters",
    "seccomp_suspend", "sk_ns", "sk_unix_file", "sockopt_buf_lock", "tcp_half_closed", "timens", "timer_cr_ids",
    "timerfd", "tun", "tun_ns", "uffd", "uffd-noncoop", "userns",
}  # fmt: skip
GOOD = ["Looks good."]
INCOMPLETE = [
    "Looks good but some kernel features are missing",
    "which, depending on your process tree, may cause",
    "dump or restore failure.",
]


class Run:
    """One run of check: its exit status, what it printed, what it logged."""

    def __init__(self, directory: Path, **options: object) -> None:
        asked = {"feature": None, "extra": False, "experimental": False, "all": False, "criu_style": True} | options
        self.out: list[str] = []
        log = Log(DEBUG, "criu")
        path = directory / "check.log"
        log.open(str(path))
        self.status = module.check(SimpleNamespace(**asked), self.out.append, log)
        log.close()
        self.log = path.read_text()


Runner = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return lambda **options: Run(tmp_path, **options)


def _absent() -> None:
    raise KernelError("it is not there")


def _no_device() -> None:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/thing")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a table of our own in place of the real one."""

    def replace(*abilities: Ability) -> None:
        breakpoints = Ability("breakpoints", _absent, ALONE, UNUSED, "stops", "steps")
        monkeypatch.setattr(module, "ABILITIES", (*abilities, breakpoints))

    return replace


def row(name: str, criu: int = EXTRA, *, firn: str = UNUSED, state: str = "no", **more: object) -> Ability:
    """A row whose probe finds *state*."""
    probes = {"yes": lambda: None, "partly": lambda: "half of it", "no": _absent, "no device": _no_device}
    return Ability(name, probes[state], criu, firn, f"the {name} thing", f"no {name}", **more)  # type: ignore[arg-type]


# -- The table --------------------------------------------------------------------------------------------------------


def test_all_features_of_criu_are_answered() -> None:
    assert {ability.name for ability in table.ABILITIES if ability.feature} == FEATURES
    assert len({ability.name for ability in table.ABILITIES}) == len(table.ABILITIES)


def test_rows_say_what_is_lost() -> None:
    for ability in table.ABILITIES:
        assert ability.purpose and ability.loss and ability.name.isascii()
        assert ability.criu in (REQUIRED, EXTRA, EXPERIMENTAL, ALONE)
        assert ability.firn in (NEEDED, USED, UNUSED)


# -- CRIU's verdict ---------------------------------------------------------------------------------------------------


def test_good(run: Runner, rows: Callable[..., None]) -> None:
    rows(row("one", REQUIRED, state="yes"), row("two", EXTRA), row("three", EXPERIMENTAL), row("four", ALONE))
    found = run()
    assert (found.status, found.out) == (0, GOOD)
    assert "one" in found.log and "three" not in found.log


def test_first_required_miss_ends_it(run: Runner, rows: Callable[..., None]) -> None:
    rows(row("one", REQUIRED, state="yes"), row("two", REQUIRED), row("three", REQUIRED), row("four", EXTRA))
    found = run(all=True)
    assert (found.status, found.out) == (1, [])
    lines = found.log.splitlines()
    assert "Warn" in lines[-1] and lines[-1].endswith("Does not look good.")
    assert "two" in lines[-2] and "it is not there" in lines[-2]
    assert not any("three" in line or "four" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, set()),
        ({"extra": True}, {EXTRA}),
        ({"experimental": True}, {EXPERIMENTAL}),
        ({"all": True}, {EXTRA, EXPERIMENTAL}),
        ({"extra": True, "experimental": True}, {EXTRA, EXPERIMENTAL}),
    ],
)
@pytest.mark.parametrize("category", [EXTRA, EXPERIMENTAL, ALONE])
@pytest.mark.parametrize("criu_style", [True, False])
def test_categories(
    run: Runner,
    rows: Callable[..., None],
    options: dict[str, object],
    counted: set[int],
    category: int,
    criu_style: bool,
) -> None:
    rows(row("base", REQUIRED, state="yes"), row("thing", category))
    found = run(criu_style=criu_style, **options)
    verdict = INCOMPLETE if category in counted else GOOD
    assert found.status == (category in counted)
    assert found.out[-len(verdict) :] == verdict
    assert len(found.out) == len(verdict) or not criu_style


def test_optional_ones_are_all_tried(run: Runner, rows: Callable[..., None]) -> None:
    rows(*(row(f"thing{number}") for number in range(5)))
    found = run(extra=True)
    assert sum("thing" in line for line in found.log.splitlines()) == 5


def test_breakpoints_never_count(run: Runner, rows: Callable[..., None]) -> None:
    rows(row("one", EXTRA, state="yes"))
    found = run(all=True)
    assert found.out == GOOD
    assert "breakpoints" in found.log


@pytest.mark.parametrize(
    ("ability", "good"),
    [
        (row("thing", state="partly"), True),
        (row("thing", state="partly", strict=True), False),
        (row("thing", state="no device"), False),
        (row("thing", state="no device", tolerated=errno.ENOENT), True),
        (row("thing", state="no", tolerated=errno.ENOENT), False),
    ],
)
def test_shades(run: Runner, rows: Callable[..., None], ability: Ability, good: bool) -> None:
    rows(ability)
    found = run(extra=True)
    assert found.out == (GOOD if good else INCOMPLETE)
    assert ("Warn" in next(line for line in found.log.splitlines() if "thing" in line)) is not good


# -- One feature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criu_style", [True, False])
def test_feature_present(run: Runner, rows: Callable[..., None], criu_style: bool) -> None:
    rows(row("thing", state="yes"), row("required", REQUIRED))
    found = run(feature="thing", criu_style=criu_style, all=True)
    assert (found.status, found.out) == (0, ["thing is supported"])


@pytest.mark.parametrize("state", ["no", "no device"])
def test_feature_absent(run: Runner, rows: Callable[..., None], state: str) -> None:
    rows(row("thing", state=state, tolerated=errno.ENOENT))
    found = run(feature="thing")
    assert (found.status, found.out) == (1, [])
    assert "Error" in found.log and "thing is not supported: " in found.log


@pytest.mark.parametrize("strict", [True, False])
def test_feature_partly(run: Runner, rows: Callable[..., None], strict: bool) -> None:
    rows(row("thing", state="partly", strict=strict))
    found = run(feature="thing")
    assert (found.status, found.out) == ((1, []) if strict else (0, ["thing is supported"]))
    assert "half of it" in found.log


@pytest.mark.parametrize("name", ["", "list", "no_such_thing", "Tun", "tun ", "x" * 5000, "\n", "../tun", "map_files"])
def test_feature_unknown(run: Runner, name: str) -> None:
    found = run(feature=name)
    assert (found.status, found.out) == (1, [])
    assert "Unknown feature" in found.log


def test_firn_knows_more_names(run: Runner) -> None:
    assert run(feature="kcmp", criu_style=False).out == ["kcmp is supported"]


def test_feature_probes_nothing_else(run: Runner, rows: Callable[..., None]) -> None:
    rows(row("thing", state="yes"), row("other"))
    assert "other" not in run(feature="thing").log


# -- firn's own voice -------------------------------------------------------------------------------------------------


def test_lines_of_firn(run: Runner, rows: Callable[..., None]) -> None:
    rows(
        row("one", REQUIRED, firn=NEEDED, state="yes"),
        row("two", EXTRA, firn=USED, state="partly"),
        row("three", EXTRA, firn=UNUSED),
    )
    out = run(criu_style=False).out
    assert out == [
        "What firn needs:",
        "one                      yes     the one thing; without it: no one",
        "What some processes need, or what makes firn faster:",
        "two                      partly  the two thing; without it: no two (half of it)",
        "What firn does not use, or not yet:",
        "three                    no      the three thing; without it: no three (it is not there)",
        "breakpoints              no      stops; without it: steps (it is not there)",
        "firn has all that it needs and uses.",
        "Looks good.",
    ]


@pytest.mark.parametrize("criu", [REQUIRED, EXTRA, ALONE])
def test_firn_cannot_do_without(run: Runner, rows: Callable[..., None], criu: int) -> None:
    rows(row("one", criu, firn=NEEDED), row("two", EXTRA, firn=USED), row("three", ALONE, firn=NEEDED))
    found = run(criu_style=False)
    assert found.status == 1
    assert found.out[-2:] == ["firn cannot work here without: one, three.", "Does not look good."]
    assert any(line.startswith("two ") for line in found.out)


def test_criu_requires_what_firn_does_not(run: Runner, rows: Callable[..., None]) -> None:
    rows(row("one", REQUIRED, firn=UNUSED))
    found = run(criu_style=False)
    assert (found.status, found.out[-1]) == (1, "Does not look good.")


@pytest.mark.parametrize("extra", [True, False])
def test_firn_would_use(run: Runner, rows: Callable[..., None], extra: bool) -> None:
    rows(row("one", ALONE, firn=USED))
    found = run(criu_style=False, extra=extra)
    assert "firn works here, but would use: one." in found.out
    assert found.status == extra
    assert found.out[-1] == (INCOMPLETE if extra else GOOD)[-1]


# -- This machine -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FULL, reason="needs root")
@pytest.mark.parametrize("criu_style", [True, False])
def test_this_machine(run: Runner, criu_style: bool) -> None:
    found = run(criu_style=criu_style)
    assert found.status == 0, [*found.out, found.log]
    assert found.out[-1:] == GOOD


@pytest.mark.skipif("MEM_SOFT_DIRTY" in kernel_config() or not kernel_config(), reason="this kernel may have it all")
@pytest.mark.skipif(not FULL, reason="needs root")
@pytest.mark.parametrize("criu_style", [True, False])
def test_this_machine_lacks_something(run: Runner, criu_style: bool) -> None:
    found = run(criu_style=criu_style, all=True)
    assert found.status == 1
    assert found.out[-3:] == INCOMPLETE
    assert len(found.out) == 3 or not criu_style
    assert "mem_dirty_track" in (found.log if criu_style else "".join(found.out))


def test_options_of_the_interface(capsys: pytest.CaptureFixture[str]) -> None:
    from firn import api

    assert api.check(CheckOptions(feature="mnt_id", criu_style=True)) == 0
    assert capsys.readouterr().out == "mnt_id is supported\n"
