/*
 * System calls that the freeze interrupts. A thread waits in one; afterwards it must not have returned early, nor with
 * EINTR, nor with anything but what an undisturbed wait gives. Timed waits also have a (generous) upper bound.
 */
#include "workload.h"

#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/wait.h>

enum { WAIT_MS = 500, LATE_MS = 2000 };

static const struct timespec span = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000000};

static pthread_t waiter;
static volatile int waiter_tid, finished, released, verdict;
static int64_t started, ended;
static volatile int handled;
static uint32_t word;
static sigset_t queue;
static int descriptors[2];
static pid_t child;

static void on_signal(int number)
{
	handled = number;
}

/* ---- timed waits: each answers 1 if the call returned what it does when its time is over ---- */

static int64_t absolute(clockid_t clock, struct timespec *at)
{
	int64_t end = now_ns(clock) + WAIT_MS * 1000000LL;
	at->tv_sec = end / 1000000000;
	at->tv_nsec = end % 1000000000;
	return end;
}

static int wait_nanosleep(void)
{
	CHECK(!nanosleep(&span, NULL));
	return 1;
}

static int wait_nanosleep_rest(void)
{
	struct timespec rest = {77, 88};
	CHECK(!nanosleep(&span, &rest));
	return 1;
}

static int wait_clock_relative(void)
{
	struct timespec rest;
	CHECK(!clock_nanosleep(CLOCK_MONOTONIC, 0, &span, &rest));
	return 1;
}

static int wait_until_clock(clockid_t clock)
{
	struct timespec at;
	int64_t end = absolute(clock, &at);
	CHECK(!clock_nanosleep(clock, TIMER_ABSTIME, &at, NULL));
	CHECK(now_ns(clock) >= end);
	return 1;
}

static int wait_clock_monotonic(void)
{
	return wait_until_clock(CLOCK_MONOTONIC);
}

static int wait_clock_realtime(void)
{
	return wait_until_clock(CLOCK_REALTIME);
}

static int wait_clock_boottime(void)
{
	return wait_until_clock(CLOCK_BOOTTIME);
}

static int wait_poll(void)
{
	CHECK(!poll(NULL, 0, WAIT_MS));
	return 1;
}

/* On a file too, whose events are never what is asked for. */
static int wait_poll_file(void)
{
	struct pollfd wanted = {.fd = descriptors[0], .events = POLLPRI};
	CHECK(!poll(&wanted, 1, WAIT_MS) && !wanted.revents);
	return 1;
}

static int wait_ppoll(void)
{
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	CHECK(!ppoll(NULL, 0, &span, &mask));
	return 1;
}

static int wait_select(void)
{
	struct timeval limit = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000};
	CHECK(!select(0, NULL, NULL, NULL, &limit));
	CHECK(!limit.tv_sec && !limit.tv_usec);
	return 1;
}

static int wait_pselect(void)
{
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	CHECK(!pselect(0, NULL, NULL, NULL, &span, &mask));
	return 1;
}

static int wait_futex(void)
{
	CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &span, NULL, 0) == -1 && errno == ETIMEDOUT);
	return 1;
}

static int wait_futex_until(void)
{
	struct timespec at;
	absolute(CLOCK_MONOTONIC, &at);
	CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &at, NULL, 0xff) == -1 && errno == ETIMEDOUT);
	return 1;
}

static int wait_condition(void)
{
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
	struct timespec at;
	absolute(CLOCK_REALTIME, &at);
	CHECK(!pthread_mutex_lock(&mutex));
	int result = 0;
	/* A condition may wake without reason; a program has to wait again. */
	while (!result)
		result = pthread_cond_timedwait(&condition, &mutex, &at);
	CHECK(result == ETIMEDOUT && !handled);
	return 1;
}

static int wait_sigtimedwait(void)
{
	CHECK(sigtimedwait(&queue, NULL, &span) == -1 && errno == EAGAIN);
	return 1;
}

static int wait_epoll(void)
{
	struct epoll_event event;
	CHECK(!epoll_wait(descriptors[0], &event, 1, WAIT_MS));
	return 1;
}

/* ---- waits without a limit: only what the check does ends them ---- */

static int wait_futex_forever(void)
{
	CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0));
	return 1;
}

