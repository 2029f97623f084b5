/* Locks of files: flock(2), POSIX and open-file-description locks, leases; held, shared in a tree, and waited for. */
#include "workload.h"

#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { BYTES = 4096, NOTES = 16, TEXT = 512 };

/* ---- what fdinfo says of a descriptor's locks, without the file, which may get another number ---- */

static struct note {
	pid_t pid;
	int fd;
	char text[TEXT];
} notes[NOTES];
static int noted;

static int lock_lines(pid_t pid, int fd, char *into)
{
	char path[64], text[4096];
	int count = 0;
	snprintf(path, sizeof path, "/proc/%d/fdinfo/%d", pid, fd);
	into[0] = 0;
	if (slurp(path, text, sizeof text) < 0)
		return -1;
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		char kind[16], how[16], type[16], from[32], to[32];
		int taker;
		if (sscanf(line, "lock: %*d: %15s %15s %15s %d %*s %31s %31s", kind, how, type, &taker, from, to) != 6)
			continue;
		size_t length = strlen(into);
		snprintf(into + length, TEXT - length, "%s %s %s %d %s %s\n", kind, how, type, taker, from, to);
		count++;
	}
	return count;
}

/* Remembers the locks of a descriptor of process `pid`, which must be `count`. */
static void note(pid_t pid, int fd, int count)
{
	NEED(noted < NOTES);
	notes[noted].pid = pid;
	notes[noted].fd = fd;
	NEED(lock_lines(pid, fd, notes[noted].text) == count);
	noted++;
}

static int check_notes(void)
{
	char now[TEXT];
	for (int i = 0; i < noted; i++) {
		CHECK(lock_lines(notes[i].pid, notes[i].fd, now) >= 0);
		if (strcmp(now, notes[i].text)) {
			int verdict = wrong(__FILE__, __LINE__, "locks");
			snprintf(beat->text, sizeof beat->text, "descriptor %d of %d: was\n%snow\n%s", notes[i].fd, notes[i].pid,
				 notes[i].text, now);
			return verdict;
		}
	}
	return 1;
}

/* ---- tries of a process that has none of our descriptors' locks ---- */

static int in_child(int (*try)(const char *, int, int), const char *path, int a, int b)
{
	int status = 0;
	pid_t child = fork();
	if (!child) {
		close_range(3, ~0u, 0);
		_exit(try(path, a, b) ? 0 : 1);
	}
	return waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status);
}

static int try_flock(const char *path, int how, int unused)
{
	(void)unused;
	int fd = open(path, O_RDONLY);
	return fd >= 0 && !flock(fd, how | LOCK_NB);
}

static struct flock range(int type, off_t start, off_t length)
{
	return (struct flock){.l_type = (short)type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
}

static int try_write_lock(const char *path, int start, int length)
{
	int fd = open(path, O_RDWR);
	struct flock wanted = range(F_WRLCK, start, length);
	return fd >= 0 && !fcntl(fd, F_OFD_SETLK, &wanted);
}

static int try_read_lock(const char *path, int start, int length)
{
	int fd = open(path, O_RDWR);
	struct flock wanted = range(F_RDLCK, start, length);
	return fd >= 0 && !fcntl(fd, F_OFD_SETLK, &wanted);
}

static int try_open(const char *path, int flags, int unused)
{
	(void)unused;
	return open(path, flags | O_NONBLOCK) >= 0;
}

static int set_lock(int fd, int command, int type, off_t start, off_t length)
{
	struct flock wanted = range(type, start, length);
	return fcntl(fd, command, &wanted);
}

/* ---- flock ---- */

static int first, second, third, fourth;

static void flock_set(void)
{
	int ends[2];
	first = make_file("alone", BYTES, 1);
	NEED(!flock(first, LOCK_EX) && dup(first) >= 0);
	second = make_file("together", BYTES, 2);
	third = open("together", O_RDONLY);
	NEED(third >= 0 && !flock(second, LOCK_SH) && !flock(third, LOCK_SH));
	NEED((fourth = open(".", O_RDONLY | O_DIRECTORY)) >= 0 && !flock(fourth, LOCK_EX));
	NEED(!pipe(ends) && !flock(ends[1], LOCK_EX));
	for (int i = 0; i < 5; i++)
		note(getpid(), (int[]){first, second, third, fourth, ends[1]}[i], 1);
	/* It waits for nobody. */
	note(getpid(), ends[0], 0);
}

static int flock_check(void)
{
	CHECK_ALL(check_notes());
	CHECK(!in_child(try_flock, "alone", LOCK_SH, 0));
	CHECK(in_child(try_flock, "together", LOCK_SH, 0) && !in_child(try_flock, "together", LOCK_EX, 0));
	CHECK(!in_child(try_flock, ".", LOCK_EX, 0));
	/* The lock is the description's: any descriptor of it gives it up. */
	CHECK(!flock(first, LOCK_UN) && in_child(try_flock, "alone", LOCK_EX, 0) && !flock(first, LOCK_EX));
	return 1;
}

static void flock_harm(void)
{
	flock(third, LOCK_UN);
}

/* ---- POSIX ---- */

static void posix_set(void)
{
	first = make_file("data", BYTES, 3);
	second = open("data", O_RDWR);
	NEED(second >= 0);
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 0, 10) && !set_lock(first, F_SETLK, F_RDLCK, 10, 10));
	NEED(!set_lock(first, F_SETLK, F_RDLCK, 100, 1) && !set_lock(second, F_SETLK, F_WRLCK, 200, 100));
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 1000, 0));
	note(getpid(), first, 4);
	note(getpid(), second, 1);
}

