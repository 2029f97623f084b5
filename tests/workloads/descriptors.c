/* Many descriptors, and descriptors with high numbers. */
#include "workload.h"

#include <sys/resource.h>

enum { MANY = 1000, FILES = 50, BYTES = 8192 };

static int numbers[MANY];
static char expected[BYTES];

static void open_limit(rlim_t count)
{
	struct rlimit limit;
	NEED(!getrlimit(RLIMIT_NOFILE, &limit));
	if (limit.rlim_max < count)
		cannot_run("RLIMIT_NOFILE is too low");
	limit.rlim_cur = limit.rlim_cur < count ? count : limit.rlim_cur;
	NEED(!setrlimit(RLIMIT_NOFILE, &limit));
}

/* 1,000 open files of 50 names, each with a position of its own. */
static void thousand_set(void)
{
	char name[32];
	open_limit(MANY + 64);
	fill(expected, BYTES, 1);
	for (int i = 0; i < MANY; i++) {
		snprintf(name, sizeof name, "file-%d", i % FILES);
		if (i < FILES)
			close(make_file(name, BYTES, 1));
		numbers[i] = open(name, i % 3 ? O_RDONLY | O_CLOEXEC : O_RDWR);
		NEED(numbers[i] >= 0 && lseek(numbers[i], 8 * i % BYTES, SEEK_SET) == 8 * i % BYTES);
	}
}

static int thousand_check(void)
{
	char got[8];
	for (int i = 0; i < MANY; i++) {
		CHECK(fcntl(numbers[i], F_GETFD) == (i % 3 ? FD_CLOEXEC : 0));
		CHECK(read(numbers[i], got, 8) == 8 && !memcmp(got, expected + 8 * i % BYTES, 8));
		CHECK(lseek(numbers[i], -8, SEEK_CUR) == 8 * i % BYTES);
	}
	return 1;
}

static void thousand_harm(void)
{
	close(numbers[500]);
}

/* A few descriptors far up; what lies between must be closed. */
static const int high[] = {3, 63, 64, 800, 1023, 1024, 5000};
enum { HIGH = sizeof high / sizeof *high };

static void high_set(void)
{
	open_limit(6000);
	fill(expected, BYTES, 2);
	for (int i = 0; i < HIGH; i++) {
		int fd = make_file("high", BYTES, 2);
		NEED(lseek(fd, 16 * i, SEEK_SET) == 16 * i);
		if (fd != high[i])
			NEED(dup2(fd, high[i]) == high[i] && !close(fd));
	}
}

static int high_check(void)
{
	char got[8];
	int next = 0;
	for (int fd = 3; fd < 6000; fd++) {
		if (next < HIGH && fd == high[next]) {
			CHECK(pread(fd, got, 8, 16 * next) == 8 && !memcmp(got, expected + 16 * next, 8));
			CHECK(lseek(fd, 0, SEEK_CUR) == 16 * next);
			next++;
		} else {
			CHECK(fcntl(fd, F_GETFD) == -1 && errno == EBADF);
		}
	}
	int lowest = open("high", O_RDONLY);
	CHECK(lowest == 4 && !close(lowest));
	return 1;
}

static void high_harm(void)
{
	dup2(800, 801);
}

WORKLOAD(
	{"thousand", thousand_set, thousand_check, thousand_harm},
	{"high", high_set, high_check, high_harm},
)
