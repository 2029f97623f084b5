/* Unix sockets: what waits in queues whose other end is gone, was not accepted yet, or is somebody else. */
#include "unix.h"

#include <grp.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

enum { USER = 4321, GROUP = 5432, OTHER = 6543, BIG = 40000 };

#ifndef SIOCATMARK
#define SIOCATMARK 0x8905
#endif

static char big[BIG];
static pid_t gone;

/* An abstract name of this process; up to four at a time. */
static const char *own(const char *what)
{
	static char names[4][64];
	static int turn;
	char *name = names[turn++ % 4];
	snprintf(name, 64, "@firn-%s-%d", what, getpid());
	return name;
}

static int failed(ssize_t result, int error)
{
	return result == -1 && errno == error;
}

static int same_file(int one, int other)
{
	return syscall(SYS_kcmp, getpid(), getpid(), 0, one, other) == 0;
}

static ssize_t send_to(int fd, const char *text, const char *name)
{
	struct sockaddr_un a;
	socklen_t length = address_of(&a, name);
	return sendto(fd, text, strlen(text), 0, (void *)&a, length);
}

/* The next datagram is `text`, from a socket of that name, or without one. */
static int comes_from(int fd, const char *text, const char *name)
{
	struct sockaddr_un a, b;
	socklen_t length = sizeof a, wanted = name ? address_of(&b, name) : 0;
	memset(&a, 0, sizeof a);
	CHECK(recvfrom(fd, got, 64, MSG_DONTWAIT, (void *)&a, &length) == (ssize_t)strlen(text));
	CHECK(!memcmp(got, text, strlen(text)) && length == wanted && (!name || !memcmp(&a, &b, length)));
	return 1;
}

