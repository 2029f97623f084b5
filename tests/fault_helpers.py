"""For the failure tests: a program that notices what a dump could do to it, and a dump that is cut off anywhere."""

from __future__ import annotations

import _socket
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from types import FrameType

from harness import CACHE, wait_until

import firn.abi.libc as libc
from firn import api
from firn.dump import orchestrator as dump
from firn.log import Log
from firn.restore import orchestrator as restore

SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/futex.h>
#include <time.h>
#include <unistd.h>
enum { SLEEP, POLL, SPIN, WAIT, FUTEX, KINDS };
struct shared { volatile uint64_t beats[8]; volatile uint64_t ready; volatile uint64_t wrong; char text[256]; };
static struct shared *shared;
static uint32_t beaten;
static void wrong(int line, const char *what, long value)
{
    if (!__sync_fetch_and_add(&shared->wrong, 1))
        snprintf(shared->text, sizeof shared->text, "line %d: %s: %ld", line, what, value);
}
#define CHECK(ok, value) do { if (!(ok)) wrong(__LINE__, #ok, (long)(value)); } while (0)
static void handler(int number) { wrong(__LINE__, "unexpected signal", number); }
static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}
static uint64_t own_mask(int kind)
{
    static const uint64_t masks[KINDS] = {0, 1ull << (SIGTRAP - 1), 1ull << (SIGWINCH - 1) | 1ull << (SIGUSR1 - 1),
        1ull << (SIGURG - 1) | 1ull << 40, ~(1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1) | 3ull << 31)};
    return masks[kind];
}
static void check_mask(int kind)
{
    uint64_t mask = 0;
    CHECK(!syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask, 8), errno);
    CHECK(mask == own_mask(kind), mask);
}
static void check_stack(void *mine)
{
    stack_t stack;
    CHECK(!sigaltstack(NULL, &stack), errno);
    CHECK(stack.ss_sp == mine, (uintptr_t)stack.ss_sp);
}
/* All registers hold known values for a while; every one must still hold it at the end. */
static long spin(uint64_t rounds)
{
    static const uint64_t xmm[2] = {0x1122334455667788, 0x99aabbccddeeff00};
    long bad = 0;
    __asm__ volatile(
        "push %%rbp\n"
        "push %[rounds]\n"
        "push %[xmm]\n"
        "mov 8(%%rsp), %%rcx\n"
        "mov (%%rsp), %%rax\n"
        "movdqu (%%rax), %%xmm0\n movdqa %%xmm0, %%xmm7\n movdqa %%xmm0, %%xmm15\n"
        "mov $0x1001, %%rbx\n mov $0x1002, %%rdx\n mov $0x1003, %%rsi\n mov $0x1004, %%rdi\n mov $0x1005, %%rbp\n"
        "mov $0x1008, %%r8\n mov $0x1009, %%r9\n mov $0x100a, %%r10\n mov $0x100b, %%r11\n mov $0x100c, %%r12\n"
        "mov $0x100d, %%r13\n mov $0x100e, %%r14\n mov $0x100f, %%r15\n mov $0x1000, %%rax\n"
        "1: dec %%rcx\n jnz 1b\n"
        "cmp $0x1000, %%rax\n jne 2f\n cmp $0x1001, %%rbx\n jne 2f\n cmp $0x1002, %%rdx\n jne 2f\n"
        "cmp $0x1003, %%rsi\n jne 2f\n cmp $0x1004, %%rdi\n jne 2f\n cmp $0x1005, %%rbp\n jne 2f\n"
        "cmp $0x1008, %%r8\n jne 2f\n cmp $0x1009, %%r9\n jne 2f\n cmp $0x100a, %%r10\n jne 2f\n"
        "cmp $0x100b, %%r11\n jne 2f\n cmp $0x100c, %%r12\n jne 2f\n cmp $0x100d, %%r13\n jne 2f\n"
        "cmp $0x100e, %%r14\n jne 2f\n cmp $0x100f, %%r15\n jne 2f\n"
        "mov (%%rsp), %%rax\n movdqu (%%rax), %%xmm1\n"
        "pcmpeqb %%xmm1, %%xmm0\n pcmpeqb %%xmm1, %%xmm7\n pcmpeqb %%xmm1, %%xmm15\n"
        "pand %%xmm7, %%xmm0\n pand %%xmm15, %%xmm0\n pmovmskb %%xmm0, %%eax\n cmp $0xffff, %%eax\n jne 2f\n"
        "xor %%eax, %%eax\n jmp 3f\n"
        "2: mov $1, %%eax\n"
        "3: add $16, %%rsp\n pop %%rbp\n"
        : "=a"(bad)
        : [rounds] "r"(rounds), [xmm] "r"(xmm)
        : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
          "xmm0", "xmm1", "xmm7", "xmm15");
    return bad;
}
static void *work(void *argument)
{
    int kind = (int)(intptr_t)argument;
    uint64_t mask = own_mask(kind);
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    static uint32_t word;
    struct pollfd nothing = {.fd = -1};
    CHECK(!sigaltstack(&stack, NULL), errno);
    CHECK(!syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8), errno);
    for (;;) {
        uint64_t begin = now(), least = 0;
        struct timespec t = {0, 4000000};
        long result;
        switch (kind) {
        case SLEEP:
            result = syscall(SYS_nanosleep, &t, NULL);
            CHECK(result == 0, errno);
            least = 4000000;
            __sync_fetch_and_add(&beaten, 1);
            syscall(SYS_futex, &beaten, FUTEX_WAKE, 1, NULL, NULL, 0);
            break;
        case POLL:
            result = poll(&nothing, 1, 7);
            CHECK(result == 0, errno);
            least = 6900000;
            break;
        case SPIN:
            CHECK(spin(400000) == 0, 0);
            result = syscall(SYS_nanosleep, &t, NULL);
            CHECK(result == 0, errno);
            break;
        case WAIT:
            result = syscall(SYS_futex, &beaten, FUTEX_WAIT, beaten, NULL, NULL, 0);
            CHECK(result == 0 || errno == EAGAIN, errno);
            break;
        case FUTEX:
            t.tv_nsec = 9000000;
            result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, NULL, 0);
            CHECK(result == -1 && errno == ETIMEDOUT, errno);
            least = 9000000;
            break;
        }
        CHECK(now() - begin >= least, now() - begin);
        check_mask(kind);
        check_stack(stack.ss_sp);
        shared->beats[kind]++;
    }
    return NULL;
}
/* One process per file: the first one is the parent of the others. */
int main(int argc, char **argv)
{
    int number = argc - 1;
    while (number > 1 && fork())
        number--;
    int fd = number < 1 ? -1 : open(argv[number], O_RDWR);
    if (fd < 0)
        return 1;
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    signal(SIGTRAP, handler);
    signal(SIGWINCH, handler);
    signal(SIGURG, handler);
    signal(SIGUSR1, handler);
    for (intptr_t kind = 1; kind < KINDS; kind++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)kind))
            return 1;
    }
    shared->ready = 1;
    work((void *)SLEEP);
}
"""

KINDS = ("nanosleep", "poll", "registers", "futex without timeout", "futex with timeout")
READY, WRONG, TEXT = 64, 72, slice(80, 336)
PATIENCE = 5.0
WALL = 0x40000000


def build_target() -> Path:
    made = CACHE / f"steady-{hash_of(SOURCE)}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        draft = made.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-std=gnu11", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-static", "-x", "c", "-"]
        done = subprocess.run([*command, "-o", draft], input=SOURCE, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        draft.rename(made)
    return made


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Steady:
    """The program, running, as a tree of *processes*: each has five threads that wait or compute, and check registers,
    masks, stacks, times and signals."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        paths = [folder / f"steady-{number}.beat" for number in range(processes)]
        self._maps = []
        for path in paths:
            path.write_bytes(bytes(4096))
            with path.open("r+b") as file:
                self._maps.append(mmap(file.fileno(), 4096))
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [build_target(), *paths], start_new_session=True, stdin=null, stdout=null, stderr=null, cwd=folder
        )
        self.pid = self.process.pid
        for beat in self._maps:
            wait_until("the target gets ready", lambda beat=beat: bool(_word(beat, READY)))  # type: ignore[misc]
        assert not self.trouble()

    def pids(self) -> list[int]:
        """The root and its children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [self.pid, *map(int, children.split())]

    def trouble(self) -> str:
        """Waits until every thread has gone round twice; what is wrong with it, empty if nothing is."""
        found = [_trouble(beat, self.process) for beat in self._maps]
        return "; ".join(f"process {number}: {text}" for number, text in enumerate(found) if text)

    def is_back(self) -> None:
        """It was restored by a command that has ended, so it is our child again."""
        self.process.returncode = None

    def areas(self) -> int:
        return sum(len(Path(f"/proc/{pid}/maps").read_text().splitlines()) for pid in self.pids())

    def end(self) -> None:
        pids = self.pids() if self.process.poll() is None else []
        if self.process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for pid in pids[1:]:
            # The test is the reaper of orphans.
            os.waitpid(pid, WALL)


def _word(beat: mmap, offset: int) -> int:
    return int(struct.unpack_from("<Q", beat, offset)[0])


def _beats(beat: mmap) -> tuple[int, ...]:
    return struct.unpack_from("<5Q", beat)


def _trouble(beat: mmap, process: subprocess.Popen[bytes]) -> str:
    before = _beats(beat)
    deadline = time.monotonic() + PATIENCE
    while any(now < then + 2 for now, then in zip(_beats(beat), before, strict=True)):
        if process.poll() is not None:
            return f"the target ended with {process.returncode}"
        if time.monotonic() > deadline:
            gone = zip(KINDS, _beats(beat), before, strict=True)
            return f"threads hang: {[kind for kind, now, then in gone if now < then + 2]}"
        time.sleep(0.001)
    if _word(beat, WRONG):
        return beat[TEXT].split(b"\0", 1)[0].decode()
    return ""


def reap_orphans(target: int) -> None:
    """Wait for the end of all our children but *target*: copies of it must not live on without a dump."""
    for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        if pid != target:
            os.waitpid(pid, WALL)


def dump_cut_off(pid: int, images: Path, at: int, cut: Callable[[], None], options: dict[str, bool]) -> tuple[int, int]:
    """A dump in a child of ours that calls *cut* before its call number *at*: see :func:`cut_off`."""
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    chosen = api.DumpOptions(tree=pid, images_dir=str(images), leave_running=True, **options)
    return cut_off(lambda: dump.dump(chosen, Log(0)), at, cut)


def restore_cut_off(images: Path, at: int, cut: Callable[[], None], **options: bool) -> tuple[int, int]:
    """A restore in a child of ours that calls *cut* before its call number *at*: see :func:`cut_off`."""
    chosen = api.RestoreOptions(images_dir=str(images), restore_detached=True, **options)
    return cut_off(lambda: restore.restore(chosen, Log(0)), at, cut)


def cut_off(job: Callable[[], object], at: int, cut: Callable[[], None], *sockets: str) -> tuple[int, int]:
    """Do *job* in a child of ours that calls *cut* before its call number *at* (from 1 on).

    Counted is what reaches other tasks: everything through firn.abi.libc, waitpid(2) and pwrite(2); or only calls of
    methods of sockets, in the modules *sockets* (names of files); what copies of the child do is not. Answers its wait
    status and, if it came through, the number of calls.
    """
    count, counted = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            calls = _count_socket_calls(at, cut, sockets) if sockets else _count_calls(at, cut)
            signal.signal(signal.SIGTERM, _interrupt)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            job()
            os.write(counted, str(calls[0]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(counted)
    _, status = os.waitpid(child, 0)
    with open(count, "rb") as file:
        return status, int(file.read() if not status else 0)


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _count_socket_calls(at: int, cut: Callable[[], None], modules: tuple[str, ...]) -> list[int]:
    calls, mine = [0], os.getpid()

    def look(frame: FrameType, event: str, function: object) -> None:
        if event != "c_call" or not isinstance(getattr(function, "__self__", None), _socket.socket):
            return
        if frame.f_code.co_filename.endswith(modules):
            calls[0] += 1
            if calls[0] == at and os.getpid() == mine:
                cut()

    sys.setprofile(look)
    return calls


def _count_calls(at: int, cut: Callable[[], None]) -> list[int]:
    calls, mine = [0], os.getpid()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] == at and os.getpid() == mine:
                cut()
            return function(*arguments)

        return call

    for module, name in ((libc, "_syscall"), (os, "waitpid"), (os, "pwrite")):
        setattr(module, name, counted(getattr(module, name)))
    return calls