static int wait_pause(void)
{
	CHECK(pause() == -1 && errno == EINTR && handled == SIGUSR2);
	return 1;
}

static int wait_sigsuspend(void)
{
	sigset_t during, after;
	sigemptyset(&during);
	sigaddset(&during, SIGALRM);
	CHECK(sigsuspend(&during) == -1 && errno == EINTR && handled == SIGUSR2);
	CHECK(!pthread_sigmask(SIG_SETMASK, NULL, &after));
	CHECK(sigismember(&after, SIGUSR2) && !sigismember(&after, SIGALRM));
	return 1;
}

static int wait_sigwaitinfo(void)
{
	siginfo_t info;
	CHECK(sigwaitinfo(&queue, &info) == SIGRTMIN + 3 && info.si_value.sival_int == 99);
	return 1;
}

static int wait_child(void)
{
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
	return 1;
}

static int wait_pipe(void)
{
	char byte;
	CHECK(read(descriptors[0], &byte, 1) == 1 && byte == 'x');
	return 1;
}

/* ---- what the check does to end an endless wait; answers whether it could ---- */

static int wake_futex(void)
{
	int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_MS * 1000000LL;
	while (now_ns(CLOCK_MONOTONIC) < end) {
		if (syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0) == 1)
			return 1;
		nap_ms(2);
	}
	return 0;
}

static int wake_signal(void)
{
	return !syscall(SYS_tgkill, getpid(), waiter_tid, SIGUSR2);
}

static int wake_queue(void)
{
	return !pthread_sigqueue(waiter, SIGRTMIN + 3, (union sigval){.sival_int = 99});
}

static int wake_child(void)
{
	return !kill(child, SIGTERM);
}

static int wake_pipe(void)
{
	return write(descriptors[1], "x", 1) == 1;
}

static const struct wait {
	const char *mode;
	int (*wait)(void);
	int (*wake)(void);
	/* The clock that the wait goes by; a restored program's monotonic clock may have stood still meanwhile. */
	clockid_t clock;
} waits[] = {
	{"nanosleep", wait_nanosleep, NULL, CLOCK_MONOTONIC},
	{"nanosleep-rest", wait_nanosleep_rest, NULL, CLOCK_MONOTONIC},
	{"clock-relative", wait_clock_relative, NULL, CLOCK_MONOTONIC},
	{"clock-monotonic", wait_clock_monotonic, NULL, CLOCK_MONOTONIC},
	{"clock-realtime", wait_clock_realtime, NULL, CLOCK_REALTIME},
	{"clock-boottime", wait_clock_boottime, NULL, CLOCK_MONOTONIC},
	{"poll", wait_poll, NULL, CLOCK_MONOTONIC},
	{"poll-file", wait_poll_file, NULL, CLOCK_MONOTONIC},
	{"ppoll", wait_ppoll, NULL, CLOCK_MONOTONIC},
	{"select", wait_select, NULL, CLOCK_MONOTONIC},
	{"pselect", wait_pselect, NULL, CLOCK_MONOTONIC},
	{"futex", wait_futex, NULL, CLOCK_MONOTONIC},
	{"futex-until", wait_futex_until, NULL, CLOCK_MONOTONIC},
	{"condition", wait_condition, NULL, CLOCK_REALTIME},
	{"sigtimedwait", wait_sigtimedwait, NULL, CLOCK_MONOTONIC},
	{"epoll", wait_epoll, NULL, CLOCK_MONOTONIC},
	{"futex-forever", wait_futex_forever, wake_futex, CLOCK_MONOTONIC},
	{"pause", wait_pause, wake_signal, CLOCK_MONOTONIC},
	{"sigsuspend", wait_sigsuspend, wake_signal, CLOCK_MONOTONIC},
	{"sigwaitinfo", wait_sigwaitinfo, wake_queue, CLOCK_MONOTONIC},
	{"child", wait_child, wake_child, CLOCK_MONOTONIC},
	{"pipe", wait_pipe, wake_pipe, CLOCK_MONOTONIC},
};

static const struct wait *current;

