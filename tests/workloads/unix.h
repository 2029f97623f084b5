/* Unix sockets in workloads: names, messages with a descriptor. */
#ifndef UNIX_H
#define UNIX_H

#include "workload.h"

#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

static int fds[24];
static char got[1 << 20];

MAYBE socklen_t address_of(struct sockaddr_un *a, const char *name)
{
	memset(a, 0, sizeof *a);
	a->sun_family = AF_UNIX;
	socklen_t length = (socklen_t)strlen(name);
	memcpy(a->sun_path, name, length);
	if (name[0] == '@')
		a->sun_path[0] = 0;
	return (socklen_t)offsetof(struct sockaddr_un, sun_path) + length + (name[0] != '@');
}

MAYBE int bound(int type, const char *name)
{
	struct sockaddr_un a;
	int fd = socket(AF_UNIX, type, 0);
	socklen_t length = address_of(&a, name);
	NEED(fd >= 0 && !bind(fd, (void *)&a, length));
	return fd;
}

MAYBE int connect_to(int fd, const char *name)
{
	struct sockaddr_un a;
	socklen_t length = address_of(&a, name);
	return connect(fd, (void *)&a, length);
}

/* Whether getsockname (or getpeername) says `name`. */
MAYBE int is_named(int fd, int peer, const char *name)
{
	struct sockaddr_un a, b;
	socklen_t length = sizeof a, wanted = *name ? address_of(&b, name) : sizeof(sa_family_t);
	memset(&a, 0, sizeof a);
	if (peer ? getpeername(fd, (void *)&a, &length) : getsockname(fd, (void *)&a, &length))
		return 0;
	return length == wanted && (!*name || !memcmp(&a, &b, length));
}

MAYBE ssize_t post(int fd, const char *text, int passed)
{
	char control[CMSG_SPACE(sizeof(int))] = "";
	struct iovec io = {(void *)text, strlen(text)};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &passed, sizeof passed);
	return sendmsg(fd, &m, 0);
}

/* Receives a message into `got`; the descriptor that came with it, or -1, goes to `passed`. */
MAYBE ssize_t take(int fd, size_t most, int *passed)
{
	char control[CMSG_SPACE(sizeof(int)) * 4] = "";
	struct iovec io = {got, most};
	struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t bytes = recvmsg(fd, &m, MSG_DONTWAIT);
	struct cmsghdr *c = bytes < 0 ? NULL : CMSG_FIRSTHDR(&m);
	*passed = -1;
	if (c)
		memcpy(passed, CMSG_DATA(c), sizeof *passed);
	return bytes;
}

MAYBE int nothing_left(int fd)
{
	return recv(fd, got, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN;
}

#endif
