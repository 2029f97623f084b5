"""Descriptors of events, watches and processes: every workload in every way, and the constants they are made with."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Runner
from test_workloads import test_workload as run_workload
from workloads.table import PLAIN_WAYS, REFUSED_WAY, Workload

from firn.abi import events as ev
from firn.errors import FirnError, ImageError
from firn.resources import base
from firn.resources.files.epoll import Epoll
from firn.resources.files.events import EventFd, TimerFd
from firn.resources.files.external import Inherited
from firn.resources.files.handles import Finder, to_entry
from firn.resources.files.paths import kernel_dev
from firn.resources.files.pidfd import PidFd
from firn.resources.files.watches import Fanotify, Inotify

PLACED = {
    "events": "eventfd signalfd timerfd timerfd-absolute timerfd-ticks timerfd-punctual",
    "epoll": "ways fired nested closed reused both merged many waiting",
    "watches": "folder file numbers special unlinked link odd unread lost marks mount",
    "pidfd": "self thread dead",
}

REFUSED = {
    ("watches", "whole"): "watches a whole file system",
    ("watches", "deciding"): "decides about accesses",
    ("pidfd", "outside"): "is a pidfd of process \\d+",
}

TABLE = [Workload(program, mode) for program, modes in PLACED.items() for mode in modes.split()]
TABLE += [
    Workload(program, mode, refused=(text,), ways=(*PLAIN_WAYS, REFUSED_WAY))
    for (program, mode), text in REFUSED.items()
]
TABLE += [Workload("watches", "lost-fid", ways=(*PLAIN_WAYS, "dump"))]
TABLE += [Workload("epoll", mode, once=True) for mode in ("lost", "sent")]
TABLE += [Workload("events_tree", mode) for mode in ("shared", "inherited", "apart", "pidfd")]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


# ---- messages as other programs may have written them


class Images:
    """Image files that are not there."""

    def exists(self, kind: str, number: int = 0) -> bool:
        return False


def restore_context(**files: dict[str, Any]) -> base.RestoreContext:
    entries = {(base.PIDFD, int(name[1:])): {"pidfd": message} for name, message in files.items()}
    unused: Any = None
    images: Any = Images()
    return base.RestoreContext(images, None, [os.getpid()], entries, unused, unused, Inherited([]))


def timer(**changes: int) -> dict[str, int]:
    off = dict.fromkeys(("ticks", "settime_flags", "vsec", "vnsec", "isec", "insec"), 0)
    return {"id": 1, "flags": os.O_RDWR | os.O_NONBLOCK, "clockid": time.CLOCK_MONOTONIC, **off, **changes}


def test_an_expired_interval_timer_of_criu_goes_on() -> None:
    message = timer(ticks=3, insec=20_000_000)
    assert TimerFd().is_late(message, restore_context())
    fd = TimerFd().open(1, message, restore_context())
    try:
        assert os.read(fd, 8) == (3).to_bytes(8, "little")
        os.set_blocking(fd, True)
        assert int.from_bytes(os.read(fd, 8), "little") >= 1
    finally:
        os.close(fd)


def test_a_timer_that_is_off_need_not_wait() -> None:
    assert not TimerFd().is_late(timer(isec=5), restore_context())


@pytest.mark.parametrize("wrong", [{"vsec": 1 << 63}, {"isec": (1 << 64) - 1}, {"vnsec": 10**9}, {"insec": 1 << 40}])
def test_impossible_times_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ImageError, match="timerfd 1 has an impossible time"):
        TimerFd().open(1, timer(**wrong), restore_context())


def test_an_impossible_counter_is_refused() -> None:
    with pytest.raises(ImageError, match="impossible counter"):
        EventFd().open(1, {"flags": 2, "counter": (1 << 64) - 1}, restore_context())


@pytest.mark.parametrize("flags", [0, ev.EFD_SEMAPHORE])
def test_a_semaphore_is_seen_where_fdinfo_does_not_show_it(flags: int) -> None:
    kind, said = EventFd(), list[str]()
    fd = os.eventfd(1, flags)
    try:
        found = kind.is_semaphore(fd, said.append)
    finally:
        os.close(fd)
        kind.close()
    if said:
        pytest.skip(said[0])
    assert found == bool(flags)


def test_dead_processes_stay_apart_and_together() -> None:
    dead = [{"id": number, "ino": ino, "flags": 0, "nspid": -1} for number, ino in ((0, 7), (1, 8), (2, 7))]
    context = restore_context(_0=dead[0], _1=dead[1], _2=dead[2])
    kind = PidFd()
    fds = [kind.open(number, dead[number], context) for number in range(3)]
    kind.close()
    inodes = [os.fstat(fd).st_ino for fd in fds]
    for fd in fds:
        os.close(fd)
    assert inodes[0] == inodes[2] != inodes[1]


def test_a_pidfd_of_a_process_outside_is_refused() -> None:
    with pytest.raises(ImageError, match="of process 1, which the checkpoint does not hold"):
        PidFd().open(5, {"id": 5, "ino": 1, "flags": 0, "nspid": 1}, restore_context())


def fanotify(**mark: object) -> dict[str, object]:
    whole = {"id": 0, "mflags": 0, "mask": 2, "ignored_mask": 0, "s_dev": 0, **mark}
    return {"id": 1, "flags": 2, "faflags": 0, "evflags": 0, "mark": [whole]}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (fanotify(type=2, me={"mnt_id": 1, "path": "/not mounted"}), "nothing is mounted on '/not mounted'"),
        (fanotify(type=1), "unknown type 1"),
        (fanotify(type=1, mask=0x10000), "decides about accesses"),
    ],
)
def test_marks_that_cannot_be_set_are_named(message: dict[str, object], text: str) -> None:
    with pytest.raises(FirnError, match=text):
        Fanotify().open(1, message, restore_context())


@pytest.mark.parametrize(
    ("handle", "text"),
    [
        ({"path": "/not/there"}, "watch 3: /not/there cannot be watched again: No such file"),
        ({"path": "/a\0b"}, "impossible path"),
        ({"bytes": 4000}, "watch 3: inode 9 cannot be watched again: it has no path"),
    ],
)
def test_watches_that_cannot_be_set_are_named(handle: dict[str, object], text: str) -> None:
    whole = {"bytes": 0, "type": 0, "handle": [0] * 16, **handle}
    watch = {"id": 0, "i_ino": 9, "mask": 2, "ignored_mask": 0, "s_dev": 5, "wd": 3, "f_handle": whole}
    with pytest.raises(FirnError, match=text):
        Inotify().open(1, {"id": 1, "flags": 0, "wd": [watch]}, restore_context())


def test_a_file_without_a_handle_is_searched_for(tmp_path: Path) -> None:
    """Not by what is open, but in the folders that it may lie in."""
    wanted = tmp_path / "one" / "two" / "file"
    wanted.parent.mkdir(parents=True)
    wanted.write_text("")
    st = wanted.stat()
    unused: Any = None
    options: Any = SimpleNamespace(irmap_scan_path=[str(tmp_path)], force_irmap=True)
    finder = Finder(base.DumpContext([], options, [os.getpid()], unused, unused, unused))
    assert finder.find(os.getpid(), kernel_dev(st.st_dev), st.st_ino, to_entry({}, "")) == str(wanted)


# ---- constants


HEADERS = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <linux/ioctl.h>
#include <linux/kcmp.h>
#define SHOW(name, value) printf("%s %llu\\n", name, (unsigned long long)(value))
int main(void) {
"""

