/* TCP connections with both ends in the tree: queues, options, every state that an open descriptor can have. */
#include "inet.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#define MEGA ((size_t)1 << 20)

static char *sent, *got;

union address {
	struct sockaddr any;
	struct sockaddr_in four;
	struct sockaddr_in6 six;
};

struct pair {
	int client, server;
	union address near, far;
};

static struct pair pairs[8];
static int listening[8];

static int listen_at(const char *text, int family, int backlog)
{
	union address a;
	int fd = socket(family, SOCK_STREAM, 0);
	if (fd < 0 && errno == EAFNOSUPPORT)
		cannot_run("no such sockets here");
	memset(&a, 0, sizeof a);
	a.any.sa_family = family;
	NEED(inet_pton(family, text, family == AF_INET6 ? (void *)&a.six.sin6_addr : &a.four.sin_addr) == 1);
	set_number(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	if (family == AF_INET6)
		set_number(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
	NEED(!bind(fd, &a.any, family == AF_INET6 ? sizeof a.six : sizeof a.four) && !listen(fd, backlog));
	return fd;
}

/* Connection `i`; over IPv4 to an IPv6 socket with `mapped`. */
static void connect_pair(int i, const char *text, int family, int mapped)
{
	struct pair *p = pairs + i;
	socklen_t length = sizeof p->far;
	listening[i] = listen_at(text, family, 4);
	NEED(!getsockname(listening[i], &p->far.any, &length));
	if (mapped) {
		union address a = {.four = {AF_INET, p->far.six.sin6_port, {htonl(INADDR_LOOPBACK)}, {0}}};
		p->far = a;
		length = sizeof a.four;
	}
	p->client = socket(mapped ? AF_INET : family, SOCK_STREAM, 0);
	NEED(p->client >= 0 && !connect(p->client, &p->far.any, length));
	p->server = accept(listening[i], NULL, NULL);
	length = sizeof p->near;
	NEED(p->server >= 0 && !getsockname(p->client, &p->near.any, &length));
}

/* What was said where, and whether all of it is still to be had. */
static size_t stuff(int fd, size_t size)
{
	size_t done = 0;
	while (done < size) {
		ssize_t put = send(fd, sent + done, size - done, MSG_DONTWAIT);
		if (put < 0)
			break;
		done += (size_t)put;
	}
	return done;
}

static int takes(int fd, size_t size)
{
	size_t done = 0;
	while (done < size) {
		ssize_t took = recv(fd, got + done, size - done, 0);
		CHECK(took > 0);
		done += (size_t)took;
	}
	CHECK(!memcmp(got, sent, size));
	return 1;
}

static int talks(int a, int b)
{
	for (int i = 0; i < 50; i++) {
		CHECK(write(a, "ping", 4) == 4 && recv(b, got, 4, MSG_WAITALL) == 4 && !memcmp(got, "ping", 4));
		CHECK(write(b, "pong", 4) == 4 && recv(a, got, 4, MSG_WAITALL) == 4 && !memcmp(got, "pong", 4));
	}
	return 1;
}

static int ends(int fd)
{
	CHECK(recv(fd, got, 64, 0) == 0);
	return 1;
}

/* The kernel may take seconds to give up a call that should not wait. */
static void be_impatient(int fd)
{
	struct timeval patience = {8, 0};
	NEED(!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience));
	NEED(!setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience));
}

static void buffers(void)
{
	sent = malloc(8 * MEGA);
	got = malloc(8 * MEGA);
	NEED(sent && got);
	fill(sent, 8 * MEGA, 7);
}

static void connect_three(void)
{
	buffers();
	connect_pair(0, "127.0.0.1", AF_INET, 0);
	connect_pair(1, "::1", AF_INET6, 0);
	connect_pair(2, "::", AF_INET6, 1);
	for (int i = 0; i < 3; i++) {
		be_impatient(pairs[i].client);
		be_impatient(pairs[i].server);
	}
}

static int addresses(int i, size_t size)
{
	union address a;
	socklen_t length = sizeof a;
	memset(&a, 0, sizeof a);
	CHECK(!getsockname(pairs[i].client, &a.any, &length) && length == size && !memcmp(&a, &pairs[i].near, size));
	CHECK(!getpeername(pairs[i].client, &a.any, &length) && length == size && !memcmp(&a, &pairs[i].far, size));
	return 1;
}

