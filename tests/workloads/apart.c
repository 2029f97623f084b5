/* What a single thread has for itself though usually a process has it, or a process for its children to come. */
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include "workers.h"

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

/* ---- working directories, roots and umasks of single threads ---- */

struct place {
	char cwd[PATH_MAX], root[PATH_MAX];
	struct stat file;
	long umask;
};

/* Where each worker is to be, and behind them the process. */
static struct place places[THREADS + 1];
static char start_folder[PATH_MAX];
static int proc_fd;

/* If this is not -1, the worker who goes elsewhere when asked, and where to. */
static volatile int mover = -1;
static const char *target;
static mode_t mask;

static const char *of_self(const char *name)
{
	static __thread char path[64];
	snprintf(path, sizeof path, "self/task/%d/%s", thread_id(), name);
	return path;
}

/* Where the calling thread is. Through an open /proc, as it may see no other. */
static struct place here(void)
{
	struct place now;
	char text[4096] = "";
	memset(&now, 0, sizeof now);
	NEED(readlinkat(proc_fd, of_self("cwd"), now.cwd, PATH_MAX - 1) > 0);
	NEED(readlinkat(proc_fd, of_self("root"), now.root, PATH_MAX - 1) > 0);
	stat(".", &now.file);
	/* Not by umask(2): others, who share it, may look at the same time. */
	int fd = openat(proc_fd, of_self("status"), O_RDONLY | O_CLOEXEC);
	NEED(read(fd, text, sizeof text - 1) > 0 && !close(fd));
	now.umask = strtol(strstr(text, "\nUmask:") + 8, NULL, 8);
	return now;
}

static int is_at(const struct place *wanted)
{
	struct place now = here();
	CHECK(!strcmp(now.cwd, wanted->cwd));
	CHECK(!strcmp(now.root, wanted->root));
	CHECK(now.umask == wanted->umask);
	CHECK(!now.file.st_nlink == !wanted->file.st_nlink && now.file.st_mode == wanted->file.st_mode);
	/* One that was deleted comes back as another one, and nobody has files in a dead process's. */
	CHECK(!now.file.st_nlink || !strncmp(now.cwd, "/proc/", 6) || now.file.st_ino == wanted->file.st_ino);
	return 1;
}

static int job_stays(struct worker *self)
{
	if (mover < 0)
		return is_at(&places[self->index]);
	if (mover == self->index)
		CHECK(!chdir(target) && umask(mask) == (mode_t)places[self->index].umask);
	return 1;
}

static void into_new(const char *folder)
{
	NEED(!mkdir(folder, 0755) && !chdir(folder));
}

static void into_dead(void)
{
	char path[64];
	pid_t pid = fork();
	if (!pid)
		for (;;)
			pause();
	NEED(pid > 0);
	snprintf(path, sizeof path, "/proc/%d", pid);
	NEED(!chdir(path) && !kill(pid, SIGKILL) && waitpid(pid, NULL, 0) == pid);
}

static void go_elsewhere(struct worker *self)
{
	char folder[32];
	snprintf(folder, sizeof folder, "own-%d", self->index);
	NEED(!unshare(CLONE_FS));
	into_new(folder);
	umask(01 << self->index);
	if (!strcmp(mode_name, "deleted")) {
		snprintf(folder, sizeof folder, "../own-%d", self->index);
		NEED(!rmdir(folder));
	}
	if (!strcmp(mode_name, "chroot")) {
		/* One is in its root, one beside it. */
		NEED(!mkdir("root", 0755) && !chroot("root"));
		if (self->index)
			NEED(!chdir("/"));
	}
	if (!strcmp(mode_name, "dead") && self->index)
		into_dead();
	places[self->index] = here();
}

static void start_elsewhere(int count)
{
	NEED(getcwd(start_folder, sizeof start_folder));
	NEED((proc_fd = open("/proc", O_RDONLY | O_CLOEXEC)) >= 0);
	job = job_stays;
	start_workers(count);
	places[THREADS] = here();
}

static void two_set(void)
{
	prepare = go_elsewhere;
	start_elsewhere(2);
}

static int two_check(void)
{
	CHECK_ALL(is_at(&places[THREADS]));
	CHECK_ALL(ask_workers(2));
	/* Nobody comes along. */
	CHECK(!chdir(".."));
	CHECK_ALL(ask_workers(2));
	CHECK(!chdir(start_folder));
	return 1;
}

static void two_harm(void)
{
	places[1].umask ^= 1;
}

/* ---- the process in a jail, one of its threads outside, and few descriptors free ---- */

static void jailed_set(void)
{
	prepare = go_elsewhere;
	start_elsewhere(1);
	into_new("jail");
	for (int i = 0; i < 100; i++)
		NEED(open(".", O_RDONLY) >= 0);
	NEED(!chroot("."));
	into_new("inside");
	places[THREADS] = here();
}

static int jailed_check(void)
{
	CHECK_ALL(ask_workers(1));
	CHECK_ALL(is_at(&places[THREADS]));
	CHECK(access("/proc", F_OK) && errno == ENOENT);
	return 1;
}

static void jailed_harm(void)
{
	chdir("/");
}

/* ---- directories that some threads share: 0 with 1 and 3, 2 has a copy of them; 4 has the process's ---- */

