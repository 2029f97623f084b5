/*
 * State that stands, or once stood, against a dump: where it does, the dump must be refused with all of it named, and
 * the program must go on unharmed.
 */
#include "workload.h"

#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

enum { STRANGE = 4 };

static int strange[STRANGE];
static int pipes[2], sockets[2], event, listener, terminal, poller, timer, signals, watch;
static pid_t child;

static void make_pipe(void)
{
	NEED(!pipe2(pipes, O_CLOEXEC) && write(pipes[1], "piped", 5) == 5);
}

static void make_socketpair(void)
{
	NEED(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) && write(sockets[0], "sent", 4) == 4);
}

static void make_listener(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	NEED(listener >= 0 && !bind(listener, (void *)&address, sizeof address) && !listen(listener, 3));
}

static void make_events(void)
{
	struct itimerspec far = {{5, 0}, {90000, 0}};
	struct epoll_event wanted = {.events = EPOLLIN, .data = {.u64 = 7}};
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	event = eventfd(3, EFD_NONBLOCK);
	timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	signals = signalfd(-1, &set, SFD_NONBLOCK);
	watch = inotify_init1(IN_NONBLOCK);
	poller = epoll_create1(EPOLL_CLOEXEC);
	NEED(event >= 0 && signals >= 0 && !timerfd_settime(timer, 0, &far, NULL));
	NEED(inotify_add_watch(watch, ".", IN_DELETE_SELF) >= 0);
	NEED(!epoll_ctl(poller, EPOLL_CTL_ADD, event, &wanted));
}

static void make_terminal(void)
{
	terminal = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (terminal < 0)
		cannot_run("no terminals here");
}

/* Descriptors of what no checkpoint can hold: a ring of requests, a pager, a counter, a kernel-side map. */
static void strange_set(void)
{
	static struct io_uring_params parameters;
	static union bpf_attr map = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 8, .max_entries = 1};
	static struct perf_event_attr counter = {.type = PERF_TYPE_SOFTWARE, .size = sizeof counter,
						 .config = PERF_COUNT_SW_TASK_CLOCK};
	strange[0] = (int)syscall(SYS_io_uring_setup, 4, &parameters);
	strange[1] = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	strange[2] = (int)syscall(SYS_perf_event_open, &counter, 0, -1, -1, 0);
	strange[3] = (int)syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map);
	for (int i = 0; i < STRANGE; i++)
		if (strange[i] < 0)
			cannot_run("the kernel lacks io_uring, userfaultfd, perf or bpf");
}

static int strange_check(void)
{
	uint64_t ticks = 0;
	for (int i = 0; i < STRANGE; i++)
		CHECK(fcntl(strange[i], F_GETFD) >= 0);
	CHECK(read(strange[2], &ticks, 8) == 8 && ticks > 0);
	return 1;
}

static void strange_harm(void)
{
	close(strange[0]);
}

static int pipe_check(void)
{
	char got[16];
	CHECK(read(pipes[0], got, 16) == 5 && !memcmp(got, "piped", 5));
	CHECK(write(pipes[1], "piped", 5) == 5);
	return 1;
}

static int socketpair_check(void)
{
	char got[16];
	CHECK(read(sockets[1], got, 16) == 4 && !memcmp(got, "sent", 4) && write(sockets[0], "sent", 4) == 4);
	return 1;
}

static int listener_check(void)
{
	int accepting = 0;
	socklen_t length = sizeof accepting;
	CHECK(!getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &accepting, &length) && accepting);
	return 1;
}

static int events_check(void)
{
	struct epoll_event ready;
	struct itimerspec left;
	uint64_t value;
	CHECK(epoll_wait(poller, &ready, 1, 0) == 1 && ready.data.u64 == 7);
	CHECK(read(event, &value, 8) == 8 && value == 3 && write(event, &value, 8) == 8);
	CHECK(!timerfd_gettime(timer, &left) && left.it_value.tv_sec > 80000 && left.it_interval.tv_sec == 5);
	CHECK(fcntl(signals, F_GETFL) & O_NONBLOCK && fcntl(watch, F_GETFL) & O_NONBLOCK);
	return 1;
}

static int terminal_check(void)
{
	CHECK(isatty(terminal));
	return 1;
}

static void pipe_harm(void)
{
	NEED(write(pipes[1], "x", 1) == 1);
}

static void socketpair_harm(void)
{
	NEED(write(sockets[0], "x", 1) == 1);
}

static void listener_harm(void)
{
	dup2(socket(AF_INET, SOCK_STREAM, 0), listener);
}

static void events_harm(void)
{
	uint64_t more = 1;
	NEED(write(event, &more, 8) == 8);
}

static void terminal_harm(void)
{
	dup2(open("/dev/null", O_RDWR), terminal);
}

/* A child: a tree of more than one task. */
static void child_set(void)
{
	child = fork();
	NEED(child >= 0);
	while (!child)
		pause();
}

static int child_check(void)
{
	CHECK(!waitpid(child, NULL, WNOHANG));
	CHECK(!kill(child, 0));
	return 1;
}

static void child_harm(void)
{
	kill(child, SIGKILL);
	nap_ms(20);
}

WORKLOAD(
	{"strange", strange_set, strange_check, strange_harm},
	{"pipe", make_pipe, pipe_check, pipe_harm},
	{"socketpair", make_socketpair, socketpair_check, socketpair_harm},
	{"listener", make_listener, listener_check, listener_harm},
	{"events", make_events, events_check, events_harm},
	{"terminal", make_terminal, terminal_check, terminal_harm},
	{"child", child_set, child_check, child_harm},
)