/* ---- quiet connections, all that was agreed, options; a listening socket goes on beside them ---- */

static struct tcp_info agreed[3];

static void quiet_set(void)
{
	connect_three();
	set_number(pairs[0].client, IPPROTO_TCP, TCP_NODELAY, 1);
	set_number(pairs[0].client, SOL_SOCKET, SO_KEEPALIVE, 1);
	set_number(pairs[0].client, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	set_number(pairs[0].server, IPPROTO_TCP, TCP_USER_TIMEOUT, 4321);
	set_number(pairs[1].server, SOL_SOCKET, SO_SNDBUF, 40000);
	set_number(pairs[1].client, SOL_SOCKET, SO_REUSEADDR, 1);
	set_number(pairs[2].server, IPPROTO_IPV6, IPV6_TCLASS, 0x20);
	NEED(fcntl(pairs[2].client, F_SETFL, O_RDWR | O_NONBLOCK) == 0);
	for (int i = 0; i < 3; i++) {
		socklen_t length = sizeof agreed[i];
		NEED(!getsockopt(pairs[i].client, IPPROTO_TCP, TCP_INFO, &agreed[i], &length));
	}
}

static int quiet_check(void)
{
	struct tcp_info info;
	for (int i = 0; i < 3; i++) {
		socklen_t length = sizeof info;
		CHECK(!getsockopt(pairs[i].client, IPPROTO_TCP, TCP_INFO, &info, &length));
		CHECK(info.tcpi_options == agreed[i].tcpi_options && info.tcpi_state == TCP_ESTABLISHED);
		CHECK(info.tcpi_snd_wscale == agreed[i].tcpi_snd_wscale && info.tcpi_rcv_wscale == agreed[i].tcpi_rcv_wscale);
		CHECK_ALL(addresses(i, i == 1 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in)));
		CHECK(number(pairs[i].client, SOL_SOCKET, SO_REUSEADDR) == (i == 1));
		CHECK(number(pairs[i].server, SOL_SOCKET, SO_REUSEADDR) == 1);
		CHECK(number(pairs[i].client, IPPROTO_TCP, TCP_REPAIR) == 0);
	}
	CHECK(number(pairs[0].client, IPPROTO_TCP, TCP_NODELAY) == 1 && number(pairs[0].server, IPPROTO_TCP, TCP_NODELAY) == 0);
	CHECK(number(pairs[0].client, SOL_SOCKET, SO_KEEPALIVE) == 1);
	CHECK(number(pairs[0].client, IPPROTO_TCP, TCP_KEEPIDLE) == 77);
	CHECK(number(pairs[0].server, IPPROTO_TCP, TCP_USER_TIMEOUT) == 4321);
	CHECK(number(pairs[1].server, SOL_SOCKET, SO_SNDBUF) == 80000);
	CHECK(number(pairs[2].server, IPPROTO_IPV6, IPV6_TCLASS) == 0x20);
	CHECK(fcntl(pairs[2].client, F_GETFL) == (O_RDWR | O_NONBLOCK));
	CHECK(!fcntl(pairs[2].client, F_SETFL, O_RDWR));
	for (int i = 0; i < 3; i++)
		CHECK_ALL(talks(pairs[i].client, pairs[i].server));
	CHECK(!fcntl(pairs[2].client, F_SETFL, O_RDWR | O_NONBLOCK));
	int more = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(more >= 0 && !connect(more, &pairs[0].far.any, sizeof pairs[0].far.four));
	int served = accept(listening[0], NULL, NULL);
	struct linger now = {1, 0};
	CHECK(served >= 0 && !setsockopt(more, SOL_SOCKET, SO_LINGER, &now, sizeof now));
	close(more);
	close(served);
	return 1;
}

static void quiet_harm(void)
{
	set_number(pairs[1].client, SOL_SOCKET, SO_REUSEADDR, 0);
}

/* ---- full queues: unread, not acknowledged, not sent, corked; one is peeked at from an offset (since Linux 6.9) ---- */

static size_t stuffed[3];
static int peeks;

