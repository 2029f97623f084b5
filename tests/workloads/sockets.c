/* Sockets of the other kinds: netlink, packet, raw and ping sockets. */
#include "inet.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <linux/filter.h>
#include <linux/icmp.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/icmp6.h>
#include <poll.h>

static int fds[8];
static uint32_t port;
static char got[4096];

static int make(int i, int family, int type, int protocol)
{
	fds[i] = socket(family, type, protocol);
	if (fds[i] < 0 && (errno == EAFNOSUPPORT || errno == EPROTONOSUPPORT || errno == EACCES || errno == EPERM))
		cannot_run("no such sockets here");
	NEED(fds[i] >= 0);
	return fds[i];
}

/* ---- netlink ---- */

/* The kernel answers a question about the loopback device. */
static int asks(int fd)
{
	struct { struct nlmsghdr head; struct ifinfomsg what; } ask = {
		{sizeof ask, RTM_GETLINK, NLM_F_REQUEST, 7, 0}, {.ifi_index = (int)if_nametoindex("lo")}};
	CHECK(send(fd, &ask, sizeof ask, 0) == sizeof ask);
	CHECK(recv(fd, got, sizeof got, 0) > (ssize_t)sizeof ask);
	CHECK(((struct nlmsghdr *)got)->nlmsg_type == RTM_NEWLINK && ((struct nlmsghdr *)got)->nlmsg_seq == 7);
	return 1;
}

static void netlink_set(void)
{
	struct sockaddr_nl at = {.nl_family = AF_NETLINK};
	socklen_t length = sizeof at;
	make(0, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	NEED(!bind(fds[0], (struct sockaddr *)&at, sizeof at) && !getsockname(fds[0], (struct sockaddr *)&at, &length));
	port = at.nl_pid;
	/* Groups, also beyond the 32nd, none of which ever speaks here. */
	make(1, AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK, NETLINK_ROUTE);
	at = (struct sockaddr_nl){.nl_family = AF_NETLINK, .nl_groups = 1 << (RTNLGRP_DECnet_IFADDR - 1)};
	NEED(!bind(fds[1], (struct sockaddr *)&at, sizeof at));
	set_number(fds[1], SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_BRVLAN);
	set_number(fds[0], SOL_NETLINK, NETLINK_EXT_ACK, 1);
	set_number(fds[0], SOL_NETLINK, NETLINK_CAP_ACK, 1);
	set_number(fds[1], SOL_NETLINK, NETLINK_PKTINFO, 1);
	set_number(fds[1], SOL_NETLINK, NETLINK_NO_ENOBUFS, 1);
	set_number(fds[1], SOL_SOCKET, SO_RCVBUF, 30000);
	/* Two processes' sockets that talk to each other. */
	for (int i = 2; i < 4; i++) {
		make(i, AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK);
		at = (struct sockaddr_nl){.nl_family = AF_NETLINK, .nl_pid = (uint32_t)getpid() * 8 + (uint32_t)i};
		NEED(!bind(fds[i], (struct sockaddr *)&at, sizeof at));
	}
	NEED(!connect(fds[2], (struct sockaddr *)&at, sizeof at));
	make(4, AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
}

static int netlink_check(void)
{
	struct sockaddr_nl at;
	socklen_t length = sizeof at;
	uint32_t groups[8] = {0};
	CHECK(!getsockname(fds[0], (struct sockaddr *)&at, &length) && at.nl_pid == port && !at.nl_groups);
	CHECK(!getsockname(fds[1], (struct sockaddr *)&at, &length) && at.nl_groups == 1 << (RTNLGRP_DECnet_IFADDR - 1));
	CHECK(!getpeername(fds[2], (struct sockaddr *)&at, &length) && at.nl_pid == (uint32_t)getpid() * 8 + 3);
	CHECK(!getsockname(fds[4], (struct sockaddr *)&at, &length) && !at.nl_pid);
	length = sizeof groups;
	CHECK(!getsockopt(fds[1], SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, groups, &length));
	int group = RTNLGRP_BRVLAN - 1;
	CHECK(groups[group / 32] == (uint32_t)1 << group % 32 && groups[0] == 1 << (RTNLGRP_DECnet_IFADDR - 1));
	CHECK(number(fds[0], SOL_NETLINK, NETLINK_EXT_ACK) == 1 && number(fds[0], SOL_NETLINK, NETLINK_CAP_ACK) == 1);
	CHECK(number(fds[0], SOL_NETLINK, NETLINK_PKTINFO) == 0 && number(fds[1], SOL_NETLINK, NETLINK_PKTINFO) == 1);
	CHECK(number(fds[1], SOL_NETLINK, NETLINK_NO_ENOBUFS) == 1 && number(fds[1], SOL_SOCKET, SO_RCVBUF) == 60000);
	CHECK(number(fds[2], SOL_SOCKET, SO_PROTOCOL) == NETLINK_USERSOCK);
	CHECK(fcntl(fds[1], F_GETFL) == (O_RDWR | O_NONBLOCK));
	CHECK_ALL(asks(fds[0]));
	CHECK(send(fds[2], "hello", 5, 0) == 5 && recv(fds[3], got, 64, MSG_DONTWAIT) == 5);
	return 1;
}

static void netlink_harm(void)
{
	int group = RTNLGRP_BRVLAN;
	setsockopt(fds[1], SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, &group, sizeof group);
}

/* ---- packet ---- */

/* Nobody else's, for tests run side by side. */
#define KIND (0x9000 + 2 * (getpid() & 0x7ff))

static void bind_packet(int i, const char *device, int kind)
{
	struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)kind),
				 .sll_ifindex = device ? (int)if_nametoindex(device) : 0};
	NEED(!bind(fds[i], (struct sockaddr *)&at, sizeof at));
}