static void share(struct worker *self)
{
	if (self->index == 0) {
		go_elsewhere(self);
		for (int i = 1; i < 4; i++) {
			workers[i].index = i;
			workers[i].thread = start_thread(worker_body, &workers[i]);
			NEED(wait_for(&workers[i].up, 5000));
		}
	}
	if (self->index == 2)
		NEED(!unshare(CLONE_FS));
	places[self->index] = here();
}

static void shared_set(void)
{
	prepare = share;
	start_elsewhere(1);
	workers[4].index = 4;
	workers[4].thread = start_thread(worker_body, &workers[4]);
	NEED(wait_for(&workers[4].up, 5000));
}

static int moves(int which, const char *folder, struct place goal)
{
	mover = which;
	target = folder;
	mask = (mode_t)goal.umask;
	CHECK_ALL(ask_workers(5));
	mover = -1;
	places[0] = places[1] = places[3] = goal;
	CHECK_ALL(ask_workers(5));
	return is_at(&places[THREADS]);
}

static int shared_check(void)
{
	struct place before = places[0], above = places[THREADS];
	CHECK_ALL(ask_workers(5));
	above.umask = 0333;
	CHECK_ALL(moves(3, "..", above));
	return moves(0, "own-0", before);
}

static void shared_harm(void)
{
	places[4] = places[0];
}

/* ---- directories that a thread shares with a child, and with a single thread of another one; not with its process ---- */

static void *wait_for_ever(void *argument)
{
	for (;;)
		pause();
	return argument;
}

static void bear_in_own(struct worker *self)
{
	go_elsewhere(self);
	for (int i = 0; i < 2; i++) {
		long child = syscall(SYS_clone, CLONE_FS | SIGCHLD, 0, 0, 0, 0);
		NEED(child >= 0);
		if (!child) {
			if (i) {
				start_thread(wait_for_ever, NULL);
				NEED(!unshare(CLONE_FS));
			}
			__atomic_store_n(&beat->tokens[i], (uint64_t)getpid(), __ATOMIC_SEQ_CST);
			wait_for_ever(NULL);
		}
		NEED(wait_for((int *)&beat->tokens[i], 5000));
	}
}

static void family_set(void)
{
	prepare = bear_in_own;
	start_elsewhere(1);
}

static int family_check(void)
{
	return ask_workers(1);
}

static void family_harm(void)
{
	places[0].umask ^= 1;
}

/* ---- what is refused ---- */

static void leave(struct worker *self)
{
	(void)self;
	int flag = !strcmp(mode_name, "files") ? CLONE_FILES : !strcmp(mode_name, "mounts") ? CLONE_NEWNS : CLONE_NEWUTS;
	if (unshare(flag))
		cannot_run("no such unshare");
	if (flag == CLONE_FILES)
		NEED(dup2(0, 77) == 77);
	if (flag == CLONE_NEWNS) {
		/* On a mount that nobody else sees. */
		NEED(!mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) && !mkdir("mounted", 0755));
		NEED(!mount("none", "mounted", "tmpfs", 0, NULL) && !chdir("mounted"));
	}
}

static int job_left(struct worker *self)
{
	char path[64], own[64] = "", theirs[64] = "";
	const char *kind = !strcmp(mode_name, "mounts") ? "mnt" : "uts";
	(void)self;
	snprintf(path, sizeof path, "/proc/self/task/%d/ns/%s", thread_id(), kind);
	CHECK(readlink(path, own, sizeof own - 1) > 0);
	snprintf(path, sizeof path, "/proc/%d/ns/%s", getpid(), kind);
	CHECK(readlink(path, theirs, sizeof theirs - 1) > 0);
	CHECK(!strcmp(mode_name, "files") ? fcntl(77, F_GETFD) >= 0 : strcmp(own, theirs) != 0);
	return 1;
}

static void left_set(void)
{
	prepare = leave;
	job = job_left;
	start_workers(1);
}

static int left_check(void)
{
	CHECK_ALL(ask_workers(1));
	CHECK(fcntl(77, F_GETFD) < 0);
	return 1;
}

static void left_harm(void)
{
	dup2(0, 77);
}

static void children_set(void)
{
	if (unshare(CLONE_NEWTIME))
		cannot_run("no time namespaces");
}

static int children_check(void)
{
	char own[64] = "", theirs[64] = "";
	CHECK(readlink("/proc/self/ns/time", own, sizeof own - 1) > 0);
	CHECK(readlink("/proc/self/ns/time_for_children", theirs, sizeof theirs - 1) > 0);
	CHECK(strcmp(own, theirs));
	return 1;
}

static void children_harm(void)
{
	int fd = open("/proc/self/ns/time", O_RDONLY);
	setns(fd, CLONE_NEWTIME);
}

WORKLOAD(
	{"directories", two_set, two_check, two_harm},
	{"deleted", two_set, two_check, two_harm},
	{"chroot", two_set, two_check, two_harm},
	{"dead", two_set, two_check, two_harm},
	{"jailed", jailed_set, jailed_check, jailed_harm},
	{"shared", shared_set, shared_check, shared_harm},
	{"family", family_set, family_check, family_harm},
	{"files", left_set, left_check, left_harm},
	{"mounts", left_set, left_check, left_harm},
	{"namespace", left_set, left_check, left_harm},
	{"children", children_set, children_check, children_harm},
)