static void *wait_there(void *argument)
{
	sigset_t blocked;
	(void)argument;
	if (!strcmp(mode_name, "sigsuspend")) {
		sigemptyset(&blocked);
		sigaddset(&blocked, SIGUSR2);
		pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	}
	started = now_ns(current->clock);
	__atomic_store_n(&waiter_tid, thread_id(), __ATOMIC_SEQ_CST);
	errno = 0;
	verdict = current->wait();
	ended = now_ns(current->clock);
	__atomic_store_n(&finished, 1, __ATOMIC_SEQ_CST);
	/* It stays until the check, so that the process looks the same whether the time is over or not. */
	while (!__atomic_load_n(&released, __ATOMIC_SEQ_CST))
		short_nap();
	return NULL;
}

/* Until the thread sleeps in its call. */
static void await_sleep(void)
{
	char path[64];
	for (int i = 0; i < 1000 && !waiter_tid; i++)
		nap_ms(1);
	snprintf(path, sizeof path, "/proc/self/task/%d/status", waiter_tid);
	for (int i = 0; i < 1000 && field(path, "State")[0] != 'S'; i++)
		nap_ms(1);
	NEED(!finished);
}

static void make_descriptors(void)
{
	if (!strcmp(mode_name, "pipe")) {
		NEED(!pipe2(descriptors, O_CLOEXEC));
	} else if (!strcmp(mode_name, "poll-file")) {
		descriptors[0] = make_file("polled", 4096, 1);
	} else if (!strcmp(mode_name, "epoll")) {
		descriptors[0] = epoll_create1(EPOLL_CLOEXEC);
	} else if (!strcmp(mode_name, "child")) {
		child = fork();
		NEED(child >= 0);
		while (!child)
			pause();
	}
}

static void wait_set(void)
{
	/* Without SA_RESTART: a stray signal would end the waits with EINTR. */
	struct sigaction action = {.sa_handler = on_signal};
	for (size_t i = 0; i < sizeof waits / sizeof *waits; i++)
		if (!strcmp(waits[i].mode, mode_name))
			current = &waits[i];
	NEED(!sigaction(SIGUSR1, &action, NULL) && !sigaction(SIGUSR2, &action, NULL));
	sigemptyset(&queue);
	sigaddset(&queue, SIGRTMIN + 3);
	NEED(!sigprocmask(SIG_BLOCK, &queue, NULL));
	if (!descriptors[0])
		make_descriptors();
	waiter_tid = finished = released = handled = verdict = 0;
	waiter = start_thread(wait_there, NULL);
	await_sleep();
}

static int wait_check(void)
{
	if (current->wake) {
		CHECK(!finished);
		CHECK(current->wake());
	}
	CHECK(wait_for(&finished, WAIT_MS + (long)(beat->away_ns / 1000000) + 2 * LATE_MS));
	CHECK_ALL(verdict);
	if (!current->wake) {
		beat->tokens[1] = (uint64_t)(ended - started);
		CHECK(ended - started >= WAIT_MS * 1000000LL);
		CHECK(ended - started <= (WAIT_MS + LATE_MS) * 1000000LL + (int64_t)beat->away_ns);
	}
	__atomic_store_n(&released, 1, __ATOMIC_SEQ_CST);
	CHECK(!pthread_join(waiter, NULL));
	if (strcmp(mode_name, "child"))
		wait_set();
	return 1;
}

/* A handled signal, without SA_RESTART, ends every one of these waits early; a condition only sees `handled`. */
static void wait_harm(void)
{
	syscall(SYS_tgkill, getpid(), waiter_tid, SIGUSR1);
	nap_ms(50);
}

#define WAIT(name) {name, wait_set, wait_check, wait_harm}

WORKLOAD(
	WAIT("nanosleep"), WAIT("nanosleep-rest"), WAIT("clock-relative"), WAIT("clock-monotonic"),
	WAIT("clock-realtime"), WAIT("clock-boottime"), WAIT("poll"), WAIT("poll-file"), WAIT("ppoll"), WAIT("select"),
	WAIT("pselect"), WAIT("futex"), WAIT("futex-until"), WAIT("condition"), WAIT("sigtimedwait"), WAIT("epoll"),
	WAIT("futex-forever"), WAIT("pause"), WAIT("sigsuspend"), WAIT("sigwaitinfo"), WAIT("child"), WAIT("pipe"),
)