static void packet_set(void)
{
	struct packet_mreq promiscuous = {.mr_ifindex = (int)if_nametoindex("lo"), .mr_type = PACKET_MR_PROMISC};
	struct packet_mreq address = {.mr_ifindex = promiscuous.mr_ifindex, .mr_type = PACKET_MR_MULTICAST, .mr_alen = 6,
				      .mr_address = {1, 0, 0x5e, 7, 7, 7}};
	struct sock_filter code[] = {{0x06, 0, 0, 0}}; /* takes nothing */
	struct sock_fprog filter = {1, code};
	struct tpacket_req3 ring = {4096, 4, 2048, 8, 60, 16, 0};
	struct tpacket_req old = {4096, 2, 2048, 4};
	make(0, AF_PACKET, SOCK_DGRAM, 0);
	bind_packet(0, "lo", KIND);
	make(1, AF_PACKET, SOCK_RAW, 0);
	set_number(fds[1], SOL_PACKET, PACKET_AUXDATA, 1);
	set_number(fds[1], SOL_PACKET, PACKET_ORIGDEV, 1);
	set_number(fds[1], SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
	set_number(fds[1], SOL_PACKET, PACKET_TIMESTAMP, 16 /* SOF_TIMESTAMPING_SOFTWARE */);
	set_number(fds[1], SOL_PACKET, PACKET_QDISC_BYPASS, 1);
	NEED(!setsockopt(fds[1], SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promiscuous, sizeof promiscuous));
	NEED(!setsockopt(fds[1], SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promiscuous, sizeof promiscuous));
	NEED(!setsockopt(fds[1], SOL_PACKET, PACKET_ADD_MEMBERSHIP, &address, sizeof address));
	NEED(!setsockopt(fds[1], SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter));
	bind_packet(1, NULL, ETH_P_ALL);
	/* Rings that nobody has mapped. */
	make(2, AF_PACKET, SOCK_RAW, 0);
	set_number(fds[2], SOL_PACKET, PACKET_VERSION, TPACKET_V3);
	set_number(fds[2], SOL_PACKET, PACKET_RESERVE, 32);
	NEED(!setsockopt(fds[2], SOL_PACKET, PACKET_RX_RING, &ring, sizeof ring));
	make(3, AF_PACKET, SOCK_RAW, 0);
	set_number(fds[3], SOL_PACKET, PACKET_VERSION, TPACKET_V2);
	set_number(fds[3], SOL_PACKET, PACKET_LOSS, 1);
	NEED(!setsockopt(fds[3], SOL_PACKET, PACKET_TX_RING, &old, sizeof old));
	/* A group of two that share what comes. */
	for (int i = 4; i < 6; i++) {
		make(i, AF_PACKET, SOCK_DGRAM, 0);
		bind_packet(i, "lo", KIND + 1);
		set_number(fds[i], SOL_PACKET, PACKET_FANOUT, (getpid() & 0x7fff) | PACKET_FANOUT_LB << 16);
	}
}

static int hears(int count, int at, int kind)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)kind), .sll_halen = 6,
				 .sll_ifindex = (int)if_nametoindex("lo")};
	for (int i = 0; i < count; i++) {
		struct pollfd ready = {fds[at + i], POLLIN, 0};
		CHECK(sendto(fds[0], "frame", 5, 0, (struct sockaddr *)&to, sizeof to) == 5);
		CHECK(poll(&ready, 1, 3000) == 1);
		CHECK(recv(fds[at + i], got, 64, MSG_DONTWAIT) == 5 && !memcmp(got, "frame", 5));
	}
	return 1;
}