static void queues_set(void)
{
	connect_three();
	for (int i = 0; i < 3; i++) {
		NEED(write(pairs[i].client, sent, 1000) == 1000);
		stuffed[i] = stuff(pairs[i].server, 6 * MEGA);
		NEED(stuffed[i] > MEGA);
	}
	int offset = 5;
	peeks = !setsockopt(pairs[0].client, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset);
	NEED(!peeks || recv(pairs[0].client, got, 3, MSG_PEEK) == 3);
	connect_pair(3, "127.0.0.1", AF_INET, 0);
	be_impatient(pairs[3].server);
	set_number(pairs[3].client, IPPROTO_TCP, TCP_CORK, 1);
	NEED(write(pairs[3].client, "corked", 6) == 6);
}

static int queues_check(void)
{
	int left = -1;
	if (peeks) {
		CHECK(number(pairs[0].client, SOL_SOCKET, SO_PEEK_OFF) == 8);
		CHECK(recv(pairs[0].client, got, 4, MSG_PEEK) == 4 && !memcmp(got, sent + 8, 4));
	}
	for (int i = 0; i < 3; i++) {
		CHECK(!ioctl(pairs[i].server, FIONREAD, &left) && left == 1000);
		CHECK_ALL(takes(pairs[i].client, stuffed[i]));
		CHECK_ALL(takes(pairs[i].server, 1000));
		CHECK_ALL(talks(pairs[i].server, pairs[i].client));
	}
	CHECK(number(pairs[3].client, IPPROTO_TCP, TCP_CORK) == 1);
	CHECK(recv(pairs[3].server, got, 64, 0) == 6 && !memcmp(got, "corked", 6));
	return 1;
}

static void queues_harm(void)
{
	NEED(recv(pairs[1].client, got, 1, 0) == 1);
}

/* ---- half closed ----
 * 0: client FIN-WAIT-2, server CLOSE-WAIT, nothing queued       1: the same, unread data on both sides
 * 2: client FIN-WAIT-1 behind data that does not fit, server established
 * 3: shut for reading only                                      4: closed on both sides, descriptors still open, unread */
static void half_set(void)
{
	connect_three();
	connect_pair(3, "127.0.0.1", AF_INET, 0);
	connect_pair(4, "127.0.0.1", AF_INET, 0);
	for (int i = 3; i < 5; i++) {
		be_impatient(pairs[i].client);
		be_impatient(pairs[i].server);
	}
	NEED(!shutdown(pairs[0].client, SHUT_WR));
	NEED(write(pairs[1].client, sent, 5000) == 5000 && write(pairs[1].server, sent, 3000) == 3000);
	NEED(!shutdown(pairs[1].client, SHUT_WR));
	stuffed[2] = stuff(pairs[2].client, 6 * MEGA);
	NEED(!shutdown(pairs[2].client, SHUT_WR) && write(pairs[2].server, sent, 100) == 100);
	NEED(!shutdown(pairs[3].client, SHUT_RD));
	NEED(!shutdown(pairs[4].client, SHUT_WR) && in_state(pairs[4].server, TCP_CLOSE_WAIT));
	NEED(write(pairs[4].server, sent, 500) == 500);
	NEED(!shutdown(pairs[4].server, SHUT_WR) && in_state(pairs[4].server, TCP_CLOSE));
	NEED(in_state(pairs[0].client, TCP_FIN_WAIT2) && in_state(pairs[0].server, TCP_CLOSE_WAIT));
	NEED(in_state(pairs[1].client, TCP_FIN_WAIT2) && in_state(pairs[1].server, TCP_CLOSE_WAIT));
	NEED(in_state(pairs[2].client, TCP_FIN_WAIT1) && in_state(pairs[2].server, TCP_ESTABLISHED));
}

