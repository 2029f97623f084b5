/* Descriptors of processes. */
#include "workload.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>

#define THREAD O_EXCL /* PIDFD_THREAD, which older headers lack */

static int process[4];

static int open_pid(pid_t pid, unsigned flags)
{
	return (int)syscall(SYS_pidfd_open, pid, flags);
}

static int is_dead(int fd)
{
	struct pollfd wait = {fd, POLLIN, 0};
	return poll(&wait, 1, 0) == 1;
}

static long send(int fd, int number)
{
	return syscall(SYS_pidfd_send_signal, fd, number, NULL, 0);
}

static volatile sig_atomic_t got;

static void on_signal(int signal_number)
{
	got += signal_number == SIGUSR2;
}

static void self_set(void)
{
	signal(SIGUSR2, on_signal);
	NEED((process[0] = open_pid(getpid(), O_NONBLOCK)) >= 0);
}

static int self_check(void)
{
	got = 0;
	CHECK(!is_dead(process[0]) && !send(process[0], SIGUSR2) && got == 1);
	CHECK(fcntl(process[0], F_GETFL) & O_NONBLOCK && fcntl(process[0], F_GETFD) == FD_CLOEXEC);
	return 1;
}

static void self_harm(void)
{
	signal(SIGUSR2, SIG_IGN);
}

static volatile pid_t thread_tid;

static void *idler(void *argument)
{
	(void)argument;
	thread_tid = thread_id();
	for (;;)
		pause();
	return NULL;
}

static void thread_set(void)
{
	signal(SIGUSR2, on_signal);
	start_thread(idler, NULL);
	while (!thread_tid)
		nap_ms(1);
	process[0] = open_pid(thread_tid, THREAD);
	if (process[0] < 0)
		cannot_run("no pidfds of threads");
}

static int thread_check(void)
{
	char path[64];
	got = 0;
	CHECK(!send(process[0], SIGUSR2) && wait_for(&got, 3000));
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", process[0]);
	CHECK(atoi(field(path, "Pid")) == thread_tid);
	return 1;
}

/* Two descriptors of one dead process, one of another. */
static void dead_set(void)
{
	for (int i = 0; i < 2; i++) {
		pid_t child = fork();
		if (!child)
			_exit(0);
		NEED((process[i] = open_pid(child, 0)) >= 0);
		if (i)
			NEED((process[2] = open_pid(child, O_NONBLOCK)) >= 0);
		NEED(waitpid(child, NULL, 0) == child);
	}
}

static int dead_check(void)
{
	struct stat state[3];
	for (int i = 0; i < 3; i++) {
		CHECK(is_dead(process[i]) && send(process[i], 0) < 0 && errno == ESRCH);
		CHECK(!fstat(process[i], &state[i]));
	}
	CHECK(!(fcntl(process[1], F_GETFL) & O_NONBLOCK) && fcntl(process[2], F_GETFL) & O_NONBLOCK);
	CHECK(state[1].st_ino == state[2].st_ino && state[0].st_ino != state[1].st_ino);
	return 1;
}

static void dead_harm(void)
{
	dup2(process[0], process[2]);
}

static void outside_set(void)
{
	NEED((process[0] = open_pid(getppid(), 0)) >= 0);
}

static int outside_check(void)
{
	CHECK(!is_dead(process[0]) && !send(process[0], 0));
	return 1;
}

static void outside_harm(void)
{
	close(process[0]);
}

WORKLOAD(
	{"self", self_set, self_check, self_harm},
	{"thread", thread_set, thread_check, self_harm},
	{"dead", dead_set, dead_check, dead_harm},
	{"outside", outside_set, outside_check, outside_harm},
)
