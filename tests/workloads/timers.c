/* Interval timers (setitimer) and POSIX timers (raw system calls, so that ids are the kernel's). */
#include "workload.h"

#include <signal.h>
#include <sys/time.h>

#define FAR 90000   /* seconds; no timer with this value fires in a test */
#define SLACK 3600  /* seconds that a test may take at most */

static int far_left(long seconds)
{
	return seconds <= FAR && seconds > FAR - SLACK;
}

/* ---- setitimer ---- */

static volatile int ticks[32];

static void on_tick(int number)
{
	ticks[number]++;
}

static int which(void)
{
	return !strcmp(mode_name, "real") ? ITIMER_REAL : !strcmp(mode_name, "virtual") ? ITIMER_VIRTUAL : ITIMER_PROF;
}

static void interval_set(void)
{
	struct itimerval value = {.it_interval = {5, 250000}, .it_value = {FAR, 0}};
	NEED(!setitimer(which(), &value, NULL));
}

static int interval_check(void)
{
	struct itimerval value;
	for (int timer = 0; timer < 3; timer++) {
		CHECK(!getitimer(timer, &value));
		if (timer == which()) {
			CHECK(far_left(value.it_value.tv_sec));
			CHECK(value.it_interval.tv_sec == 5 && value.it_interval.tv_usec == 250000);
		} else {
			CHECK(!value.it_value.tv_sec && !value.it_value.tv_usec && !value.it_interval.tv_usec);
		}
	}
	return 1;
}

static void interval_harm(void)
{
	struct itimerval off = {.it_interval = {0, 0}};
	setitimer(which(), &off, NULL);
}

/* All three tick on: the process burns processor time in the check until each has fired again. */
static void ticking_set(void)
{
	struct itimerval value = {.it_interval = {0, 20000}, .it_value = {0, 20000}};
	signal(SIGALRM, on_tick);
	signal(SIGVTALRM, on_tick);
	signal(SIGPROF, on_tick);
	for (int timer = 0; timer < 3; timer++)
		NEED(!setitimer(timer, &value, NULL));
}

static int ticks_come(int number)
{
	int64_t end = now_ns(CLOCK_MONOTONIC) + 3000000000;
	ticks[number] = 0;
	while (ticks[number] < 2 && now_ns(CLOCK_MONOTONIC) < end)
		;
	return ticks[number] >= 2;
}

static int ticking_check(void)
{
	CHECK(ticks_come(SIGALRM));
	CHECK(ticks_come(SIGVTALRM));
	CHECK(ticks_come(SIGPROF));
	return 1;
}

static void ticking_harm(void)
{
	struct itimerval off = {.it_interval = {0, 0}};
	setitimer(ITIMER_REAL, &off, NULL);
}

/* ---- timer_create ---- */

typedef int timer_id;

static timer_id make_timer(clockid_t clock, int notify, int number, int payload, pid_t thread)
{
	struct sigevent event = {.sigev_notify = notify, .sigev_signo = number};
	timer_id id;
	event.sigev_value.sival_int = payload;
	event._sigev_un._tid = thread;
	NEED(!syscall(SYS_timer_create, clock, &event, &id));
	return id;
}

static long arm(timer_id id, int flags, struct itimerspec value)
{
	return syscall(SYS_timer_settime, id, flags, &value, NULL);
}

static long remaining(timer_id id, struct itimerspec *value)
{
	return syscall(SYS_timer_gettime, id, value);
}

static int is_armed(timer_id id, long interval)
{
	struct itimerspec value;
	return !remaining(id, &value) && far_left(value.it_value.tv_sec) && value.it_interval.tv_sec == interval &&
	       value.it_interval.tv_nsec == interval + 1;
}

/* Every clock, each with its own interval; the last timer is not armed. */
static const clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_PROCESS_CPUTIME_ID,
				   CLOCK_THREAD_CPUTIME_ID, CLOCK_TAI};
enum { CLOCKS = sizeof clocks / sizeof *clocks };
static timer_id by_clock[CLOCKS + 1];

static void clocks_set(void)
{
	for (int i = 0; i < CLOCKS; i++) {
		by_clock[i] = make_timer(clocks[i], SIGEV_SIGNAL, SIGRTMIN + i, i, 0);
		NEED(!arm(by_clock[i], 0, (struct itimerspec){{i, i + 1}, {FAR, 0}}));
	}
	by_clock[CLOCKS] = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, 9, 0);
}

