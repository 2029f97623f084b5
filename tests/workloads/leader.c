/* The thread group's leader has ended (a zombie until the last thread goes), while other threads live and beat. */
#include "members.h"
#include "workers.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>

enum { CODE = 42, LAST_CODE = 43, OTHERS = 3, HOUR = 3600 };

static char *area;
static pid_t leader;

static int leader_is_dead(void)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/task/%d/status", leader);
	return field(path, "State")[0] == 'Z';
}

/* What its parent will be told, if nobody ends the whole group otherwise: the last field of its stat file. */
static int code_of_leader(void)
{
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/self/task/%d/stat", leader);
	NEED(slurp(path, text, sizeof text) > 0);
	return atoi(strrchr(text, ' ') + 1) >> 8;
}

/* What the leader does last, and what the surviving thread sets up when it is alone. */
static void (*do_last)(void), (*prepare_alone)(void);

static void *outlive(void *argument)
{
	(void)argument;
	while (!leader_is_dead())
		nap_ms(1);
	if (prepare_alone)
		prepare_alone();
	live();
	return NULL;
}

/* Without them nobody gets at the descriptors of a process whose leader is dead. */
static void need_thread_pidfds(void)
{
	int fd = syscall(SYS_pidfd_open, thread_id(), O_EXCL /* PIDFD_THREAD */);
	if (fd < 0)
		cannot_run("the kernel has no pidfds of threads");
	close(fd);
}

static void leader_set(void)
{
	need_thread_pidfds();
	area = map_anon(16);
	fill(area, 16 * PAGE, 1);
	leader = thread_id();
	start_thread(outlive, NULL);
	if (do_last)
		do_last();
	syscall(SYS_exit, CODE);
}

static int leader_check(void)
{
	CHECK(same(area, 16 * PAGE, 1));
	CHECK(thread_id() != leader && getpid() == leader);
	CHECK(leader_is_dead());
	CHECK(code_of_leader() == CODE);
	return 1;
}

static void leader_harm(void)
{
	area[1] ^= 1;
}

/* ---- with everything that a process owns, other threads, and a child that would get a signal if its parent ended ---- */

static int data, poll, ends[2], pair[2];
static char *shared;
static timer_t timer;
static pid_t child;

static int worker_job(struct worker *self)
{
	CHECK(thread_id() == self->tid && getpid() == leader);
	return 1;
}

/* Also some who are not where the process is. */
static void worker_prepare(struct worker *self)
{
	if (self->index) {
		NEED(!unshare(CLONE_FS) && !chdir("/"));
		umask(0111);
	}
}

static void child_prepare(void)
{
	NEED(!prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0));
}

static int lock(int command, short type)
{
	struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = 8, .l_len = 8};
	return fcntl(data, command, &range);
}

static void whole_prepare(void)
{
	struct itimerspec far = {{0, 0}, {HOUR, 0}};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
	child = bear(0, child_prepare, NULL);
	NEED(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &far, NULL));
	NEED(!setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {HOUR, 0}}, NULL));
	NEED(!kill(getpid(), SIGUSR1));
	NEED(!syscall(SYS_tgkill, getpid(), thread_id(), SIGUSR2));
	data = make_file("data", 4 * PAGE, 2);
	NEED(lseek(data, 24, SEEK_SET) == 24 && !lock(F_SETLK, F_WRLCK));
	NEED(!pipe(ends) && write(ends[1], "12345", 5) == 5);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && write(pair[1], "123", 3) == 3);
	shared = map_pages(2, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	fill(shared, 2 * PAGE, 3);
	/* Its target is open, but not under its number. */
	int copy = dup(ends[0]);
	NEED((poll = epoll_create1(0)) >= 0);
	NEED(!epoll_ctl(poll, EPOLL_CTL_ADD, copy, &(struct epoll_event){.events = EPOLLIN, .data.u64 = 77}));
	close(copy);
}

