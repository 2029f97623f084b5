/* Files of /proc of what is dead, or is there only later: working directory, descriptors. */
#include <signal.h>
#include <sys/wait.h>

#include "workload.h"

static char before[PATH_MAX];
static int in_dead, in_thread, folder, shown, self;

static int open_in(int pid, const char *name)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "/proc/%d%s", pid, name);
	int fd = open(path, O_RDONLY);
	NEED(fd >= 0);
	return fd;
}

static void *waits_for_ever(void *argument)
{
	(void)argument;
	for (;;)
		pause();
	return NULL;
}

/* A child with a further thread; `*thread` gets its id. */
static int child_with_thread(int *thread)
{
	int ends[2], pid;
	NEED(!pipe(ends));
	pid = fork();
	NEED(pid >= 0);
	if (!pid) {
		pthread_t other;
		pthread_create(&other, NULL, waits_for_ever, NULL);
		write(ends[1], "", 1);
		waits_for_ever(NULL);
	}
	char byte;
	NEED(read(ends[0], &byte, 1) == 1);
	close(ends[0]);
	close(ends[1]);
	/* Nobody else makes threads or processes in the child, so its second id is the thread's. */
	char path[64];
	for (*thread = pid + 1; ; ++*thread) {
		snprintf(path, sizeof path, "/proc/%d/task/%d", pid, *thread);
		if (!access(path, F_OK))
			return pid;
		NEED(*thread < pid + 30000);
	}
}

static void dead_set(void)
{
	char path[64], name[64];
	int thread, pid = child_with_thread(&thread);
	in_dead = open_in(pid, "/status");
	folder = open_in(pid, "/fd");
	snprintf(name, sizeof name, "/task/%d/stat", thread);
	in_thread = open_in(pid, name);
	snprintf(path, sizeof path, "/proc/%d", pid);
	NEED(!chdir(path));
	NEED(!kill(pid, SIGKILL) && waitpid(pid, NULL, 0) == pid);
	NEED(readlink("/proc/self/cwd", before, sizeof before - 1) > 0);
}

static int dead_check(void)
{
	char now[PATH_MAX] = "", byte;
	CHECK(readlink("/proc/self/cwd", now, sizeof now - 1) > 0 && !strcmp(now, before));
	CHECK(chdir(".") && errno == ESRCH);
	CHECK(read(in_dead, &byte, 1) < 0 && errno == ESRCH);
	CHECK(read(in_thread, &byte, 1) < 0 && errno == ESRCH);
	CHECK(openat(folder, "0", O_RDONLY) < 0 && errno == ENOENT);
	return 1;
}

static void dead_harm(void)
{
	chdir("/");
}

/* Of a descriptor that comes after it, of itself, and of another thread's table. */
static void shown_set(void)
{
	char path[64];
	int late = open("/dev/zero", O_RDONLY);
	NEED(late >= 0 && dup2(late, 200) == 200);
	close(late);
	shown = open("/proc/self/fdinfo/200", O_RDONLY);
	NEED(shown >= 0 && lseek(shown, 4, SEEK_SET) == 4);
	self = open("/proc/self/status", O_RDONLY);
	snprintf(path, sizeof path, "/proc/self/fd/%d", self);
	NEED(dup2(open(path, O_PATH | O_NOFOLLOW), 100) == 100);
}

static int shown_check(void)
{
	char text[64] = "", now[64] = "";
	CHECK(lseek(shown, 0, SEEK_CUR) == 4 && lseek(shown, 0, SEEK_SET) == 0);
	CHECK(read(shown, text, sizeof text - 1) > 0 && strstr(text, "pos:\t0"));
	CHECK(lseek(shown, 4, SEEK_SET) == 4);
	CHECK(readlinkat(100, "", now, sizeof now - 1) > 0 && strstr(now, "/status"));
	return 1;
}

static void shown_harm(void)
{
	lseek(shown, 0, SEEK_SET);
}

WORKLOAD(
	{"dead", dead_set, dead_check, dead_harm},
	{"shown", shown_set, shown_check, shown_harm},
)