WANTED = {
    "EFD_SEMAPHORE": "EFD_SEMAPHORE",
    "TFD_TIMER_ABSTIME": "TFD_TIMER_ABSTIME",
    "TFD_IOC_SET_TICKS": "_IOW('T', 0, unsigned long long)",
    "ITIMERSPEC.size": "sizeof(struct itimerspec)",
    "EPOLL_CTL_ADD": "EPOLL_CTL_ADD",
    "EPOLL_CTL_MOD": "EPOLL_CTL_MOD",
    "EPOLL_EVENT.size": "sizeof(struct epoll_event)",
    "EPOLL_READINESS": "EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP",
    "EPOLL_PRIVATE": "(unsigned)(EPOLLEXCLUSIVE | EPOLLWAKEUP | EPOLLONESHOT | EPOLLET)",
    "EPOLLONESHOT": "EPOLLONESHOT",
    "KCMP_EPOLL_TFD": "KCMP_EPOLL_TFD",
    "EPOLL_SLOT.size": "sizeof(struct kcmp_epoll_slot)",
    "IN_USER_MASK": "(unsigned)(IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT)",
    "IN_DONT_FOLLOW": "IN_DONT_FOLLOW",
    "IN_MODIFY": "IN_MODIFY",
    "IN_ATTRIB": "IN_ATTRIB",
    "INOTIFY_IOC_SETNEXTWD": "_IOW('I', 0, int)",
    "FAN_CLOEXEC": "FAN_CLOEXEC",
    "FAN_NONBLOCK": "FAN_NONBLOCK",
    "FAN_UNLIMITED_QUEUE": "FAN_UNLIMITED_QUEUE",
    "FAN_REPORT_PIDFD": "FAN_REPORT_PIDFD",
    "FAN_CLOSE_WRITE": "FAN_CLOSE_WRITE",
    "FAN_EVENT_ON_CHILD": "FAN_EVENT_ON_CHILD",
    "FAN_MARK_REMOVE": "FAN_MARK_REMOVE",
    "FANOTIFY_EVENT.size": "sizeof(struct fanotify_event_metadata)",
    "FAN_MARK_ADD": "FAN_MARK_ADD",
    "FAN_MARK_DONT_FOLLOW": "FAN_MARK_DONT_FOLLOW",
    "FAN_MARK_MOUNT": "FAN_MARK_MOUNT",
    "FAN_MARK_IGNORED_MASK": "FAN_MARK_IGNORED_MASK",
    "FAN_MARK_IGNORED_SURV_MODIFY": "FAN_MARK_IGNORED_SURV_MODIFY",
    "FAN_MARK_EVICTABLE": "FAN_MARK_EVICTABLE",
    "FAN_MARK_IGNORE": "FAN_MARK_IGNORE",
    "FILE_HANDLE.size": "offsetof(struct file_handle, f_handle)",
    "MAX_HANDLE": "MAX_HANDLE_SZ",
    "FIONREAD": "FIONREAD",
}


