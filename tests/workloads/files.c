/* Open files by path: positions, flags, sharing of open file descriptions, special files, owners. */
#include "workload.h"

#include <dirent.h>
#include <signal.h>

/* What the kernel adds to the flags of every file that a 64-bit program opens; O_LARGEFILE is 0 there. */
enum { BYTES = 65536, KERNEL_LARGEFILE = 0100000 };

static int fds[16];
static char expected[BYTES];

/* Reading, writing and both, each at a position of its own. */
static void positions_set(void)
{
	static const int flags[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDONLY | O_NOATIME | O_NONBLOCK, O_RDWR | O_SYNC};
	close(make_file("data", BYTES, 1));
	fill(expected, BYTES, 1);
	for (int i = 0; i < 5; i++) {
		fds[i] = open("data", flags[i]);
		NEED(fds[i] >= 0);
		NEED(lseek(fds[i], 1000 * i + 8, SEEK_SET) == 1000 * i + 8);
	}
	NEED(lseek(fds[4], 10LL * BYTES, SEEK_SET) == 10LL * BYTES);
}

static int positions_check(void)
{
	static const int flags[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDONLY | O_NOATIME | O_NONBLOCK, O_RDWR | O_SYNC};
	char got[8];
	for (int i = 0; i < 5; i++) {
		CHECK((fcntl(fds[i], F_GETFL) & ~KERNEL_LARGEFILE) == flags[i]);
		CHECK(lseek(fds[i], 0, SEEK_CUR) == (i < 4 ? 1000 * i + 8 : 10LL * BYTES));
	}
	for (int i = 0; i < 4; i++) {
		if (i == 1)
			CHECK(read(fds[i], got, 8) == -1 && errno == EBADF);
		else
			CHECK(read(fds[i], got, 8) == 8 && !memcmp(got, expected + 1000 * i + 8, 8));
		CHECK(lseek(fds[i], 1000 * i + 8, SEEK_SET) == 1000 * i + 8);
	}
	CHECK(write(fds[0], got, 8) == -1 && errno == EBADF);
	CHECK(write(fds[1], expected + 1008, 8) == 8 && lseek(fds[1], -8, SEEK_CUR) == 1008);
	return 1;
}

static void first_seek_harm(void)
{
	lseek(fds[0], 1, SEEK_CUR);
}

/* Appending: the write goes to the end wherever the position is. */
static void append_set(void)
{
	close(make_file("log", 4096, 2));
	fds[0] = open("log", O_RDWR | O_APPEND);
	NEED(fds[0] >= 0 && lseek(fds[0], 24, SEEK_SET) == 24);
}

static int append_check(void)
{
	struct stat now;
	CHECK(fcntl(fds[0], F_GETFL) & O_APPEND);
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 24);
	CHECK(write(fds[0], "appended", 8) == 8);
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 4104);
	CHECK(!fstat(fds[0], &now) && now.st_size == 4104);
	CHECK(!ftruncate(fds[0], 4096) && lseek(fds[0], 24, SEEK_SET) == 24);
	return 1;
}

static void append_harm(void)
{
	fcntl(fds[0], F_SETFL, 0);
}

/* O_PATH: a file that is only named, a folder likewise; and a symbolic link itself. */
static void path_set(void)
{
	close(make_file("named", 4096, 3));
	NEED(!mkdir("folder", 0755));
	fds[0] = open("named", O_PATH);
	fds[1] = open("folder", O_PATH | O_DIRECTORY | O_CLOEXEC);
	NEED(fds[0] >= 0 && fds[1] >= 0);
}