static int is(int fd, const char *text)
{
	return recv(fd, got, BIG, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(got, text, strlen(text));
}

static void harm(void)
{
	recv(fds[0], got, 1, MSG_DONTWAIT);
	close(fds[1]);
}

/* ---- before they are accepted ---- */

static int client_of(int type, const char *server)
{
	int fd = socket(AF_UNIX, type, 0);
	NEED(fd >= 0 && !connect_to(fd, server));
	return fd;
}

/* Streams: bytes and descriptors, among them the socket itself; many bytes, and shut; nothing; from somebody who is
 * gone; with an out-of-band byte. Seqpacket: messages, an empty one, and gone. */
static void early_set(void)
{
	static char server[64];
	strcpy(server, own("early"));
	fill(big, BIG, 1);
	fds[0] = bound(SOCK_STREAM, server);
	fds[1] = make_file("file", 4096, 2);
	NEED(!listen(fds[0], 9) && !fcntl(fds[0], F_SETFL, O_NONBLOCK));
	fds[2] = client_of(SOCK_STREAM, server);
	NEED(write(fds[2], "before", 6) == 6 && post(fds[2], "file", fds[1]) == 4 && post(fds[2], "self", fds[2]) == 4);
	fds[3] = client_of(SOCK_STREAM, server);
	NEED(write(fds[3], big, BIG) == BIG && !shutdown(fds[3], SHUT_WR));
	NEED(!close(client_of(SOCK_STREAM, server)));
	gone = fork();
	if (!gone) {
		char name[64];
		gid_t more = OTHER;
		snprintf(name, sizeof name, "@firn-gone-%d", getppid());
		int fd = bound(SOCK_STREAM, name);
		NEED(!setgroups(1, &more) && !setegid(GROUP) && !seteuid(USER) && !connect_to(fd, server));
		_exit(write(fd, "dear", 4) != 4);
	}
	int status = -1;
	NEED(gone > 0 && waitpid(gone, &status, 0) == gone && status == 0);
	fds[4] = client_of(SOCK_STREAM, server);
	NEED(write(fds[4], "ab", 2) == 2 && send(fds[4], "!", 1, MSG_OOB) == 1 && write(fds[4], "cd", 2) == 2);
	fds[5] = bound(SOCK_SEQPACKET, "packets");
	NEED(!listen(fds[5], 9));
	fds[6] = client_of(SOCK_SEQPACKET, "packets");
	NEED(write(fds[6], "one", 3) == 3 && write(fds[6], "", 0) == 0 && post(fds[6], "server", fds[5]) == 6);
	fds[7] = bound(SOCK_SEQPACKET, "visitor");
	NEED(!connect_to(fds[7], "packets") && write(fds[7], big, BIG) == BIG && !close(fds[7]) && !unlink("visitor"));
}

static int accepted(int listener)
{
	return accept4(listener, NULL, NULL, SOCK_NONBLOCK);
}

static int early_check(void)
{
	int end, passed;
	struct ucred who;
	gid_t groups[4] = {0};
	socklen_t length = sizeof who;
	CHECK((end = accepted(fds[0])) >= 0 && take(end, 64, &passed) == 10 && !memcmp(got, "beforefile", 10));
	CHECK(passed >= 0 && same_file(passed, fds[1]) && take(end, 64, &passed) == 4 && same_file(passed, fds[2]));
	CHECK(write(end, "answer", 6) == 6 && is(fds[2], "answer"));
	CHECK((end = accepted(fds[0])) >= 0 && recv(end, got, 2 * BIG, MSG_WAITALL) == BIG && !memcmp(got, big, BIG));
	CHECK(is(end, "") && write(end, "still", 5) == 5 && is(fds[3], "still"));
	CHECK((end = accepted(fds[0])) >= 0 && is(end, "") && is_named(end, 1, ""));
	CHECK((end = accepted(fds[0])) >= 0 && is_named(end, 1, own("gone")) && is(end, "dear") && is(end, ""));
	CHECK(!getsockopt(end, SOL_SOCKET, SO_PEERCRED, &who, &length));
	CHECK(who.pid == gone && who.uid == USER && who.gid == GROUP);
	length = sizeof groups;
	CHECK(!getsockopt(end, SOL_SOCKET, SO_PEERGROUPS, groups, &length) && length == 4 && groups[0] == OTHER);
	CHECK((end = accepted(fds[0])) >= 0 && is(end, "ab") && recv(end, got, 1, MSG_OOB) == 1 && *got == '!');
	CHECK(is(end, "cd") && failed(accept4(fds[0], NULL, NULL, 0), EAGAIN));
	CHECK((end = accepted(fds[5])) >= 0 && is(end, "one") && is(end, "") && take(end, 64, &passed) == 6);
	CHECK(same_file(passed, fds[5]) && write(end, "to six", 6) == 6 && is(fds[6], "to six"));
	CHECK((end = accepted(fds[5])) >= 0 && is_named(end, 1, "visitor") && recv(end, got, BIG, 0) == BIG && is(end, ""));
	return 1;
}

/* ---- the other end is gone ---- */

/* Names of peers that are closed, and what they have left behind: words, an error. */
static void parted_set(void)
{
	signal(SIGPIPE, SIG_IGN);
	int server = bound(SOCK_STREAM, own("server")), end;
	NEED(!listen(server, 9));
	fds[0] = bound(SOCK_STREAM, "client");
	NEED(!connect_to(fds[0], own("server")) && (end = accept(server, NULL, NULL)) >= 0);
	NEED(write(end, "bye", 3) == 3 && !close(end));
	end = bound(SOCK_STREAM, own("visitor"));
	NEED(!connect_to(end, own("server")) && (fds[1] = accept(server, NULL, NULL)) >= 0);
	NEED(write(fds[1], "lost", 4) == 4 && write(end, "data", 4) == 4 && !close(end));
	fds[2] = client_of(SOCK_STREAM, own("server"));
	NEED(!close(server));
	for (int i = 3; i < 5; i++) {
		int pair[2];
		NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && write(pair[0], "lost", 4) == 4);
		NEED((i == 3 || write(pair[1], "data", 4) == 4) && !close(pair[1]));
		fds[i] = pair[0];
	}
	/* Datagrams: to a name that is closed, that another has now; from half of a pair that had a name. */
	fds[5] = bound(SOCK_DGRAM, own("five"));
	end = bound(SOCK_DGRAM, own("taken"));
	NEED(!connect_to(fds[5], own("taken")) && !connect_to(end, own("five")) && write(end, "old", 3) == 3 && !close(end));
	fds[6] = bound(SOCK_DGRAM, own("taken"));
	int pair[2];
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) && dup2(pair[1], 40) == 40 && !close(pair[1]));
	struct sockaddr_un a;
	socklen_t length = address_of(&a, "partner");
	NEED(!bind(40, (void *)&a, length) && write(40, "last", 4) == 4 && !close(40) && !unlink("partner"));
	fds[7] = pair[0];
}