static int posix_check(void)
{
	CHECK_ALL(check_notes());
	CHECK(!in_child(try_read_lock, "data", 9, 1) && in_child(try_read_lock, "data", 10, 10));
	CHECK(!in_child(try_write_lock, "data", 19, 1) && in_child(try_write_lock, "data", 20, 80));
	CHECK(!in_child(try_write_lock, "data", 100, 1) && in_child(try_write_lock, "data", 101, 99));
	CHECK(!in_child(try_read_lock, "data", 299, 1) && in_child(try_write_lock, "data", 300, 700));
	CHECK(!in_child(try_read_lock, "data", 1 << 30, 1));
	return 1;
}

static void posix_harm(void)
{
	set_lock(second, F_SETLK, F_UNLCK, 250, 1);
}

/* ---- of open file descriptions ---- */

static void ofd_set(void)
{
	first = make_file("data", BYTES, 4);
	second = open("data", O_RDWR);
	NEED(second >= 0 && dup(second) >= 0);
	NEED(!set_lock(first, F_OFD_SETLK, F_WRLCK, 0, 10) && !set_lock(second, F_OFD_SETLK, F_WRLCK, 10, 10));
	NEED(!set_lock(first, F_OFD_SETLK, F_RDLCK, 50, 0) && !set_lock(second, F_OFD_SETLK, F_RDLCK, 60, 0));
	note(getpid(), first, 2);
	note(getpid(), second, 2);
}

static int ofd_check(void)
{
	CHECK_ALL(check_notes());
	CHECK(set_lock(first, F_OFD_SETLK, F_WRLCK, 10, 1) && errno == EAGAIN);
	CHECK(set_lock(second, F_OFD_SETLK, F_WRLCK, 60, 1) && errno == EAGAIN);
	CHECK(!in_child(try_read_lock, "data", 0, 1) && in_child(try_read_lock, "data", 60, 1));
	return 1;
}

static void ofd_harm(void)
{
	set_lock(second, F_OFD_SETLK, F_UNLCK, 0, 0);
}

/* ---- leases ---- */

static volatile sig_atomic_t signals;

static void count(int number)
{
	(void)number;
	signals++;
}

static void take_lease(int fd, int type)
{
	NEED(signal(SIGUSR1, count) != SIG_ERR);
	NEED(!fcntl(fd, F_SETSIG, SIGUSR1) && !fcntl(fd, F_SETLEASE, type));
	note(getpid(), fd, 1);
}

static void lease_read_set(void)
{
	close(make_file("data", BYTES, 5));
	NEED((first = open("data", O_RDONLY)) >= 0);
	take_lease(first, F_RDLCK);
}

static void lease_write_set(void)
{
	first = make_file("data", BYTES, 6);
	take_lease(first, F_WRLCK);
}

