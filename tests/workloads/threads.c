/* Threads: local storage, ids, robust mutexes, restartable sequences, and what the kernel does when a thread ends. */
#include "workers.h"

#include <sched.h>
#include <stddef.h>

/* Thread-local storage of both kinds. */
static __thread uint64_t local = 42;
static __thread char zeroed[512];
static pthread_key_t key;

static void tls_prepare(struct worker *self)
{
	local = 1000 + self->index;
	fill(zeroed, sizeof zeroed, self->index);
	NEED(!pthread_setspecific(key, self));
}

static int tls_job(struct worker *self)
{
	CHECK(local == 1000u + self->index);
	CHECK(same(zeroed, sizeof zeroed, self->index));
	CHECK(pthread_getspecific(key) == self);
	CHECK(pthread_equal(pthread_self(), self->thread));
	return 1;
}

static void tls_set(void)
{
	NEED(!pthread_key_create(&key, NULL));
	prepare = tls_prepare;
	job = tls_job;
	start_workers(THREADS);
	local = 7;
}

static int tls_check(void)
{
	CHECK(local == 7);
	return ask_all();
}

static void tls_harm(void)
{
	local = 8;
}

/* Thread ids, as the kernel tells them and as other threads may signal them. */
static pid_t leader;

static int tids_job(struct worker *self)
{
	CHECK(thread_id() == self->tid);
	CHECK(!syscall(SYS_tgkill, getpid(), self->tid, 0));
	return 1;
}

static void tids_set(void)
{
	job = tids_job;
	start_workers(THREADS);
	leader = thread_id();
}

static int tids_check(void)
{
	char path[64];
	CHECK(thread_id() == leader && getpid() == leader);
	CHECK(atoi(field("/proc/self/status", "Threads")) == THREADS + 1);
	for (int i = 0; i < THREADS; i++) {
		snprintf(path, sizeof path, "/proc/self/task/%d", workers[i].tid);
		CHECK(!access(path, F_OK));
	}
	return ask_all();
}

static void tids_harm(void)
{
	workers[3].tid++;
}

/* A thread that ends while it holds a robust mutex: the kernel must walk its list and mark the mutex. */
static pthread_mutex_t robust;
static struct worker holder;

static void *hold_and_die(void *argument)
{
	struct worker *self = argument;
	NEED(!pthread_mutex_lock(&robust));
	__atomic_store_n(&self->up, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&self->go, __ATOMIC_SEQ_CST))
		nap_ms(2);
	return NULL;
}

static void robust_set(void)
{
	pthread_mutexattr_t attributes;
	NEED(!pthread_mutexattr_init(&attributes));
	NEED(!pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST));
	NEED(!pthread_mutex_init(&robust, &attributes));
	holder = (struct worker){0};
	holder.thread = start_thread(hold_and_die, &holder);
	NEED(wait_for(&holder.up, 5000));
}

static int robust_check(void)
{
	CHECK(pthread_mutex_trylock(&robust) == EBUSY);
	__atomic_store_n(&holder.go, 1, __ATOMIC_SEQ_CST);
	CHECK(!pthread_join(holder.thread, NULL));
	struct timespec limit;
	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += 2;
	CHECK(pthread_mutex_timedlock(&robust, &limit) == EOWNERDEAD);
	CHECK(!pthread_mutex_consistent(&robust));
	CHECK(!pthread_mutex_unlock(&robust));
	CHECK(!pthread_mutex_destroy(&robust));
	robust_set();
	return 1;
}

/* The holder is told to end before its list can be walked: the kernel is given an empty list in its place. */
static int lose_list(struct worker *self)
{
	static struct { void *next; long offset; void *pending; } empty = {&empty, 0, NULL};
	(void)self;
	CHECK(!syscall(SYS_set_robust_list, &empty, sizeof empty));
	NEED(!pthread_mutex_lock(&robust));
	self->up = 2;
	pthread_exit(NULL);
}

static void robust_harm(void)
{
	holder.go = 1;
	pthread_join(holder.thread, NULL);
	memset(&robust, 0, sizeof robust);
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attributes);
	job = lose_list;
	workers[0].thread = holder.thread = start_thread(worker_body, &workers[0]);
	workers[0].go = 1;
	while (workers[0].up != 2)
		nap_ms(1);
}

/* rseq: the kernel keeps writing the cpu number into the area that each thread has registered. */
extern const ptrdiff_t __rseq_offset;
extern const unsigned int __rseq_size;
enum { RSEQ_SIGNATURE = 0x53053053 };

static char *rseq_area(void)
{
	return (char *)__builtin_thread_pointer() + __rseq_offset;
}

static int rseq_job(struct worker *self)
{
	cpu_set_t set, all;
	(void)self;
	CHECK(!sched_getaffinity(0, sizeof all, &all));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all))
			continue;
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		CHECK(!sched_setaffinity(0, sizeof set, &set));
		nap_ms(1);
		CHECK(((volatile uint32_t *)rseq_area())[1] == (uint32_t)cpu);
	}
	CHECK(!sched_setaffinity(0, sizeof all, &all));
	/* The same area registered again is EBUSY; without a registration the call would succeed (rseq(2)). */
	CHECK(syscall(SYS_rseq, rseq_area(), 32, 0, RSEQ_SIGNATURE) == -1 && errno == EBUSY);
	return 1;
}

static void rseq_set(void)
{
	if (!__rseq_size)
		cannot_run("the C library registers no rseq area");
	job = rseq_job;
	start_workers(3);
}

static int rseq_check(void)
{
	CHECK_ALL(rseq_job(NULL));
	return ask_workers(3);
}

static void rseq_harm(void)
{
	syscall(SYS_rseq, rseq_area(), 32, 1, RSEQ_SIGNATURE);
}

/* clear_child_tid: the kernel clears the word and wakes the joiner when a thread ends. */
static int forget_tid_address;

static void *wait_and_return(void *argument)
{
	struct worker *self = argument;
	__atomic_store_n(&self->up, 1, __ATOMIC_SEQ_CST);
	while (!__atomic_load_n(&self->go, __ATOMIC_SEQ_CST))
		nap_ms(2);
	if (forget_tid_address)
		syscall(SYS_set_tid_address, NULL);
	return self;
}

static void join_set(void)
{
	for (int i = 0; i < THREADS; i++) {
		workers[i] = (struct worker){.index = i};
		workers[i].thread = start_thread(wait_and_return, &workers[i]);
		NEED(wait_for(&workers[i].up, 5000));
	}
}

static int join_check(void)
{
	struct timespec limit;
	void *result;
	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += 2;
	for (int i = 0; i < THREADS; i++) {
		CHECK(pthread_tryjoin_np(workers[i].thread, &result) == EBUSY);
		__atomic_store_n(&workers[i].go, 1, __ATOMIC_SEQ_CST);
		CHECK(!pthread_timedjoin_np(workers[i].thread, &result, &limit));
		CHECK(result == &workers[i]);
	}
	join_set();
	return 1;
}

static void join_harm(void)
{
	forget_tid_address = 1;
}

WORKLOAD(
	{"tls", tls_set, tls_check, tls_harm},
	{"tids", tids_set, tids_check, tids_harm},
	{"robust", robust_set, robust_check, robust_harm},
	{"rseq", rseq_set, rseq_check, rseq_harm},
	{"join", join_set, join_check, join_harm},
)
