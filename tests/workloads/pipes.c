/* Pipes and FIFOs: what is inside, where packets end, which ends there are and how each is open. */
#include "workload.h"

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>

enum { BYTES = 65536, LARGEFILE = 0100000 };

static int fds[16];
static char expected[1 << 20], got[1 << 20];

static int flags_of(int fd)
{
	return fcntl(fd, F_GETFL);
}

static int pending(int fd)
{
	int bytes = -1;
	return ioctl(fd, FIONREAD, &bytes) ? -1 : bytes;
}

/* Bytes waiting in a pipe of both ends, one of them dup'ed; the check leaves as much in it as it found. */
static void stream_set(void)
{
	NEED(!pipe(fds));
	fds[2] = dup(fds[1]);
	NEED(fds[2] >= 0);
	fill(expected, 4096, 1);
	NEED(write(fds[1], expected, 1000) == 1000 && write(fds[2], expected + 1000, 3096) == 3096);
}

static int stream_check(void)
{
	CHECK(pending(fds[0]) == 4096);
	CHECK(read(fds[0], got, sizeof got) == 4096 && !memcmp(got, expected, 4096));
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, fds[1], fds[2]) == 0);
	CHECK(write(fds[2], expected, 4096) == 4096);
	return 1;
}

static void stream_harm(void)
{
	read(fds[0], got, 1);
}

/* A pipe filled to the last byte, and one filled by many small writes that share no page. */
static void full_set(void)
{
	NEED(!pipe2(fds, O_NONBLOCK) && !pipe2(fds + 2, O_NONBLOCK));
	fill(expected, BYTES, 2);
	NEED(write(fds[1], expected, BYTES) == BYTES);
	NEED(write(fds[1], expected, 1) == -1 && errno == EAGAIN);
	for (int i = 0; i < 16; i++)
		NEED(write(fds[3], expected + 3000 * i, 3000) == 3000);
}

static int full_check(void)
{
	CHECK(pending(fds[0]) == BYTES && pending(fds[2]) == 48000);
	CHECK(write(fds[1], expected, 1) == -1 && errno == EAGAIN);
	CHECK(read(fds[0], got, sizeof got) == BYTES && !memcmp(got, expected, BYTES));
	CHECK(write(fds[1], expected, BYTES) == BYTES);
	CHECK(read(fds[2], got, sizeof got) == 48000 && !memcmp(got, expected, 48000));
	CHECK(write(fds[3], expected, 48000) == 48000);
	return 1;
}

/* Full, though there are far fewer bytes in it than its capacity: by small writes that share no page, also of a FIFO; by
 * splice; by a page of which a part was read; and one whose last page has room. */
enum { SMALL = 3000, TINY = 5 };

static int is_full(int fd)
{
	struct pollfd ask = {fd, POLLOUT, 0};
	return poll(&ask, 1, 0) == 0;
}

static void pages_set(void)
{
	int other[2];
	fill(expected, BYTES, 5);
	for (int i = 0; i < 8; i += 2)
		NEED(!pipe2(fds + i, O_NONBLOCK));
	NEED(!mkfifo("small", 0600) && (fds[8] = open("small", O_RDWR | O_NONBLOCK)) >= 0 && !pipe(other));
	for (int i = 0; i < 16; i++) {
		NEED(write(fds[1], expected + SMALL * i, SMALL) == SMALL && write(fds[8], expected + i, SMALL) == SMALL);
		NEED(write(other[1], expected, TINY) == TINY && splice(other[0], NULL, fds[3], NULL, TINY, 0) == TINY);
		NEED(i == 15 || write(fds[7], expected, SMALL) == SMALL);
	}
	NEED(write(fds[5], expected, BYTES) == BYTES && read(fds[4], got, 1) == 1 && !close(other[0]) && !close(other[1]));
}

static int pages_check(void)
{
	CHECK(is_full(fds[1]) && is_full(fds[3]) && is_full(fds[5]) && is_full(fds[8]) && !is_full(fds[7]));
	CHECK(pending(fds[0]) == 16 * SMALL && pending(fds[2]) == 16 * TINY && pending(fds[4]) == BYTES - 1);
	CHECK(write(fds[1], expected, 1500) == -1 && errno == EAGAIN && write(fds[8], expected, 1500) == -1);
	CHECK(write(fds[5], expected, 1) == -1 && errno == EAGAIN);
	CHECK(write(fds[7], expected, 4096) == 4096 && is_full(fds[7]));
	CHECK(write(fds[1], expected, 1000) == 1000 && read(fds[0], got, 16 * SMALL) == 16 * SMALL);
	CHECK(!memcmp(got, expected, 16 * SMALL) && read(fds[0], got, BYTES) == 1000);
	CHECK(read(fds[4], got, 4095) == 4095 && write(fds[5], expected, 4096) == 4096 && is_full(fds[5]));
	CHECK(read(fds[2], got, BYTES) == 16 * TINY && !memcmp(got + TINY, expected, TINY));
	CHECK(read(fds[8], got, SMALL) == SMALL && !memcmp(got, expected, SMALL) && !is_full(fds[8]));
	return 1;
}

