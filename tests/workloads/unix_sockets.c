/* Unix sockets: pairs, names, connections in every state, what is queued, options. */
#include "unix.h"

#include <linux/filter.h>

static char expected[65536], sender[64];

/* Pairs of the three types with data on both sides; an O_NONBLOCK end, a close-on-exec end, a dup. */
static void pairs_set(void)
{
	fill(expected, sizeof expected, 1);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds) && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, fds + 2));
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, fds + 4));
	fds[6] = dup(fds[1]);
	NEED(!fcntl(fds[0], F_SETFL, O_NONBLOCK));
	NEED(write(fds[0], expected, 60000) == 60000 && write(fds[1], "back", 4) == 4);
	for (int i = 2; i < 6; i++)
		NEED(write(fds[i], "one", 3) == 3 && write(fds[i], "", 0) == 0 && write(fds[i], expected, 40000) == 40000);
}

static int pairs_check(void)
{
	CHECK(fcntl(fds[0], F_GETFL) == (O_RDWR | O_NONBLOCK) && fcntl(fds[1], F_GETFL) == O_RDWR);
	CHECK(fcntl(fds[2], F_GETFL) == (O_RDWR | O_NONBLOCK) && fcntl(fds[4], F_GETFD) == FD_CLOEXEC);
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, fds[1], fds[6]) == 0);
	for (int i = 0; i < 6; i++)
		CHECK(is_named(fds[i], 0, "") && is_named(fds[i], 1, ""));
	CHECK(recv(fds[6], got, sizeof got, 0) == 60000 && !memcmp(got, expected, 60000));
	CHECK(recv(fds[0], got, sizeof got, 0) == 4 && !memcmp(got, "back", 4));
	for (int i = 2; i < 6; i++) {
		CHECK(recv(fds[i], got, sizeof got, 0) == 3 && !memcmp(got, "one", 3));
		CHECK(recv(fds[i], got, sizeof got, MSG_DONTWAIT) == 0);
		CHECK(recv(fds[i], got, sizeof got, 0) == 40000 && !memcmp(got, expected, 40000));
		CHECK(nothing_left(fds[i]));
	}
	CHECK(write(fds[2], "again", 5) == 5 && read(fds[3], got, 64) == 5);
	return 1;
}

static void pairs_harm(void)
{
	recv(fds[3], got, 1, 0);
}

/* Listening sockets by path, abstract name, relative name in another folder, and a name that is gone; each with a
 * connection of its own. */
static char full[4][100];

static void listen_set(void)
{
	char cwd[80];
	NEED(getcwd(cwd, sizeof cwd) && !mkdir("sub", 0755));
	snprintf(full[0], 100, "%s/full", cwd);
	snprintf(full[1], 100, "@firn-test-%d", getpid());
	strcpy(full[2], "relative");
	snprintf(full[3], 100, "%s/gone", cwd);
	for (int i = 0; i < 4; i++) {
		NEED(i != 2 || !chdir("sub"));
		fds[i] = bound(i == 3 ? SOCK_SEQPACKET : SOCK_STREAM, full[i]);
		NEED(!listen(fds[i], 3 + i));
		fds[4 + i] = socket(AF_UNIX, i == 3 ? SOCK_SEQPACKET : SOCK_STREAM, 0);
		NEED(!connect_to(fds[4 + i], full[i]));
		fds[8 + i] = accept(fds[i], NULL, NULL);
		NEED(fds[8 + i] >= 0 && write(fds[4 + i], "request", 7) == 7);
		NEED(i != 2 || !chdir(".."));
	}
	NEED(!chmod("full", 0640) && !chown("full", 12, 34) && !unlink("gone"));
}

static int listen_check(void)
{
	struct stat st;
	int on = 0;
	socklen_t size = sizeof on;
	for (int i = 0; i < 4; i++) {
		CHECK(is_named(fds[i], 0, full[i]) && is_named(fds[4 + i], 0, "") && is_named(fds[4 + i], 1, full[i]));
		CHECK(is_named(fds[8 + i], 0, full[i]) && is_named(fds[8 + i], 1, ""));
		CHECK(!getsockopt(fds[i], SOL_SOCKET, SO_ACCEPTCONN, &on, &size) && on);
		CHECK(recv(fds[8 + i], got, sizeof got, MSG_DONTWAIT) == 7 && write(fds[8 + i], "answer", 6) == 6);
		CHECK(recv(fds[4 + i], got, sizeof got, MSG_DONTWAIT) == 6 && write(fds[4 + i], "request", 7) == 7);
		if (i == 3)
			break;
		CHECK(i != 2 || !chdir("sub"));
		int fresh = socket(AF_UNIX, SOCK_STREAM, 0);
		CHECK(!connect_to(fresh, full[i]));
		int other = accept4(fds[i], NULL, NULL, SOCK_NONBLOCK);
		CHECK(other >= 0 && !close(other) && !close(fresh));
		CHECK(i != 2 || !chdir(".."));
	}
	CHECK(!stat("full", &st) && (st.st_mode & 07777) == 0640 && st.st_uid == 12 && st.st_gid == 34);
	CHECK(S_ISSOCK(st.st_mode) && access("gone", F_OK) == -1 && !stat("sub/relative", &st));
	return 1;
}