static int clocks_check(void)
{
	struct itimerspec value;
	for (int i = 0; i < CLOCKS; i++)
		CHECK(is_armed(by_clock[i], i));
	CHECK(!remaining(by_clock[CLOCKS], &value));
	CHECK(!value.it_value.tv_sec && !value.it_value.tv_nsec && !value.it_interval.tv_sec);
	return 1;
}

static void first_harm(void)
{
	arm(by_clock[1], 0, (struct itimerspec){{0, 0}, {5, 0}});
}

/* Timers set to a point in time. */
static void absolute_set(void)
{
	for (int i = 0; i < 3; i++) {
		by_clock[i] = make_timer(clocks[i], SIGEV_SIGNAL, SIGRTMIN, i, 0);
		NEED(!arm(by_clock[i], TIMER_ABSTIME,
			  (struct itimerspec){{i, i + 1}, {now_ns(clocks[i]) / 1000000000 + FAR, 0}}));
	}
}

static int absolute_check(void)
{
	for (int i = 0; i < 3; i++)
		CHECK(is_armed(by_clock[i], i));
	return 1;
}

/* The ways to be told: a signal with payload, nothing, a signal to one thread. */
static pid_t waiter_tid;
static volatile int waiter_got;
static timer_id told[3];

static void *waiter(void *argument)
{
	siginfo_t info;
	sigset_t set;
	(void)argument;
	waiter_tid = thread_id();
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	for (;;)
		if (sigwaitinfo(&set, &info) == SIGRTMIN + 5 && info.si_code == SI_TIMER)
			waiter_got = info.si_value.sival_int;
	return NULL;
}

static void notify_set(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	sigaddset(&set, SIGRTMIN + 6);
	NEED(!sigprocmask(SIG_BLOCK, &set, NULL));
	start_thread(waiter, NULL);
	while (!__atomic_load_n(&waiter_tid, __ATOMIC_SEQ_CST))
		nap_ms(1);
	told[0] = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 6, 600, 0);
	told[1] = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
	told[2] = make_timer(CLOCK_MONOTONIC, SIGEV_THREAD_ID, SIGRTMIN + 5, 500, waiter_tid);
	for (int i = 0; i < 3; i++)
		NEED(!arm(told[i], 0, (struct itimerspec){{FAR, FAR + 1}, {FAR, 0}}));
}

static int notify_check(void)
{
	struct timespec limit = {3, 0};
	siginfo_t info;
	sigset_t set;
	for (int i = 0; i < 3; i++) {
		CHECK(is_armed(told[i], FAR));
		CHECK(!arm(told[i], 0, (struct itimerspec){{FAR, FAR + 1}, {0, 1000000}}));
	}
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 6);
	CHECK(sigtimedwait(&set, &info, &limit) == SIGRTMIN + 6);
	CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 600 && info.si_timerid == told[0]);
	CHECK(wait_for(&waiter_got, 3000) && waiter_got == 500);
	waiter_got = 0;
	for (int i = 0; i < 3; i++)
		CHECK(!arm(told[i], 0, (struct itimerspec){{FAR, FAR + 1}, {FAR, 0}}));
	return 1;
}

static void notify_harm(void)
{
	told[0] = told[1];
}

/* Ids with holes: some timers have been deleted, and the next one made after the restore must not collide. */
enum { MANY = 40 };
static timer_id many[MANY];

static int kept(int i)
{
	return i % 7 == 2 || i == MANY - 2;
}

static void sparse_set(void)
{
	for (int i = 0; i < MANY; i++)
		many[i] = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, i, 0);
	for (int i = 0; i < MANY; i++)
		if (kept(i))
			NEED(!arm(many[i], 0, (struct itimerspec){{i, i + 1}, {FAR, 0}}));
		else
			NEED(!syscall(SYS_timer_delete, many[i]));
}

static int sparse_check(void)
{
	struct itimerspec value;
	for (int i = 0; i < MANY; i++)
		if (kept(i))
			CHECK(is_armed(many[i], i));
		else
			CHECK(remaining(many[i], &value) && errno == EINVAL);
	timer_id fresh = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
	for (int i = 0; i < MANY; i++)
		CHECK(!kept(i) || fresh != many[i]);
	CHECK(!syscall(SYS_timer_delete, fresh));
	return 1;
}

