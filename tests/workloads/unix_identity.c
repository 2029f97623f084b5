/* Unix sockets: who made a connection (SO_PEERCRED), and who sent what waits: by credentials and by name. */
#include "workload.h"

#include <grp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/fsuid.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

enum { USER = 4321, GROUP = 5432, OTHER = 6543 };

static int fds[16];
static pid_t gone;
static struct sockaddr_un place, sender;
static char got[256];

static socklen_t name_it(struct sockaddr_un *a, const char *what)
{
	*a = (struct sockaddr_un){.sun_family = AF_UNIX};
	int length = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "firn-%s-%d", what, getpid());
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

/* What the kernel says of the peer is that process, user and group, with one more group or none. */
static int told(int fd, pid_t pid, uid_t uid, gid_t gid)
{
	struct ucred who = {0, 0, 0};
	socklen_t length = sizeof who;
	CHECK(!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length));
	snprintf(got, sizeof got, "descriptor %d: %d %d %d, not %d %d %d", fd, who.pid, who.uid, who.gid, pid, uid, gid);
	if (who.pid != pid || who.uid != uid || who.gid != gid)
		return wrong(__FILE__, __LINE__, got);
	return 1;
}

static int server(const char *what, struct sockaddr_un *a, socklen_t *length)
{
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	*length = name_it(a, what);
	NEED(fd >= 0 && !bind(fd, (void *)a, *length) && !listen(fd, 4));
	return fd;
}

static void peers_set(void)
{
	struct sockaddr_un a;
	socklen_t length;
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds));
	fds[2] = server("peers", &a, &length);
	fds[3] = socket(AF_UNIX, SOCK_STREAM, 0);
	fds[4] = socket(AF_UNIX, SOCK_STREAM, 0);
	/* One connection by another user, who has a group more; one that waits. */
	gid_t more = OTHER;
	NEED(!setgroups(1, &more) && !setegid(GROUP) && !seteuid(USER));
	NEED(!connect(fds[3], (void *)&a, length));
	NEED(!seteuid(0) && !setegid(0) && !setgroups(0, NULL));
	NEED(!connect(fds[4], (void *)&a, length));
	fds[5] = accept(fds[2], NULL, NULL);
	NEED(fds[5] >= 0);
	/* A pair that somebody made who is gone, and who had our descriptors. */
	gone = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (!gone) {
		int two[2];
		_exit(setegid(GROUP) || seteuid(USER) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, two) || two[1] != two[0] + 1);
	}
	int status = -1;
	NEED(gone > 0 && waitpid(gone, &status, 0) == gone && status == 0);
	fds[6] = fds[5] + 1;
	fds[7] = fds[5] + 2;
}

static int peers_check(void)
{
	gid_t groups[4] = {0};
	socklen_t length = sizeof groups;
	CHECK_ALL(told(fds[0], getpid(), 0, 0));
	CHECK_ALL(told(fds[1], getpid(), 0, 0));
	CHECK_ALL(told(fds[3], getpid(), 0, 0));
	CHECK_ALL(told(fds[5], getpid(), USER, GROUP));
	CHECK(!getsockopt(fds[5], SOL_SOCKET, SO_PEERGROUPS, groups, &length) && length == 4 && groups[0] == OTHER);
	CHECK_ALL(told(fds[6], gone, USER, GROUP));
	CHECK_ALL(told(fds[7], gone, USER, GROUP));
	CHECK(write(fds[6], "x", 1) == 1 && read(fds[7], got, 8) == 1 && write(fds[3], "y", 1) == 1);
	CHECK(read(fds[5], got, 8) == 1 && write(fds[4], "z", 1) == 1);
	int late = accept(fds[2], NULL, NULL);
	CHECK(late >= 0 && read(late, got, 8) == 1);
	CHECK_ALL(told(late, getpid(), 0, 0));
	/* Who connects now is told of us, who listen. */
	struct sockaddr_un a;
	length = name_it(&a, "peers");
	int client = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(!connect(client, (void *)&a, length));
	CHECK_ALL(told(client, getpid(), 0, 0));
	return 1;
}

static void peers_harm(void)
{
	close(fds[5]);
	fds[5] = fds[0];
}

/* ---- what waits ---- */

static ssize_t post(int fd, const char *text, uid_t uid)
{
	struct ucred who = {getpid(), uid, GROUP};
	char control[CMSG_SPACE(sizeof who)] = "";
	struct iovec io = {(void *)text, strlen(text)};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_CREDENTIALS, c->cmsg_len = CMSG_LEN(sizeof who);
	memcpy(CMSG_DATA(c), &who, sizeof who);
	return sendmsg(fd, &m, 0);
}

