/* Pipes and unix sockets between a process and its child: each end is in one of them only, or shared by both. */
#include "workload.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static int there[2], back[2], pair[2], shared[2], server = -1;
static char got[64];

static void serve(int in, int out)
{
	char text[64];
	ssize_t bytes;
	while ((bytes = read(in, text, sizeof text)) > 0) {
		text[0]++;
		if (write(out, text, (size_t)bytes) != bytes)
			_exit(1);
	}
	_exit(0);
}

static int asked(int to, int from)
{
	return write(to, "ask", 3) == 3 && read(from, got, sizeof got) == 3 && !memcmp(got, "bsk", 3);
}

/* A child behind two pipes, waiting for the next question; a third pipe whose ends both have, with bytes in it. */
static void pipes_set(void)
{
	NEED(!pipe(there) && !pipe(back) && !pipe(shared) && write(shared[1], "both", 4) == 4);
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(there[1]);
		close(back[0]);
		serve(there[0], back[1]);
	}
	NEED(!close(there[0]) && !close(back[1]));
}

static int pipes_check(void)
{
	CHECK(asked(there[1], back[0]));
	CHECK(read(shared[0], got, sizeof got) == 4 && !memcmp(got, "both", 4) && write(shared[1], "both", 4) == 4);
	return 1;
}

static void pipes_harm(void)
{
	read(shared[0], got, 1);
}

/* A child behind a socket pair; a listening socket that both have, and a connection from one to the other. */
static void sockets_set(void)
{
	struct sockaddr_un a = {AF_UNIX, "server"};
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	server = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	NEED(server >= 0 && !bind(server, (void *)&a, sizeof a) && !listen(server, 4));
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(pair[0]);
		shared[0] = accept(server, NULL, NULL);
		if (shared[0] < 0 || write(shared[0], "hello", 5) != 5)
			_exit(1);
		serve(pair[1], pair[1]);
	}
	shared[1] = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	NEED(!close(pair[1]) && !connect(shared[1], (void *)&a, sizeof a));
	NEED(asked(pair[0], pair[0]));
}

static int sockets_check(void)
{
	CHECK(asked(pair[0], pair[0]));
	CHECK(recv(shared[1], got, sizeof got, MSG_DONTWAIT) == 5 && !memcmp(got, "hello", 5));
	return 1;
}

static void sockets_harm(void)
{
	recv(shared[1], got, 1, 0);
}

WORKLOAD(
	{"pipes", pipes_set, pipes_check, pipes_harm},
	{"sockets", sockets_set, sockets_check, sockets_harm},
)
