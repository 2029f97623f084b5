/* Threads that prepare some state of their own, stand by, and check it when main asks each of them. */
#ifndef WORKERS_H
#define WORKERS_H

#include "workload.h"

enum { THREADS = 8 };

struct worker {
	pthread_t thread;
	pid_t tid;
	int index;
	volatile int up, go, verdict;
};

static struct worker workers[THREADS];

/* What a thread does when it starts (may be NULL), and the check that it makes; the mode sets both. */
static void (*prepare)(struct worker *);
static int (*job)(struct worker *);

MAYBE void *worker_body(void *argument)
{
	struct worker *self = argument;
	self->tid = thread_id();
	if (prepare)
		prepare(self);
	__atomic_store_n(&self->up, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		while (!__atomic_load_n(&self->go, __ATOMIC_SEQ_CST))
			nap_ms(2);
		self->go = 0;
		__atomic_store_n(&self->verdict, job(self), __ATOMIC_SEQ_CST);
	}
	return NULL;
}

MAYBE void start_workers(int count)
{
	for (int i = 0; i < count; i++) {
		workers[i].index = i;
		workers[i].thread = start_thread(worker_body, &workers[i]);
	}
	for (int i = 0; i < count; i++)
		NEED(wait_for(&workers[i].up, 5000));
}

MAYBE int ask_workers(int count)
{
	for (int i = 0; i < count; i++) {
		workers[i].verdict = 0;
		__atomic_store_n(&workers[i].go, 1, __ATOMIC_SEQ_CST);
	}
	for (int i = 0; i < count; i++) {
		CHECK(wait_for(&workers[i].verdict, 5000));
		CHECK_ALL(workers[i].verdict);
	}
	return 1;
}

MAYBE int ask_all(void)
{
	return ask_workers(THREADS);
}

#endif
