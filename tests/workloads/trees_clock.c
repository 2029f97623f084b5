/* A parent, a child and a thread that ask for the time all along, through the vdso: it never goes back. */
#include "members.h"

static volatile int64_t latest[2];

/* One look at each clock, both by the vdso and by the kernel; `seen` is what the caller saw last. */
static int look(int64_t *seen)
{
	static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME, CLOCK_MONOTONIC_COARSE};
	for (int i = 0; i < 4; i++) {
		struct timespec direct;
		int64_t through = now_ns(clocks[i]);
		CHECK(!syscall(SYS_clock_gettime, clocks[i], &direct));
		int64_t apart = direct.tv_sec * 1000000000LL + direct.tv_nsec - through;
		CHECK(apart > -50000000 && apart < 5000000000LL);
	}
	int64_t now = now_ns(CLOCK_MONOTONIC);
	CHECK(now >= *seen);
	*seen = now;
	CHECK(labs(time(NULL) - now_ns(CLOCK_REALTIME) / 1000000000LL) <= 1);
	CHECK(sched_getcpu() >= 0);
	return 1;
}

static volatile int thread_verdict = 1;

static void *look_on(void *unused)
{
	int64_t seen = 0;
	for (;;) {
		int verdict = look(&seen);
		if (verdict != 1)
			thread_verdict = verdict;
		latest[0] = seen;
		nap_ms(1);
	}
	return unused;
}

static int member_look(void)
{
	int64_t seen = latest[1];
	CHECK_ALL(look(&seen));
	latest[1] = seen;
	return 1;
}

static void clock_set(void)
{
	int64_t seen = 0;
	NEED(look(&seen) == 1);
	bear(0, NULL, member_look);
	start_thread(look_on, NULL);
}

static int clock_check(void)
{
	int64_t before = latest[0];
	CHECK_MEMBERS(1);
	for (int ms = 0; latest[0] <= before; ms++) {
		CHECK(ms < 5000);
		nap_ms(1);
	}
	CHECK_ALL(thread_verdict);
	CHECK_ALL(member_look());
	return 1;
}

static void clock_harm(void)
{
	latest[1] = INT64_MAX;
}

WORKLOAD(
	{"vdso", clock_set, clock_check, clock_harm},
)