/* A file without a name: nobody can read it for a checkpoint without breaking the lease. */
static void lease_nameless_set(void)
{
	lease_write_set();
	NEED(!unlink("data"));
}

static int lease_nameless_check(void)
{
	CHECK_ALL(check_notes());
	CHECK(!signals && fcntl(first, F_GETLEASE) == F_WRLCK);
	return 1;
}

/* Somebody opens the file: they cannot, and we are told. */
static int told_of(int flags)
{
	int before = signals;
	if (in_child(try_open, "data", flags, 0))
		return 0;
	for (int i = 0; i < 1000 && signals == before; i++)
		nap_ms(1);
	return signals == before + 1;
}

static int lease_check(void)
{
	int type = fcntl(first, F_GETLEASE);
	CHECK(type == (strcmp(mode_name, "lease-read") ? F_WRLCK : F_RDLCK));
	CHECK_ALL(check_notes());
	CHECK(type == F_WRLCK || in_child(try_open, "data", O_RDONLY, 0));
	CHECK(!signals && told_of(O_WRONLY));
	CHECK(fcntl(first, F_GETLEASE) == F_UNLCK && !fcntl(first, F_SETLEASE, F_UNLCK));
	CHECK(in_child(try_open, "data", O_WRONLY, 0));
	return 1;
}

static void lease_harm(void)
{
	fcntl(first, F_SETLEASE, F_UNLCK);
}

/* Leases that somebody is breaking: we know it already, and have not given them up. */
static void breaking_set(void)
{
	int how = strcmp(mode_name, "breaking-read") ? O_WRONLY : O_RDONLY;
	if (!strcmp(mode_name, "breaking-shared"))
		lease_read_set();
	else
		lease_write_set();
	NEED(told_of(how));
	noted = 0;
	note(getpid(), first, 1);
	NEED(strstr(notes[0].text, "BREAKING"));
}

static int breaking_check(void)
{
	int reader = !strcmp(mode_name, "breaking-read");
	CHECK_ALL(check_notes());
	CHECK(signals == 1 && fcntl(first, F_GETLEASE) == (reader ? F_RDLCK : F_UNLCK));
	CHECK(!in_child(try_open, "data", reader ? O_RDONLY : O_WRONLY, 0));
	/* Who was told is not told again. */
	nap_ms(20);
	CHECK(signals == 1 && !fcntl(first, F_SETLEASE, F_UNLCK));
	CHECK(in_child(try_open, "data", O_WRONLY, 0));
	return 1;
}

/* ---- in a tree ---- */

static volatile int *box;
static pid_t child;

/* A process that does `job`, says so, and stays. */
static pid_t helper(int flags, void (*job)(void))
{
	box[0] = 0;
	pid_t pid = (pid_t)syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
	NEED(pid >= 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		job();
		box[0] = 1;
		for (;;)
			nap_ms(1000);
	}
	NEED(wait_for(&box[0], 5000));
	return pid;
}

static void make_box(void)
{
	box = map_pages(1, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
}

static void tree_child(void)
{
	/* On what the parent has open, too; and one of its own. */
	NEED(!flock(second, LOCK_EX));
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 100, 50) && !set_lock(third, F_OFD_SETLK, F_WRLCK, 0, 5));
}

static void tree_set(void)
{
	make_box();
	first = make_file("data", BYTES, 7);
	second = make_file("flocked", BYTES, 8);
	third = make_file("described", BYTES, 9);
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 0, 100));
	child = helper(0, tree_child);
	for (int i = 0; i < 2; i++) {
		pid_t pid = i ? child : getpid();
		note(pid, first, 1);
		note(pid, second, 1);
		note(pid, third, 1);
	}
	NEED(!strcmp(notes[1].text, notes[4].text) && strcmp(notes[0].text, notes[3].text));
}

static int tree_check(void)
{
	struct flock holder = range(F_WRLCK, 120, 1);
	CHECK_ALL(check_notes());
	CHECK(!fcntl(first, F_GETLK, &holder) && holder.l_type == F_WRLCK && holder.l_pid == child);
	CHECK(!in_child(try_flock, "flocked", LOCK_SH, 0) && !in_child(try_read_lock, "data", 50, 1));
	return 1;
}

static void tree_harm(void)
{
	flock(second, LOCK_UN);
}

