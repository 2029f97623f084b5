/*
 * Internet sockets that take nothing from an ordinary sender, and connections that have ended or never were: filters,
 * bound devices and limits of the way that came after the data; what waits with its hops and kind; the device for
 * groups; segment sizes.
 */
#include "inet.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>

#ifndef IP_TRANSPARENT
#define IP_TRANSPARENT 19
#endif
#ifndef IP_MINTTL
#define IP_MINTTL 21
#endif

enum { PLAIN, HOPS, FILTER, DEVICE, KINDS };
static int near[KINDS], far[KINDS], fds[4];
static in_port_t ports[4];
static int sizes[4];
static char got[4096];

static struct sockaddr_in at(in_port_t port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = port, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	return a;
}

static in_port_t port_of(int fd)
{
	struct sockaddr_in a = at(0);
	socklen_t length = sizeof a;
	return getsockname(fd, (struct sockaddr *)&a, &length) ? 0 : a.sin_port;
}

static int bound(int type, in_port_t port)
{
	struct sockaddr_in a = at(port);
	int fd = socket(AF_INET, type, 0);
	NEED(fd >= 0);
	if (!bind(fd, (struct sockaddr *)&a, sizeof a))
		return fd;
	close(fd);
	return -1;
}

static int call(int fd, in_port_t port)
{
	struct sockaddr_in a = at(port);
	return connect(fd, (struct sockaddr *)&a, sizeof a);
}

/* A connection of `client`, which is new, to a server that is in no state to listen any more. */
static int served(int client, void (*prepare)(int))
{
	int listening = bound(SOCK_STREAM, 0);
	prepare(listening);
	NEED(!listen(listening, 1) && !call(client, port_of(listening)));
	int fd = accept(listening, NULL, NULL);
	NEED(fd >= 0);
	close(listening);
	return fd;
}

static void nothing(int fd)
{
	(void)fd;
}

static void demand_hops(int fd)
{
	set_number(fd, IPPROTO_IP, IP_TTL, 255);
	set_number(fd, IPPROTO_IP, IP_MINTTL, 255);
}

/* From now on it takes nothing. */
static void close_ears(int fd)
{
	struct sock_filter none = {BPF_RET | BPF_K, 0, 0, 0};
	struct sock_fprog program = {1, &none};
	NEED(!setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
}

static void open_ears(int fd)
{
	setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &fd, sizeof fd);
}

static void bind_device(int fd)
{
	NEED(!setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 2));
}

static void pairs_set(void)
{
	for (int i = 0; i < KINDS; i++) {
		near[i] = socket(AF_INET, SOCK_STREAM, 0);
		if (i == HOPS)
			demand_hops(near[i]);
		if (i == DEVICE)
			bind_device(near[i]);
		far[i] = served(near[i], i == HOPS ? demand_hops : nothing);
		NEED(write(far[i], "left", 4) == 4 && !shutdown(far[i], SHUT_WR) && in_state(near[i], TCP_CLOSE_WAIT));
		NEED(in_state(far[i], TCP_FIN_WAIT2));
	}
}

/* Half closed: the one FIN is there, the other still to come. */
static void half_set(void)
{
	pairs_set();
	close_ears(near[FILTER]);
	close_ears(far[FILTER]);
	set_number(near[PLAIN], IPPROTO_TCP, TCP_WINDOW_CLAMP, 9000);
}

static int half_check(void)
{
	open_ears(near[FILTER]);
	open_ears(far[FILTER]);
	CHECK(number(near[PLAIN], IPPROTO_TCP, TCP_WINDOW_CLAMP) == 9000);
	CHECK(number(near[HOPS], IPPROTO_IP, IP_MINTTL) == 255);
	socklen_t length = sizeof got;
	CHECK(!getsockopt(near[DEVICE], SOL_SOCKET, SO_BINDTODEVICE, got, &length) && !strcmp(got, "lo"));
	for (int i = 0; i < KINDS; i++) {
		CHECK(state(near[i]) == TCP_CLOSE_WAIT && state(far[i]) == TCP_FIN_WAIT2);
		CHECK(read(near[i], got, 64) == 4 && !memcmp(got, "left", 4) && read(near[i], got, 64) == 0);
		CHECK(write(near[i], "still", 5) == 5 && recv(far[i], got, 5, MSG_WAITALL) == 5);
	}
	return 1;
}

static void half_harm(void)
{
	shutdown(near[HOPS], SHUT_WR);
}