/* The portraits compare what the dead thread still shows of it. */
static void be_another(void)
{
	NEED(!prctl(PR_SET_NAME, "the first", 0, 0, 0));
	NEED(!setpriority(PRIO_PROCESS, 0, 5));
	NEED(!syscall(SYS_setresuid, 65534, 65534, 65534));
}

static void whole_set(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	NEED(!pthread_sigmask(SIG_BLOCK, &set, NULL));
	prepare = worker_prepare;
	job = worker_job;
	start_workers(OTHERS);
	do_last = be_another;
	prepare_alone = whole_prepare;
	leader_set();
}

static int whole_check(void)
{
	struct itimerspec left;
	struct itimerval real;
	struct epoll_event event;
	sigset_t pending;
	char path[64], text[512];
	int waiting, status;
	CHECK_ALL(leader_check());
	CHECK_ALL(ask_workers(OTHERS));
	CHECK_MEMBERS(1);
	CHECK(waitpid(child, &status, WNOHANG) == 0);
	CHECK(!timer_gettime(timer, &left) && left.it_value.tv_sec > HOUR / 2);
	CHECK(!getitimer(ITIMER_REAL, &real) && real.it_value.tv_sec > HOUR / 2);
	CHECK(!sigpending(&pending) && sigismember(&pending, SIGUSR1) && sigismember(&pending, SIGUSR2));
	snprintf(path, sizeof path, "/proc/self/task/%d/status", thread_id());
	CHECK(strtoull(field(path, "ShdPnd"), NULL, 16) == 1 << (SIGUSR1 - 1));
	CHECK(strtoull(field(path, "SigPnd"), NULL, 16) == 1 << (SIGUSR2 - 1));
	snprintf(path, sizeof path, "/proc/self/task/%d/comm", leader);
	CHECK(slurp(path, text, sizeof text) > 0 && !strcmp(text, "the first\n"));
	CHECK(lseek(data, 0, SEEK_CUR) == 24);
	snprintf(path, sizeof path, "/proc/thread-self/fdinfo/%d", data);
	CHECK(slurp(path, text, sizeof text) > 0 && strstr(text, "POSIX  ADVISORY  WRITE"));
	CHECK(!ioctl(ends[0], FIONREAD, &waiting) && waiting == 5);
	CHECK(!ioctl(pair[0], FIONREAD, &waiting) && waiting == 3);
	CHECK(same(shared, 2 * PAGE, 3));
	CHECK(epoll_wait(poll, &event, 1, 5000) == 1 && event.data.u64 == 77);
	return 1;
}

static void whole_harm(void)
{
	sigset_t set;
	int number;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigwait(&set, &number);
}

/* ---- in a child: its parent is told the exit code of the last thread (before Linux 5.19, of the leader) ---- */

static void *outlive_in_slot(void *argument)
{
	struct member *slot = argument;
	while (!leader_is_dead())
		nap_ms(1);
	__atomic_store_n(&slot->pid, getpid(), __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&slot->request, __ATOMIC_SEQ_CST) != LEAVE)
		nap_ms(2);
	if (!same(area, 16 * PAGE, 1))
		_exit(1);
	syscall(SYS_exit, LAST_CODE);
	return NULL;
}

static void child_set(void)
{
	need_thread_pidfds();
	area = map_anon(16);
	fill(area, 16 * PAGE, 1);
	child = fork();
	NEED(child >= 0);
	if (!child) {
		leader = thread_id();
		start_thread(outlive_in_slot, SLOT(0));
		syscall(SYS_exit, CODE);
	}
	NEED(wait_for(&SLOT(0)->pid, 5000));
}

static int child_check(void)
{
	int status;
	CHECK(state_of(child) == 'Z' && waitpid(child, &status, WNOHANG) == 0);
	tell(0, LEAVE);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == LAST_CODE || WEXITSTATUS(status) == CODE));
	return 1;
}

static void child_harm(void)
{
	kill(child, SIGKILL);
}

WORKLOAD(
	{"gone", leader_set, leader_check, leader_harm},
	{"halted", leader_set, leader_check, leader_harm},
	{"whole", whole_set, whole_check, whole_harm},
	{"child", child_set, child_check, child_harm},
)
