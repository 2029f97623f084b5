/* Internet sockets without connections: listening, bound and fresh ones, datagrams that wait, options, groups. */
#include "inet.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <poll.h>

#ifndef IPPROTO_UDPLITE
#define IPPROTO_UDPLITE 136
#endif

static int fds[16];
static uint16_t ports[16];
static char got[70000], expected[65504];

union address {
	struct sockaddr any;
	struct sockaddr_in four;
	struct sockaddr_in6 six;
};

static socklen_t address_of(union address *a, const char *text, uint16_t port)
{
	memset(a, 0, sizeof *a);
	a->any.sa_family = strchr(text, ':') ? AF_INET6 : AF_INET;
	if (a->any.sa_family == AF_INET6) {
		a->six.sin6_port = htons(port);
		NEED(inet_pton(AF_INET6, text, &a->six.sin6_addr) == 1);
		return sizeof a->six;
	}
	a->four.sin_port = htons(port);
	NEED(inet_pton(AF_INET, text, &a->four.sin_addr) == 1);
	return sizeof a->four;
}

static int make(int i, int family, int type, int protocol)
{
	fds[i] = socket(family, type, protocol);
	if (fds[i] < 0 && (errno == EAFNOSUPPORT || errno == EPROTONOSUPPORT))
		cannot_run("no such sockets here");
	NEED(fds[i] >= 0);
	return fds[i];
}

static void bind_to(int i, const char *text, uint16_t port)
{
	union address a;
	socklen_t length = address_of(&a, text, port);
	NEED(!bind(fds[i], &a.any, length) && !getsockname(fds[i], &a.any, &length));
	ports[i] = ntohs(a.four.sin_port);
}

static int connect_to(int fd, const char *text, uint16_t port)
{
	union address a;
	socklen_t length = address_of(&a, text, port);
	return connect(fd, &a.any, length);
}

static int is_at(int i, const char *text)
{
	union address a, b;
	socklen_t length = sizeof a, wanted = address_of(&b, text, ports[i]);
	return !getsockname(fds[i], &a.any, &length) && length == wanted && !memcmp(&a, &b, length);
}

/* A client gets through to listening socket `i`, and is accepted. */
static int answers(int i, const char *text)
{
	int client = socket(strchr(text, ':') ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	struct linger now = {1, 0};
	CHECK(client >= 0 && !connect_to(client, text, ports[i]));
	struct pollfd ready = {fds[i], POLLIN, 0};
	CHECK(poll(&ready, 1, 5000) == 1);
	int served = accept(fds[i], NULL, NULL);
	CHECK(served >= 0 && write(client, "ping", 4) == 4 && read(served, got, 64) == 4 && !memcmp(got, "ping", 4));
	/* Without TIME-WAIT, which would go on without us. */
	setsockopt(client, SOL_SOCKET, SO_LINGER, &now, sizeof now);
	close(client);
	close(served);
	return 1;
}

static void listen_set(void)
{
	make(0, AF_INET, SOCK_STREAM, 0);
	bind_to(0, "127.0.0.1", 0);
	NEED(!listen(fds[0], 7));
	make(1, AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	set_number(fds[1], IPPROTO_IPV6, IPV6_V6ONLY, 1);
	set_number(fds[1], SOL_SOCKET, SO_REUSEADDR, 1);
	bind_to(1, "::", 0);
	NEED(!listen(fds[1], 3));
	make(2, AF_INET6, SOCK_STREAM, 0);
	bind_to(2, "::", 0);
	NEED(!listen(fds[2], 100));
	/* Two that share a port, and one that only has an IPv4 address of the port that 1 has. */
	for (int i = 3; i < 5; i++) {
		make(i, AF_INET, SOCK_STREAM, 0);
		set_number(fds[i], SOL_SOCKET, SO_REUSEPORT, 1);
		bind_to(i, "127.0.0.1", i == 3 ? 0 : ports[3]);
		NEED(!listen(fds[i], 2));
	}
	make(5, AF_INET, SOCK_STREAM, 0);
	bind_to(5, "127.0.0.1", ports[1]);
	NEED(!listen(fds[5], 1));
	fds[6] = dup(fds[0]);
}

static int listen_check(void)
{
	struct tcp_info info;
	socklen_t length = sizeof info;
	CHECK(is_at(0, "127.0.0.1") && is_at(1, "::") && is_at(2, "::") && is_at(3, "127.0.0.1") && is_at(5, "127.0.0.1"));
	CHECK(number(fds[1], IPPROTO_IPV6, IPV6_V6ONLY) == 1 && number(fds[2], IPPROTO_IPV6, IPV6_V6ONLY) == 0);
	CHECK(number(fds[0], SOL_SOCKET, SO_REUSEADDR) == 0 && number(fds[1], SOL_SOCKET, SO_REUSEADDR) == 1);
	CHECK(number(fds[3], SOL_SOCKET, SO_REUSEPORT) == 1 && number(fds[4], SOL_SOCKET, SO_REUSEPORT) == 1);
	CHECK(number(fds[5], SOL_SOCKET, SO_REUSEADDR) == 0 && number(fds[1], SOL_SOCKET, SO_ACCEPTCONN) == 1);
	CHECK(fcntl(fds[1], F_GETFL) == (O_RDWR | O_NONBLOCK) && fcntl(fds[1], F_GETFD) == FD_CLOEXEC);
	CHECK(!getsockopt(fds[2], IPPROTO_TCP, TCP_INFO, &info, &length) && info.tcpi_sacked == 100);
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, fds[0], fds[6]) == 0);
	CHECK_ALL(answers(0, "127.0.0.1"));
	CHECK_ALL(answers(1, "::1"));
	CHECK_ALL(answers(2, "::1"));
	CHECK_ALL(answers(2, "127.0.0.1"));
	CHECK_ALL(answers(5, "127.0.0.1"));
	return 1;
}

