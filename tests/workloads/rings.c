/* Packet sockets whose rings are mapped: frames and blocks that wait, and both sides' places in the ring. */
#include "workload.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>

/* Nobody else's, for tests run side by side; others than those of the program for sockets without rings. */
#define KIND (0xa000 + 2 * (getpid() & 0x7ff))
#define BLOCK 8192u
#define BLOCKS 4u
#define FRAME 512u
#define FRAMES (BLOCK * BLOCKS / FRAME)
#define EACH 3u
#define PATIENCE 5000

static int sender, ringed, listener, version, kind;
static char *ring, *sending;
static int device;
/* What has been sent; shared by the processes of the tree: whose turn it is, and what has been taken. */
static uint32_t sent, place;
static struct { volatile int turn, verdict; uint32_t taken; } *shared;

static int make(int type)
{
	int fd = socket(AF_PACKET, type, 0);
	if (fd < 0 && (errno == EAFNOSUPPORT || errno == EPERM))
		cannot_run("no packet sockets here");
	NEED(fd >= 0);
	return fd;
}

static void bind_to(int fd, int to)
{
	struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)to), .sll_ifindex = device};
	NEED(!bind(fd, (struct sockaddr *)&at, sizeof at));
}

static void begin(int how)
{
	version = how;
	kind = KIND;
	device = (int)if_nametoindex("lo");
	sender = make(SOCK_DGRAM);
	ringed = make(SOCK_RAW);
	shared = mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(shared != MAP_FAILED && !setsockopt(ringed, SOL_PACKET, PACKET_VERSION, &version, sizeof version));
}

static void map_ring(size_t bytes)
{
	ring = mmap(NULL, bytes, RW, MAP_SHARED, ringed, 0);
	NEED(ring != MAP_FAILED);
}

static int say(uint32_t count)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)kind), .sll_halen = 6,
				 .sll_ifindex = device};
	for (; count; count--, sent++)
		CHECK(sendto(sender, &sent, sizeof sent, 0, (struct sockaddr *)&to, sizeof to) == sizeof sent);
	return 1;
}

/* ---- frames that are received (versions 1 and 2) ---- */

static volatile uint32_t *frame(uint32_t number)
{
	return (volatile uint32_t *)(ring + (size_t)(number % FRAMES) * FRAME);
}

/* Takes the next frame, which must have come and be that with the next number. */
static int take(void)
{
	volatile uint32_t *status = frame(shared->taken);
	uint32_t got;
	for (int i = 0; i < PATIENCE && !(*status & TP_STATUS_USER); i++)
		nap_ms(1);
	CHECK(*status & TP_STATUS_USER);
	const char *start = (const char *)status;
	uint16_t mac = version == TPACKET_V1 ? ((const struct tpacket_hdr *)start)->tp_mac
					     : ((const struct tpacket2_hdr *)start)->tp_mac;
	memcpy(&got, start + mac + ETH_HLEN, sizeof got);
	CHECK(got == shared->taken);
	*status = TP_STATUS_KERNEL;
	shared->taken++;
	return 1;
}

static void frames_set(int how, uint32_t left)
{
	struct tpacket_req size = {BLOCK, BLOCKS, FRAME, FRAMES};
	begin(how);
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_RX_RING, &size, sizeof size));
	map_ring(BLOCK * BLOCKS);
	bind_to(ringed, kind);
	/* Once around, and some more. */
	for (uint32_t i = 0; i < FRAMES + 13; i++)
		NEED(say(1) == 1 && take() == 1);
	NEED(say(left) == 1);
}

static int frames_check(void)
{
	uint32_t left = sent - shared->taken;
	for (uint32_t i = 0; i < left; i++) {
		CHECK(*frame(shared->taken) & TP_STATUS_USER);
		CHECK_ALL(take());
	}
	CHECK(*frame(shared->taken) == TP_STATUS_KERNEL);
	CHECK_ALL(say(7));
	for (uint32_t i = 0; i < 7; i++)
		CHECK_ALL(take());
	return say(left);
}

static void second_set(void)
{
	frames_set(TPACKET_V2, 5);
}

static void first_set(void)
{
	/* A filter that takes all, and stays. */
	struct sock_filter code[] = {{0x06, 0, 0, 0xffff}};
	struct sock_fprog filter = {1, code};
	int yes = 1;
	frames_set(TPACKET_V1, 1);
	NEED(!setsockopt(ringed, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter));
	NEED(!setsockopt(ringed, SOL_SOCKET, SO_LOCK_FILTER, &yes, sizeof yes));
}

static void full_set(void)
{
	frames_set(TPACKET_V2, FRAMES);
}

/* ---- a ring that has not been used; two that cannot be saved ---- */