static void listen_harm(void)
{
	unlink("full");
}

/* Clients that wait to be accepted, in an order that is not that of their descriptors; the queue is full. */
static void waiting_set(void)
{
	struct sockaddr_un a;
	fds[0] = bound(SOCK_STREAM, "server");
	NEED(!listen(fds[0], 2));
	for (int i = 1; i < 4; i++)
		fds[i] = socket(AF_UNIX, SOCK_STREAM, 0);
	for (int i = 3; i > 0; i--) {
		char name[16];
		snprintf(name, sizeof name, "@c%d-%d", i, getpid() % 10000);
		socklen_t length = address_of(&a, name);
		NEED(!bind(fds[i], (void *)&a, length) && !connect_to(fds[i], "server"));
	}
}

static int waiting_check(void)
{
	int late = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	CHECK(connect_to(late, "server") == -1 && errno == EAGAIN);
	for (int i = 3; i > 0; i--) {
		char name[16];
		snprintf(name, sizeof name, "@c%d-%d", i, getpid() % 10000);
		CHECK(is_named(fds[i], 0, name) && is_named(fds[i], 1, "server"));
		int end = accept4(fds[0], NULL, NULL, 0);
		CHECK(end >= 0 && is_named(end, 1, name) && is_named(end, 0, "server"));
		CHECK(write(fds[i], "late", 4) == 4 && recv(end, got, 64, 0) == 4);
	}
	return 1;
}

static void waiting_harm(void)
{
	accept(fds[0], NULL, NULL);
}

/* Shut down on one side and on both, and peers that are closed, with data still to be read. */
static void half_set(void)
{
	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < 5; i++)
		NEED(!socketpair(AF_UNIX, i == 4 ? SOCK_SEQPACKET : SOCK_STREAM, 0, fds + 2 * i));
	for (int i = 0; i < 10; i += 2)
		NEED(write(fds[i + 1], "last words", 10) == 10);
	NEED(!shutdown(fds[1], SHUT_WR) && !shutdown(fds[2], SHUT_RD) && !shutdown(fds[4], SHUT_RDWR));
	NEED(!close(fds[7]) && !close(fds[9]));
	fds[10] = bound(SOCK_STREAM, "server");
	NEED(!listen(fds[10], 1));
	fds[11] = socket(AF_UNIX, SOCK_STREAM, 0);
	NEED(!connect_to(fds[11], "server"));
	fds[12] = accept(fds[10], NULL, NULL);
	NEED(fds[12] >= 0 && write(fds[11], "bye", 3) == 3 && !close(fds[11]));
}

static int half_check(void)
{
	static const int writable[] = {1, 0, 1, 0, 0, 0, 0};
	static const int pairs[] = {0, 1, 2, 3, 4, 5, 6};
	for (int i = 0; i < 7; i++) {
		errno = 0;
		ssize_t sent = send(fds[pairs[i]], "x", 1, MSG_DONTWAIT);
		CHECK(writable[i] ? sent == 1 : sent == -1 && errno == EPIPE);
	}
	for (int i = 0; i < 10; i += 2) {
		CHECK(recv(fds[i], got, 64, MSG_DONTWAIT) == 10 && !memcmp(got, "last words", 10));
		CHECK(recv(fds[i], got, 64, MSG_DONTWAIT) == 0);
	}
	struct pollfd ask = {fds[6], POLLIN, 0};
	CHECK(poll(&ask, 1, 0) == 1 && ask.revents & POLLHUP);
	CHECK(is_named(fds[12], 0, "server") && recv(fds[12], got, 64, MSG_DONTWAIT) == 3 && !memcmp(got, "bye", 3));
	CHECK(recv(fds[12], got, 64, MSG_DONTWAIT) == 0 && write(fds[12], "x", 1) == -1 && errno == EPIPE);
	return 1;
}

static void half_harm(void)
{
	recv(fds[0], got, 1, 0);
}

/* Datagram sockets: one by itself, one connected to it, one that has been connected both ways by name, an unbound one;
 * queues from a named sender and from nameless ones, and of a socket whose other half is gone. */