static int parted_check(void)
{
	CHECK(is_named(fds[0], 0, "client") && is_named(fds[0], 1, own("server")) && is(fds[0], "bye") && is(fds[0], ""));
	CHECK(is_named(fds[1], 0, own("server")) && is_named(fds[1], 1, own("visitor")) && is(fds[1], "data"));
	CHECK(failed(recv(fds[1], got, 1, MSG_DONTWAIT), ECONNRESET) && is(fds[1], "") && failed(write(fds[1], "x", 1), EPIPE));
	CHECK(is_named(fds[2], 1, own("server")) && failed(recv(fds[2], got, 1, MSG_DONTWAIT), ECONNRESET) && is(fds[2], ""));
	CHECK(failed(recv(fds[3], got, 1, MSG_DONTWAIT), ECONNRESET) && is(fds[3], ""));
	CHECK(failed(recv(fds[4], got, 1, MSG_DONTWAIT), ECONNRESET) && is(fds[4], "data") && is(fds[4], ""));
	CHECK_ALL(comes_from(fds[5], "old", own("taken")));
	CHECK(is_named(fds[5], 1, own("taken")) && failed(write(fds[5], "x", 1), ECONNREFUSED));
	CHECK(failed(write(fds[5], "x", 1), ENOTCONN) && !connect_to(fds[5], own("taken")) && write(fds[5], "new", 3) == 3);
	CHECK_ALL(comes_from(fds[6], "new", own("five")));
	CHECK(is_named(fds[7], 1, "partner"));
	CHECK_ALL(comes_from(fds[7], "last", "partner"));
	CHECK(failed(write(fds[7], "x", 1), ECONNREFUSED));
	return 1;
}

/* ---- datagrams from others than the peer ---- */

static void strangers_set(void)
{
	/* Named, nameless and closed ones in one queue, before it was connected, both ways. */
	fds[0] = bound(SOCK_DGRAM, own("box"));
	fds[1] = bound(SOCK_DGRAM, "friend");
	int nobody = socket(AF_UNIX, SOCK_DGRAM, 0), late = bound(SOCK_DGRAM, own("late"));
	NEED(send_to(nobody, "hey", own("box")) == 3 && send_to(fds[1], "ho", own("box")) == 2);
	NEED(send_to(late, "hum", own("box")) == 3 && !close(late) && send_to(nobody, "again", own("box")) == 5);
	NEED(!connect_to(fds[0], "friend") && !connect_to(fds[1], own("box")) && write(fds[1], "third", 5) == 5);
	NEED(!close(nobody));
	/* One of a pair that goes to somebody else: the other half is told of what is lost, or is not. */
	fds[2] = bound(SOCK_DGRAM, own("post"));
	for (int i = 3; i < 9; i += 2)
		NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, fds + i) && write(fds[i], "parting", 7) == 7);
	NEED(write(fds[4], "lost", 4) == 4 && !connect_to(fds[3], own("post")) && !connect_to(fds[5], own("post")));
	struct sockaddr none = {AF_UNSPEC, ""};
	NEED(!connect(fds[7], &none, sizeof none) && write(fds[8], "heard", 5) == 5);
	/* A chain of three, and one that is its own peer. */
	for (int i = 9; i < 12; i++)
		fds[i] = bound(SOCK_DGRAM, i == 9 ? "nine" : i == 10 ? "ten" : "eleven");
	NEED(!connect_to(fds[9], "ten") && write(fds[9], "link", 4) == 4 && !connect_to(fds[10], "eleven"));
	fds[12] = bound(SOCK_DGRAM, "self");
	NEED(!connect_to(fds[12], "self") && write(fds[12], "me", 2) == 2);
}

