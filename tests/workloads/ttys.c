/* Pseudoterminals with both sides here: settings, what is queued, sides that are closed, the controlling terminal. */
#include "workload.h"
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <asm/termbits.h>

enum { MANY = 5 };

static int master, slave, number, spare;
static int masters[MANY], slaves[MANY], numbers[MANY];
static struct termios2 wanted;

static int new_master(int *index)
{
	int fd = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC), unlocked = 0;
	if (fd < 0)
		cannot_run("no terminals here");
	NEED(!ioctl(fd, TIOCSPTLCK, &unlocked) && !ioctl(fd, TIOCGPTN, index));
	return fd;
}

static int open_slave(int index, int flags)
{
	char path[32];
	snprintf(path, sizeof path, "/dev/pts/%d", index);
	int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC | flags);
	NEED(fd >= 0);
	return fd;
}

static void pair(void)
{
	master = new_master(&number);
	slave = open_slave(number, 0);
	NEED(!ioctl(slave, TCGETS2, &wanted));
}

static void apply(void)
{
	NEED(!ioctl(slave, TCSETS2, &wanted));
}

static void raw(void)
{
	wanted.c_iflag = wanted.c_oflag = wanted.c_lflag = 0;
	wanted.c_cc[VMIN] = 1;
	wanted.c_cc[VTIME] = 0;
	apply();
}

static int same_settings(int fd)
{
	struct termios2 found;
	memset(&found, 0, sizeof found);
	CHECK(!ioctl(fd, TCGETS2, &found));
	CHECK(!memcmp(&found, &wanted, sizeof found));
	return 1;
}

/* Reads from `fd` without waiting for more than what is there now, or comes within a moment. */
static ssize_t take(int fd, char *buffer, size_t size)
{
	struct pollfd ready = {.fd = fd, .events = POLLIN};
	if (poll(&ready, 1, 200) <= 0) {
		errno = EAGAIN;
		return -1;
	}
	return read(fd, buffer, size);
}

static int reads(int fd, const char *text, size_t length)
{
	char buffer[256];
	ssize_t got = take(fd, buffer, sizeof buffer);
	CHECK(got == (ssize_t)length);
	CHECK(!memcmp(buffer, text, length));
	return 1;
}

#define READS(fd, text) CHECK_ALL(reads(fd, text, sizeof text - 1))

static int put(int fd, const char *text)
{
	return write(fd, text, strlen(text)) == (ssize_t)strlen(text);
}

static int nothing(int fd)
{
	struct pollfd ready = {.fd = fd, .events = POLLIN};
	return !poll(&ready, 1, 20);
}

/* Data goes through, both ways; only for terminals in raw mode. */
static int works(void)
{
	CHECK(put(master, "to slave") && put(slave, "to master"));
	READS(slave, "to slave");
	READS(master, "to master");
	return 1;
}

/* ---- settings: of the slave, locked ones, window, lock, exclusive mode, the node's owner ---- */

static void settings_set(void)
{
	struct winsize size = {33, 101, 7, 9};
	struct termios locked;
	int one = 1;
	pair();
	wanted.c_iflag = IXOFF | ISTRIP;
	wanted.c_oflag = OPOST | ONOCR;
	wanted.c_lflag = ECHOE | NOFLSH;
	wanted.c_cflag = (wanted.c_cflag & ~(CBAUD | CBAUD << IBSHIFT)) | BOTHER | BOTHER << IBSHIFT;
	wanted.c_ispeed = wanted.c_ospeed = 12345;
	for (int i = 0; i < NCCS; i++)
		wanted.c_cc[i] = (cc_t)(i + 1);
	apply();
	NEED(!ioctl(slave, TCGETS2, &wanted));
	memset(&locked, 0, sizeof locked);
	locked.c_lflag = NOFLSH;
	locked.c_cc[VINTR] = 1;
	if (ioctl(slave, TIOCSLCKTRMIOS, &locked))
		cannot_run("settings cannot be locked");
	NEED(!ioctl(master, TIOCSWINSZ, &size) && !ioctl(slave, TIOCEXCL) && !ioctl(master, TIOCSPTLCK, &one));
	NEED(!fchown(slave, 12, 34) && !fchmod(slave, 0640));
}