/* Capacities: less than usual, more, more and full. */
static const int sizes[3] = {4096, 131072, 1 << 20};

static void capacity_set(void)
{
	fill(expected, sizeof expected, 3);
	for (int i = 0; i < 3; i++) {
		NEED(!pipe(fds + 2 * i));
		NEED(fcntl(fds[2 * i], F_SETPIPE_SZ, sizes[i]) == sizes[i]);
	}
	NEED(write(fds[1], expected, 4096) == 4096);
	NEED(write(fds[5], expected, 1 << 20) == 1 << 20);
}

static int capacity_check(void)
{
	for (int i = 0; i < 3; i++)
		CHECK(fcntl(fds[2 * i + 1], F_GETPIPE_SZ) == sizes[i]);
	CHECK(pending(fds[0]) == 4096 && pending(fds[2]) == 0 && pending(fds[4]) == 1 << 20);
	CHECK(read(fds[4], got, sizeof got) == 1 << 20 && !memcmp(got, expected, sizeof got));
	CHECK(write(fds[5], expected, 1 << 20) == 1 << 20);
	return 1;
}

static void capacity_harm(void)
{
	fcntl(fds[2], F_SETPIPE_SZ, 65536);
}

/* Packets: each read gets one. */
static const int lengths[6] = {3, 1, 4096, 1, 1, 700};

static void packets_set(void)
{
	fill(expected, BYTES, 4);
	NEED(!pipe2(fds, O_DIRECT | O_NONBLOCK));
	for (int i = 0; i < 6; i++)
		NEED(write(fds[1], expected + i, lengths[i]) == lengths[i]);
}

static int packets_check(void)
{
	CHECK(flags_of(fds[0]) == (O_RDONLY | O_NONBLOCK));
	CHECK(flags_of(fds[1]) == (O_WRONLY | O_DIRECT | O_NONBLOCK));
	for (int i = 0; i < 6; i++)
		CHECK(read(fds[0], got, sizeof got) == lengths[i] && !memcmp(got, expected + i, lengths[i]));
	CHECK(read(fds[0], got, 1) == -1 && errno == EAGAIN);
	for (int i = 0; i < 6; i++)
		CHECK(write(fds[1], expected + i, lengths[i]) == lengths[i]);
	return 1;
}

static void packets_harm(void)
{
	read(fds[0], got, 1);
}

/* Bytes, two packets, bytes, a packet; and a packet alone whose writer has left packet mode.
 * Bytes that came by tee are not joined by a packet written behind them, as written ones are. */
static void tee_in(int to, const char *bytes)
{
	int from[2];
	ssize_t length = (ssize_t)strlen(bytes);
	NEED(!pipe(from) && write(from[1], bytes, strlen(bytes)) == length);
	NEED(tee(from[0], to, strlen(bytes), 0) == length && !close(from[0]) && !close(from[1]));
}

static void mixed_set(void)
{
	NEED(!pipe2(fds, O_NONBLOCK) && !pipe2(fds + 2, O_NONBLOCK | O_DIRECT));
	tee_in(fds[1], "ab");
	NEED(!fcntl(fds[1], F_SETFL, O_DIRECT) && write(fds[1], "cd", 2) == 2 && write(fds[1], "e", 1) == 1);
	NEED(!fcntl(fds[1], F_SETFL, 0) && write(fds[1], "fg", 2) == 2 && write(fds[1], "h", 1) == 1);
	tee_in(fds[1], "i");
	NEED(!fcntl(fds[1], F_SETFL, O_DIRECT) && write(fds[1], "jkl", 3) == 3 && !fcntl(fds[1], F_SETFL, O_NONBLOCK));
	NEED(write(fds[3], "xyz", 3) == 3 && !fcntl(fds[3], F_SETFL, 0));
}

static int mixed_check(void)
{
	CHECK(read(fds[0], got, 1) == 1 && got[0] == 'a');
	CHECK(read(fds[0], got, 64) == 3 && !memcmp(got, "bcd", 3));
	CHECK(read(fds[0], got, 64) == 1 && got[0] == 'e');
	CHECK(read(fds[0], got, 4) == 4 && !memcmp(got, "fghi", 4));
	CHECK(read(fds[0], got, 2) == 2 && !memcmp(got, "jk", 2));
	CHECK(read(fds[0], got, 1) == -1 && errno == EAGAIN);
	CHECK(read(fds[2], got, 1) == 1 && read(fds[2], got, 1) == -1 && errno == EAGAIN);
	CHECK(flags_of(fds[3]) == O_WRONLY);
	return 1;
}