static void listen_harm(void)
{
	shutdown(fds[2], SHUT_RD);
}

static void bound_set(void)
{
	make(0, AF_INET, SOCK_STREAM, 0);
	bind_to(0, "127.0.0.1", 0);
	make(1, AF_INET6, SOCK_STREAM, 0);
	bind_to(1, "::1", 0);
	make(2, AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	make(3, AF_INET6, SOCK_STREAM, 0);
	make(4, AF_INET, SOCK_STREAM, 0);
	set_number(fds[4], IPPROTO_IP, IP_FREEBIND, 1);
	bind_to(4, "192.0.2.77", 0);
	make(5, AF_INET, SOCK_DGRAM, 0);
	make(6, AF_INET6, SOCK_DGRAM, IPPROTO_UDPLITE);
	bind_to(6, "::1", 0);
}

static int bound_check(void)
{
	CHECK(is_at(0, "127.0.0.1") && is_at(1, "::1") && is_at(2, "0.0.0.0") && is_at(3, "::"));
	CHECK(is_at(4, "192.0.2.77") && is_at(5, "0.0.0.0") && is_at(6, "::1"));
	CHECK(number(fds[4], IPPROTO_IP, IP_FREEBIND) == 1 && number(fds[6], SOL_SOCKET, SO_PROTOCOL) == IPPROTO_UDPLITE);
	CHECK(fcntl(fds[2], F_GETFL) == (O_RDWR | O_NONBLOCK));
	/* They are good for what sockets are for; once, for a listening one cannot be only bound again. */
	CHECK(!listen(fds[0], 1) && !listen(fds[1], 1) && !listen(fds[2], 1));
	CHECK_ALL(answers(0, "127.0.0.1"));
	CHECK_ALL(answers(1, "::1"));
	return 1;
}

static void bound_harm(void)
{
	connect_to(fds[2], "127.0.0.1", 1);
	bind_to(5, "127.0.0.1", 0);
	ports[5] = 0;
}

static void udp_set(void)
{
	make(0, AF_INET, SOCK_DGRAM, 0);
	bind_to(0, "127.0.0.1", 0);
	make(1, AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	bind_to(1, "127.0.0.1", 0);
	NEED(!connect_to(fds[1], "127.0.0.1", ports[0]));
	make(2, AF_INET6, SOCK_DGRAM, 0);
	bind_to(2, "::", 0);
	make(3, AF_INET6, SOCK_DGRAM, 0);
	bind_to(3, "::1", 0);
	NEED(!connect_to(fds[3], "::1", ports[2]));
	make(4, AF_INET, SOCK_DGRAM, 0);
	bind_to(4, "127.0.0.1", 0);
	NEED(!connect_to(fds[4], "127.0.0.1", ports[0]) && !shutdown(fds[4], SHUT_WR));
	/* Connected to no port, which getpeername does not tell. */
	make(5, AF_INET, SOCK_DGRAM, 0);
	NEED(!connect_to(fds[5], "127.0.0.9", 0));
}

static int udp_check(void)
{
	union address a;
	socklen_t length = sizeof a;
	CHECK(is_at(0, "127.0.0.1") && is_at(1, "127.0.0.1") && is_at(2, "::") && is_at(3, "::1"));
	CHECK(!getpeername(fds[3], &a.any, &length) && ntohs(a.six.sin6_port) == ports[2]);
	CHECK(write(fds[1], "one", 3) == 3 && write(fds[3], "two", 3) == 3);
	CHECK(recv(fds[0], got, 64, 0) == 3 && !memcmp(got, "one", 3));
	length = sizeof a;
	CHECK(recvfrom(fds[2], got, 64, 0, &a.any, &length) == 3 && ntohs(a.six.sin6_port) == ports[3]);
	CHECK(sendto(fds[2], "back", 4, 0, &a.any, length) == 4 && read(fds[3], got, 64) == 4);
	CHECK(fcntl(fds[1], F_GETFL) == (O_RDWR | O_NONBLOCK));
	CHECK(send(fds[4], "no", 2, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	/* It gets as far as to the data, where one without a peer fails for want of an address. */
	CHECK(send(fds[5], (void *)1, 2, MSG_NOSIGNAL) == -1 && errno == EFAULT);
	return 1;
}

static void udp_harm(void)
{
	shutdown(fds[1], SHUT_WR);
}

/* Datagrams wait: of every size, from two senders (one gone), over IPv4 to an IPv6 socket, from before a connect. */
static void queue_set(void)
{
	fill(expected, sizeof expected, 3);
	make(0, AF_INET, SOCK_DGRAM, 0);
	bind_to(0, "0.0.0.0", 0);
	make(1, AF_INET6, SOCK_DGRAM, 0);
	bind_to(1, "::", 0);
	make(2, AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE);
	bind_to(2, "127.0.0.1", 0);
	make(3, AF_INET, SOCK_DGRAM, 0);
	bind_to(3, "127.0.0.1", 0);
	for (int i = 4; i < 7; i++) {
		make(i, i == 5 ? AF_INET6 : AF_INET, SOCK_DGRAM, i == 6 ? IPPROTO_UDPLITE : 0);
		bind_to(i, i == 5 ? "::1" : "127.0.0.1", 0);
	}
	NEED(!connect_to(fds[4], "127.0.0.1", ports[0]) && !connect_to(fds[5], "::1", ports[1]));
	NEED(!connect_to(fds[6], "127.0.0.1", ports[2]));
	NEED(write(fds[4], "", 0) == 0 && write(fds[4], "first", 5) == 5 && write(fds[4], expected, 40000) == 40000);
	NEED(write(fds[5], "six", 3) == 3 && write(fds[6], "light", 5) == 5);
	NEED(!connect_to(fds[4], "127.0.0.1", ports[1]) && write(fds[4], "four", 4) == 4);
	NEED(!connect_to(fds[4], "127.0.0.1", ports[3]) && write(fds[4], "early", 5) == 5);
	NEED(!connect_to(fds[3], "127.0.0.1", ports[0]));
	close(fds[4]);
}

static int takes(int i, const void *data, ssize_t size, const char *from, uint16_t port)
{
	union address a, b;
	socklen_t length = sizeof a, wanted = address_of(&b, from, port);
	memset(&a, 0, sizeof a);
	CHECK(recvfrom(fds[i], got, sizeof got, MSG_DONTWAIT, &a.any, &length) == size && !memcmp(got, data, (size_t)size));
	CHECK(length == wanted && !memcmp(&a, &b, length));
	return 1;
}

static int queue_check(void)
{
	CHECK_ALL(takes(0, "", 0, "127.0.0.1", ports[4]));
	CHECK_ALL(takes(0, "first", 5, "127.0.0.1", ports[4]));
	CHECK_ALL(takes(0, expected, 40000, "127.0.0.1", ports[4]));
	CHECK_ALL(takes(1, "six", 3, "::1", ports[5]));
	CHECK_ALL(takes(1, "four", 4, "::ffff:127.0.0.1", ports[4]));
	CHECK_ALL(takes(2, "light", 5, "127.0.0.1", ports[6]));
	CHECK_ALL(takes(3, "early", 5, "127.0.0.1", ports[4]));
	for (int i = 0; i < 4; i++)
		CHECK(recv(fds[i], got, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	CHECK(write(fds[3], "later", 5) == 5);
	CHECK_ALL(takes(0, "later", 5, "127.0.0.1", ports[3]));
	return 1;
}

static void queue_harm(void)
{
	recv(fds[1], got, 1, 0);
}

/* Datagrams wait in sockets that share a port, one that is bound to a device, and merged (UDP_GRO) in a third. */
static int waits[2];
static uint16_t senders[2][32];

static void crowd_set(void)
{
	union address a;
	int offset = 0;
	for (int i = 0; i < 2; i++) {
		make(i, AF_INET, SOCK_DGRAM, 0);
		set_number(fds[i], SOL_SOCKET, SO_REUSEPORT, 1);
		bind_to(i, "0.0.0.0", i ? ports[0] : 0);
	}
	for (int i = 0; i < 16; i++) {
		int fd = socket(AF_INET, SOCK_DGRAM, 0);
		NEED(fd >= 0 && !connect_to(fd, "127.0.0.1", ports[0]) && write(fd, "share", 5) == 5);
		close(fd);
	}
	for (int i = 0; i < 2; i++) {
		socklen_t length = sizeof a;
		set_number(fds[i], SOL_SOCKET, 42 /* SO_PEEK_OFF */, 0);
		for (; recvfrom(fds[i], got, 64, MSG_PEEK | MSG_DONTWAIT, &a.any, &length) == 5; waits[i]++)
			senders[i][waits[i]] = ntohs(a.four.sin_port);
		offset = -1;
		set_number(fds[i], SOL_SOCKET, 42, offset);
	}
	NEED(waits[0] + waits[1] == 16 && waits[0] && waits[1]);
	make(2, AF_INET, SOCK_DGRAM, 0);
	NEED(!setsockopt(fds[2], SOL_SOCKET, SO_BINDTODEVICE, "lo", 2));
	bind_to(2, "127.0.0.1", 0);
	make(3, AF_INET, SOCK_DGRAM, 0);
	set_number(fds[3], IPPROTO_UDP, 104 /* UDP_GRO */, 1);
	bind_to(3, "127.0.0.1", 0);
	make(4, AF_INET, SOCK_DGRAM, 0);
	bind_to(4, "127.0.0.1", 0);
	NEED(!connect_to(fds[4], "127.0.0.1", ports[2]) && write(fds[4], "device", 6) == 6);
	set_number(fds[4], IPPROTO_UDP, 103 /* UDP_SEGMENT */, 100);
	NEED(!connect_to(fds[4], "127.0.0.1", ports[3]) && write(fds[4], expected, 250) == 250);
}

static int crowd_check(void)
{
	union address a;
	char device[16] = "";
	socklen_t length = sizeof device;
	for (int i = 0; i < 2; i++)
		for (int j = 0; j < waits[i]; j++)
			CHECK_ALL(takes(i, "share", 5, "127.0.0.1", senders[i][j]));
	CHECK(recv(fds[0], got, 1, MSG_DONTWAIT) == -1 && recv(fds[1], got, 1, MSG_DONTWAIT) == -1);
	CHECK(getpeername(fds[0], &a.any, &length) == -1 && errno == ENOTCONN && is_at(0, "0.0.0.0") && is_at(1, "0.0.0.0"));
	length = sizeof device;
	CHECK(!getsockopt(fds[2], SOL_SOCKET, SO_BINDTODEVICE, device, &length) && !strcmp(device, "lo"));
	CHECK_ALL(takes(2, "device", 6, "127.0.0.1", ports[4]));
	/* Merged as the kernel likes, but all of it. */
	ssize_t size = 0, more;
	while ((more = recv(fds[3], got, sizeof got, MSG_DONTWAIT)) > 0) {
		CHECK(more % 100 == 0 || more % 100 == 50);
		size += more;
	}
	CHECK(size == 250 && number(fds[3], IPPROTO_UDP, 104) == 1);
	return 1;
}

static void crowd_harm(void)
{
	recv(fds[1], got, 1, 0);
}

static const struct { int fd, level, option, value; } wanted[] = {
	{0, SOL_SOCKET, SO_KEEPALIVE, 1}, {0, IPPROTO_TCP, TCP_NODELAY, 1}, {0, IPPROTO_TCP, TCP_KEEPIDLE, 77},
	{0, IPPROTO_TCP, TCP_KEEPINTVL, 11}, {0, IPPROTO_TCP, TCP_KEEPCNT, 5}, {0, IPPROTO_TCP, TCP_USER_TIMEOUT, 4321},
	{0, IPPROTO_TCP, TCP_SYNCNT, 3}, {0, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384}, {0, IPPROTO_TCP, TCP_MAXSEG, 900},
	{3, IPPROTO_TCP, TCP_FASTOPEN, 5}, {0, IPPROTO_IP, IP_TTL, 33}, {0, IPPROTO_IP, IP_TOS, 0x10},
	{0, SOL_SOCKET, SO_PRIORITY, 3},
	{1, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 44}, {1, IPPROTO_IPV6, IPV6_TCLASS, 0x20},
	{1, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1}, {1, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, 9},
	{1, IPPROTO_IPV6, IPV6_MTU_DISCOVER, 2}, {1, IPPROTO_IPV6, IPV6_RECVERR, 1}, {1, SOL_SOCKET, SO_RCVBUF, 20480},
	{2, IPPROTO_IP, IP_PKTINFO, 1}, {2, IPPROTO_IP, IP_RECVTTL, 1}, {2, IPPROTO_IP, IP_MULTICAST_TTL, 7},
	{2, IPPROTO_IP, IP_MULTICAST_LOOP, 0}, {2, IPPROTO_IP, IP_MTU_DISCOVER, 3}, {2, SOL_SOCKET, SO_BROADCAST, 1},
	{2, IPPROTO_UDP, 103 /* UDP_SEGMENT */, 1200}, {2, IPPROTO_UDP, 104 /* UDP_GRO */, 1},
	{2, IPPROTO_IP, IP_RECVERR, 1}, {3, IPPROTO_TCP, TCP_DEFER_ACCEPT, 7}, {3, IPPROTO_TCP, TCP_LINGER2, 20},
};

static void options_set(void)
{
	make(0, AF_INET, SOCK_STREAM, 0);
	make(1, AF_INET6, SOCK_DGRAM, 0);
	make(2, AF_INET, SOCK_DGRAM, 0);
	make(3, AF_INET, SOCK_STREAM, 0);
	make(4, AF_INET, SOCK_STREAM, 0);
	struct timeval patience = {3, 500000};
	NEED(!setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience));
	NEED(!setsockopt(fds[0], IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
	NEED(!setsockopt(fds[4], SOL_SOCKET, SO_BINDTODEVICE, "lo", 2));
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		set_number(fds[wanted[i].fd], wanted[i].level, wanted[i].option, wanted[i].value);
	for (int i = 3; i < 5; i++) {
		bind_to(i, "127.0.0.1", 0);
		NEED(!listen(fds[i], 4));
	}
}

static int options_check(void)
{
	struct timeval patience = {0, 0};
	char text[32] = "";
	socklen_t length = sizeof patience;
	CHECK(!getsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &patience, &length) && patience.tv_sec == 3);
	length = sizeof text;
	CHECK(!getsockopt(fds[0], IPPROTO_TCP, TCP_CONGESTION, text, &length) && !strcmp(text, "reno"));
	length = sizeof text;
	CHECK(!getsockopt(fds[4], SOL_SOCKET, SO_BINDTODEVICE, text, &length) && !strcmp(text, "lo"));
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		int value = number(fds[wanted[i].fd], wanted[i].level, wanted[i].option);
		snprintf(text, sizeof text, "option %zu is %d", i, value);
		int doubled = wanted[i].level == SOL_SOCKET && wanted[i].option == SO_RCVBUF;
		if (value != (1 + doubled) * wanted[i].value)
			return wrong(__FILE__, __LINE__, text);
	}
	CHECK_ALL(answers(4, "127.0.0.1"));
	return 1;
}

static void options_harm(void)
{
	set_number(fds[2], IPPROTO_IP, IP_RECVTTL, 0);
}

/* Multicast groups: whole ones, and by source. */
static void groups_set(void)
{
	struct ip_mreqn all = {{inet_addr("239.1.2.3")}, {0}, (int)if_nametoindex("lo")};
	struct ip_mreq_source some = {{inet_addr("239.1.2.4")}, {inet_addr("127.0.0.1")}, {inet_addr("127.0.0.9")}};
	struct ipv6_mreq six = {.ipv6mr_interface = if_nametoindex("lo")};
	inet_pton(AF_INET6, "ff15::77", &six.ipv6mr_multiaddr);
	make(0, AF_INET, SOCK_DGRAM, 0);
	bind_to(0, "0.0.0.0", 0);
	make(1, AF_INET6, SOCK_DGRAM, 0);
	bind_to(1, "::", 0);
	make(2, AF_INET, SOCK_DGRAM, 0);
	NEED(!setsockopt(fds[0], IPPROTO_IP, IP_ADD_MEMBERSHIP, &all, sizeof all));
	NEED(!setsockopt(fds[0], IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &some, sizeof some));
	NEED(!setsockopt(fds[1], IPPROTO_IPV6, IPV6_JOIN_GROUP, &six, sizeof six));
	all.imr_multiaddr.s_addr = inet_addr("239.1.2.5");
	NEED(!setsockopt(fds[0], IPPROTO_IP, IP_ADD_MEMBERSHIP, &all, sizeof all));
	some.imr_multiaddr = all.imr_multiaddr;
	NEED(!setsockopt(fds[0], IPPROTO_IP, IP_BLOCK_SOURCE, &some, sizeof some));
}

/* Leaving shows what was joined; joining again brings the old state back. */
static int groups_check(void)
{
	struct ip_mreqn all = {{inet_addr("239.1.2.3")}, {0}, (int)if_nametoindex("lo")};
	struct ip_mreq_source some = {{inet_addr("239.1.2.4")}, {inet_addr("127.0.0.1")}, {inet_addr("127.0.0.9")}};
	struct ipv6_mreq six = {.ipv6mr_interface = if_nametoindex("lo")};
	inet_pton(AF_INET6, "ff15::77", &six.ipv6mr_multiaddr);
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_DROP_MEMBERSHIP, &all, sizeof all));
	CHECK(setsockopt(fds[2], IPPROTO_IP, IP_DROP_MEMBERSHIP, &all, sizeof all) == -1);
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_DROP_SOURCE_MEMBERSHIP, &some, sizeof some));
	CHECK(!setsockopt(fds[1], IPPROTO_IPV6, IPV6_LEAVE_GROUP, &six, sizeof six));
	CHECK(!setsockopt(fds[1], IPPROTO_IPV6, IPV6_JOIN_GROUP, &six, sizeof six));
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_ADD_MEMBERSHIP, &all, sizeof all));
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &some, sizeof some));
	some.imr_multiaddr.s_addr = inet_addr("239.1.2.5");
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_UNBLOCK_SOURCE, &some, sizeof some));
	CHECK(!setsockopt(fds[0], IPPROTO_IP, IP_BLOCK_SOURCE, &some, sizeof some));
	return 1;
}