/* Over, but not all was read. */
static void over_set(void)
{
	pairs_set();
	for (int i = 0; i < KINDS; i++)
		NEED(!shutdown(near[i], SHUT_WR) && in_state(near[i], TCP_CLOSE));
	close_ears(near[FILTER]);
}

static int over_check(void)
{
	struct sock_filter code[4];
	socklen_t length = 4;
	CHECK(!getsockopt(near[FILTER], SOL_SOCKET, SO_GET_FILTER, code, &length) && length == 1);
	for (int i = 0; i < KINDS; i++) {
		CHECK(state(near[i]) == TCP_CLOSE && read(near[i], got, 64) == 4 && !memcmp(got, "left", 4));
		CHECK(read(near[i], got, 64) == 0 && send(near[i], "no", 2, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	}
	return 1;
}

static void over_harm(void)
{
	read(near[DEVICE], got, 64);
}

/* 0: refused, and told so. 1: bound to its port, and reset. 2: bound, and shut before it was anything. */
static void ended_set(void)
{
	struct linger now = {1, 0};
	int closed = bound(SOCK_STREAM, 0);
	fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	NEED(call(fds[0], port_of(closed)) == -1 && errno == EINPROGRESS && in_state(fds[0], TCP_CLOSE));
	NEED(number(fds[0], SOL_SOCKET, SO_ERROR) == ECONNREFUSED);
	for (int i = 1; i < 3; i++) {
		/* A port that was asked for stays; and only of such a one the kernel tells that it is still there. */
		fds[i] = bound(SOCK_STREAM, 0);
		ports[i] = port_of(fds[i]);
		close(fds[i]);
		fds[i] = bound(SOCK_STREAM, ports[i]);
		NEED(fds[i] >= 0);
	}
	fds[3] = served(fds[1], nothing);
	NEED(!setsockopt(fds[3], SOL_SOCKET, SO_LINGER, &now, sizeof now) && !close(fds[3]));
	NEED(in_state(fds[1], TCP_CLOSE) && number(fds[1], SOL_SOCKET, SO_ERROR) == ECONNRESET);
	NEED(shutdown(fds[2], SHUT_RD) == -1 && errno == ENOTCONN);
	close(closed);
}

static int ended_check(void)
{
	int listening = bound(SOCK_STREAM, 0);
	struct pollfd ready = {fds[0], POLLOUT, 0};
	CHECK(!listen(listening, 1) && fcntl(fds[0], F_GETFL) & O_NONBLOCK);
	/* The kernel has the first call tell once more that it was refused. */
	CHECK(call(fds[0], port_of(listening)) == -1 && (errno == ECONNABORTED || errno == EINPROGRESS));
	if (errno == ECONNABORTED)
		CHECK(call(fds[0], port_of(listening)) == -1 && errno == EINPROGRESS);
	CHECK(poll(&ready, 1, 5000) == 1 && write(fds[0], "yes", 3) == 3);
	for (int i = 1; i < 3; i++)
		CHECK(port_of(fds[i]) == ports[i] && bound(SOCK_STREAM, ports[i]) == -1 && errno == EADDRINUSE);
	CHECK(read(fds[1], got, 64) == 0);
	CHECK(!listen(fds[2], 1) && port_of(fds[2]) == ports[2]);
	return 1;
}

static void ended_harm(void)
{
	close(fds[1]);
}

/* Datagrams that say how they came, before a filter that would not let them in. */
static void queue_set(void)
{
	for (int i = 0; i < 2; i++)
		fds[i] = bound(SOCK_DGRAM, 0);
	set_number(fds[0], IPPROTO_IP, IP_RECVTTL, 1);
	set_number(fds[0], IPPROTO_IP, IP_RECVTOS, 1);
	set_number(fds[1], IPPROTO_IP, IP_TTL, 77);
	set_number(fds[1], IPPROTO_IP, IP_TOS, 0x28);
	NEED(!call(fds[1], port_of(fds[0])) && write(fds[1], "how", 3) == 3);
	close_ears(fds[0]);
	set_number(fds[0], SOL_SOCKET, SO_LOCK_FILTER, 1);
}

static int queue_check(void)
{
	char control[256];
	struct iovec part = {got, sizeof got};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	int hops = 0, kind = 0;
	CHECK(write(fds[1], "never", 5) == 5);
	CHECK(recvmsg(fds[0], &message, MSG_DONTWAIT) == 3 && !memcmp(got, "how", 3));
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL)
			hops = *(int *)(void *)CMSG_DATA(c);
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS)
			kind = *CMSG_DATA(c);
	}
	CHECK(hops == 77 && kind == 0x28);
	CHECK(recv(fds[0], got, 64, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	CHECK(setsockopt(fds[0], SOL_SOCKET, SO_DETACH_FILTER, &hops, sizeof hops) == -1 && errno == EPERM);
	return 1;
}

static void queue_harm(void)
{
	recv(fds[0], got, 64, 0);
}

/* Sends to groups through a device that only its index names. */
static void outgoing_set(void)
{
	struct ip_mreqn lo = {.imr_ifindex = (int)if_nametoindex("lo")};
	struct sockaddr_in any = {.sin_family = AF_INET};
	for (int i = 0; i < 2; i++) {
		fds[i] = socket(AF_INET, SOCK_DGRAM, 0);
		NEED(!bind(fds[i], (struct sockaddr *)&any, sizeof any));
	}
	NEED(!setsockopt(fds[0], IPPROTO_IP, IP_MULTICAST_IF, &lo, sizeof lo));
	lo.imr_multiaddr.s_addr = inet_addr("239.7.7.9");
	NEED(!setsockopt(fds[1], IPPROTO_IP, IP_ADD_MEMBERSHIP, &lo, sizeof lo));
}

static int outgoing_check(void)
{
	struct sockaddr_in group = at(port_of(fds[1]));
	struct pollfd ready = {fds[1], POLLIN, 0};
	group.sin_addr.s_addr = inet_addr("239.7.7.9");
	CHECK(sendto(fds[0], "all", 3, 0, (struct sockaddr *)&group, sizeof group) == 3);
	CHECK(poll(&ready, 1, 5000) == 1 && recv(fds[1], got, 64, MSG_DONTWAIT) == 3 && !memcmp(got, "all", 3));
	CHECK(number(fds[0], IPPROTO_IP, IP_MULTICAST_TTL) == 1 && number(fds[0], IPPROTO_IP, IP_MULTICAST_LOOP) == 1);
	CHECK(number(fds[0], IPPROTO_IP, IP_TRANSPARENT) == 0);
	return 1;
}

static void outgoing_harm(void)
{
	set_number(fds[0], IPPROTO_IP, IP_MULTICAST_LOOP, 0);
}

/* A connection over IPv6: fds[2] and fds[3]. */
static void connect_six(void)
{
	struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	socklen_t length = sizeof a;
	int listening = socket(AF_INET6, SOCK_STREAM, 0);
	if (listening < 0 || bind(listening, (struct sockaddr *)&a, sizeof a))
		cannot_run("no IPv6 here");
	NEED(!listen(listening, 1) && !getsockname(listening, (struct sockaddr *)&a, &length));
	fds[2] = socket(AF_INET6, SOCK_STREAM, 0);
	NEED(!connect(fds[2], (struct sockaddr *)&a, sizeof a));
	fds[3] = accept(listening, NULL, NULL);
	NEED(fds[3] >= 0);
	close(listening);
}

static int exchange(int rounds)
{
	for (int i = 0; i < 4 * rounds; i++) {
		int from = i % 4, to = from ^ 1;
		if (write(fds[from], got, sizeof got) != sizeof got || recv(fds[to], got, sizeof got, MSG_WAITALL) < 1)
			return 0;
	}
	return 1;
}

/* What is sent goes in segments as large as before. */
static void segments_set(void)
{
	fds[0] = socket(AF_INET, SOCK_STREAM, 0);
	fds[1] = served(fds[0], nothing);
	connect_six();
	NEED(exchange(20));
	for (int i = 0; i < 4; i++)
		sizes[i] = number(fds[i], IPPROTO_TCP, TCP_MAXSEG);
}

static int segments_check(void)
{
	CHECK(exchange(1));
	for (int i = 0; i < 4; i++)
		CHECK(number(fds[i], IPPROTO_TCP, TCP_MAXSEG) >= sizes[i]);
	return 1;
}

static void segments_harm(void)
{
	sizes[1] = 1 << 17;
}

WORKLOAD({"half", half_set, half_check, half_harm}, {"over", over_set, over_check, over_harm},
	 {"ended", ended_set, ended_check, ended_harm}, {"queue", queue_set, queue_check, queue_harm},
	 {"outgoing", outgoing_set, outgoing_check, outgoing_harm},
	 {"segments", segments_set, segments_check, segments_harm})