static int settings_check(void)
{
	struct winsize size;
	struct termios locked;
	struct stat st;
	int value = 0;
	CHECK_ALL(same_settings(slave));
	CHECK_ALL(same_settings(master));
	CHECK(!ioctl(slave, TIOCGLCKTRMIOS, &locked) && locked.c_lflag == NOFLSH && locked.c_cc[VINTR] == 1 && !locked.c_iflag);
	CHECK(!ioctl(slave, TIOCGWINSZ, &size) && size.ws_row == 33 && size.ws_col == 101);
	CHECK(size.ws_xpixel == 7 && size.ws_ypixel == 9);
	CHECK(!ioctl(slave, TIOCGEXCL, &value) && value && !ioctl(master, TIOCGEXCL, &value) && !value);
	CHECK(!ioctl(master, TIOCGPTLCK, &value) && value);
	CHECK(!ioctl(master, TIOCGPKT, &value) && !value);
	CHECK(!ioctl(master, TIOCGPTN, &value) && value == number);
	CHECK(!fstat(slave, &st) && st.st_uid == 12 && st.st_gid == 34 && (st.st_mode & 07777) == 0640);
	return 1;
}

static void settings_harm(void)
{
	struct winsize size = {33, 102, 7, 9};
	ioctl(master, TIOCSWINSZ, &size);
}

/* ---- lines: typed in canonical mode: ends of several kinds, quoted bytes, one that is not finished ---- */

static void lines_set(void)
{
	pair();
	wanted.c_lflag &= ~ECHO;
	wanted.c_cc[VEOL] = ';';
	apply();
	NEED(put(master, "first\rstruck\x15second\nby;eof\x04\x04quo\x16\nted\x16\x04\x16\x16\n\x16\x03 half"));
}

static int lines_check(void)
{
	CHECK_ALL(same_settings(slave));
	READS(slave, "first\n");
	READS(slave, "second\n");
	READS(slave, "by;");
	READS(slave, "eof");
	READS(slave, "");
	READS(slave, "quo\nted\x04\x16\n");
	CHECK(nothing(slave));
	CHECK(put(master, "\x7f\x7f\x7f\x7f\x7fother\n"));
	READS(slave, "\x03other\n");
	CHECK(nothing(slave) && nothing(master));
	/* For the next check. */
	return put(master, "first\rstruck\x15second\nby;eof\x04\x04quo\x16\nted\x16\x04\x16\x16\n\x16\x03 half");
}

static void lines_harm(void)
{
	ioctl(slave, TCFLSH, TCIFLUSH);
}

/* ---- plain: typed lines and a part of one, as they mostly are, with echo ---- */

static void plain_set(void)
{
	pair();
	NEED(put(master, "one\ntwo\nthr"));
}

static int plain_check(void)
{
	char text[64] = "";
	size_t got = 0;
	while (got < 13 && !nothing(master))
		got += (size_t)read(master, text + got, sizeof text - got);
	CHECK(got == 13 && !memcmp(text, "one\r\ntwo\r\nthr", 13));
	READS(slave, "one\n");
	READS(slave, "two\n");
	CHECK(nothing(slave) && put(master, "ee\n"));
	READS(slave, "three\n");
	READS(master, "ee\r\n");
	CHECK_ALL(same_settings(slave));
	return put(master, "one\ntwo\nthr");
}

static void plain_harm(void)
{
	ioctl(slave, TCFLSH, TCIFLUSH);
}

/* ---- raw: bytes of all values both ways; a reader that wants many at once ---- */

static void raw_set(void)
{
	pair();
	wanted.c_cc[VMIN] = 9;
	raw();
	wanted.c_cc[VMIN] = 9;
	apply();
	NEED(write(master, "\x00\x03\x04\x11\x13\xff", 6) == 6 && write(slave, "\x00\n\r\x13\xff\x04", 6) == 6);
}

static int raw_check(void)
{
	CHECK_ALL(same_settings(slave));
	CHECK(put(master, "abc"));
	READS(slave, "\x00\x03\x04\x11\x13\xff" "abc");
	READS(master, "\x00\n\r\x13\xff\x04");
	CHECK(nothing(slave) && nothing(master));
	return write(master, "\x00\x03\x04\x11\x13\xff", 6) == 6 && write(slave, "\x00\n\r\x13\xff\x04", 6) == 6;
}

static void raw_harm(void)
{
	ioctl(slave, TCFLSH, TCIOFLUSH);
}

/* ---- full: nobody reads, as much as fits is queued both ways ---- */

static size_t stuff(int fd, char start)
{
	size_t put_in = 0;
	for (int quiet = 0; quiet < 20;) {
		char byte = (char)(start + put_in % 23);
		if (write(fd, &byte, 1) == 1) {
			put_in++;
			quiet = 0;
		} else {
			nap_ms(1);
			quiet++;
		}
	}
	return put_in;
}

