"""Descriptors of events, watches and processes: every workload in every way, and the constants they are made with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Runner
from test_workloads import test_workload as run_workload
from workloads.table import PLAIN_WAYS, REFUSED_WAY, Workload

from firn.abi import events as ev

PLACED = {
    "events": "eventfd signalfd timerfd timerfd-absolute timerfd-ticks timerfd-punctual",
    "epoll": "ways fired nested closed reused both many waiting",
    "watches": "folder file numbers special unlinked link odd marks mount",
    "pidfd": "self thread dead",
}

REFUSED = {
    ("epoll", "merged"): "several targets that are open as descriptor \\d+ only",
    ("epoll", "lost"): "target \\d+ .* has been closed but lives on",
    ("watches", "unread"): "an inotify instance with 64 bytes of unread events",
    ("watches", "whole"): "watches a whole file system",
    ("watches", "deciding"): "decides about accesses",
    ("pidfd", "outside"): "is a pidfd of process \\d+",
}

TABLE = [Workload(program, mode) for program, modes in PLACED.items() for mode in modes.split()]
TABLE += [
    Workload(program, mode, refused=(text,), ways=(*PLAIN_WAYS, REFUSED_WAY)) for (program, mode), text in REFUSED.items()
]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


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
    "INOTIFY_IOC_SETNEXTWD": "_IOW('I', 0, int)",
    "FAN_CLOEXEC": "FAN_CLOEXEC",
    "FAN_NONBLOCK": "FAN_NONBLOCK",
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