static void sparse_harm(void)
{
	syscall(SYS_timer_delete, many[9]);
}

/* A fast timer whose signal is blocked: it overruns, before and after. */
static void overrun_set(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	NEED(!sigprocmask(SIG_BLOCK, &set, NULL));
	by_clock[0] = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 1, 33, 0);
	NEED(!arm(by_clock[0], 0, (struct itimerspec){{0, 1000000}, {0, 1000000}}));
	nap_ms(30);
}

static int overrun_check(void)
{
	struct timespec limit = {3, 0};
	siginfo_t info;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	nap_ms(30);
	/* The one that waits since before may know nothing of what has passed since; the next must. */
	for (int i = 0; i < 2; i++) {
		CHECK(sigtimedwait(&set, &info, &limit) == SIGRTMIN + 1);
		CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 33);
		nap_ms(30);
	}
	CHECK(sigtimedwait(&set, &info, &limit) == SIGRTMIN + 1);
	CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 33 && info.si_overrun >= 5);
	return 1;
}

/* The expirations from before the checkpoint are counted in the one signal that waits: it is one, and knows them. */
static int overrun_kept_check(void)
{
	struct timespec none = {0, 0};
	siginfo_t info;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	CHECK(sigtimedwait(&set, &info, &none) == SIGRTMIN + 1);
	CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 33 && info.si_overrun >= 5);
	overrun_set();
	return 1;
}

static void overrun_harm(void)
{
	struct timespec none = {0, 0};
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	syscall(SYS_timer_delete, by_clock[0]);
	sigtimedwait(&set, NULL, &none);
}

/* Timers that keep firing through a handler. */
static volatile sig_atomic_t fired;

static void on_fire(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	if (info->si_code == SI_TIMER && info->si_value.sival_int == 71)
		fired++;
}

static void firing_set(void)
{
	struct sigaction action = {.sa_sigaction = on_fire, .sa_flags = SA_SIGINFO | SA_RESTART};
	NEED(!sigaction(SIGRTMIN + 7, &action, NULL));
	by_clock[0] = make_timer(CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + 7, 71, 0);
	NEED(!arm(by_clock[0], 0, (struct itimerspec){{0, 10000000}, {0, 10000000}}));
}

static int firing_check(void)
{
	int64_t end = now_ns(CLOCK_MONOTONIC) + 3000000000;
	fired = 0;
	while (fired < 3 && now_ns(CLOCK_MONOTONIC) < end)
		nap_ms(5);
	CHECK(fired >= 3);
	return 1;
}

static void firing_harm(void)
{
	arm(by_clock[0], 0, (struct itimerspec){{0, 0}, {0, 0}});
}

/* More of them than one program can ask for at a time. */
enum { CROWD = 3000 };

static timer_id crowd[CROWD];

static void crowd_set(void)
{
	for (int i = 0; i < CROWD; i++) {
		crowd[i] = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
		NEED(!arm(crowd[i], 0, (struct itimerspec){{i + 1, 0}, {FAR, 0}}));
	}
}

static int crowd_check(void)
{
	struct itimerspec value;
	for (int i = 0; i < CROWD; i++)
		CHECK(!remaining(crowd[i], &value) && value.it_interval.tv_sec == i + 1 && value.it_value.tv_sec > 0);
	return 1;
}

static void crowd_harm(void)
{
	syscall(SYS_timer_delete, crowd[CROWD / 2]);
}

WORKLOAD(
	{"crowd", crowd_set, crowd_check, crowd_harm},
	{"real", interval_set, interval_check, interval_harm},
	{"virtual", interval_set, interval_check, interval_harm},
	{"prof", interval_set, interval_check, interval_harm},
	{"ticking", ticking_set, ticking_check, ticking_harm},
	{"clocks", clocks_set, clocks_check, first_harm},
	{"absolute", absolute_set, absolute_check, first_harm},
	{"notify", notify_set, notify_check, notify_harm},
	{"sparse", sparse_set, sparse_check, sparse_harm},
	{"overrun", overrun_set, overrun_check, overrun_harm},
	{"overrun-kept", overrun_set, overrun_kept_check, overrun_harm},
	{"firing", firing_set, firing_check, firing_harm},
)
