/*
 * Calls that the kernel never restarts by itself (signal(7)): a freeze must not be seen by them. Each waits in a child of
 * its own, which ends with 0 if the call gave what an undisturbed one gives.
 */
#include <linux/aio_abi.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "workload.h"

enum { KEY = 0x66690000, CALLS = 8, FULL = 10 };

struct message {
	long type;
	char text[FULL];
};

static int semaphores, queue, full_queue;
static int pair[2], full_pair[2], listener;
static pid_t children[CALLS];
static const struct timespec half = {0, 500000000}, minute = {60, 0};

static void on_signal(int number)
{
	(void)number;
}

static int wait_semop(void)
{
	struct sembuf down = {0, -1, 0};
	return !semop(semaphores, &down, 1);
}

static int wait_semtimedop(void)
{
	struct sembuf down = {1, -1, 0};
	return !semtimedop(semaphores, &down, 1, &minute);
}

static int wait_msgrcv(void)
{
	struct message got;
	return msgrcv(queue, &got, FULL, 3, 0) == 3 && !memcmp(got.text, "abc", 3);
}

static int wait_msgsnd(void)
{
	struct message last = {5, "last"};
	return !msgsnd(full_queue, &last, FULL, 0);
}

static int wait_recv(void)
{
	char byte;
	return recv(pair[0], &byte, 1, 0) == 1 && byte == 'x';
}

static int wait_send(void)
{
	return send(full_pair[0], "z", 1, 0) == 1;
}

static int wait_accept(void)
{
	return accept(listener, NULL, NULL) >= 0;
}

static int wait_io_getevents(void)
{
	struct io_event event;
	aio_context_t ring = 0;
	struct timespec limit = half;
	if (syscall(SYS_io_setup, 4, &ring))
		return 0;
	return !syscall(SYS_io_getevents, ring, 1, 1, &event, &limit);
}

static int (*const calls[CALLS])(void) = {
	wait_semop, wait_semtimedop, wait_msgrcv, wait_msgsnd, wait_recv, wait_send, wait_accept, wait_io_getevents,
};

static struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};

static void make_objects(void)
{
	key_t key = KEY | (getpid() & 0xffff);
	struct message one = {4, "full"};
	struct timeval limit = {60, 0};
	char byte = 'y';
	/* Without permissions, or any program with threads might have used it as well, and could not be dumped. */
	semaphores = semget(key, 2, IPC_CREAT | IPC_EXCL);
	queue = msgget(key, IPC_CREAT | IPC_EXCL | 0600);
	full_queue = msgget(key ^ 0x8000, IPC_CREAT | IPC_EXCL | 0600);
	NEED(semaphores >= 0 && queue >= 0 && full_queue >= 0);
	while (!msgsnd(full_queue, &one, FULL, IPC_NOWAIT))
		;
	NEED(errno == EAGAIN);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && !socketpair(AF_UNIX, SOCK_DGRAM, 0, full_pair));
	while (send(full_pair[0], &byte, 1, MSG_DONTWAIT) == 1)
		;
	listener = socket(AF_UNIX, SOCK_STREAM, 0);
	NEED(!bind(listener, (struct sockaddr *)&address, sizeof address) && !listen(listener, 4));
	NEED(!setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
	NEED(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
	NEED(!setsockopt(full_pair[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit));
}

static void calls_set(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	NEED(!sigaction(SIGUSR1, &action, NULL));
	make_objects();
	for (int i = 0; i < CALLS; i++) {
		children[i] = fork();
		NEED(children[i] >= 0);
		if (!children[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			int right = calls[i]();
			_exit(right ? 0 : errno ? errno : 99);
		}
	}
	for (int i = 0; i < CALLS; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/%d/status", children[i]);
		for (int n = 0; n < 1000 && field(path, "State")[0] != 'S'; n++)
			nap_ms(1);
	}
}

static int calls_check(void)
{
	struct sembuf up[] = {{0, 1, 0}, {1, 1, 0}};
	struct message got, three = {3, "abc"};
	char byte;
	int status, client = socket(AF_UNIX, SOCK_STREAM, 0);
	nap_ms(20);
	for (int i = 0; i < CALLS - 1; i++)
		CHECK(!waitpid(children[i], &status, WNOHANG));
	CHECK(!semop(semaphores, up, 2));
	CHECK(!msgsnd(queue, &three, 3, 0));
	CHECK(msgrcv(full_queue, &got, FULL, 0, 0) == FULL && got.type == 4);
	CHECK(write(pair[1], "x", 1) == 1);
	/* All of them: the kernel wakes a sender when half of its buffer is free. */
	CHECK(read(full_pair[1], &byte, 1) == 1 && byte == 'y');
	while (recv(full_pair[1], &byte, 1, MSG_DONTWAIT) == 1 && byte == 'y')
		;
	CHECK(!connect(client, (struct sockaddr *)&address, sizeof address));
	for (int i = 0; i < CALLS; i++) {
		CHECK(waitpid(children[i], &status, 0) == children[i]);
		beat->tokens[0] = (uint64_t)i;
		errno = WEXITSTATUS(status);
		CHECK(!status);
	}
	return 1;
}

static void calls_harm(void)
{
	kill(children[1], SIGUSR1);
	nap_ms(20);
}

WORKLOAD(
	{"calls", calls_set, calls_check, calls_harm},
)