static void unused_set(void)
{
	struct tpacket_req size = {BLOCK, BLOCKS, FRAME, FRAMES};
	begin(TPACKET_V2);
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_RX_RING, &size, sizeof size));
	map_ring(BLOCK * BLOCKS);
	bind_to(ringed, kind);
}

static void closed_set(void)
{
	unused_set();
	NEED(!close(ringed));
}

static void part_set(void)
{
	unused_set();
	NEED(!munmap(ring + BLOCK, BLOCK));
}

static int unused_check(void)
{
	CHECK(*frame(0) == TP_STATUS_KERNEL);
	return 1;
}

static void unused_harm(void)
{
	*frame(0) = TP_STATUS_USER;
}

static void frames_harm(void)
{
	*frame(shared->taken) = TP_STATUS_KERNEL;
}

/* ---- blocks ---- */

static struct tpacket_block_desc *block(uint32_t number)
{
	return (struct tpacket_block_desc *)(ring + (size_t)(number % BLOCKS) * BLOCK);
}

static volatile uint32_t *block_status(uint32_t number)
{
	return &block(number)->hdr.bh1.block_status;
}

/* Takes blocks until all that was sent has been taken, in order. */
static int take_blocks(void)
{
	for (int i = 0; i < PATIENCE && shared->taken != sent; i++) {
		if (!(*block_status(place) & TP_STATUS_USER)) {
			nap_ms(1);
			continue;
		}
		struct tpacket_hdr_v1 *head = &block(place)->hdr.bh1;
		char *at = (char *)block(place) + head->offset_to_first_pkt;
		for (uint32_t packet = 0; packet < head->num_pkts; packet++) {
			struct tpacket3_hdr *each = (struct tpacket3_hdr *)at;
			uint32_t got;
			memcpy(&got, at + each->tp_mac + ETH_HLEN, sizeof got);
			CHECK(got == shared->taken);
			shared->taken++;
			at += each->tp_next_offset;
		}
		*block_status(place) = TP_STATUS_KERNEL;
		place++;
	}
	CHECK(shared->taken == sent);
	return 1;
}

/* Packets in blocks of their own, which the kernel hands over when their time is up. */
static int leave_blocks(uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		CHECK_ALL(say(EACH));
		for (int wait = 0; wait < PATIENCE && !(*block_status(place + i) & TP_STATUS_USER); wait++)
			nap_ms(1);
		CHECK(*block_status(place + i) & TP_STATUS_USER);
	}
	return 1;
}

static void blocks_set(void)
{
	struct tpacket_req3 size = {BLOCK, BLOCKS, FRAME, FRAMES, 20, 16, 0};
	begin(TPACKET_V3);
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_RX_RING, &size, sizeof size));
	map_ring(BLOCK * BLOCKS);
	bind_to(ringed, kind);
	for (uint32_t i = 0; i < BLOCKS + 1; i++)
		NEED(leave_blocks(1) == 1 && take_blocks() == 1);
	/* The last ones may be in a block that the kernel still fills. */
	NEED(leave_blocks(1) == 1 && say(2) == 1);
}

static int blocks_check(void)
{
	CHECK_ALL(take_blocks());
	CHECK_ALL(leave_blocks(1));
	CHECK_ALL(take_blocks());
	return leave_blocks(1) == 1 ? say(2) : 0;
}

static void blocks_full_set(void)
{
	blocks_set();
	NEED(take_blocks() == 1 && leave_blocks(BLOCKS) == 1);
}

static int blocks_full_check(void)
{
	for (uint32_t i = 0; i < BLOCKS; i++)
		CHECK(*block_status(i) & TP_STATUS_USER);
	CHECK_ALL(take_blocks());
	CHECK_ALL(leave_blocks(1));
	CHECK_ALL(take_blocks());
	return leave_blocks(BLOCKS);
}

static void blocks_harm(void)
{
	block(place)->hdr.bh1.num_pkts--;
}

/* ---- frames that are sent ---- */

static volatile uint32_t *slot(uint32_t number)
{
	char *start = sending + (size_t)(number % FRAMES) * FRAME;
	return version == TPACKET_V3 ? &((struct tpacket3_hdr *)start)->tp_status : (uint32_t *)start;
}

/* Prepares the next frame. */
static int prepare(uint32_t number)
{
	char *start = sending + (size_t)(number % FRAMES) * FRAME;
	char *data = start + TPACKET_ALIGN(version == TPACKET_V3 ? sizeof(struct tpacket3_hdr) : sizeof(struct tpacket2_hdr));
	uint16_t type = htons((uint16_t)(kind + 1));
	CHECK(*slot(number) == TP_STATUS_AVAILABLE);
	memset(data, 0, 60);
	memcpy(data + 12, &type, 2);
	memcpy(data + ETH_HLEN, &number, sizeof number);
	if (version == TPACKET_V3)
		((struct tpacket3_hdr *)start)->tp_len = 60;
	else
		((struct tpacket2_hdr *)start)->tp_len = 60;
	*slot(number) = TP_STATUS_SEND_REQUEST;
	return 1;
}

