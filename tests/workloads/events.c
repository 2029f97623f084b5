/* Counters, signals and timers as descriptors: eventfd, signalfd, timerfd. */
#include "workload.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

#define FAR 90000  /* seconds; no timer with this value fires in a test */
#define SLACK 3600 /* seconds that a test may take at most */
#define SECOND 1000000000LL

static int get(int fd, uint64_t *value)
{
	return read(fd, value, 8) == 8;
}

static int put(int fd, uint64_t value)
{
	return write(fd, &value, 8) == 8;
}

/* ---- eventfd ---- */

static const struct {
	uint64_t counter;
	int flags;
} counters[] = {
	{3, EFD_NONBLOCK}, {5, EFD_NONBLOCK | EFD_SEMAPHORE}, {0xfffffffffffffffe, EFD_NONBLOCK},
	{1ull << 32, EFD_NONBLOCK | EFD_CLOEXEC}, {0, EFD_NONBLOCK},
};
enum { COUNTERS = sizeof counters / sizeof *counters };
static int counter[COUNTERS], same_counter;

static void eventfd_set(void)
{
	for (int i = 0; i < COUNTERS; i++) {
		counter[i] = eventfd(0, counters[i].flags);
		NEED(counter[i] >= 0 && put(counter[i], counters[i].counter));
	}
	same_counter = fcntl(counter[0], F_DUPFD, 300);
	NEED(same_counter == 300);
}

static int eventfd_check(void)
{
	uint64_t value;
	for (int i = 0; i < COUNTERS; i++) {
		uint64_t wanted = counters[i].counter;
		CHECK(fcntl(counter[i], F_GETFD) == (counters[i].flags & EFD_CLOEXEC ? FD_CLOEXEC : 0));
		if (counters[i].flags & EFD_SEMAPHORE) {
			for (uint64_t n = 0; n < wanted; n++)
				CHECK(get(counter[i], &value) && value == 1);
		} else if (wanted) {
			CHECK(get(counter[i], &value) && value == wanted);
		}
		CHECK(!get(counter[i], &value) && errno == EAGAIN);
		CHECK(put(counter[i], wanted));
	}
	CHECK(put(same_counter, 4) && get(counter[0], &value) && value == 7 && put(counter[0], 3));
	return 1;
}

static void eventfd_harm(void)
{
	uint64_t value;
	get(counter[1], &value);
}

/* ---- signalfd ---- */

static int signals[2];

static void signalfd_set(void)
{
	sigset_t both, one;
	sigemptyset(&one);
	sigaddset(&one, SIGUSR1);
	both = one;
	sigaddset(&both, SIGRTMIN + 2);
	sigaddset(&both, 64);
	NEED(!sigprocmask(SIG_BLOCK, &both, NULL));
	signals[0] = signalfd(-1, &one, SFD_NONBLOCK);
	signals[1] = signalfd(-1, &both, SFD_NONBLOCK | SFD_CLOEXEC);
	NEED(signals[0] >= 0 && signals[1] >= 0);
	NEED(!sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 22}));
	NEED(!sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 11}));
}

static int signalfd_check(void)
{
	struct signalfd_siginfo info;
	CHECK(read(signals[0], &info, sizeof info) == sizeof info);
	CHECK(info.ssi_signo == SIGUSR1 && info.ssi_int == 11 && info.ssi_code == SI_QUEUE);
	CHECK(read(signals[0], &info, sizeof info) < 0 && errno == EAGAIN);
	CHECK(read(signals[1], &info, sizeof info) == sizeof info);
	CHECK(info.ssi_signo == (uint32_t)SIGRTMIN + 2 && info.ssi_int == 22);
	CHECK(!raise(64) && read(signals[0], &info, sizeof info) < 0 && errno == EAGAIN);
	CHECK(read(signals[1], &info, sizeof info) == sizeof info && info.ssi_signo == 64);
	CHECK(!sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 22}));
	CHECK(!sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 11}));
	return 1;
}

static void signalfd_harm(void)
{
	sigset_t none;
	sigemptyset(&none);
	signalfd(signals[0], &none, 0);
}

/* ---- timerfd ---- */

static const clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME_ALARM,
				   CLOCK_BOOTTIME_ALARM};
enum { CLOCKS = sizeof clocks / sizeof *clocks };
static int timer[CLOCKS + 2];

static int absolute(void)
{
	return !strcmp(mode_name, "timerfd-absolute");
}

/* The kernel's own word for how the timer was set. */
static int set_flags(int fd)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	return (int)strtol(field(path, "settime flags"), NULL, 8);
}

static int wanted_flags(int i)
{
	return !absolute() ? 0 : i ? TFD_TIMER_ABSTIME : TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET;
}

/* Of timers that are due at a time of the wall clock, in ns. */
static int64_t wall_due[CLOCKS];

static void clocks_set(void)
{
	for (int i = 0; i < CLOCKS; i++) {
		timer[i] = timerfd_create(clocks[i], TFD_NONBLOCK);
		if (timer[i] < 0)
			cannot_run("timerfd_create");
		clockid_t by = clocks[i] == CLOCK_REALTIME_ALARM ? CLOCK_REALTIME :
			       clocks[i] == CLOCK_BOOTTIME_ALARM ? CLOCK_BOOTTIME : clocks[i];
		long start = absolute() ? now_ns(by) / SECOND : 0;
		struct itimerspec value = {{i, i + 1}, {start + FAR, 0}};
		wall_due[i] = absolute() && by == CLOCK_REALTIME ? (start + FAR) * SECOND : 0;
		NEED(!timerfd_settime(timer[i], wanted_flags(i), &value, NULL));
	}
	/* Never set; and off, but with an interval. */
	timer[CLOCKS] = timerfd_create(CLOCK_MONOTONIC, 0);
	timer[CLOCKS + 1] = timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC);
	NEED(!timerfd_settime(timer[CLOCKS + 1], 0, &(struct itimerspec){{77, 7}, {0, 0}}, NULL));
}

