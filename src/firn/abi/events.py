"""Descriptors that tell of events: timerfd, epoll, inotify, fanotify, file handles.

Sources: include/uapi/linux/{eventfd,timerfd,eventpoll,inotify,fanotify,kcmp,pidfd}.h, fs/fhandle.c's struct
file_handle as in open_by_handle_at(2).
"""

from __future__ import annotations

import struct

EFD_SEMAPHORE = 1
COUNTER_LIMIT = (1 << 64) - 1
"""An eventfd counter that only the kernel itself can reach (eventfd(2): it reports POLLERR then)."""

TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400
ITIMERSPEC = struct.Struct("<QQQQ")
"""struct itimerspec: seconds and nanoseconds of it_interval, then of it_value."""

CLOCK_OF_ALARM = {8: 0, 9: 7}
"""CLOCK_REALTIME_ALARM and CLOCK_BOOTTIME_ALARM -> the clock that they go by."""

EPOLL_CTL_ADD = 1
EPOLL_CTL_MOD = 3
EPOLL_EVENT = struct.Struct("<IQ")
"""struct epoll_event (packed on x86-64)."""
EPOLL_READINESS = 0x2007
"""EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLRDHUP; the kernel adds EPOLLERR and EPOLLHUP."""
EPOLL_PRIVATE = 0xF << 28
"""EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET: all that is left of a one-shot target that has fired."""
EPOLLONESHOT = 1 << 30
KCMP_EPOLL_TFD = 7
EPOLL_SLOT = struct.Struct("<III")
"""struct kcmp_epoll_slot: efd, tfd, toff."""

IN_USER_MASK = 0xFFF | 0x04000000 | 0x80000000
"""IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT: what a watch keeps of its mask."""
IN_MODIFY, IN_ATTRIB = 2, 4
IN_DONT_FOLLOW = 0x02000000
INOTIFY_IOC_SETNEXTWD = 0x40044900

FAN_CLOEXEC = 1
FAN_NONBLOCK = 2
FAN_UNLIMITED_QUEUE, FAN_REPORT_PIDFD = 0x10, 0x80
FAN_CLOSE_WRITE, FAN_EVENT_ON_CHILD = 0x8, 0x08000000
FAN_MARK_ADD, FAN_MARK_REMOVE = 0x01, 0x02
FAN_MARK_DONT_FOLLOW = 0x04
FAN_MARK_MOUNT = 0x10
FAN_MARK_IGNORED_MASK = 0x20
FAN_MARK_IGNORED_SURV_MODIFY = 0x40
FAN_MARK_EVICTABLE = 0x200
FAN_MARK_IGNORE = 0x400
FAN_PERMISSION = 0x10000 | 0x20000 | 0x40000 | 0x100000
"""FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS."""

FANOTIFY_EVENT = struct.Struct("<IBBHQii")
"""struct fanotify_event_metadata: event_len, vers, reserved, metadata_len, mask, fd, pid."""
MAX_FANOTIFY_EVENT = 4096
"""Bytes that are enough for any event with all its information records (fanotify(7))."""
FILE_HANDLE = struct.Struct("<Ii")
"""The head of struct file_handle: handle_bytes, handle_type."""
MAX_HANDLE = 128

FIONREAD = 0x541B
PIDFD_THREAD = 0o200