/* Has the kernel send what is prepared: frames `place` up to `end`. */
static int go_on(uint32_t end)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons((uint16_t)(kind + 1)), .sll_halen = 6,
				 .sll_ifindex = device};
	struct timeval patience = {5, 0};
	uint32_t got[32];
	CHECK(sendto(ringed, NULL, 0, 0, (struct sockaddr *)&to, sizeof to) == 60 * (ssize_t)(end - place));
	CHECK(!setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience));
	for (; place != end; place++) {
		CHECK(recv(listener, got, sizeof got, 0) == 46 && got[0] == place);
		for (int i = 0; i < PATIENCE && *slot(place) != TP_STATUS_AVAILABLE; i++)
			nap_ms(1);
	}
	return 1;
}

static void listen_set(void)
{
	listener = make(SOCK_DGRAM);
	bind_to(listener, kind + 1);
}

static void send_set(int how)
{
	struct tpacket_req3 size = {BLOCK, BLOCKS, FRAME, FRAMES, 0, 0, 0};
	begin(how);
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_TX_RING, &size, how == TPACKET_V3 ? sizeof size : sizeof(struct tpacket_req)));
	map_ring(BLOCK * BLOCKS);
	sending = ring;
	listen_set();
	for (uint32_t i = 0; i < FRAMES + 5; i++)
		NEED(prepare(i) == 1 && go_on(i + 1) == 1);
	NEED(prepare(place) == 1 && prepare(place + 1) == 1);
}

static void send_second_set(void)
{
	send_set(TPACKET_V2);
}

static void send_third_set(void)
{
	send_set(TPACKET_V3);
}

static int send_check(void)
{
	CHECK_ALL(go_on(place + 2));
	for (uint32_t i = 0; i < 4; i++)
		CHECK_ALL(prepare(place + i));
	CHECK_ALL(go_on(place + 4));
	return prepare(place) == 1 ? prepare(place + 1) : 0;
}

static void send_harm(void)
{
	*slot(place) = TP_STATUS_AVAILABLE;
}

/* ---- two processes with both rings of one socket ---- */

static void child(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		if (shared->turn) {
			shared->verdict = take();
			__atomic_store_n(&shared->turn, 0, __ATOMIC_SEQ_CST);
		}
		short_nap();
	}
}

static void shared_set(void)
{
	struct tpacket_req size = {BLOCK, BLOCKS, FRAME, FRAMES};
	begin(TPACKET_V2);
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_RX_RING, &size, sizeof size));
	NEED(!setsockopt(ringed, SOL_PACKET, PACKET_TX_RING, &size, sizeof size));
	map_ring(2 * BLOCK * BLOCKS);
	sending = ring + BLOCK * BLOCKS;
	bind_to(ringed, kind);
	listen_set();
	for (uint32_t i = 0; i < 21; i++)
		NEED(say(1) == 1 && take() == 1);
	for (uint32_t i = 0; i < 3; i++)
		NEED(prepare(i) == 1 && go_on(i + 1) == 1);
	NEED(prepare(place) == 1 && prepare(place + 1) == 1 && say(4) == 1);
	/* A part has another protection. */
	NEED(!mprotect(ring + 2 * BLOCK * BLOCKS - PAGE, PAGE, PROT_READ));
	pid_t pid = fork();
	NEED(pid >= 0);
	if (!pid)
		child();
}

static int by_child(void)
{
	shared->turn = 1;
	for (int i = 0; i < PATIENCE && __atomic_load_n(&shared->turn, __ATOMIC_SEQ_CST); i++)
		nap_ms(1);
	CHECK(!shared->turn);
	return shared->verdict;
}

static int shared_check(void)
{
	for (uint32_t i = 0; i < 2; i++) {
		CHECK_ALL(take());
		CHECK_ALL(by_child());
	}
	CHECK(*frame(shared->taken) == TP_STATUS_KERNEL);
	CHECK_ALL(go_on(place + 2));
	CHECK(prepare(place) == 1 && prepare(place + 1) == 1);
	return say(4);
}

WORKLOAD({"second", second_set, frames_check, frames_harm}, {"first", first_set, frames_check, frames_harm},
	 {"full", full_set, frames_check, frames_harm}, {"unused", unused_set, frames_check, unused_harm},
	 {"closed", closed_set, unused_check, unused_harm}, {"part", part_set, unused_check, unused_harm}, {"blocks", blocks_set, blocks_check, blocks_harm},
	 {"blocks-full", blocks_full_set, blocks_full_check, blocks_harm},
	 {"send", send_second_set, send_check, send_harm}, {"send-third", send_third_set, send_check, send_harm},
	 {"shared", shared_set, shared_check, frames_harm})