static int clocks_check(void)
{
	struct itimerspec value;
	uint64_t ticks;
	for (int i = 0; i < CLOCKS; i++) {
		int64_t before = now_ns(CLOCK_REALTIME);
		CHECK(!timerfd_gettime(timer[i], &value));
		/* A time of the wall clock is what it was (but for the moment in which it was read), however long the program
		 * was away. */
		before -= (int64_t)(beat->away_ns / 4 + 1000000);
		int64_t now = wall_due[i] - value.it_value.tv_sec * SECOND - value.it_value.tv_nsec;
		CHECK(!wall_due[i] || (now >= before && now <= now_ns(CLOCK_REALTIME)));
		CHECK(value.it_interval.tv_sec == i && value.it_interval.tv_nsec == i + 1);
		CHECK(value.it_value.tv_sec <= FAR && value.it_value.tv_sec > FAR - SLACK);
		CHECK(!get(timer[i], &ticks) && errno == EAGAIN);
		CHECK(set_flags(timer[i]) == wanted_flags(i));
	}
	CHECK(!timerfd_gettime(timer[CLOCKS], &value));
	CHECK(!value.it_value.tv_sec && !value.it_value.tv_nsec && !value.it_interval.tv_sec);
	CHECK(!timerfd_gettime(timer[CLOCKS + 1], &value));
	CHECK(!value.it_value.tv_sec && value.it_interval.tv_sec == 77 && value.it_interval.tv_nsec == 7);
	return 1;
}

static void clocks_harm(void)
{
	timerfd_settime(timer[2], 0, &(struct itimerspec){{0, 0}, {9, 0}}, NULL);
}

/* Unread expirations: all of a periodic timer are counted, and none that its own clock has not seen yet. */
#define PERIOD (7 * 1000000LL)
static int64_t ticks_from;
static uint64_t ticks_got;

static void ticks_set(void)
{
	timer[0] = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	timer[1] = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK);
	ticks_got = 0;
	ticks_from = now_ns(CLOCK_MONOTONIC);
	NEED(!timerfd_settime(timer[0], 0, &(struct itimerspec){{0, PERIOD}, {0, PERIOD}}, NULL));
	NEED(!timerfd_settime(timer[1], 0, &(struct itimerspec){{0, 0}, {0, 1}}, NULL));
	nap_ms(100);
}

static int ticks_check(void)
{
	uint64_t ticks;
	CHECK(get(timer[0], &ticks));
	ticks_got += ticks;
	int64_t due = (now_ns(CLOCK_MONOTONIC) - ticks_from) / PERIOD;
	CHECK(ticks_got >= 100000000 / PERIOD && (int64_t)ticks_got <= due && (int64_t)ticks_got > due - 3 * SECOND / PERIOD);
	nap_ms(30);
	CHECK(get(timer[0], &ticks) && ticks >= 3);
	ticks_got += ticks;
	CHECK(get(timer[1], &ticks) && ticks == 1);
	CHECK(!get(timer[1], &ticks) && errno == EAGAIN);
	CHECK(!timerfd_settime(timer[1], 0, &(struct itimerspec){{0, 0}, {0, 1}}, NULL));
	nap_ms(2);
	return 1;
}

static void ticks_harm(void)
{
	uint64_t ticks;
	get(timer[1], &ticks);
}

/* A timer never fires before its time, by the clock that its owner sees, and not much later. */
static int64_t promised[2];

static void punctual_set(void)
{
	for (int i = 0; i < 2; i++) {
		clockid_t clock = i ? CLOCK_BOOTTIME : CLOCK_MONOTONIC;
		promised[i] = now_ns(clock) + 3 * SECOND / 2;
		timer[i] = timer[i] ? timer[i] : timerfd_create(clock, 0);
		long length = i ? promised[i] : 3 * SECOND / 2;
		struct itimerspec value = {{0, 0}, {length / SECOND, length % SECOND}};
		NEED(!timerfd_settime(timer[i], i ? TFD_TIMER_ABSTIME : 0, &value, NULL));
	}
}

static int punctual_check(void)
{
	uint64_t ticks;
	for (int i = 0; i < 2; i++) {
		struct pollfd wait = {timer[i], POLLIN, 0};
		CHECK(poll(&wait, 1, 8000) == 1);
		int64_t late = now_ns(i ? CLOCK_BOOTTIME : CLOCK_MONOTONIC) - promised[i];
		CHECK(late >= 0 && late < 2 * SECOND);
		CHECK(get(timer[i], &ticks) && ticks == 1);
	}
	punctual_set();
	return 1;
}

static void punctual_harm(void)
{
	timerfd_settime(timer[1], 0, &(struct itimerspec){{0, 0}, {0, 1000}}, NULL);
	nap_ms(1);
	promised[1] += 4 * SECOND;
}

WORKLOAD(
	{"eventfd", eventfd_set, eventfd_check, eventfd_harm},
	{"signalfd", signalfd_set, signalfd_check, signalfd_harm},
	{"timerfd", clocks_set, clocks_check, clocks_harm},
	{"timerfd-absolute", clocks_set, clocks_check, clocks_harm},
	{"timerfd-ticks", ticks_set, ticks_check, ticks_harm},
	{"timerfd-punctual", punctual_set, punctual_check, punctual_harm},
)