static size_t amounts[2];

static void full_fill(void)
{
	amounts[0] = stuff(master, 'a');
	amounts[1] = stuff(slave, 'A');
}

static void full_set(void)
{
	pair();
	raw();
	NEED(!fcntl(master, F_SETFL, O_RDWR | O_NONBLOCK) && !fcntl(slave, F_SETFL, O_RDWR | O_NONBLOCK));
	full_fill();
	NEED(amounts[0] > 4095 && amounts[1] > 4095);
}

static int empty(int fd, char start, size_t expected)
{
	char buffer[512];
	size_t got = 0;
	ssize_t count;
	while ((count = take(fd, buffer, sizeof buffer)) > 0)
		for (ssize_t i = 0; i < count; i++, got++)
			CHECK(buffer[i] == (char)(start + got % 23));
	CHECK(got == expected);
	return 1;
}

static int full_check(void)
{
	CHECK_ALL(empty(slave, 'a', amounts[0]));
	CHECK_ALL(empty(master, 'A', amounts[1]));
	CHECK_ALL(works());
	full_fill();
	return 1;
}

static void full_harm(void)
{
	ioctl(slave, TCFLSH, TCIFLUSH);
}

/* ---- packet: the master in packet mode ---- */

static void packet_set(void)
{
	int one = 1;
	pair();
	NEED(!ioctl(master, TIOCPKT, &one));
	NEED(put(slave, "out\n") && put(master, "in"));
}

static int packet_check(void)
{
	READS(master, "\0out\r\nin");
	CHECK(!ioctl(slave, TCXONC, TCOOFF) && !ioctl(slave, TCXONC, TCOON));
	READS(master, "\x08");
	CHECK(put(master, "\n"));
	READS(slave, "in\n");
	READS(master, "\0\r\n");
	return put(slave, "out\n") && put(master, "in");
}

static void packet_harm(void)
{
	int zero = 0;
	ioctl(master, TIOCPKT, &zero);
}

/* ---- hung: the master is gone ---- */

static void hung_set(void)
{
	pair();
	close(master);
}

static int hung_check(void)
{
	char byte;
	CHECK(read(slave, &byte, 1) == 0);
	CHECK(write(slave, &byte, 1) == -1 && errno == EIO);
	CHECK(ioctl(slave, TCGETS2, &wanted) == -1 && errno == EIO);
	return 1;
}

static void hung_harm(void)
{
	close(slave);
}

/* ---- closed: the slave was open, and is no more; what was typed is still there ---- */

static void closed_set(void)
{
	pair();
	raw();
	if (strstr(mode_name, "typed"))
		NEED(put(master, "left"));
	close(slave);
}

static int closed_check(void)
{
	struct pollfd ready = {.fd = master, .events = POLLIN};
	char byte;
	CHECK(poll(&ready, 1, 0) == 1 && ready.revents & POLLHUP);
	CHECK(read(master, &byte, 1) == -1 && errno == EIO);
	slave = open_slave(number, 0);
	CHECK_ALL(same_settings(slave));
	if (strstr(mode_name, "typed"))
		READS(slave, "left");
	CHECK_ALL(works());
	if (strstr(mode_name, "typed"))
		CHECK(put(master, "left"));
	CHECK(!close(slave));
	return 1;
}

static void closed_harm(void)
{
	slave = open_slave(number, 0);
}

/* ---- unopened: the slave was never open ---- */

static void unopened_set(void)
{
	struct winsize size = {5, 6, 0, 0};
	master = new_master(&number);
	NEED(!ioctl(master, TIOCSWINSZ, &size));
}

static int unopened_check(void)
{
	struct pollfd ready = {.fd = master, .events = POLLIN};
	struct winsize size;
	CHECK(!poll(&ready, 1, 0) && !ready.revents);
	CHECK(!ioctl(master, TIOCGWINSZ, &size) && size.ws_row == 5 && size.ws_col == 6);
	return 1;
}

static void unopened_harm(void)
{
	close(open_slave(number, 0));
}

/* ---- many: several at once, with gaps between their numbers; descriptions, duplicates and flags ---- */

