/* epoll instances: modes of reporting, nesting, and targets that are not open under their number any more. */
#include "workload.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

static int instance, target[512];

static int add(int into, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data = {.u64 = data}};
	return epoll_ctl(into, EPOLL_CTL_ADD, fd, &event);
}

static int change(int in, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data = {.u64 = data}};
	return epoll_ctl(in, EPOLL_CTL_MOD, fd, &event);
}

static int tell(int fd)
{
	return write(fd, &(uint64_t){1}, 8) == 8;
}

static int quiet(int fd)
{
	uint64_t value;
	return read(fd, &value, 8) == 8;
}

/* The one thing that is reported at once: its data, or 0 if there is none, or all ones if there are more. */
static uint64_t reported(uint32_t *events)
{
	struct epoll_event event[2];
	int count = epoll_wait(instance, event, 2, 0);
	if (count == 1 && events)
		*events = event[0].events;
	return count == 1 ? event[0].data.u64 : count ? ~0ull : 0;
}

static void make(int count)
{
	NEED((instance = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	for (int i = 0; i < count; i++)
		NEED((target[i] = eventfd(0, EFD_NONBLOCK)) >= 0);
}

/* ---- the ways to report ---- */

#define BIG 0xfedcba9876543210u

static void ways_set(void)
{
	make(4);
	NEED(!add(instance, target[0], EPOLLIN, BIG));
	NEED(!add(instance, target[1], EPOLLIN | EPOLLET, 22));
	NEED(!add(instance, target[2], EPOLLIN | EPOLLONESHOT, 33));
	NEED(!add(instance, target[3], EPOLLIN | EPOLLEXCLUSIVE, 44));
	NEED(tell(target[0]));
}

static int ways_check(void)
{
	uint32_t events;
	CHECK(reported(&events) == BIG && events == EPOLLIN);
	CHECK(reported(NULL) == BIG && quiet(target[0]) && !reported(NULL));
	CHECK(tell(target[1]) && reported(NULL) == 22 && !reported(NULL) && quiet(target[1]));
	CHECK(tell(target[2]) && reported(NULL) == 33 && !reported(NULL) && quiet(target[2]) && tell(target[2]));
	CHECK(!reported(NULL) && quiet(target[2]));
	CHECK(!change(instance, target[2], EPOLLIN | EPOLLONESHOT, 33));
	CHECK(tell(target[3]) && reported(NULL) == 44 && quiet(target[3]));
	CHECK(tell(target[0]));
	return 1;
}

static void ways_harm(void)
{
	change(instance, target[1], EPOLLIN, 22);
}

/* One-shot targets that have fired say nothing, not even that the other side is gone, until they are asked again. */
static int hung;

static void fired_set(void)
{
	int pair[2];
	make(1);
	NEED(!add(instance, target[0], EPOLLIN | EPOLLONESHOT, 11));
	NEED(tell(target[0]) && reported(NULL) == 11);
	NEED(!pipe(pair) && !add(instance, pair[0], EPOLLIN | EPOLLONESHOT, 12));
	NEED(write(pair[1], "x", 1) == 1 && reported(NULL) == 12 && !close(pair[1]));
	hung = pair[0];
}

static int fired_check(void)
{
	uint32_t events;
	CHECK(!reported(NULL));
	CHECK(!change(instance, target[0], EPOLLIN | EPOLLONESHOT, 11));
	CHECK(reported(NULL) == 11 && !reported(NULL));
	CHECK(!change(instance, hung, EPOLLIN | EPOLLONESHOT, 12));
	CHECK(reported(&events) == 12 && events & EPOLLHUP && !reported(NULL));
	return 1; /* both have fired again */
}

static void fired_harm(void)
{
	change(instance, hung, EPOLLONESHOT, 12);
}

/* ---- instances in instances, added in both directions of descriptor numbers ---- */

static int inner[3];

static void nested_set(void)
{
	make(1);
	for (int i = 0; i < 3; i++)
		NEED((inner[i] = epoll_create1(0)) >= 0);
	NEED(!add(inner[0], target[0], EPOLLIN, 1));
	NEED(!add(inner[2], inner[0], EPOLLIN, 2));
	NEED(!add(inner[1], inner[2], EPOLLIN, 3));
	NEED(!add(instance, inner[1], EPOLLIN, 4));
}

static int nested_check(void)
{
	struct epoll_event event;
	CHECK(!reported(NULL) && tell(target[0]) && reported(NULL) == 4);
	CHECK(epoll_wait(inner[1], &event, 1, 0) == 1 && event.data.u64 == 3);
	CHECK(epoll_wait(inner[2], &event, 1, 0) == 1 && event.data.u64 == 2);
	CHECK(epoll_wait(inner[0], &event, 1, 0) == 1 && event.data.u64 == 1);
	CHECK(quiet(target[0]) && !reported(NULL));
	CHECK(add(inner[0], instance, EPOLLIN, 5) && errno == ELOOP);
	return 1;
}

static void nested_harm(void)
{
	epoll_ctl(inner[2], EPOLL_CTL_DEL, inner[0], NULL);
}

/* ---- numbers that do not lead to their targets any more ---- */

/* Closed, but open as another descriptor. */
static void closed_set(void)
{
	make(3);
	NEED(!add(instance, target[1], EPOLLIN, 71));
	int other = fcntl(target[1], F_DUPFD, 200);
	NEED(other == 200 && !close(target[1]));
	target[1] = other;
}

static int closed_check(void)
{
	CHECK(!reported(NULL) && tell(target[0]) && quiet(target[0]));
	CHECK(tell(target[1]) && reported(NULL) == 71 && quiet(target[1]) && !reported(NULL));
	return 1;
}

static void closed_harm(void)
{
	dup2(target[0], target[1]);
}

/* The number leads to another file meanwhile, which was added too. */
static int first;

static void reused_set(void)
{
	make(2);
	int number = target[0];
	NEED(!add(instance, number, EPOLLIN, 81));
	first = fcntl(number, F_DUPFD, 100);
	NEED(first == 100 && dup2(target[1], number) == number);
	NEED(!add(instance, number, EPOLLIN, 82));
}

static int reused_check(void)
{
	CHECK(!reported(NULL) && tell(first) && reported(NULL) == 81 && quiet(first));
	CHECK(tell(target[0]) && reported(NULL) == 82 && quiet(target[1]) && !reported(NULL));
	return 1;
}

static void reused_harm(void)
{
	dup2(first, target[0]);
}

/* One file added under two numbers. */
static void both_set(void)
{
	make(1);
	target[1] = dup(target[0]);
	NEED(!add(instance, target[0], EPOLLIN, 91) && !add(instance, target[1], EPOLLIN, 92));
}

static int both_check(void)
{
	struct epoll_event event[3];
	CHECK(!reported(NULL) && tell(target[0]));
	CHECK(epoll_wait(instance, event, 3, 0) == 2 && event[0].data.u64 + event[1].data.u64 == 91 + 92);
	CHECK(quiet(target[0]) && !reported(NULL));
	return 1;
}

static void both_harm(void)
{
	epoll_ctl(instance, EPOLL_CTL_DEL, target[1], NULL);
}

/* One file added under two numbers, of which one is left; the other one is known to the instance still. */
static void merged_set(void)
{
	both_set();
	NEED(!close(target[1]));
}

static int merged_check(void)
{
	CHECK_ALL(both_check());
	CHECK(fcntl(target[1], F_GETFD) == -1 && dup2(target[0], target[1]) == target[1]);
	CHECK(!change(instance, target[1], EPOLLIN, 92) && !close(target[1]));
	return 1;
}

static void merged_harm(void)
{
	dup2(target[0], target[1]);
	both_harm();
	close(target[1]);
}

/* Closed here, but it lives on in a message that nobody has read. */
static int pair[2];

static void send_away(int fd)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec part = {"x", 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				 .msg_controllen = sizeof control};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	*rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
	memcpy(CMSG_DATA(rights), &fd, sizeof(int));
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) && sendmsg(pair[0], &message, 0) == 1 && !close(fd));
}