/* The next message is `text`, by `uid`; with `from` by the socket of that name. */
static int takes(int fd, const char *text, uid_t uid, struct sockaddr_un *from, socklen_t length)
{
	struct sockaddr_un a;
	char control[128];
	struct iovec io = {got, sizeof got};
	struct msghdr m = {&a, sizeof a, &io, 1, control, sizeof control, 0};
	CHECK(recvmsg(fd, &m, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(got, text, strlen(text)));
	if (from)
		CHECK(m.msg_namelen == length && !memcmp(&a, from, length));
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	if (uid) {
		struct ucred who;
		CHECK(c && c->cmsg_type == SCM_CREDENTIALS);
		memcpy(&who, CMSG_DATA(c), sizeof who);
		CHECK(who.pid == getpid() && who.uid == uid && who.gid == GROUP);
	} else
		CHECK(!c);
	return 1;
}

static socklen_t place_length, sender_length;

static void letters_set(void)
{
	int on = 1;
	for (int i = 0; i < 4; i += 2) {
		NEED(!socketpair(AF_UNIX, i ? SOCK_DGRAM : SOCK_STREAM, 0, fds + i));
		NEED(!setsockopt(fds[i + 1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
		NEED(post(fds[i], "one", USER) == 3 && post(fds[i], "two", OTHER) == 3 && post(fds[i], "three", OTHER) == 5);
	}
	/* Letters from two with a name, one of whom is gone. */
	place_length = name_it(&place, "place");
	sender_length = name_it(&sender, "sender");
	for (int i = 4; i < 7; i++)
		NEED((fds[i] = socket(AF_UNIX, SOCK_DGRAM, 0)) >= 0);
	struct sockaddr_un other;
	socklen_t length = name_it(&other, "other");
	NEED(!bind(fds[4], (void *)&place, place_length) && !bind(fds[5], (void *)&sender, sender_length));
	NEED(!bind(fds[6], (void *)&other, length));
	NEED(sendto(fds[5], "dear", 4, 0, (void *)&place, place_length) == 4);
	NEED(sendto(fds[6], "friend", 6, 0, (void *)&place, place_length) == 6);
	close(fds[6]);
	int offset = 2;
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds + 7) && write(fds[7], "stay", 4) == 4);
	NEED(!setsockopt(fds[8], SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset));
}

static int letters_check(void)
{
	CHECK_ALL(takes(fds[1], "one", USER, NULL, 0));
	CHECK_ALL(takes(fds[1], "twothree", OTHER, NULL, 0));
	CHECK_ALL(takes(fds[3], "one", USER, NULL, 0));
	CHECK_ALL(takes(fds[3], "two", OTHER, NULL, 0));
	CHECK_ALL(takes(fds[3], "three", OTHER, NULL, 0));
	struct sockaddr_un other;
	socklen_t length = name_it(&other, "other");
	CHECK_ALL(takes(fds[4], "dear", 0, &sender, sender_length));
	CHECK_ALL(takes(fds[4], "friend", 0, &other, length));
	CHECK(recv(fds[8], got, 8, MSG_PEEK | MSG_DONTWAIT) == 2 && !memcmp(got, "ay", 2));
	return 1;
}

static void letters_harm(void)
{
	recv(fds[3], got, 8, 0);
}

/* Names that are relative: of a removed file whose name is another's now, of a sender. And a seqpacket socket with a
 * name and without a peer. */
static void relative_set(void)
{
	struct sockaddr_un name = {AF_UNIX, "same"}, letter = {AF_UNIX, "letter"}, lone = {AF_UNIX, "lone"};
	for (int i = 0; i < 4; i++)
		NEED((fds[i] = socket(AF_UNIX, i == 3 ? SOCK_SEQPACKET : SOCK_DGRAM, 0)) >= 0);
	NEED(!bind(fds[2], (void *)&letter, sizeof letter) && !bind(fds[3], (void *)&lone, sizeof lone));
	for (int i = 0; i < 2; i++) {
		NEED(!bind(fds[i], (void *)&name, sizeof name));
		NEED(sendto(fds[2], i ? "new" : "old", 3, 0, (void *)&name, sizeof name) == 3);
		NEED(i || !unlink("same"));
	}
}

static int relative_check(void)
{
	struct sockaddr_un letter = {AF_UNIX, "letter"};
	socklen_t length = sizeof letter.sun_family + sizeof "letter"; /* the kernel cuts what comes after the name */
	CHECK_ALL(takes(fds[0], "old", 0, &letter, length));
	CHECK_ALL(takes(fds[1], "new", 0, &letter, length));
	CHECK(!listen(fds[3], 1));
	return 1;
}

static void relative_harm(void)
{
	recv(fds[0], got, 8, 0);
}

WORKLOAD({"peers", peers_set, peers_check, peers_harm}, {"letters", letters_set, letters_check, letters_harm},
	{"relative", relative_set, relative_check, relative_harm})
