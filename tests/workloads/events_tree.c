/* Descriptors of events that a parent and its child share. The child does what it is told through shared memory. */
#include "workload.h"

#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>

enum { REST, TELL, TAKE, SEEN };

static struct {
	volatile int order;
	volatile uint64_t result;
} *child_box;

static pid_t child;
static int counter, timer, instance, process;

static int tell(int fd)
{
	return write(fd, &(uint64_t){1}, 8) == 8;
}

static uint64_t take(int fd)
{
	uint64_t value = 0;
	return read(fd, &value, 8) == 8 ? value : 0;
}

static uint64_t reported(void)
{
	struct epoll_event event;
	return epoll_wait(instance, &event, 1, 0) == 1 ? event.data.u64 : 0;
}

static void serve(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		int order = child_box->order;
		if (order == TELL)
			child_box->result = (uint64_t)tell(counter);
		else if (order == TAKE)
			child_box->result = take(counter);
		else if (order == SEEN)
			child_box->result = reported();
		if (order)
			__atomic_store_n(&child_box->order, REST, __ATOMIC_SEQ_CST);
		nap_ms(1);
	}
}

static uint64_t have_child(int order)
{
	__atomic_store_n(&child_box->order, order, __ATOMIC_SEQ_CST);
	for (int i = 0; i < 3000 && __atomic_load_n(&child_box->order, __ATOMIC_SEQ_CST); i++)
		nap_ms(1);
	return child_box->order ? ~0ull : child_box->result;
}

static void make(void)
{
	child_box = map_pages(1, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	NEED((counter = eventfd(0, EFD_NONBLOCK)) >= 0 && (timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)) >= 0);
	NEED((instance = epoll_create1(0)) >= 0);
}

static void start_child(void)
{
	NEED((child = fork()) >= 0);
	if (!child)
		serve();
}

static void child_harm(void)
{
	kill(child, SIGKILL);
}

static int add(int fd, uint64_t data)
{
	struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = data}};
	return epoll_ctl(instance, EPOLL_CTL_ADD, fd, &event);
}

/* An eventfd of both. */
static void shared_set(void)
{
	make();
	start_child();
}

static int shared_check(void)
{
	CHECK(have_child(TELL) == 1 && take(counter) == 1);
	CHECK(tell(counter) && tell(counter) && have_child(TAKE) == 2 && !take(counter));
	return 1;
}

/* An epoll instance that the child has inherited, with its targets. */
static void inherited_set(void)
{
	make();
	NEED(!add(counter, 51) && !add(timer, 52));
	start_child();
}

static int inherited_check(void)
{
	CHECK(have_child(SEEN) == 0 && tell(counter) && have_child(SEEN) == 51 && reported() == 51);
	CHECK(have_child(TAKE) == 1 && !reported());
	return 1;
}

/* One whose target only the child has open under any number. */
static void apart_set(void)
{
	make();
	NEED(!add(counter, 61));
	start_child();
	close(counter);
}

static int apart_check(void)
{
	CHECK(have_child(TELL) == 1 && reported() == 61 && have_child(TAKE) == 1 && !reported());
	return 1;
}

/* The child as a descriptor. */
static void pidfd_set(void)
{
	make();
	start_child();
	NEED((process = (int)syscall(SYS_pidfd_open, child, 0)) >= 0);
}

static int pidfd_check(void)
{
	struct pollfd wait = {process, POLLIN, 0};
	CHECK(!syscall(SYS_pidfd_send_signal, process, 0, NULL, 0) && poll(&wait, 1, 0) == 0);
	return 1;
}

static void pidfd_harm(void)
{
	child_harm();
	nap_ms(50);
}

WORKLOAD(
	{"shared", shared_set, shared_check, child_harm},
	{"inherited", inherited_set, inherited_check, child_harm},
	{"apart", apart_set, apart_check, child_harm},
	{"pidfd", pidfd_set, pidfd_check, pidfd_harm},
)