static void datagrams_set(void)
{
	struct sockaddr_un a;
	fds[0] = bound(SOCK_DGRAM, "mailbox");
	snprintf(sender, sizeof sender, "@firn-test-dgram-%d", getpid());
	fds[1] = bound(SOCK_DGRAM, sender);
	fds[2] = socket(AF_UNIX, SOCK_DGRAM, 0);
	NEED(!connect_to(fds[1], "mailbox") && write(fds[1], "signed", 6) == 6 && write(fds[1], "", 0) == 0);
	fds[3] = bound(SOCK_DGRAM, "left");
	fds[4] = bound(SOCK_DGRAM, "right");
	NEED(!connect_to(fds[3], "right") && !connect_to(fds[4], "left") && write(fds[3], "to the right", 12) == 12);
	fds[5] = bound(SOCK_DGRAM, "nobody");
	socklen_t length = address_of(&a, "nobody");
	NEED(sendto(fds[2], "unsigned", 8, 0, (void *)&a, length) == 8);
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, fds + 6) && write(fds[7], "orphan", 6) == 6 && !close(fds[7]));
}

static int datagrams_check(void)
{
	struct sockaddr_un a;
	socklen_t length = sizeof a;
	CHECK(recvfrom(fds[0], got, 64, MSG_DONTWAIT, (void *)&a, &length) == 6 && !memcmp(got, "signed", 6));
	CHECK(length == offsetof(struct sockaddr_un, sun_path) + strlen(sender));
	CHECK(!memcmp(a.sun_path + 1, sender + 1, strlen(sender) - 1));
	CHECK(recv(fds[0], got, 64, MSG_DONTWAIT) == 0 && nothing_left(fds[0]));
	CHECK(is_named(fds[1], 0, sender) && is_named(fds[1], 1, "mailbox"));
	CHECK(write(fds[1], "more", 4) == 4 && recv(fds[0], got, 64, MSG_DONTWAIT) == 4);
	CHECK(is_named(fds[3], 0, "left") && is_named(fds[3], 1, "right") && is_named(fds[4], 1, "left"));
	CHECK(recv(fds[4], got, 64, MSG_DONTWAIT) == 12 && write(fds[4], "x", 1) == 1 && recv(fds[3], got, 9, 0) == 1);
	CHECK(is_named(fds[2], 0, "") && !is_named(fds[2], 1, ""));
	length = sizeof a;
	CHECK(recvfrom(fds[5], got, 64, MSG_DONTWAIT, (void *)&a, &length) == 8 && length == 0);
	CHECK(recv(fds[6], got, 64, MSG_DONTWAIT) == 6 && !memcmp(got, "orphan", 6));
	CHECK(write(fds[6], "x", 1) == -1 && (errno == ECONNREFUSED || errno == ECONNRESET));
	return 1;
}

static void datagrams_harm(void)
{
	recv(fds[0], got, 1, 0);
}

/* Descriptors on their way: among the bytes of a stream, in messages; a file that is open nowhere else, one that is, a
 * pipe, a socket with a descriptor in its own queue, and a socket that is in its own queue. */
static void rights_set(void)
{
	int inner[2], channel[2], one;
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds) && !socketpair(AF_UNIX, SOCK_DGRAM, 0, fds + 2));
	fds[4] = make_file("shared", 4096, 3);
	one = make_file("alone", 4096, 4);
	NEED(lseek(one, 8, SEEK_SET) == 8);
	NEED(write(fds[0], "plain", 5) == 5 && post(fds[0], "with", one) == 4 && post(fds[0], "file", fds[4]) == 4);
	NEED(write(fds[0], "tail", 4) == 4);
	NEED(!pipe(channel) && write(channel[1], "in the pipe", 11) == 11);
	NEED(post(fds[2], "reader", channel[0]) == 6 && post(fds[2], "writer", channel[1]) == 6);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, inner) && post(inner[0], "deep", one) == 4);
	NEED(post(fds[2], "nested", inner[1]) == 6 && post(fds[2], "itself", fds[3]) == 6);
	NEED(!close(one) && !close(channel[0]) && !close(channel[1]) && !close(inner[1]));
	fds[5] = inner[0];
}

