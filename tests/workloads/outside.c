/* Descriptors of what belongs to the machine: its namespaces, and devices that keep nothing for each opener. */
#include "workload.h"

#include <sys/ioctl.h>
#include <linux/nsfs.h>
#include <linux/sched.h>

static int fds[16];

/* ---- namespaces ---- */

static const struct { const char *path; int type; } spaces[] = {
	{"/proc/self/ns/pid", CLONE_NEWPID}, {"/proc/self/ns/net", CLONE_NEWNET}, {"/proc/self/ns/ipc", CLONE_NEWIPC},
	{"/proc/self/ns/uts", CLONE_NEWUTS}, {"/proc/self/ns/mnt", CLONE_NEWNS}, {"/proc/self/ns/user", CLONE_NEWUSER},
	{"/proc/self/ns/cgroup", CLONE_NEWCGROUP}, {"/proc/self/ns/time", CLONE_NEWTIME},
	{"/proc/self/ns/pid_for_children", CLONE_NEWPID},
};
enum { SPACES = sizeof spaces / sizeof spaces[0] };

static void namespaces_set(void)
{
	for (int i = 0; i < SPACES; i++) {
		fds[i] = open(spaces[i].path, O_RDONLY | (i & 1 ? O_CLOEXEC : 0));
		NEED(fds[i] >= 0);
	}
	fds[SPACES] = open(spaces[1].path, O_PATH);
	NEED(fds[SPACES] >= 0);
}

static int namespaces_check(void)
{
	struct stat mine, opened;
	for (int i = 0; i < SPACES; i++) {
		CHECK(ioctl(fds[i], NS_GET_NSTYPE) == spaces[i].type);
		CHECK(!stat(spaces[i].path, &mine) && !fstat(fds[i], &opened));
		CHECK(mine.st_dev == opened.st_dev && mine.st_ino == opened.st_ino);
	}
	CHECK(fcntl(fds[SPACES], F_GETFL) & O_PATH && ioctl(fds[SPACES], NS_GET_NSTYPE) == -1 && errno == EBADF);
	CHECK(!stat(spaces[1].path, &mine) && !fstat(fds[SPACES], &opened) && mine.st_ino == opened.st_ino);
	return 1;
}

static void namespaces_harm(void)
{
	dup2(fds[2], fds[3]);
}

/* ---- devices ---- */

static void devices_set(void)
{
	static const char *const names[] = {"/dev/cpu/0/cpuid", "/dev/hwrng", "/dev/loop-control", "/dev/loop7"};
	for (int i = 0; i < 4; i++) {
		fds[i] = open(names[i], i == 2 ? O_RDWR : O_RDONLY);
		if (fds[i] < 0)
			cannot_run(names[i]);
	}
	NEED(lseek(fds[0], 1, SEEK_SET) == 1);
}

static int devices_check(void)
{
	struct stat opened;
	char told[16];
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 1);
	/* Function 0 of the instruction tells the vendor. */
	CHECK(pread(fds[0], told, 16, 0) == 16 && (!memcmp(told + 4, "Genu", 4) || !memcmp(told + 4, "Auth", 4)));
	CHECK(!fstat(fds[1], &opened) && opened.st_rdev == (10 << 8 | 183));
	CHECK(!fstat(fds[2], &opened) && S_ISCHR(opened.st_mode) && (fcntl(fds[2], F_GETFL) & O_ACCMODE) == O_RDWR);
	CHECK(!fstat(fds[3], &opened) && S_ISBLK(opened.st_mode) && opened.st_rdev == (7 << 8 | 7));
	CHECK(read(fds[3], told, 16) == 0);
	return 1;
}

static void devices_harm(void)
{
	lseek(fds[0], 0, SEEK_SET);
}

WORKLOAD(
	{"namespaces", namespaces_set, namespaces_check, namespaces_harm},
	{"devices", devices_set, devices_check, devices_harm},
)