static int path_check(void)
{
	char byte, where[64];
	for (int i = 0; i < 2; i++) {
		CHECK(fcntl(fds[i], F_GETFL) & O_PATH);
		CHECK(read(fds[i], &byte, 1) == -1 && errno == EBADF);
	}
	CHECK(fcntl(fds[1], F_GETFD) == FD_CLOEXEC);
	snprintf(where, sizeof where, "/proc/self/fd/%d", fds[0]);
	int again = open(where, O_RDONLY);
	CHECK(again >= 0 && read(again, &byte, 1) == 1 && !close(again));
	CHECK(!mkdirat(fds[1], "inside", 0700) && !rmdir("folder/inside"));
	return 1;
}

static void link_set(void)
{
	NEED(!symlink("nowhere", "link"));
	fds[0] = open("link", O_PATH | O_NOFOLLOW);
	NEED(fds[0] >= 0);
}

static int link_check(void)
{
	char target[64];
	CHECK(fcntl(fds[0], F_GETFL) & O_PATH);
	CHECK(readlinkat(fds[0], "", target, sizeof target) == 7 && !memcmp(target, "nowhere", 7));
	return 1;
}

static void path_harm(void)
{
	dup2(open("/dev/null", O_PATH), fds[0]);
}

/* A folder that has been read in part: the rest comes, each name once. */
enum { NAMES = 200 };
static char seen[NAMES];

static int read_names(int fd, int most)
{
	char buffer[512];
	int count = 0;
	while (count < most) {
		long got = syscall(SYS_getdents64, fd, buffer, sizeof buffer);
		if (got <= 0)
			return got < 0 ? -1 : count;
		for (long at = 0; at < got; at += *(uint16_t *)(buffer + at + 16), count++)
			if (buffer[at + 19] == 'n')
				seen[atoi(buffer + at + 20)]++;
	}
	return count;
}

static void directory_set(void)
{
	char name[64];
	NEED(!mkdir("many", 0755));
	for (int i = 0; i < NAMES; i++) {
		snprintf(name, sizeof name, "many/n%d", i);
		int fd = open(name, O_WRONLY | O_CREAT, 0600);
		NEED(fd >= 0 && !close(fd));
	}
	fds[0] = open("many", O_RDONLY | O_DIRECTORY);
	NEED(fds[0] >= 0 && read_names(fds[0], 60) >= 60);
}

static int directory_check(void)
{
	int early = 0;
	for (int i = 0; i < NAMES; i++)
		early += seen[i];
	CHECK(early > 0 && early < NAMES);
	CHECK(read_names(fds[0], 10000) > 0);
	for (int i = 0; i < NAMES; i++)
		CHECK(seen[i] == 1);
	memset(seen, 0, sizeof seen);
	CHECK(!lseek(fds[0], 0, SEEK_SET) && read_names(fds[0], 60) >= 60);
	return 1;
}

static void directory_harm(void)
{
	lseek(fds[0], 0, SEEK_SET);
}

/* dup shares the position and the status flags; a second open of the same file shares neither. */
static void dup_set(void)
{
	close(make_file("twice", BYTES, 4));
	fill(expected, BYTES, 4);
	fds[0] = open("twice", O_RDWR);
	fds[1] = dup(fds[0]);
	fds[2] = fcntl(fds[0], F_DUPFD_CLOEXEC, 100);
	fds[3] = open("twice", O_RDWR);
	NEED(fds[0] >= 0 && fds[1] >= 0 && fds[2] >= 100 && fds[3] >= 0);
	NEED(lseek(fds[1], 800, SEEK_SET) == 800 && lseek(fds[3], 1600, SEEK_SET) == 1600);
}

static int dup_check(void)
{
	char got[8];
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 800 && lseek(fds[2], 0, SEEK_CUR) == 800);
	CHECK(lseek(fds[3], 0, SEEK_CUR) == 1600);
	CHECK(read(fds[2], got, 8) == 8 && !memcmp(got, expected + 800, 8));
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 808 && lseek(fds[1], -8, SEEK_CUR) == 800);
	CHECK(lseek(fds[3], 0, SEEK_CUR) == 1600);
	CHECK(!fcntl(fds[1], F_SETFL, O_NONBLOCK) && fcntl(fds[0], F_GETFL) & O_NONBLOCK);
	CHECK(!(fcntl(fds[3], F_GETFL) & O_NONBLOCK));
	CHECK(!fcntl(fds[1], F_SETFL, 0));
	CHECK(fcntl(fds[0], F_GETFD) == 0 && fcntl(fds[2], F_GETFD) == FD_CLOEXEC);
	return 1;
}