/* Two processes with one table of descriptors: one holder, whoever of them has asked. */
static void table_child(void)
{
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 100, 50) && !flock(second, LOCK_EX));
}

static void table_set(void)
{
	make_box();
	first = make_file("data", BYTES, 10);
	second = make_file("flocked", BYTES, 11);
	NEED(!set_lock(first, F_SETLK, F_RDLCK, 0, 10));
	child = helper(CLONE_FILES, table_child);
	note(getpid(), first, 2);
	note(child, second, 1);
}

static int table_check(void)
{
	CHECK_ALL(check_notes());
	CHECK(!in_child(try_read_lock, "data", 120, 1) && !in_child(try_flock, "flocked", LOCK_SH, 0));
	return 1;
}

static void table_harm(void)
{
	set_lock(first, F_SETLK, F_UNLCK, 100, 50);
}

/* Who took the lock is gone; we have it. */
static int take_and_go(const char *unused, int fd, int b)
{
	(void)unused, (void)b;
	return !flock(fd, LOCK_EX);
}

static void gone_set(void)
{
	int status;
	first = make_file("data", BYTES, 12);
	pid_t pid = fork();
	if (!pid)
		_exit(!take_and_go(NULL, first, 0));
	NEED(waitpid(pid, &status, 0) == pid && !status);
}

static int gone_check(void)
{
	char now[TEXT];
	CHECK(lock_lines(getpid(), first, now) == 1 && strstr(now, "FLOCK ADVISORY WRITE"));
	CHECK(!in_child(try_flock, "data", LOCK_SH, 0));
	return 1;
}

static void gone_harm(void)
{
	flock(first, LOCK_UN);
}

/* Processes that wait for a lock wait on, and get it. */
static void wait_child(void)
{
	box[0] = 1;
	if (!strcmp(mode_name, "waiter-posix"))
		box[1] = set_lock(first, F_SETLKW, F_WRLCK, 0, 10) ? -1 : 1;
	else
		box[1] = flock(open("data", O_RDWR), LOCK_EX) ? -1 : 1;
}

static int child_sleeps(void)
{
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", child);
	return slurp(path, text, sizeof text) > 0 && strstr(text, ") S ");
}

static void waiter_set(void)
{
	make_box();
	first = make_file("data", BYTES, 13);
	NEED(!set_lock(first, F_SETLK, F_WRLCK, 0, 10) && !flock(first, LOCK_EX));
	child = helper(0, wait_child);
	nap_ms(20);
	NEED(child_sleeps() && !box[1]);
	note(getpid(), first, 2);
}

static int waiter_check(void)
{
	char line[64], text[4096];
	CHECK_ALL(check_notes());
	snprintf(line, sizeof line, " %d ", child);
	for (int i = 0; i < 1000; i++) {
		CHECK(slurp("/proc/locks", text, sizeof text) > 0);
		if (strstr(text, line))
			break;
		nap_ms(1);
	}
	CHECK(strstr(text, line) && !box[1]);
	CHECK(!set_lock(first, F_SETLK, F_UNLCK, 0, 0) && !flock(first, LOCK_UN));
	CHECK(wait_for(&box[1], 2000) && box[1] == 1);
	return 1;
}

static void waiter_harm(void)
{
	kill(child, SIGKILL);
}

WORKLOAD(
	{"flock", flock_set, flock_check, flock_harm},
	{"posix", posix_set, posix_check, posix_harm},
	{"ofd", ofd_set, ofd_check, ofd_harm},
	{"lease-read", lease_read_set, lease_check, lease_harm},
	{"lease-write", lease_write_set, lease_check, lease_harm},
	{"lease-nameless", lease_nameless_set, lease_nameless_check, lease_harm},
	{"breaking-read", breaking_set, breaking_check, lease_harm},
	{"breaking-all", breaking_set, breaking_check, lease_harm},
	{"breaking-shared", breaking_set, breaking_check, lease_harm},
	{"tree", tree_set, tree_check, tree_harm},
	{"table", table_set, table_check, table_harm},
	{"gone", gone_set, gone_check, gone_harm},
	{"waiter-posix", waiter_set, waiter_check, waiter_harm},
	{"waiter-flock", waiter_set, waiter_check, waiter_harm},
)
