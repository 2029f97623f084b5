/*
 * What all workloads share: the beat file they talk through, the beat loop, checks that name their line.
 *
 *     PROGRAM BEAT_FILE MODE [--break]
 *
 * A program has one or more modes. Each sets up one kind of kernel state, says it is ready, beats, and checks itself
 * when asked. With --break it damages a piece of that state right before the check, which must then fail.
 * The beat file is 4096 bytes, mapped shared by the program and by the runner (tests/harness.py mirrors the layout).
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { STARTING, READY, SETUP_FAILED, CANNOT_RUN };

struct beat {
	uint64_t beats;    /* grows while the program lives */
	uint64_t ready;    /* READY, SETUP_FAILED or CANNOT_RUN; `text` has the reason of the latter two */
	uint64_t request;  /* the runner writes 1 to ask for the check; the program writes 2 when it has seen that */
	uint64_t verdict;  /* 1 right; 100 + line of the check that failed, `text` shows it */
	uint64_t pid;
	uint64_t checks;   /* checks answered so far */
	uint64_t phase;    /* the runner: how many restores this process has seen */
	uint64_t away_ns;  /* the runner: nanoseconds from the first dump's start to the last restore's end */
	uint64_t tokens[8]; /* for a program's own use */
	char pad[1024 - 16 * sizeof(uint64_t)];
	char text[1024];
};

struct mode {
	const char *name;
	void (*set)(void);
	int (*check)(void);
	void (*harm)(void);
};

static struct beat *beat;

/* How the beat loop waits between beats; a mode that may make no system call installs its own. */
static void (*idle)(void);

/* The mode that runs, for setups shared by several modes. */
static const char *mode_name;

/* Every macro below is used by some program, not by each. */
#define MAYBE __attribute__((unused)) static

MAYBE int wrong(const char *file, int line, const char *what)
{
	snprintf(beat->text, sizeof beat->text, "%s:%d: %s (errno %d: %s)", file, line, what, errno, strerror(errno));
	return 100 + line;
}

/* In a check: states what must hold, and returns the verdict of the first thing that does not. */
#define CHECK(c) do { if (!(c)) return wrong(__FILE__, __LINE__, #c); } while (0)
#define CHECK_ALL(call) do { int verdict_ = (call); if (verdict_ != 1) return verdict_; } while (0)

/* In a setup: states what must have worked. */
#define NEED(c) do { if (!(c)) give_up(SETUP_FAILED, wrong(__FILE__, __LINE__, #c)); } while (0)

MAYBE void give_up(uint64_t how, int verdict)
{
	beat->verdict = (uint64_t)verdict;
	__atomic_store_n(&beat->ready, how, __ATOMIC_SEQ_CST);
	_exit(3);
}

/* In a setup: this machine lacks what the mode needs; the test is skipped with the reason. */
MAYBE void cannot_run(const char *reason)
{
	snprintf(beat->text, sizeof beat->text, "%s (errno %d: %s)", reason, errno, strerror(errno));
	give_up(CANNOT_RUN, 0);
}

MAYBE void nap_ms(long ms)
{
	struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
	while (nanosleep(&wait, &wait) && errno == EINTR)
		;
}

MAYBE int64_t now_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Waits until `*word` is no longer 0; answers 0 after `ms` milliseconds. */
MAYBE int wait_for(const volatile int *word, long ms)
{
	int64_t end = now_ns(CLOCK_MONOTONIC) + ms * 1000000LL;
	while (!__atomic_load_n(word, __ATOMIC_SEQ_CST)) {
		if (now_ns(CLOCK_MONOTONIC) > end)
			return 0;
		nap_ms(1);
	}
	return 1;
}

/* ---- memory ---- */