static int fetch(void)
{
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				 .msg_controllen = sizeof control};
	int fd = -1;
	if (recvmsg(pair[1], &message, MSG_DONTWAIT) == 1)
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

static void lost_set(void)
{
	make(2);
	NEED(!add(instance, target[0], EPOLLIN, 5) && !add(instance, target[1], EPOLLIN | EPOLLONESHOT, 6));
	NEED(tell(target[1]) && reported(NULL) == 6);
	send_away(target[0]);
}

static int lost_check(void)
{
	CHECK(!reported(NULL));
	target[0] = fetch();
	CHECK(target[0] >= 0 && tell(target[0]) && reported(NULL) == 5 && quiet(target[0]) && !reported(NULL));
	CHECK(!change(instance, target[1], EPOLLIN, 7) && reported(NULL) == 7);
	return 1;
}

/* The instance itself is on its way. */
static void sent_set(void)
{
	make(1);
	NEED(!add(instance, target[0], EPOLLIN | EPOLLET, BIG));
	send_away(instance);
}

static int sent_check(void)
{
	instance = fetch();
	CHECK(instance >= 0 && !reported(NULL) && tell(target[0]) && reported(NULL) == BIG && !reported(NULL));
	CHECK(!epoll_ctl(instance, EPOLL_CTL_DEL, target[0], NULL));
	return 1;
}