static int half_check(void)
{
	CHECK(state(pairs[0].client) == TCP_FIN_WAIT2 && state(pairs[0].server) == TCP_CLOSE_WAIT);
	CHECK(state(pairs[1].client) == TCP_FIN_WAIT2 && state(pairs[1].server) == TCP_CLOSE_WAIT);
	errno = state(pairs[2].client) * 100 + state(pairs[2].server);
	CHECK(state(pairs[2].client) == TCP_FIN_WAIT1 && state(pairs[2].server) == TCP_ESTABLISHED);
	CHECK(state(pairs[3].client) == TCP_ESTABLISHED && state(pairs[3].server) == TCP_ESTABLISHED);
	CHECK(state(pairs[4].client) == TCP_CLOSE && state(pairs[4].server) == TCP_CLOSE);
	for (int i = 0; i < 3; i++) {
		CHECK(send(pairs[i].client, "no", 2, MSG_NOSIGNAL) == -1 && errno == EPIPE);
		CHECK(write(pairs[i].server, "still", 5) == 5);
	}
	CHECK_ALL(takes(pairs[1].server, 5000));
	CHECK_ALL(takes(pairs[2].server, stuffed[2]));
	for (int i = 0; i < 3; i++)
		CHECK_ALL(ends(pairs[i].server));
	CHECK_ALL(takes(pairs[1].client, 3000));
	CHECK_ALL(takes(pairs[2].client, 100));
	for (int i = 0; i < 3; i++)
		CHECK(recv(pairs[i].client, got, 5, MSG_WAITALL) == 5 && !memcmp(got, "still", 5));
	CHECK(in_state(pairs[2].client, TCP_FIN_WAIT2) && in_state(pairs[2].server, TCP_CLOSE_WAIT));
	struct pollfd shut = {pairs[3].client, POLLRDHUP, 0};
	CHECK(poll(&shut, 1, 0) == 1);
	CHECK_ALL(ends(pairs[3].client));
	CHECK(write(pairs[3].client, "one way", 7) == 7 && recv(pairs[3].server, got, 7, MSG_WAITALL) == 7);
	CHECK_ALL(takes(pairs[4].client, 500));
	for (int i = 0; i < 5; i++) {
		/* So that the last one to close is not the one that has the port of the listening socket. */
		CHECK(!shutdown(pairs[i].server, SHUT_WR) || i == 4);
		CHECK_ALL(ends(pairs[i].client));
	}
	return 1;
}

static void half_harm(void)
{
	shutdown(pairs[3].server, SHUT_WR);
}

/* ---- connections that nobody has accepted yet ----
 * At each of three sockets, in this order: one that is quiet, one that has sent little, one that has sent much and shut
 * down, one that has sent and was reset, one that is quiet, one with an urgent byte amid others. Then two sockets that
 * share a port. */
#define WAIT 6
#define SHARERS 12
#define MUCH 40000

static int clients[3][WAIT], sharers[SHARERS], crowds[2];

static int call(const union address *to)
{
	int fd = socket(to->any.sa_family, SOCK_STREAM, 0);
	NEED(fd >= 0 && !connect(fd, &to->any, to->any.sa_family == AF_INET6 ? sizeof to->six : sizeof to->four));
	be_impatient(fd);
	return fd;
}

static int crowd(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof info;
	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) ? -1 : (int)info.tcpi_unacked;
}

static void waiting_set(void)
{
	static const char *at[] = {"127.0.0.1", "::1", "::"};
	struct linger now = {1, 0};
	union address to;
	socklen_t length;
	buffers();
	for (int i = 0; i < 3; i++) {
		length = sizeof to;
		listening[i] = listen_at(at[i], i ? AF_INET6 : AF_INET, 16);
		NEED(!getsockname(listening[i], &to.any, &length));
		if (i == 2) {
			union address a = {.four = {AF_INET, to.six.sin6_port, {htonl(INADDR_LOOPBACK)}, {0}}};
			to = a;
		}
		for (int k = 0; k < WAIT; k++)
			clients[i][k] = call(&to);
		NEED(write(clients[i][1], sent, 3) == 3 && write(clients[i][2], sent, MUCH) == MUCH);
		NEED(!shutdown(clients[i][2], SHUT_WR) && write(clients[i][3], "gone", 4) == 4);
		NEED(in_state(clients[i][2], TCP_FIN_WAIT2));
		NEED(write(clients[i][5], "before", 6) == 6 && send(clients[i][5], "!", 1, MSG_OOB) == 1);
		NEED(write(clients[i][5], "behind", 6) == 6);
		NEED(!setsockopt(clients[i][3], SOL_SOCKET, SO_LINGER, &now, sizeof now) && !close(clients[i][3]));
		NEED(crowd(listening[i]) == WAIT);
	}
	for (int i = 3; i < 5; i++) {
		listening[i] = socket(AF_INET, SOCK_STREAM, 0);
		set_number(listening[i], SOL_SOCKET, SO_REUSEPORT, 1);
		if (i == 3) {
			union address a = {.four = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}}};
			to = a;
		}
		NEED(!bind(listening[i], &to.any, sizeof to.four) && !listen(listening[i], 16));
		length = sizeof to;
		NEED(!getsockname(listening[i], &to.any, &length));
	}
	for (int i = 0; i < SHARERS; i++) {
		sharers[i] = call(&to);
		NEED(send(sharers[i], &i, sizeof i, 0) == sizeof i);
	}
	for (int i = 0; i < 2; i++)
		crowds[i] = crowd(listening[3 + i]);
	NEED(crowds[0] + crowds[1] == SHARERS);
}