/* Every end with flags of its own: O_NONBLOCK, both ways, opened again through /proc; O_APPEND and O_NOATIME. */
static void flags_set(void)
{
	char path[64];
	NEED(!pipe(fds) && !fcntl(fds[1], F_SETFL, O_NONBLOCK | O_APPEND));
	snprintf(path, sizeof path, "/proc/self/fd/%d", fds[0]);
	fds[2] = open(path, O_RDWR);
	fds[3] = open(path, O_RDONLY | O_NONBLOCK);
	fds[4] = open(path, O_WRONLY | O_CLOEXEC);
	NEED(fds[2] >= 0 && fds[3] >= 0 && fds[4] >= 0 && !fcntl(fds[2], F_SETFL, O_NOATIME));
	NEED(write(fds[2], "five", 4) == 4);
}

static int flags_check(void)
{
	static const int flags[] = {O_RDONLY, O_WRONLY | O_NONBLOCK | O_APPEND, O_RDWR | O_NOATIME | LARGEFILE,
		O_RDONLY | O_NONBLOCK | LARGEFILE, O_WRONLY | LARGEFILE};
	struct stat one, other;
	CHECK(!fstat(fds[0], &one));
	for (int i = 0; i < 5; i++) {
		CHECK(flags_of(fds[i]) == flags[i]);
		CHECK(!fstat(fds[i], &other) && one.st_ino == other.st_ino);
		for (int k = 0; k < i; k++)
			CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, fds[i], fds[k]) > 0);
	}
	CHECK(fcntl(fds[4], F_GETFD) == FD_CLOEXEC && fcntl(fds[2], F_GETFD) == 0);
	CHECK(read(fds[3], got, 64) == 4 && !memcmp(got, "five", 4));
	CHECK(read(fds[3], got, 64) == -1 && errno == EAGAIN);
	CHECK(write(fds[4], "five", 4) == 4);
	return 1;
}

static void flags_harm(void)
{
	fcntl(fds[3], F_SETFL, 0);
}

/* Only one end left anywhere: data and then the end of it; a broken pipe; data that only a new reader could get. */
static void halves_set(void)
{
	for (int i = 0; i < 3; i++)
		NEED(!pipe(fds + 2 * i));
	NEED(write(fds[1], "rest", 4) == 4 && write(fds[5], "lost", 4) == 4);
	NEED(fcntl(fds[3], F_SETPIPE_SZ, 8192) == 8192);
	NEED(!close(fds[1]) && !close(fds[2]) && !close(fds[4]));
	signal(SIGPIPE, SIG_IGN);
}

static int halves_check(void)
{
	char path[64];
	struct pollfd ask = {fds[0], POLLIN, 0};
	CHECK(poll(&ask, 1, 0) == 1 && ask.revents == (POLLIN | POLLHUP));
	CHECK(read(fds[0], got, 64) == 4 && !memcmp(got, "rest", 4) && read(fds[0], got, 64) == 0);
	CHECK(write(fds[3], "x", 1) == -1 && errno == EPIPE && fcntl(fds[3], F_GETPIPE_SZ) == 8192);
	CHECK(write(fds[5], "x", 1) == -1 && errno == EPIPE);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fds[5]);
	int reader = open(path, O_RDONLY | O_NONBLOCK);
	CHECK(reader >= 0 && read(reader, got, 64) == 4 && !memcmp(got, "lost", 4) && !close(reader));
	return 1;
}

static void halves_harm(void)
{
	read(fds[0], got, 1);
}

/* Who is told by a signal when the pipe changes. */
static void owner_set(void)
{
	struct f_owner_ex owner = {F_OWNER_PID, getpid()};
	signal(SIGUSR1, SIG_IGN);
	NEED(!pipe(fds) && !fcntl(fds[0], F_SETOWN_EX, &owner) && !fcntl(fds[0], F_SETSIG, SIGUSR1));
	NEED(!fcntl(fds[0], F_SETFL, O_ASYNC | O_NONBLOCK));
}

static int owner_check(void)
{
	struct f_owner_ex owner;
	CHECK(!fcntl(fds[0], F_GETOWN_EX, &owner) && owner.type == F_OWNER_PID && owner.pid == getpid());
	CHECK(fcntl(fds[0], F_GETSIG) == SIGUSR1 && flags_of(fds[0]) == (O_RDONLY | O_ASYNC | O_NONBLOCK));
	return 1;
}