static int strangers_check(void)
{
	struct ucred who;
	socklen_t length = sizeof who;
	CHECK_ALL(comes_from(fds[0], "hey", NULL));
	CHECK_ALL(comes_from(fds[0], "ho", "friend"));
	CHECK_ALL(comes_from(fds[0], "hum", own("late")));
	CHECK_ALL(comes_from(fds[0], "again", NULL));
	CHECK_ALL(comes_from(fds[0], "third", "friend"));
	CHECK(failed(send_to(fds[2], "x", own("box")), EPERM) && is_named(fds[0], 1, "friend"));
	CHECK(!getsockopt(fds[0], SOL_SOCKET, SO_PEERCRED, &who, &length) && who.pid == 0 && who.uid == (uid_t)-1);
	CHECK(!getsockopt(fds[3], SOL_SOCKET, SO_PEERCRED, &who, &length) && who.pid == getpid());
	CHECK(failed(recv(fds[4], got, 1, MSG_DONTWAIT), ECONNRESET));
	for (int i = 4; i < 9; i += 2) {
		CHECK_ALL(comes_from(fds[i], "parting", NULL));
		CHECK(i == 8 || failed(write(fds[i], "x", 1), EPERM));
	}
	CHECK_ALL(comes_from(fds[7], "heard", NULL));
	CHECK(failed(write(fds[7], "x", 1), ENOTCONN) && write(fds[3], "on", 2) == 2 && write(fds[5], "on", 2) == 2);
	CHECK_ALL(comes_from(fds[2], "on", NULL));
	CHECK_ALL(comes_from(fds[10], "link", "nine"));
	CHECK(failed(write(fds[9], "x", 1), EPERM) && write(fds[10], "y", 1) == 1);
	CHECK_ALL(comes_from(fds[11], "y", "ten"));
	CHECK_ALL(comes_from(fds[12], "me", "self"));
	CHECK(write(fds[12], "I", 1) == 1);
	CHECK_ALL(comes_from(fds[12], "I", "self"));
	return 1;
}

/* ---- out-of-band bytes ---- */

enum { BETWEEN, FIRST, ALONE, INLINE, WAS, WAS_FIRST, TWO, AFTER_FILE, CASES };

static int at_mark(int fd)
{
	int answer = -1;
	return ioctl(fd, SIOCATMARK, &answer) ? -1 : answer;
}

static void urgent_set(void)
{
	int on = 1, pair[2];
	for (int i = 0; i < CASES; i++) {
		NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
		fds[i] = pair[0];
		fds[10 + i] = pair[1];
		NEED(i != INLINE || !setsockopt(pair[0], SOL_SOCKET, SO_OOBINLINE, &on, sizeof on));
		if (i == BETWEEN || i == INLINE || i == WAS || i == TWO)
			NEED(write(pair[1], "ab", 2) == 2);
		if (i == AFTER_FILE)
			NEED(post(pair[1], "ab", pair[1]) == 2);
		if (send(pair[1], "!", 1, MSG_OOB) != 1)
			cannot_run("no out-of-band bytes in unix sockets");
		if (i != ALONE)
			NEED(write(pair[1], "cd", 2) == 2);
		NEED((i != WAS && i != WAS_FIRST) || recv(pair[0], got, 1, MSG_OOB) == 1);
		NEED(i != TWO || (send(pair[1], "?", 1, MSG_OOB) == 1 && write(pair[1], "ef", 2) == 2));
	}
}