static void many_set(void)
{
	int gap[MANY], unused;
	for (int i = 0; i < MANY; i++) {
		gap[i] = new_master(&unused);
		masters[i] = new_master(&numbers[i]);
		slaves[i] = open_slave(numbers[i], i & 1 ? O_NONBLOCK : 0);
	}
	for (int i = 0; i < MANY; i++)
		close(gap[i]);
	spare = open_slave(numbers[0], O_NONBLOCK);
	NEED(dup2(slaves[1], slaves[1] + 40) >= 0);
	NEED(!fcntl(masters[2], F_SETFL, O_RDWR | O_NONBLOCK));
}

static int many_check(void)
{
	for (int i = 0; i < MANY; i++) {
		int found = -1;
		struct termios2 settings;
		char text[16];
		CHECK(!ioctl(masters[i], TIOCGPTN, &found) && found == numbers[i]);
		CHECK(!ioctl(slaves[i], TCGETS2, &settings));
		settings.c_lflag = settings.c_oflag = 0;
		CHECK(!ioctl(slaves[i], TCSETS2, &settings));
		snprintf(text, sizeof text, "number %d", i);
		CHECK(put(slaves[i], text));
		CHECK_ALL(reads(masters[i], text, strlen(text)));
		CHECK(!!(fcntl(slaves[i], F_GETFL) & O_NONBLOCK) == (i & 1));
	}
	CHECK(fcntl(spare, F_GETFL) & O_NONBLOCK && fcntl(masters[2], F_GETFL) & O_NONBLOCK);
	CHECK(!(fcntl(masters[1], F_GETFL) & O_NONBLOCK));
	CHECK(put(masters[0], "x"));
	READS(spare, "x");
	CHECK(!fcntl(slaves[1] + 40, F_SETFL, O_RDWR) && !(fcntl(slaves[1], F_GETFL) & O_NONBLOCK));
	CHECK(!fcntl(slaves[1], F_SETFL, O_RDWR | O_NONBLOCK));
	return 1;
}

static void many_harm(void)
{
	fcntl(masters[1], F_SETFL, O_RDWR | O_NONBLOCK);
}

/* ---- session: the program leads a session that has the slave as its terminal, by itself, and as /dev/tty ---- */

static volatile sig_atomic_t interrupts;

static void interrupted(int signal)
{
	(void)signal;
	interrupts++;
}

static void session_set(void)
{
	pair();
	NEED(signal(SIGINT, interrupted) != SIG_ERR);
	NEED(!ioctl(slave, TIOCSCTTY, 0));
	spare = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	NEED(spare >= 0);
	if (!strcmp(mode_name, "session-dev-tty"))
		close(slave);
}

static int session_check(void)
{
	pid_t session = 0, group = 0;
	int found = -1, before = interrupts;
	char path[32] = "", again[32];
	CHECK(!ioctl(spare, TIOCGSID, &session) && session == getpid());
	CHECK(!ioctl(spare, TIOCGPGRP, &group) && group == getpid());
	CHECK(!ioctl(spare, TIOCGDEV, &found) && (found & 0xff) == (number & 0xff));
	snprintf(again, sizeof again, "/proc/self/fd/%d", spare);
	CHECK(readlink(again, path, sizeof path - 1) > 0 && !strcmp(path, "/dev/tty"));
	found = open("/dev/tty", O_RDWR | O_NOCTTY);
	CHECK(found >= 0 && !close(found));
	CHECK(put(master, "\x03"));
	for (int i = 0; i < 100 && interrupts == before; i++)
		nap_ms(1);
	CHECK(interrupts == before + 1);
	READS(master, "^C");
	CHECK(put(master, "typed\n"));
	READS(spare, "typed\n");
	READS(master, "typed\r\n");
	return 1;
}

static void session_harm(void)
{
	signal(SIGHUP, SIG_IGN);
	ioctl(spare, TIOCNOTTY);
}

WORKLOAD(
	{"settings", settings_set, settings_check, settings_harm},
	{"lines", lines_set, lines_check, lines_harm},
	{"plain", plain_set, plain_check, plain_harm},
	{"raw", raw_set, raw_check, raw_harm},
	{"full", full_set, full_check, full_harm},
	{"packet", packet_set, packet_check, packet_harm},
	{"hung", hung_set, hung_check, hung_harm},
	{"closed", closed_set, closed_check, closed_harm},
	{"closed-typed", closed_set, closed_check, closed_harm},
	{"unopened", unopened_set, unopened_check, unopened_harm},
	{"many", many_set, many_check, many_harm},
	{"session", session_set, session_check, session_harm},
	{"session-dev-tty", session_set, session_check, session_harm},
)