static void owner_harm(void)
{
	fcntl(fds[0], F_SETSIG, SIGUSR2);
}

/* FIFOs by name: both ways, and a reader and a writer of their own. */
static void fifo_set(void)
{
	NEED(!mkfifo("both", 0640) && !mkfifo("ends", 0600));
	fds[0] = open("both", O_RDWR);
	fds[1] = open("ends", O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
	fds[2] = open("ends", O_WRONLY | O_CLOEXEC);
	fds[3] = open("ends", O_PATH);
	NEED(fds[0] >= 0 && fds[1] >= 0 && fds[2] >= 0 && fds[3] >= 0);
	NEED(fcntl(fds[2], F_SETPIPE_SZ, 16384) == 16384);
	NEED(write(fds[0], "to myself", 9) == 9 && write(fds[2], "to the reader", 13) == 13);
}

static int fifo_check(void)
{
	struct stat inode, name;
	CHECK((flags_of(fds[0]) & ~LARGEFILE) == O_RDWR && (flags_of(fds[2]) & ~LARGEFILE) == O_WRONLY);
	CHECK((flags_of(fds[1]) & ~LARGEFILE) == (O_RDONLY | O_NONBLOCK | O_NOFOLLOW));
	CHECK(!fstat(fds[0], &inode) && !stat("both", &name) && inode.st_ino == name.st_ino);
	CHECK(read(fds[0], got, 64) == 9 && !memcmp(got, "to myself", 9) && write(fds[0], got, 9) == 9);
	CHECK(fcntl(fds[1], F_GETPIPE_SZ) == 16384 && fcntl(fds[0], F_GETPIPE_SZ) == 65536);
	CHECK(read(fds[1], got, 64) == 13 && !memcmp(got, "to the reader", 13));
	CHECK(read(fds[1], got, 64) == -1 && errno == EAGAIN);
	CHECK(write(fds[2], "to the reader", 13) == 13);
	return 1;
}

static void fifo_harm(void)
{
	read(fds[1], got, 1);
}

/* A FIFO without a name any more, and the only end of one that has a name. */
static void nameless_set(void)
{
	NEED(!mkfifo("gone", 0604) && !mkfifo("alone", 0600));
	fds[0] = open("gone", O_RDONLY | O_NONBLOCK);
	fds[1] = open("gone", O_WRONLY);
	fds[2] = open("alone", O_RDONLY | O_NONBLOCK);
	NEED(fds[0] >= 0 && fds[1] >= 0 && fds[2] >= 0 && !unlink("gone") && write(fds[1], "secret", 6) == 6);
}

static int nameless_check(void)
{
	struct stat inode, other;
	CHECK(!fstat(fds[0], &inode) && !fstat(fds[1], &other) && inode.st_ino == other.st_ino);
	CHECK(inode.st_nlink == 0 && inode.st_mode == (S_IFIFO | 0604) && access("gone", F_OK) == -1);
	CHECK(read(fds[0], got, 64) == 6 && !memcmp(got, "secret", 6) && write(fds[1], "secret", 6) == 6);
	CHECK(read(fds[2], got, 64) == 0);
	return 1;
}

static void nameless_harm(void)
{
	read(fds[0], got, 1);
}

/* Many pipes at once, half of them empty. */
enum { MANY = 150 };
static int many[MANY][2];

static void many_set(void)
{
	for (int i = 0; i < MANY; i++) {
		NEED(!pipe(many[i]));
		if (i % 2)
			NEED(write(many[i][1], &i, sizeof i) == sizeof i);
	}
}

static int many_check(void)
{
	for (int i = 0; i < MANY; i++) {
		int value = 0;
		CHECK(pending(many[i][0]) == (i % 2 ? sizeof i : 0));
		if (i % 2)
			CHECK(read(many[i][0], &value, 4) == 4 && value == i && write(many[i][1], &i, 4) == 4);
	}
	return 1;
}

static void many_harm(void)
{
	write(many[20][1], "x", 1);
}

WORKLOAD(
	{"stream", stream_set, stream_check, stream_harm},
	{"full", full_set, full_check, stream_harm},
	{"pages", pages_set, pages_check, stream_harm},
	{"capacity", capacity_set, capacity_check, capacity_harm},
	{"packets", packets_set, packets_check, packets_harm},
	{"mixed", mixed_set, mixed_check, packets_harm},
	{"flags", flags_set, flags_check, flags_harm},
	{"halves", halves_set, halves_check, halves_harm},
	{"owner", owner_set, owner_check, owner_harm},
	{"fifo", fifo_set, fifo_check, fifo_harm},
	{"nameless", nameless_set, nameless_check, nameless_harm},
	{"many", many_set, many_check, many_harm},
)