/* Who has been accepted is the one whose turn it was, and agrees with it on how to talk. */
static int is_client(int fd, int client)
{
	struct tcp_info ours, theirs;
	union address a, b;
	socklen_t length = sizeof a, other = sizeof b, size = sizeof ours;
	memset(&a, 0, sizeof a);
	memset(&b, 0, sizeof b);
	CHECK(!getpeername(fd, &a.any, &length) && !getsockname(client, &b.any, &other));
	CHECK(a.four.sin_port == b.four.sin_port);
	CHECK(!getsockopt(fd, IPPROTO_TCP, TCP_INFO, &ours, &size));
	CHECK(!getsockopt(client, IPPROTO_TCP, TCP_INFO, &theirs, &size));
	CHECK(ours.tcpi_options == theirs.tcpi_options && ours.tcpi_snd_wscale == theirs.tcpi_rcv_wscale);
	CHECK(ours.tcpi_rcv_wscale == theirs.tcpi_snd_wscale);
	return 1;
}

static int serves(int i)
{
	for (int k = 0; k < WAIT; k++) {
		int fd = accept(listening[i], NULL, NULL);
		CHECK(fd >= 0);
		be_impatient(fd);
		if (k == 3) {
			CHECK(recv(fd, got, 64, 0) == 4 && !memcmp(got, "gone", 4));
			CHECK(recv(fd, got, 64, 0) == -1 && errno == ECONNRESET);
			continue;
		}
		CHECK_ALL(is_client(fd, clients[i][k]));
		CHECK(number(fd, IPPROTO_TCP, TCP_REPAIR) == 0 && number(fd, SOL_SOCKET, SO_REUSEADDR) == 1);
		CHECK_ALL(takes(fd, k == 1 ? 3 : k == 2 ? MUCH : 0));
		if (k == 5) {
			CHECK(recv(fd, got, 64, 0) == 6 && !memcmp(got, "before", 6));
			CHECK(recv(fd, got, 1, MSG_OOB) == 1 && *got == '!');
			CHECK(recv(fd, got, 64, 0) == 6 && !memcmp(got, "behind", 6));
		}
		if (k == 2) {
			CHECK_ALL(ends(fd));
			CHECK(write(fd, "still", 5) == 5);
			CHECK(recv(clients[i][k], got, 5, MSG_WAITALL) == 5 && !memcmp(got, "still", 5));
		} else {
			CHECK_ALL(talks(clients[i][k], fd));
			CHECK_ALL(talks(fd, clients[i][k]));
		}
	}
	CHECK(crowd(listening[i]) == 0);
	return 1;
}

static int waiting_check(void)
{
	for (int i = 0; i < 3; i++)
		CHECK_ALL(serves(i));
	for (int i = 3; i < 5; i++) {
		CHECK(crowd(listening[i]) == crowds[i - 3] && number(listening[i], SOL_SOCKET, SO_INCOMING_CPU) == -1);
		for (int last = -1, n = 0; n < crowds[i - 3]; n++) {
			int who = -1, fd = accept(listening[i], NULL, NULL);
			CHECK(fd >= 0 && recv(fd, &who, sizeof who, MSG_WAITALL) == sizeof who && who > last && who < SHARERS);
			CHECK(number(fd, SOL_SOCKET, SO_REUSEPORT) == 1);
			CHECK_ALL(is_client(fd, sharers[who]));
			CHECK_ALL(talks(sharers[who], fd));
			last = who;
		}
	}
	return 1;
}

static void waiting_harm(void)
{
	NEED(write(clients[1][4], "more", 4) == 4);
}

WORKLOAD({"quiet", quiet_set, quiet_check, quiet_harm}, {"queues", queues_set, queues_check, queues_harm},
	 {"half", half_set, half_check, half_harm}, {"waiting", waiting_set, waiting_check, waiting_harm})