static int packet_check(void)
{
	struct sockaddr_ll at;
	socklen_t length = sizeof at;
	char lines[256];
	CHECK(!getsockname(fds[0], (struct sockaddr *)&at, &length) && at.sll_protocol == htons(KIND));
	CHECK(at.sll_ifindex == (int)if_nametoindex("lo") && number(fds[0], SOL_SOCKET, SO_TYPE) == SOCK_DGRAM);
	length = sizeof at;
	CHECK(!getsockname(fds[1], (struct sockaddr *)&at, &length) && at.sll_protocol == htons(ETH_P_ALL));
	CHECK(at.sll_ifindex == 0 && number(fds[1], SOL_PACKET, PACKET_AUXDATA) == 1);
	CHECK(number(fds[1], SOL_PACKET, PACKET_ORIGDEV) == 1 && number(fds[1], SOL_PACKET, PACKET_TIMESTAMP) == 16);
	CHECK(number(fds[1], SOL_PACKET, PACKET_IGNORE_OUTGOING) == 1);
	CHECK(number(fds[1], SOL_PACKET, PACKET_QDISC_BYPASS) == 1);
	struct sock_filter code[4];
	length = 4;
	CHECK(!getsockopt(fds[1], SOL_SOCKET, SO_ATTACH_FILTER, code, &length) && length == 1 && code[0].code == 6);
	CHECK(recv(fds[1], lines, sizeof lines, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	CHECK(number(fds[2], SOL_PACKET, PACKET_VERSION) == TPACKET_V3 && number(fds[2], SOL_PACKET, PACKET_RESERVE) == 32);
	CHECK(number(fds[3], SOL_PACKET, PACKET_VERSION) == TPACKET_V2 && number(fds[3], SOL_PACKET, PACKET_LOSS) == 1);
	/* With a ring in place its version cannot be changed; and a ring can be mapped as long as it is. */
	int version = TPACKET_V1;
	CHECK(setsockopt(fds[2], SOL_PACKET, PACKET_VERSION, &version, sizeof version) == -1 && errno == EBUSY);
	void *ring = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_SHARED, fds[2], 0);
	CHECK(ring != MAP_FAILED && !munmap(ring, 16384));
	ring = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fds[3], 0);
	CHECK(ring != MAP_FAILED && !munmap(ring, 8192));
	for (int i = 4; i < 6; i++)
		CHECK(number(fds[i], SOL_PACKET, PACKET_FANOUT) == ((getpid() & 0x7fff) | PACKET_FANOUT_LB << 16));
	CHECK_ALL(hears(1, 0, KIND));
	/* The members take turns; which is first nobody says. */
	for (int i = 0; i < 4; i++) {
		struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(KIND + 1), .sll_halen = 6,
					 .sll_ifindex = (int)if_nametoindex("lo")};
		CHECK(sendto(fds[0], "frame", 5, 0, (struct sockaddr *)&to, sizeof to) == 5);
	}
	for (int i = 4; i < 6; i++) {
		struct pollfd ready = {fds[i], POLLIN, 0};
		for (int j = 0; j < 2; j++)
			CHECK(poll(&ready, 1, 3000) == 1 && recv(fds[i], got, 64, MSG_DONTWAIT) == 5);
	}
	/* Both memberships of one kind are there, and no third. */
	struct packet_mreq promiscuous = {.mr_ifindex = (int)if_nametoindex("lo"), .mr_type = PACKET_MR_PROMISC};
	struct packet_mreq address = {.mr_ifindex = promiscuous.mr_ifindex, .mr_type = PACKET_MR_MULTICAST, .mr_alen = 6,
				      .mr_address = {1, 0, 0x5e, 7, 7, 7}};
	struct packet_mreq *each[] = {&promiscuous, &promiscuous, &address};
	for (int i = 0; i < 3; i++)
		CHECK(!setsockopt(fds[1], SOL_PACKET, PACKET_DROP_MEMBERSHIP, each[i], sizeof promiscuous));
	for (int i = 0; i < 3; i++)
		CHECK(!setsockopt(fds[1], SOL_PACKET, PACKET_ADD_MEMBERSHIP, each[i], sizeof promiscuous));
	return 1;
}