static int rights_check(void)
{
	int one, file, reader, writer, inner, itself, deep;
	CHECK(take(fds[1], 3, &one) == 3 && one == -1 && take(fds[1], 64, &one) == 6 && one >= 0);
	CHECK(!memcmp(got, "inwith", 6) && take(fds[1], 64, &file) == 4 && file >= 0);
	CHECK(take(fds[1], 64, &deep) == 4 && deep == -1 && !memcmp(got, "tail", 4));
	CHECK(lseek(one, 0, SEEK_CUR) == 8 && syscall(SYS_kcmp, getpid(), getpid(), 0, file, fds[4]) == 0);
	CHECK(take(fds[3], 64, &reader) == 6 && take(fds[3], 64, &writer) == 6 && read(reader, got, 64) == 11);
	CHECK(!memcmp(got, "in the pipe", 11) && write(writer, "x", 1) == 1 && read(reader, got, 64) == 1);
	CHECK(take(fds[3], 64, &inner) == 6 && inner >= 0 && take(inner, 64, &deep) == 4 && deep >= 0);
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, deep, one) == 0);
	CHECK(write(fds[5], "still", 5) == 5 && recv(inner, got, 64, 0) == 5);
	CHECK(take(fds[3], 64, &itself) == 6 && syscall(SYS_kcmp, getpid(), getpid(), 0, itself, fds[3]) == 0);
	return 1;
}

static void rights_harm(void)
{
	recv(fds[1], got, 3, 0);
}

/* Options that are not as in a new socket. */
static struct sock_filter code[2] = {{BPF_LD | BPF_W | BPF_LEN, 0, 0, 0}, {BPF_RET | BPF_A, 0, 0, 0}};

static int value_of(int fd, int option)
{
	int value = -1;
	socklen_t size = sizeof value;
	return getsockopt(fd, SOL_SOCKET, option, &value, &size) ? -1 : value;
}

static void set(int fd, int option, int value)
{
	NEED(!setsockopt(fd, SOL_SOCKET, option, &value, sizeof value));
}

static void options_set(void)
{
	struct timeval wait = {3, 4000};
	struct sock_fprog program = {2, code};
	struct linger linger = {1, 7};
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, fds));
	set(fds[0], SO_SNDBUF, 50000);
	set(fds[0], SO_RCVBUF, 60000);
	set(fds[1], SO_SNDBUFFORCE, 5000000);
	set(fds[0], SO_PASSCRED, 1);
	set(fds[0], SO_PRIORITY, 4);
	set(fds[1], SO_BROADCAST, 1);
	set(fds[1], SO_KEEPALIVE, 1);
	set(fds[1], SO_OOBINLINE, 1);
	set(fds[1], SO_MARK, 99);
	set(fds[1], SO_RCVLOWAT, 5);
	NEED(!setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait));
	NEED(!setsockopt(fds[1], SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
	NEED(!setsockopt(fds[1], SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
}

static int options_check(void)
{
	struct timeval wait = {0, 0};
	struct linger linger = {0, 0};
	struct sock_filter found[2];
	socklen_t size = sizeof wait;
	CHECK(value_of(fds[0], SO_SNDBUF) == 100000 && value_of(fds[0], SO_RCVBUF) == 120000);
	CHECK(value_of(fds[1], SO_SNDBUF) == 10000000 && value_of(fds[1], SO_RCVBUF) != 120000);
	CHECK(value_of(fds[0], SO_PASSCRED) == 1 && value_of(fds[1], SO_PASSCRED) == 0);
	CHECK(value_of(fds[0], SO_PRIORITY) == 4 && value_of(fds[1], SO_BROADCAST) == 1);
	CHECK(value_of(fds[1], SO_KEEPALIVE) == 1 && value_of(fds[1], SO_OOBINLINE) == 1);
	CHECK(value_of(fds[1], SO_MARK) == 99 && value_of(fds[1], SO_RCVLOWAT) == 5);
	CHECK(value_of(fds[0], 72) == 3 && value_of(fds[1], 72) == 1);
	CHECK(!getsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &wait, &size) && wait.tv_sec == 3 && wait.tv_usec == 4000);
	size = sizeof linger;
	CHECK(!getsockopt(fds[1], SOL_SOCKET, SO_LINGER, &linger, &size) && linger.l_onoff && linger.l_linger == 7);
	size = 2;
	CHECK(!getsockopt(fds[1], SOL_SOCKET, SO_GET_FILTER, found, &size) && size == 2 && !memcmp(found, code, sizeof code));
	CHECK(write(fds[0], "x", 1) == 1 && recv(fds[1], got, 64, MSG_DONTWAIT) == 1);
	return 1;
}

static void options_harm(void)
{
	set(fds[1], SO_RCVLOWAT, 6);
}

WORKLOAD(
	{"pairs", pairs_set, pairs_check, pairs_harm},
	{"listen", listen_set, listen_check, listen_harm},
	{"waiting", waiting_set, waiting_check, waiting_harm},
	{"half", half_set, half_check, half_harm},
	{"datagrams", datagrams_set, datagrams_check, datagrams_harm},
	{"rights", rights_set, rights_check, rights_harm},
	{"options", options_set, options_check, options_harm},
)