static void away_harm(void)
{
	int fd = fetch();
	epoll_ctl(fd, EPOLL_CTL_DEL, target[0], NULL);
	close(fd);
}

/* ---- many, and somebody who waits ---- */

static void many_set(void)
{
	make(500);
	for (int i = 0; i < 500; i++)
		NEED(!add(instance, target[i], i % 3 ? EPOLLIN : EPOLLIN | EPOLLET, 1000 + (uint64_t)i));
}

static int many_check(void)
{
	for (int i = 0; i < 500; i++)
		CHECK(tell(target[i]) && reported(NULL) == 1000 + (uint64_t)i && quiet(target[i]));
	return 1;
}

static void many_harm(void)
{
	epoll_ctl(instance, EPOLL_CTL_DEL, target[333], NULL);
}

static volatile int woken;

static void *waiter(void *argument)
{
	struct epoll_event event;
	(void)argument;
	for (;;)
		if (epoll_wait(instance, &event, 1, -1) == 1 && quiet(target[0]))
			__atomic_add_fetch(&woken, event.data.u64 == 6, __ATOMIC_SEQ_CST);
	return NULL;
}

static void waiting_set(void)
{
	make(1);
	NEED(!add(instance, target[0], EPOLLIN, 6));
	start_thread(waiter, NULL);
	nap_ms(20);
}

static int waiting_check(void)
{
	CHECK(!woken && tell(target[0]) && wait_for(&woken, 3000) && woken == 1);
	woken = 0;
	return 1;
}

static void waiting_harm(void)
{
	epoll_ctl(instance, EPOLL_CTL_DEL, target[0], NULL);
}

WORKLOAD(
	{"ways", ways_set, ways_check, ways_harm},
	{"fired", fired_set, fired_check, fired_harm},
	{"nested", nested_set, nested_check, nested_harm},
	{"closed", closed_set, closed_check, closed_harm},
	{"reused", reused_set, reused_check, reused_harm},
	{"both", both_set, both_check, both_harm},
	{"merged", merged_set, merged_check, merged_harm},
	{"lost", lost_set, lost_check, away_harm},
	{"sent", sent_set, sent_check, away_harm},
	{"many", many_set, many_check, many_harm},
	{"waiting", waiting_set, waiting_check, waiting_harm},
)