static void packet_harm(void)
{
	int off = 0;
	setsockopt(fds[1], SOL_PACKET, PACKET_ORIGDEV, &off, sizeof off);
}

/* ---- raw ---- */

#define PROTOCOL 253 /* for experiments (RFC 3692) */
/* An address of the process's own. */
#define HERE htonl(0x7f010000u | ((uint32_t)getpid() & 0xffff))

static void raw_set(void)
{
	struct sockaddr_in to = {AF_INET, 0, {HERE}, {0}};
	uint32_t filter = ~(1U << ICMP_TIMESTAMPREPLY);
	struct icmp6_filter none;
	ICMP6_FILTER_SETBLOCKALL(&none);
	make(0, AF_INET, SOCK_RAW, PROTOCOL);
	NEED(!bind(fds[0], (struct sockaddr *)&to, sizeof to));
	/* Connected without a port, which getpeername does not show. */
	make(1, AF_INET, SOCK_RAW | SOCK_NONBLOCK, PROTOCOL);
	to.sin_addr.s_addr = inet_addr("127.0.0.9");
	NEED(!connect(fds[1], (struct sockaddr *)&to, sizeof to));
	set_number(fds[1], IPPROTO_IP, IP_TTL, 9);
	make(2, AF_INET, SOCK_RAW, IPPROTO_ICMP);
	NEED(!setsockopt(fds[2], SOL_RAW, ICMP_FILTER, &filter, sizeof filter));
	set_number(fds[2], IPPROTO_IP, IP_NODEFRAG, 1);
	make(3, AF_INET, SOCK_RAW, IPPROTO_RAW);
	make(4, AF_INET6, SOCK_RAW, PROTOCOL);
	set_number(fds[4], SOL_RAW, IPV6_CHECKSUM, 6);
	set_number(fds[4], IPPROTO_IPV6, IPV6_HDRINCL, 1);
	make(5, AF_INET6, SOCK_RAW, IPPROTO_ICMPV6);
	NEED(!setsockopt(fds[5], IPPROTO_ICMPV6, ICMP6_FILTER, &none, sizeof none));
	/* One for the packets of TCP, which is no TCP socket. */
	make(6, AF_INET, SOCK_RAW, IPPROTO_TCP);
	set_number(fds[6], IPPROTO_IP, IP_HDRINCL, 1);
	NEED(!shutdown(fds[6], SHUT_RDWR) || errno == ENOTCONN);
	to.sin_addr.s_addr = inet_addr("127.99.99.99");
	NEED(!bind(fds[6], (struct sockaddr *)&to, sizeof to));
}