/* How far reads go, and whether the mark is there afterwards, is that of this kernel: the two that matter are told apart. */
static int urgent_check(void)
{
	for (int i = 0; i < CASES; i++) {
		struct pollfd ask = {fds[i], POLLPRI | POLLIN, 0};
		CHECK(poll(&ask, 1, 0) == 1 && !(ask.revents & POLLPRI) == (i == WAS || i == WAS_FIRST));
		if (i != FIRST && i != ALONE && i != WAS_FIRST)
			CHECK(at_mark(fds[i]) == 0 && is(fds[i], i == TWO ? "ab!cd" : "ab"));
		CHECK(at_mark(fds[i]) == 1);
		if (i == INLINE)
			CHECK(failed(recv(fds[i], got, 1, MSG_OOB), EINVAL) && is(fds[i], "!cd"));
		else if (i == WAS || i == WAS_FIRST)
			CHECK(failed(recv(fds[i], got, 1, MSG_OOB), EINVAL));
		else
			CHECK(recv(fds[i], got, 1, MSG_OOB) == 1 && *got == (i == TWO ? '?' : '!'));
		CHECK(i == ALONE || i == INLINE || is(fds[i], i == TWO ? "ef" : "cd"));
		CHECK(write(fds[10 + i], "more", 4) == 4 && is(fds[i], "more"));
	}
	return 1;
}

/* ---- credentials ---- */