MAYBE uint64_t next_word(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

/* Fills `bytes` (a multiple of 8) with words that only `seed` tells; no word is 0. */
MAYBE void fill(void *start, size_t bytes, uint64_t seed)
{
	uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
	for (size_t i = 0; i < bytes / 8; i++)
		((uint64_t *)start)[i] = next_word(&state);
}

MAYBE int same(const void *start, size_t bytes, uint64_t seed)
{
	uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
	for (size_t i = 0; i < bytes / 8; i++)
		if (((const uint64_t *)start)[i] != next_word(&state))
			return 0;
	return 1;
}

MAYBE int all_zero(const void *start, size_t bytes)
{
	for (size_t i = 0; i < bytes / 8; i++)
		if (((const uint64_t *)start)[i])
			return 0;
	return 1;
}

#define PAGE ((size_t)4096)
#define RW (PROT_READ | PROT_WRITE)

MAYBE void *map_pages(size_t pages, int prot, int flags, int fd)
{
	void *start = mmap(NULL, pages * PAGE, prot, flags, fd, 0);
	NEED(start != MAP_FAILED);
	return start;
}

MAYBE void *map_anon(size_t pages)
{
	return map_pages(pages, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

/* ---- files; paths are relative to the folder of the beat file, where the program runs ---- */

/* Makes a file of `bytes` (a multiple of 8) of pattern `seed` and leaves it open at position 0. */
MAYBE int make_file(const char *path, size_t bytes, uint64_t seed)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
	NEED(fd >= 0);
	char *content = malloc(bytes + 8);
	NEED(content);
	fill(content, bytes, seed);
	NEED(pwrite(fd, content, bytes, 0) == (ssize_t)bytes);
	free(content);
	return fd;
}

/* Puts the first `size` bytes of a (proc) file and a final NUL into `text`; answers the length or -1. */
MAYBE ssize_t slurp(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t length = 0;
	ssize_t got = 0;
	if (fd < 0)
		return -1;
	while (length < size - 1 && (got = read(fd, text + length, size - 1 - length)) > 0)
		length += (size_t)got;
	close(fd);
	text[length] = 0;
	return got < 0 ? -1 : (ssize_t)length;
}

MAYBE int spit(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t put = write(fd, text, strlen(text));
	int kept = errno;
	close(fd);
	errno = kept;
	return put == (ssize_t)strlen(text) ? 0 : -1;
}

/* The value (text after the colon and blanks) of a line of a proc status-like file, or an empty string. */
MAYBE const char *field(const char *path, const char *name)
{
	static __thread char text[8192];
	char key[64];
	snprintf(key, sizeof key, "\n%s:", name);
	text[0] = '\n';
	if (slurp(path, text + 1, sizeof text - 1) < 0)
		return "";
	char *found = strstr(text, key);
	if (!found)
		return "";
	found += strlen(key);
	found += strspn(found, " \t");
	found[strcspn(found, "\n")] = 0;
	return found;
}

MAYBE pid_t thread_id(void)
{
	return (pid_t)syscall(SYS_gettid);
}

MAYBE pthread_t start_thread(void *(*body)(void *), void *argument)
{
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, body, argument));
	return thread;
}

/* ---- the life of a workload ---- */

MAYBE void short_nap(void)
{
	struct timespec wait = {0, 2000000};
	nanosleep(&wait, NULL);
}

MAYBE void open_beat_file(char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		_exit(2);
	beat = mmap(NULL, PAGE, RW, MAP_SHARED, fd, 0);
	if (beat == MAP_FAILED)
		_exit(2);
	close(fd);
	char *slash = strrchr(path, '/');
	if (slash) {
		char folder[PATH_MAX];
		snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
		NEED(!chdir(folder));
	}
}

static const struct mode *mode;
static int broken;
static char **arguments;

MAYBE void answer(void)
{
	__atomic_store_n(&beat->request, 2, __ATOMIC_SEQ_CST);
	if (broken)
		mode->harm();
	errno = 0;
	int verdict = mode->check();
	if (verdict == 1)
		beat->text[0] = 0;
	__atomic_store_n(&beat->verdict, (uint64_t)verdict, __ATOMIC_SEQ_CST);
	__atomic_add_fetch(&beat->checks, 1, __ATOMIC_SEQ_CST);
}

MAYBE void live(void)
{
	__atomic_store_n(&beat->ready, READY, __ATOMIC_SEQ_CST);
	for (;;) {
		__atomic_add_fetch(&beat->beats, 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&beat->request, __ATOMIC_SEQ_CST) == 1)
			answer();
		idle();
	}
}

MAYBE int run_workload(const struct mode *modes, size_t count, int argc, char **argv)
{
	if (argc < 3)
		return 2;
	for (size_t i = 0; i < count; i++)
		if (!strcmp(argv[2], modes[i].name))
			mode = &modes[i];
	if (!mode)
		return 2;
	broken = argc > 3 && !strcmp(argv[3], "--break");
	arguments = argv;
	setsid();
	open_beat_file(argv[1]);
	mode_name = mode->name;
	idle = short_nap;
	beat->pid = (uint64_t)getpid();
	mode->set();
	live();
	return 0;
}

/* Ends each program: its modes as {"name", set, check, harm}. */
#define WORKLOAD(...) \
	static const struct mode modes[] = {__VA_ARGS__}; \
	int main(int argc, char **argv) { return run_workload(modes, sizeof modes / sizeof *modes, argc, argv); }

#endif