def test_constants_are_the_headers(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no compiler")
    shows = "".join(f'SHOW("{name}", {value});\n' for name, value in WANTED.items())
    (tmp_path / "show.c").write_text(HEADERS + shows + "return 0; }\n")
    subprocess.run(["gcc", "-o", tmp_path / "show", tmp_path / "show.c"], check=True)
    text = subprocess.run([tmp_path / "show"], check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        name, value = line.split()
        ours: object = ev
        for part in name.split("."):
            ours = getattr(ours, part)
        assert ours == int(value), name


def test_a_target_under_a_number_of_its_own() -> None:
    """A child of ours adds it, so that our own descriptors stay what they are."""
    opened: dict[tuple[int, int], int] = {}
    context = restore_context()
    context.open = lambda kind, number: opened[kind, number]
    epoll, before = Epoll(), os.listdir("/proc/self/fd")
    target = {"tfd": 0, "events": 1, "data": 5, "firn": {"type": base.EVENTFD, "file": 2, "number": 700}}
    message = {"id": 1, "flags": 0, "tfd": [target]}
    try:
        opened[base.EVENTPOLL, 1] = epoll.open(1, message, context)
        opened[base.EVENTFD, 2] = EventFd().open(2, {"flags": 0, "counter": 1}, context)
        epoll.complete()
        added = Path(f"/proc/self/fdinfo/{opened[base.EVENTPOLL, 1]}").read_text()
        assert "tfd:      700 " in added
        target["firn"] = {"type": base.EVENTFD, "file": 2, "number": (1 << 31) - 2}
        with pytest.raises(OSError, match="targets of epoll instance 1 cannot be added"):
            epoll.complete()
    finally:
        for fd in opened.values():
            os.close(fd)
    assert os.listdir("/proc/self/fd") == before