static void signed_set(void)
{
	int on = 1, off = 0;
	/* Asked for late; asked for and not any more; between both; by somebody with other ids who has ended. */
	for (int i = 0; i < 8; i += 2)
		NEED(!socketpair(AF_UNIX, i == 6 ? SOCK_DGRAM : SOCK_STREAM, 0, fds + i));
	NEED(write(fds[1], "none", 4) == 4 && !setsockopt(fds[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	NEED(!setsockopt(fds[2], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) && write(fds[3], "some", 4) == 4);
	NEED(!setsockopt(fds[2], SOL_SOCKET, SO_PASSCRED, &off, sizeof off));
	NEED(write(fds[5], "none", 4) == 4 && !setsockopt(fds[4], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	NEED(write(fds[5], "some", 4) == 4 && !setsockopt(fds[6], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	gone = fork();
	if (!gone)
		_exit(setgid(GROUP) || setuid(USER) || write(fds[7], "gone", 4) != 4);
	int status = -1;
	NEED(gone > 0 && waitpid(gone, &status, 0) == gone && status == 0);
}

/* The next message is `text`, by that process and user. */
static int is_by(int fd, const char *text, pid_t pid, uid_t uid)
{
	struct ucred who = {-1, 0, 0};
	char control[256] = "";
	struct iovec io = {got, sizeof got};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	CHECK(recvmsg(fd, &m, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(got, text, strlen(text)));
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	CHECK(c && c->cmsg_type == SCM_CREDENTIALS);
	memcpy(&who, CMSG_DATA(c), sizeof who);
	CHECK(who.pid == pid && who.uid == uid);
	return 1;
}

static int signed_check(void)
{
	int on = 1;
	CHECK_ALL(is_by(fds[0], "none", 0, 65534));
	CHECK(!setsockopt(fds[2], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
	CHECK_ALL(is_by(fds[2], "some", getpid(), 0));
	CHECK_ALL(is_by(fds[4], "none", 0, 65534));
	CHECK_ALL(is_by(fds[4], "some", getpid(), 0));
	CHECK_ALL(is_by(fds[6], "gone", gone, USER));
	return 1;
}

/* ---- sockets in queues ---- */

static ssize_t post_many(int fd, const char *text, const int *passed, size_t count)
{
	char control[CMSG_SPACE(8 * sizeof(int))] = "";
	struct iovec io = {(void *)text, strlen(text)};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control,
		.msg_controllen = CMSG_SPACE(count * sizeof(int))};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(count * sizeof(int));
	memcpy(CMSG_DATA(c), passed, count * sizeof(int));
	return sendmsg(fd, &m, 0);
}

static ssize_t take_many(int fd, int *passed, size_t count)
{
	char control[CMSG_SPACE(8 * sizeof(int))] = "";
	struct iovec io = {got, 64};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t bytes = recvmsg(fd, &m, MSG_DONTWAIT);
	struct cmsghdr *c = bytes < 0 ? NULL : CMSG_FIRSTHDR(&m);
	if (!c || c->cmsg_len != CMSG_LEN(count * sizeof(int)))
		return -1;
	memcpy(passed, CMSG_DATA(c), count * sizeof(int));
	return bytes;
}

/* A stream's both ends in each other's queues; a pair that only a queue has, with words in it; a listening socket with a
 * client, both only in a queue; and one of a pair that is in the queue of a socket that is in its own. */
static void circles_set(void)
{
	int pair[2], ring[4];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds) && post_many(fds[1], "both", fds, 2) == 4);
	NEED(post_many(fds[0], "again", (int[]){fds[1], fds[0], fds[1]}, 3) == 5);
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) && write(pair[0], "inside", 6) == 6);
	NEED(post_many(fds[1], "pair", pair, 2) == 4 && !close(pair[0]) && !close(pair[1]));
	ring[0] = bound(SOCK_STREAM, own("queued"));
	NEED(!listen(ring[0], 3) && (ring[1] = client_of(SOCK_STREAM, own("queued"))) >= 0);
	NEED(post(ring[1], "mine", ring[0]) == 4 && post_many(fds[1], "server", ring, 2) == 6);
	NEED(!close(ring[0]) && !close(ring[1]));
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, ring) && !socketpair(AF_UNIX, SOCK_STREAM, 0, ring + 2));
	NEED(post(ring[0], "third", ring[3]) == 5 && post(ring[2], "first", ring[1]) == 5);
	NEED(post(fds[1], "key", ring[2]) == 3 && !close(ring[2]) && !close(ring[3]));
	fds[2] = ring[0];
	fds[3] = ring[1];
}

static int circles_check(void)
{
	int passed[3], inner, one;
	CHECK(take_many(fds[0], passed, 2) == 4 && same_file(passed[0], fds[0]) && same_file(passed[1], fds[1]));
	CHECK(take_many(fds[1], passed, 3) == 5 && same_file(passed[0], fds[1]) && same_file(passed[1], fds[0]));
	CHECK(take_many(fds[0], passed, 2) == 4 && is(passed[1], "inside") && write(passed[1], "x", 1) == 1);
	CHECK(is(passed[0], "x") && take_many(fds[0], passed, 2) == 6 && (inner = accepted(passed[0])) >= 0);
	CHECK(take(inner, 64, &one) == 4 && same_file(one, passed[0]) && write(inner, "y", 1) == 1 && is(passed[1], "y"));
	CHECK(take(fds[0], 64, &one) == 3 && take(fds[3], 64, &inner) == 5 && write(one, "z", 1) == 1);
	CHECK(take(inner, 64, passed) == 5 && same_file(passed[0], fds[3]) && is(inner, "z"));
	return 1;
}

WORKLOAD(
	{"early", early_set, early_check, harm},
	{"parted", parted_set, parted_check, harm},
	{"strangers", strangers_set, strangers_check, harm},
	{"urgent", urgent_set, urgent_check, harm},
	{"signed", signed_set, signed_check, harm},
	{"circles", circles_set, circles_check, harm},
)
