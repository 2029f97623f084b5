/* How threads are scheduled: every policy, niceness, processors, input/output priority, timer slack; per thread. */
#include "workers.h"

#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

enum { NORMAL, FIFO, RR, BATCH, IDLE = 5, DEADLINE, RESET_ON_FORK = 1, IOPRIO_WHO_PROCESS = 1 };

/* What thread `index` has in the mode that runs. */
static struct attributes wanted(int index)
{
	struct attributes a = {.size = sizeof a};
	if (!strcmp(mode_name, "fifo")) {
		a.policy = FIFO;
		a.priority = 1 + index;
	} else if (!strcmp(mode_name, "rr")) {
		a.policy = RR;
		a.priority = 99 - index;
		a.flags = index & 1 ? RESET_ON_FORK : 0;
	} else if (!strcmp(mode_name, "batch")) {
		a.policy = BATCH;
		a.nice = 3 * index - 7;
	} else if (!strcmp(mode_name, "idle")) {
		a.policy = index & 1 ? IDLE : NORMAL;
	} else if (!strcmp(mode_name, "deadline")) {
		a.policy = index ? NORMAL : DEADLINE;
		a.runtime = index ? 0 : 1000000;
		a.deadline = index ? 0 : 20000000;
		a.period = index ? 0 : 40000000;
	} else {
		a.nice = 4 * index - 15;
		a.flags = index & 1 ? RESET_ON_FORK : 0;
	}
	return a;
}

static void policy_prepare(struct worker *self)
{
	struct attributes a = wanted(self->index);
	if (syscall(SYS_sched_setattr, 0, &a, 0))
		cannot_run("sched_setattr");
}

static int policy_job(struct worker *self)
{
	struct attributes a = wanted(self->index), now;
	CHECK(!syscall(SYS_sched_getattr, 0, &now, sizeof now, 0));
	CHECK(now.policy == a.policy && now.priority == a.priority && now.flags == a.flags);
	/* The default is shown for the policies whose tasks may choose their slice or runtime. */
	CHECK(a.policy != DEADLINE || (now.runtime == a.runtime && now.deadline == a.deadline && now.period == a.period));
	if (a.policy == NORMAL || a.policy == BATCH) {
		CHECK(now.nice == a.nice);
		CHECK(getpriority(PRIO_PROCESS, 0) == a.nice);
	}
	return 1;
}

static void policy_set(void)
{
	prepare = policy_prepare;
	job = policy_job;
	start_workers(THREADS);
}

static void policy_harm(void)
{
	struct attributes a = wanted(0);
	a.policy = a.policy == NORMAL ? BATCH : NORMAL;
	a.priority = 0;
	syscall(SYS_sched_setattr, workers[0].tid, &a, 0);
}

/* Processors: each thread may use one only, in turn. */
static void own_cpu(int index, cpu_set_t *set)
{
	static cpu_set_t all;
	static int known;
	if (!known) {
		NEED(!sched_getaffinity(getpid(), sizeof all, &all));
		known = 1;
	}
	int skip = index % CPU_COUNT(&all);
	CPU_ZERO(set);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &all) && !skip--)
			CPU_SET(cpu, set);
}

static void affinity_prepare(struct worker *self)
{
	cpu_set_t set;
	own_cpu(self->index, &set);
	NEED(!sched_setaffinity(0, sizeof set, &set));
}

static int affinity_job(struct worker *self)
{
	cpu_set_t set, now;
	own_cpu(self->index, &set);
	CHECK(!sched_getaffinity(0, sizeof now, &now));
	CHECK(CPU_EQUAL(&set, &now));
	CHECK(CPU_ISSET(sched_getcpu(), &set));
	return 1;
}

static void affinity_set(void)
{
	cpu_set_t set;
	own_cpu(0, &set);
	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		cannot_run("one processor only");
	prepare = affinity_prepare;
	job = affinity_job;
	start_workers(THREADS);
}

static void affinity_harm(void)
{
	cpu_set_t set;
	own_cpu(1, &set);
	sched_setaffinity(workers[0].tid, sizeof set, &set);
}

/* Priorities of input and output: class and level. */
static int io_priority(int index)
{
	return index < 3 ? index << 13 | (index ? index + 3 : 0) : 3 << 13;
}

static void ioprio_prepare(struct worker *self)
{
	NEED(!syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, io_priority(self->index)));
}

static int ioprio_job(struct worker *self)
{
	int now = (int)syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0);
	/* A thread without one of its own shows what its niceness gives it. */
	CHECK(self->index ? now == io_priority(self->index) : now >> 13 == 0 || now >> 13 == 2);
	return 1;
}

static void ioprio_set(void)
{
	prepare = ioprio_prepare;
	job = ioprio_job;
	start_workers(THREADS);
}

static void ioprio_harm(void)
{
	syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, workers[2].tid, io_priority(1));
}

/* Timer slack, in nanoseconds. */
static void slack_prepare(struct worker *self)
{
	NEED(!prctl(PR_SET_TIMERSLACK, 1000 * (self->index + 1)));
}

static int slack_job(struct worker *self)
{
	CHECK(prctl(PR_GET_TIMERSLACK) == 1000 * (self->index + 1));
	return 1;
}

static void slack_set(void)
{
	prepare = slack_prepare;
	job = slack_job;
	start_workers(THREADS);
}

static void slack_harm(void)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/timerslack_ns", workers[4].tid);
	spit(path, "77");
}

WORKLOAD(
	{"fifo", policy_set, ask_all, policy_harm},
	{"rr", policy_set, ask_all, policy_harm},
	{"batch", policy_set, ask_all, policy_harm},
	{"idle", policy_set, ask_all, policy_harm},
	{"deadline", policy_set, ask_all, policy_harm},
	{"nice", policy_set, ask_all, policy_harm},
	{"affinity", affinity_set, ask_all, affinity_harm},
	{"ioprio", ioprio_set, ask_all, ioprio_harm},
	{"slack", slack_set, ask_all, slack_harm},
)