static void groups_harm(void)
{
	struct ip_mreqn all = {{inet_addr("239.1.2.3")}, {0}, (int)if_nametoindex("lo")};
	setsockopt(fds[0], IPPROTO_IP, IP_DROP_MEMBERSHIP, &all, sizeof all);
}

/* A connection: refused, or closed at the other end of a checkpoint; the listening socket stays. */
static void connection_set(void)
{
	make(0, AF_INET, SOCK_STREAM, 0);
	/* Else what is left of the connections would keep the port. */
	set_number(fds[0], SOL_SOCKET, SO_REUSEADDR, 1);
	bind_to(0, "127.0.0.1", 0);
	NEED(!listen(fds[0], 4));
	make(1, AF_INET, SOCK_STREAM, 0);
	NEED(!connect_to(fds[1], "127.0.0.1", ports[0]));
	fds[2] = accept(fds[0], NULL, NULL);
	NEED(fds[2] >= 0);
}

static int connection_check(void)
{
	struct tcp_info info;
	for (int i = 1; i < 3; i++) {
		socklen_t length = sizeof info;
		CHECK(!getsockopt(fds[i], IPPROTO_TCP, TCP_INFO, &info, &length));
		CHECK(info.tcpi_state == (beat->phase ? TCP_CLOSE : TCP_ESTABLISHED));
	}
	CHECK_ALL(answers(0, "127.0.0.1"));
	return 1;
}

static void connection_harm(void)
{
	close(fds[2]);
}

WORKLOAD({"listen", listen_set, listen_check, listen_harm}, {"bound", bound_set, bound_check, bound_harm},
	 {"udp", udp_set, udp_check, udp_harm}, {"queue", queue_set, queue_check, queue_harm},
	 {"crowd", crowd_set, crowd_check, crowd_harm},
	 {"options", options_set, options_check, options_harm}, {"groups", groups_set, groups_check, groups_harm},
	 {"connection", connection_set, connection_check, connection_harm})