static void dup_harm(void)
{
	int copy = open("twice", O_RDWR);
	lseek(copy, 800, SEEK_SET);
	dup2(copy, fds[1]);
	close(copy);
}

/* Close-on-exec is a property of the number, not of the file. */
static void cloexec_set(void)
{
	close(make_file("plain", 4096, 5));
	for (int i = 0; i < 6; i++) {
		fds[i] = open("plain", O_RDONLY | (i % 2 ? O_CLOEXEC : 0));
		NEED(fds[i] >= 0);
	}
	fds[6] = dup(fds[1]);
}

static int cloexec_check(void)
{
	for (int i = 0; i < 6; i++)
		CHECK(fcntl(fds[i], F_GETFD) == (i % 2 ? FD_CLOEXEC : 0));
	CHECK(fcntl(fds[6], F_GETFD) == 0);
	return 1;
}

static void cloexec_harm(void)
{
	fcntl(fds[3], F_SETFD, 0);
}

/* The memory devices. */
static void devices_set(void)
{
	static const char *const names[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"};
	for (int i = 0; i < 5; i++) {
		fds[i] = open(names[i], i == 3 ? O_RDONLY : O_RDWR);
		NEED(fds[i] >= 0);
	}
}

static int devices_check(void)
{
	uint64_t got[4] = {1, 2, 3, 4};
	CHECK(read(fds[0], got, 8) == 0 && write(fds[0], got, 8) == 8);
	CHECK(read(fds[1], got, 32) == 32 && all_zero(got, 32));
	CHECK(read(fds[2], got, 8) == 8 && write(fds[2], got, 8) == -1 && errno == ENOSPC);
	CHECK(read(fds[3], got, 32) == 32 && !all_zero(got, 32));
	CHECK(write(fds[3], got, 8) == -1 && errno == EBADF);
	CHECK(read(fds[4], got, 32) == 32 && !all_zero(got, 32));
	return 1;
}

static void devices_harm(void)
{
	dup2(fds[0], fds[2]);
}

/* The kernel's log: a reader has a place in it, here behind two records, and one at the end. */
enum { RECORD = 8192 };

static unsigned long ended;

static unsigned long read_record(int fd)
{
	char record[RECORD];
	ssize_t got;
	while ((got = read(fd, record, sizeof record - 1)) == -1 && errno == EPIPE)
		;
	if (got <= 0)
		return 0;
	record[got] = 0;
	return strtoul(strchr(record, ',') + 1, NULL, 10) + 1;
}

static void log_set(void)
{
	unsigned long number;
	for (int i = 0; i < 2; i++) {
		fds[i] = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
		if (fds[i] < 0 || !read_record(fds[i]) || !read_record(fds[i]))
			cannot_run("the kernel's log cannot be read");
	}
	while ((number = read_record(fds[1])))
		ended = number;
}

static int log_check(void)
{
	int fresh = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
	unsigned long oldest = read_record(fresh), number;
	CHECK(oldest && read_record(fresh));
	CHECK((number = read_record(fresh)) == read_record(fds[0]) || oldest > 1);
	CHECK(!close(fresh));
	CHECK(!lseek(fds[0], 0, SEEK_SET) && read_record(fds[0]) && read_record(fds[0]));
	/* Something may have been logged meanwhile. */
	number = read_record(fds[1]);
	CHECK(!number || number > ended);
	return 1;
}

static void log_harm(void)
{
	lseek(fds[1], 0, SEEK_SET);
}

/* Files of /proc/self: after the restore they must show this process, not whoever opened them. */
static void proc_set(void)
{
	char start[10];
	fds[0] = open("/proc/self/maps", O_RDONLY);
	fds[1] = open("/proc/self/status", O_RDONLY);
	fds[2] = open("/proc/self", O_RDONLY | O_DIRECTORY);
	fds[3] = open("/proc/uptime", O_RDONLY);
	NEED(fds[0] >= 0 && fds[1] >= 0 && fds[2] >= 0 && fds[3] >= 0);
	NEED(read(fds[1], start, 6) == 6 && lseek(fds[1], 0, SEEK_CUR) == 6);
}

static int proc_check(void)
{
	char text[4096], wanted[64];
	CHECK(lseek(fds[1], 0, SEEK_CUR) == 6);
	ssize_t got = pread(fds[1], text, sizeof text - 1, 0);
	CHECK(got > 0);
	text[got] = 0;
	snprintf(wanted, sizeof wanted, "\nPid:\t%d\n", getpid());
	CHECK(strstr(text, wanted));
	got = pread(fds[0], text, sizeof text - 1, 0);
	CHECK(got > 0);
	text[got] = 0;
	CHECK(strstr(text, "files"));
	int stat = openat(fds[2], "stat", O_RDONLY);
	CHECK(stat >= 0 && read(stat, text, 64) == 64 && atoi(text) == getpid() && !close(stat));
	CHECK(pread(fds[3], text, 64, 0) > 3 && strtod(text, NULL) > 0);
	return 1;
}

static void proc_harm(void)
{
	int other = open("/proc/1/status", O_RDONLY);
	lseek(other, 6, SEEK_SET);
	dup2(other, fds[1]);
}

/* Who is told about input: process, group or thread, and with which signal. */
static void owner_set(void)
{
	struct f_owner_ex owner = {F_OWNER_TID, thread_id()};
	close(make_file("owned", 4096, 6));
	for (int i = 0; i < 4; i++) {
		fds[i] = open("owned", O_RDWR);
		NEED(fds[i] >= 0);
	}
	NEED(!fcntl(fds[0], F_SETOWN, getpid()));
	NEED(!fcntl(fds[1], F_SETOWN, -getpgrp()));
	NEED(!fcntl(fds[2], F_SETOWN_EX, &owner));
	NEED(!fcntl(fds[2], F_SETSIG, SIGRTMIN + 4));
}

static int owner_check(void)
{
	static const int types[] = {F_OWNER_PID, F_OWNER_PGRP, F_OWNER_TID, F_OWNER_PID};
	struct f_owner_ex owner;
	for (int i = 0; i < 4; i++) {
		CHECK(!fcntl(fds[i], F_GETOWN_EX, &owner));
		CHECK(owner.pid == (i == 3 ? 0 : getpid()));
		CHECK(i == 3 || owner.type == types[i]);
		CHECK(fcntl(fds[i], F_GETSIG) == (i == 2 ? SIGRTMIN + 4 : 0));
	}
	uid_t ids[2];
	CHECK(!fcntl(fds[0], 17 /* F_GETOWNER_UIDS */, ids) && ids[0] == getuid() && ids[1] == geteuid());
	return 1;
}

static void owner_harm(void)
{
	fcntl(fds[2], F_SETSIG, 0);
}

WORKLOAD(
	{"positions", positions_set, positions_check, first_seek_harm},
	{"append", append_set, append_check, append_harm},
	{"path", path_set, path_check, path_harm},
	{"path-link", link_set, link_check, path_harm},
	{"directory", directory_set, directory_check, directory_harm},
	{"dup", dup_set, dup_check, dup_harm},
	{"cloexec", cloexec_set, cloexec_check, cloexec_harm},
	{"devices", devices_set, devices_check, devices_harm},
	{"log", log_set, log_check, log_harm},
	{"proc", proc_set, proc_check, proc_harm},
	{"owner", owner_set, owner_check, owner_harm},
)