static int raw_check(void)
{
	struct sockaddr_in from = {AF_INET, 0, {HERE}, {0}};
	socklen_t length = sizeof from;
	uint32_t filter = 0;
	struct icmp6_filter none;
	CHECK(!getsockname(fds[0], (struct sockaddr *)&from, &length) && from.sin_addr.s_addr == HERE);
	CHECK(number(fds[0], SOL_SOCKET, SO_PROTOCOL) == PROTOCOL && number(fds[0], SOL_SOCKET, SO_TYPE) == SOCK_RAW);
	CHECK(number(fds[1], IPPROTO_IP, IP_TTL) == 9 && fcntl(fds[1], F_GETFL) == (O_RDWR | O_NONBLOCK));
	length = sizeof filter;
	CHECK(!getsockopt(fds[2], SOL_RAW, ICMP_FILTER, &filter, &length) && filter == ~(1U << ICMP_TIMESTAMPREPLY));
	CHECK(number(fds[2], IPPROTO_IP, IP_NODEFRAG) == 1 && number(fds[0], IPPROTO_IP, IP_NODEFRAG) == 0);
	CHECK(number(fds[3], IPPROTO_IP, IP_HDRINCL) == 1 && number(fds[0], IPPROTO_IP, IP_HDRINCL) == 0);
	CHECK(number(fds[4], SOL_RAW, IPV6_CHECKSUM) == 6 && number(fds[4], IPPROTO_IPV6, IPV6_HDRINCL) == 1);
	length = sizeof none;
	CHECK(!getsockopt(fds[5], IPPROTO_ICMPV6, ICMP6_FILTER, &none, &length) && none.icmp6_filt[3] == 0xffffffff);
	CHECK(number(fds[6], IPPROTO_IP, IP_HDRINCL) == 1 && number(fds[6], SOL_SOCKET, SO_PROTOCOL) == IPPROTO_TCP);
	/* The peer of 1 is still that: nothing from elsewhere comes, and it sends without an address. */
	struct pollfd ready = {fds[0], POLLIN, 0};
	from.sin_addr.s_addr = HERE;
	CHECK(send(fds[1], "away", 4, 0) == 4);
	CHECK(sendto(fds[0], "packet", 6, 0, (struct sockaddr *)&from, sizeof from) == 6);
	CHECK(poll(&ready, 1, 3000) == 1 && recv(fds[0], got, sizeof got, 0) == 26 && !memcmp(got + 20, "packet", 6));
	CHECK(recv(fds[1], got, sizeof got, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	return 1;
}

static void raw_harm(void)
{
	struct sockaddr nobody = {.sa_family = AF_UNSPEC};
	connect(fds[1], &nobody, sizeof nobody);
}

/* ---- ping ---- */

static void ping_set(void)
{
	struct sockaddr_in to = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
	make(0, AF_INET, SOCK_DGRAM, IPPROTO_ICMP);
	NEED(!bind(fds[0], (struct sockaddr *)&to, sizeof to));
	socklen_t length = sizeof to;
	NEED(!getsockname(fds[0], (struct sockaddr *)&to, &length));
	port = to.sin_port;
	make(1, AF_INET6, SOCK_DGRAM, IPPROTO_ICMPV6);
	set_number(fds[0], IPPROTO_IP, IP_TTL, 3);
}

static int ping_check(void)
{
	struct sockaddr_in to = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
	struct icmphdr ask = {.type = ICMP_ECHO};
	socklen_t length = sizeof to;
	struct pollfd ready = {fds[0], POLLIN, 0};
	CHECK(!getsockname(fds[0], (struct sockaddr *)&to, &length) && to.sin_port == port);
	to.sin_port = 0;
	CHECK(number(fds[0], IPPROTO_IP, IP_TTL) == 3 && number(fds[1], SOL_SOCKET, SO_PROTOCOL) == IPPROTO_ICMPV6);
	CHECK(sendto(fds[0], &ask, sizeof ask, 0, (struct sockaddr *)&to, sizeof to) == sizeof ask);
	CHECK(poll(&ready, 1, 3000) == 1 && recv(fds[0], got, sizeof got, 0) == sizeof ask && got[0] == ICMP_ECHOREPLY);
	return 1;
}

static void ping_harm(void)
{
	close(fds[0]);
}

WORKLOAD({"netlink", netlink_set, netlink_check, netlink_harm}, {"packet", packet_set, packet_check, packet_harm},
	 {"raw", raw_set, raw_check, raw_harm}, {"ping", ping_set, ping_check, ping_harm})
