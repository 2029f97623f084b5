"""The option table against the documented command line of CRIU 4.2, and against what is derived from it."""

from __future__ import annotations

import pytest

from firn import api
from firn.api import TABLE, CheckOptions, DumpOptions, Option, RestoreOptions
from firn.cli import usage
from firn.cli.parse import takes
from firn.errors import NotBuilt, UsageError

# CRIU 4.2's long options. After the colon: "n" there is a --no- form, "=" a value, "?" an optional one.
CRIU_OPTIONS = """
tree:= images-dir:= work-dir:= log-file:= log-pid:n verbosity:? display-stats:n pidfile:= action-script:= libdir:=
close:= unprivileged:n deprecated:n stream:n config:= no-default-config: help: version: ms: leave-running:
leave-stopped: restore-detached:n daemon:n restore-sibling:n exec-cmd: timeout:= freeze-cgroup:= shell-job:n
weak-sysctls:n mntns-compat-mode:n track-mem:n prev-images-dir:= auto-dedup:n pre-dump-mode:= page-server:n address:=
port:= ps-socket:= status-fd:= lazy-pages: tls:n tls-cacert:= tls-cacrl:= tls-cert:= tls-key:= tls-no-cn-verify:
cpu-cap:? file-validation:= skip-file-rwx-check:n ghost-limit:= ghost-fiemap:n link-remap:n force-irmap:n
irmap-scan-path:= evasive-devices:n allow-uprobes:n file-locks:n tcp-established:n tcp-close:n skip-in-flight:n
network-lock:= ext-unix-sk:? empty-ns:= join-ns:= veth-pair:= root:= external:= inherit-fd:= ext-mount-map:=
enable-external-sharing: enable-external-masters: skip-mnt:= enable-fs:= lsm-profile:= lsm-mount-context:=
manage-cgroups:? cgroup-root:= cgroup-props:= cgroup-props-file:= cgroup-dump-controller:= cgroup-yard:= feature:=
extra:n experimental:n all:
"""

# Its short ones, as getopt(3) takes them ("h" and "V" included).
CRIU_LETTERS = "dSsRt:hD:o:v::x::Vr:jJ:lW:L:M:"


def test_every_option_of_criu_has_a_row() -> None:
    shapes = {"": "", ":": "=", "::": "?"}
    rows = [f"{row.long}:{shapes[takes(row)]}{'n' if row.no else ''}" for row in TABLE if not row.firn_only]
    assert sorted(rows) == sorted(CRIU_OPTIONS.split())


def test_short_letters() -> None:
    ours = {row.short: takes(row) for row in TABLE if row.short}
    theirs = {}
    rest = CRIU_LETTERS
    while rest:
        letter, rest = rest[0], rest[1:]
        colons = len(rest) - len(rest.lstrip(":"))
        theirs[letter], rest = ":" * colons, rest[colons:]
    assert ours == theirs


def test_every_option_has_a_help_text() -> None:
    told = [name for options in usage.SECTIONS.values() for name in options]
    assert sorted(told) == sorted(row.long for row in TABLE if row.long != "ms")
    for row in TABLE:
        assert (f"--{row.long}" in usage.full("firn")) == (row.long != "ms")
        assert not (row.firn_only and f"--{row.long} " in usage.full("criu"))


def test_help_names_the_features_of_check() -> None:
    text = usage.full("criu").partition("features:")[2].partition("Logging")[0]
    names = text.replace(",", " ").split()
    assert len(names) == 45 and {"aio_remap", "mem_dirty_track", "uffd-noncoop", "userns"} <= set(names)
    assert all(len(line) <= 60 for line in text.splitlines())


@pytest.mark.parametrize("record", [DumpOptions, RestoreOptions, CheckOptions])
def test_annotations_are_the_attributes(record: type[api.Options]) -> None:
    annotated = {name for base in record.__mro__ for name in getattr(base, "__annotations__", {})} - {"letter"}
    assert annotated == set(api.defaults(record.letter))


@pytest.mark.parametrize("record", [DumpOptions, RestoreOptions, CheckOptions])
def test_defaults_are_built(record: type[api.Options]) -> None:
    record().refuse_unbuilt()


def test_defaults() -> None:
    options = DumpOptions()
    assert (options.ghost_limit, options.ghost_fiemap, options.timeout) == (1 << 20, True, 10)
    assert (options.file_validation, options.manage_cgroups, options.cpu_cap) == ("buildid", "soft", 5)
    assert (options.verbosity, options.network_lock, options.external) == (2, "iptables", [])
    assert RestoreOptions().foreground_status is True
    assert CheckOptions().feature is None


def test_lists_are_not_shared() -> None:
    first = DumpOptions()
    first.action_script.append("x")
    assert DumpOptions().action_script == []


def test_directories(tmp_path: str) -> None:
    options = DumpOptions(images_dir="a/../b")
    assert options.images_dir.startswith("/") and options.images_dir.endswith("/b")
    assert options.work_dir == options.images_dir
    assert DumpOptions(work_dir="/w").work_dir == "/w"
    assert DumpOptions(images_dir_fd=7).images_dir == "/proc/self/fd/7"
    assert DumpOptions(images_dir_fd=7, images_dir="/x").images_dir == "/x"


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"DumpOptions has no frobnicate, inherit_fd"):
        DumpOptions(frobnicate=1, inherit_fd=[])


@pytest.mark.parametrize("row", [row for row in TABLE if row.built is False], ids=lambda row: row.long)
def test_what_is_not_built_is_refused_by_name(row: Option) -> None:
    """Also for callers of the library, and only where CRIU would listen to the option at all."""
    value: object = {str: "x", int: 77, tuple: ["x"], bool: True}[type(row.default)]
    for record in (DumpOptions, RestoreOptions, CheckOptions):
        if record.letter in row.commands and row.attribute:
            named = next(
                other.long for other in TABLE if other.attribute == row.attribute and record.letter in other.commands
            )
            with pytest.raises(NotBuilt, match=f"--{named}\\b"):
                record(**{row.attribute: value}).refuse_unbuilt()


def test_partly_built_values() -> None:
    DumpOptions(external=["unix[3]", "zork[1]"]).refuse_unbuilt()
    with pytest.raises(NotBuilt, match="external"):
        DumpOptions(external=["unix[3]", "net[4]:key"]).refuse_unbuilt()


def test_a_dump_needs_a_pid() -> None:
    with pytest.raises(UsageError, match="pid not specified"):
        api.dump(DumpOptions())


def test_a_snapshot_needs_leave_running() -> None:
    with pytest.raises(UsageError, match="--leave-running"):
        api.dump(DumpOptions(tree=1 << 30, fork_snapshot=True))


def test_a_sibling_needs_detach() -> None:
    with pytest.raises(UsageError, match="--restore-detached"):
        api.restore(RestoreOptions(restore_sibling=True))
