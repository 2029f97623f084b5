/* Who a process is: ids, capabilities, limits, folders, session. */
#include "workers.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <signal.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* ---- ids ---- */

static const gid_t groups[] = {5, 1000, 1001, 70000};
enum { GROUPS = sizeof groups / sizeof *groups };

static void become_ordinary(void)
{
	NEED(!setgroups(GROUPS, groups));
	NEED(!setresgid(1000, 1001, 1002));
	NEED(!setresuid(1000, 1000, 1000));
}

static int no_capabilities(void)
{
	return strtoull(field("/proc/thread-self/status", "CapPrm"), NULL, 16) == 0 &&
	       strtoull(field("/proc/thread-self/status", "CapEff"), NULL, 16) == 0;
}

static int ordinary_check(void)
{
	uid_t r, e, s;
	gid_t list[64];
	CHECK(!getresuid(&r, &e, &s) && r == 1000 && e == 1000 && s == 1000);
	CHECK(!getresgid(&r, &e, &s) && r == 1000 && e == 1001 && s == 1002);
	CHECK(getgroups(64, list) == GROUPS);
	for (int i = 0; i < GROUPS; i++)
		CHECK(list[i] == groups[i]);
	CHECK(no_capabilities());
	CHECK(setuid(0) && errno == EPERM);
	CHECK(prctl(PR_GET_DUMPABLE) != 1);
	return 1;
}

static void ordinary_harm(void)
{
	NEED(!setresgid(1000, 1001, 1001));
}

/* All four user ids and all four group ids differ. */
static void four_set(void)
{
	NEED(!setgroups(0, NULL));
	NEED(!prctl(PR_SET_KEEPCAPS, 1));
	NEED(!setresgid(2001, 2002, 2003) && setfsgid(2004) == 2002);
	NEED(!setresuid(0, 3002, 3003));
	setfsuid(3003);
}

static int four_check(void)
{
	char line[128];
	snprintf(line, sizeof line, "%s", field("/proc/self/status", "Uid"));
	CHECK(!strcmp(line, "0\t3002\t3003\t3003"));
	snprintf(line, sizeof line, "%s", field("/proc/self/status", "Gid"));
	CHECK(!strcmp(line, "2001\t2002\t2003\t2004"));
	CHECK(prctl(PR_GET_KEEPCAPS) == 1);
	CHECK(!strcmp(field("/proc/self/status", "CapEff"), "0000000000000000"));
	CHECK(strcmp(field("/proc/self/status", "CapPrm"), "0000000000000000"));
	return 1;
}

static void four_harm(void)
{
	setfsuid(3002);
}

/* ---- capabilities ---- */

struct capabilities {
	struct __user_cap_data_struct part[2];
};

static struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};

static void get_capabilities(struct capabilities *now)
{
	header.pid = 0;
	NEED(!syscall(SYS_capget, &header, now->part));
}

static void set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct capabilities new = {{{(uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable},
				    {effective >> 32, permitted >> 32, inheritable >> 32}}};
	header.pid = 0;
	NEED(!syscall(SYS_capset, &header, new.part));
}

enum { RAW = 1 << CAP_NET_RAW, SERVICE = 1 << CAP_NET_BIND_SERVICE, CHOWN = 1 << CAP_CHOWN };

/* An ordinary user that has kept three capabilities: one ambient, one effective, one only permitted. */
static void ambient_set(void)
{
	NEED(!prctl(PR_SET_KEEPCAPS, 1) && !setresgid(1000, 1000, 1000) && !setresuid(1000, 1000, 1000));
	set_capabilities(RAW | SERVICE, RAW | SERVICE | CHOWN, RAW);
	NEED(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
	NEED(!prctl(PR_SET_KEEPCAPS, 1));
}

static int ambient_check(void)
{
	struct capabilities now;
	get_capabilities(&now);
	CHECK(now.part[0].effective == (RAW | SERVICE) && now.part[0].permitted == (RAW | SERVICE | CHOWN));
	CHECK(now.part[0].inheritable == RAW && !now.part[1].permitted);
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_RAW, 0, 0) == 1);
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_BIND_SERVICE, 0, 0) == 0);
	CHECK(prctl(PR_GET_KEEPCAPS) == 1 && getuid() == 1000);
	return 1;
}

static void ambient_harm(void)
{
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

/* The bounding set has lost two capabilities for good. */
static void bounding_set(void)
{
	NEED(!prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE) && !prctl(PR_CAPBSET_DROP, CAP_WAKE_ALARM));
}

static int bounding_check(void)
{
	CHECK(prctl(PR_CAPBSET_READ, CAP_SYS_MODULE) == 0 && prctl(PR_CAPBSET_READ, CAP_WAKE_ALARM) == 0);
	CHECK(prctl(PR_CAPBSET_READ, CAP_CHOWN) == 1 && prctl(PR_CAPBSET_READ, CAP_SYSLOG) == 1);
	return 1;
}

static void bounding_harm(void)
{
	prctl(PR_CAPBSET_DROP, CAP_SYSLOG);
}

enum { BITS = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_CAP_AMBIENT_RAISE };

static void securebits_set(void)
{
	NEED(!prctl(PR_SET_SECUREBITS, BITS));
}

static int securebits_check(void)
{
	CHECK(prctl(PR_GET_SECUREBITS) == BITS);
	return 1;
}

static void securebits_harm(void)
{
	prctl(PR_SET_SECUREBITS, BITS & ~SECBIT_NO_SETUID_FIXUP);
}

static void nnp_set(void)
{
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

static int nnp_check(void)
{
	CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
	CHECK(atoi(field("/proc/self/status", "NoNewPrivs")) == 1);
	CHECK(beat->tokens[0] == 0);
	return 1;
}

/* It cannot be taken back. */
static void nnp_harm(void)
{
	beat->tokens[0] = 1;
}

/* Each thread with credentials of its own: the raw calls change one thread only. */
static void thread_creds_prepare(struct worker *self)
{
	int i = self->index;
	gid_t own[] = {(gid_t)(500 + i), (gid_t)(600 + i)};
	if (!i)
		return;
	NEED(!prctl(PR_SET_KEEPCAPS, 1));
	NEED(!syscall(SYS_setgroups, 2, own));
	NEED(!syscall(SYS_setresgid, 4000 + i, 4100 + i, 4200 + i));
	NEED(!syscall(SYS_setresuid, 5000 + i, 5000 + i, 5000 + i));
	set_capabilities(1u << i, 1u << i | 1, 0);
	if (i == 3)
		NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

static int thread_creds_job(struct worker *self)
{
	int i = self->index;
	uid_t r, e, s;
	gid_t list[8];
	struct capabilities now;
	if (!i) {
		CHECK(geteuid() == 0 && getegid() == 0);
		return 1;
	}
	CHECK(!getresgid(&r, &e, &s) && r == 4000 + i && e == 4100 + i && s == 4200 + i);
	CHECK(!getresuid(&r, &e, &s) && r == 5000 + i && e == r && s == r);
	CHECK(getgroups(8, list) == 2 && list[0] == 500 + i && list[1] == 600 + i);
	get_capabilities(&now);
	CHECK(now.part[0].effective == 1u << i && now.part[0].permitted == (1u << i | 1));
	CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == (i == 3));
	return 1;
}

static void thread_creds_set(void)
{
	prepare = thread_creds_prepare;
	job = thread_creds_job;
	start_workers(5);
}

static int thread_creds_check(void)
{
	return ask_workers(5);
}

static int spoil_creds(struct worker *self)
{
	if (self->index == 2)
		syscall(SYS_setresgid, 4002, 4102, 4102);
	return thread_creds_job(self);
}

static void thread_creds_harm(void)
{
	job = spoil_creds;
}

/* ---- limits: all sixteen, with soft limits of their own; hard ones are lowered where that hurts nobody ---- */

static struct rlimit limits[RLIM_NLIMITS];

static void limits_set(void)
{
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		NEED(!getrlimit(i, &limits[i]));
		rlim_t wanted = i == RLIMIT_NOFILE ? 777 : (1UL << 30) * (i + 100) + 4096 * i;
		if (i == RLIMIT_STACK)
			wanted = 6 << 20;
		if (i == RLIMIT_CPU)
			wanted = 86400;
		if (i == RLIMIT_NICE || i == RLIMIT_RTPRIO || i == RLIMIT_SIGPENDING || i == RLIMIT_NPROC)
			wanted = 17 + i;
		limits[i].rlim_cur = wanted < limits[i].rlim_max ? wanted : limits[i].rlim_max;
		if (i == RLIMIT_NOFILE || i == RLIMIT_MSGQUEUE)
			limits[i].rlim_max = limits[i].rlim_cur + 1000 < limits[i].rlim_max ? limits[i].rlim_cur + 1000
											    : limits[i].rlim_max;
		NEED(!setrlimit(i, &limits[i]));
	}
}

static int limits_check(void)
{
	struct rlimit now;
	for (int i = 0; i < RLIM_NLIMITS; i++)
		CHECK(!getrlimit(i, &now) && now.rlim_cur == limits[i].rlim_cur && now.rlim_max == limits[i].rlim_max);
	return 1;
}

static void limits_harm(void)
{
	struct rlimit other = limits[RLIMIT_NOFILE];
	other.rlim_cur--;
	setrlimit(RLIMIT_NOFILE, &other);
}

/* Limits below what the process has already: nothing can be mapped. */
static void tight_set(void)
{
	for (int i = 0; i < 2; i++) {
		int which = i ? RLIMIT_DATA : RLIMIT_AS;
		NEED(!getrlimit(which, &limits[which]));
		limits[which].rlim_cur = 65536;
		NEED(!setrlimit(which, &limits[which]));
	}
}

static int tight_check(void)
{
	struct rlimit now;
	CHECK(!getrlimit(RLIMIT_AS, &now) && now.rlim_cur == 65536 && now.rlim_max == limits[RLIMIT_AS].rlim_max);
	CHECK(!getrlimit(RLIMIT_DATA, &now) && now.rlim_cur == 65536);
	CHECK(mmap(NULL, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == ENOMEM);
	return 1;
}

static void tight_harm(void)
{
	limits[RLIMIT_AS].rlim_cur = 1 << 30;
	setrlimit(RLIMIT_AS, &limits[RLIMIT_AS]);
}

/* ---- folders ---- */

static void umask_set(void)
{
	umask(0137);
}

static int umask_check(void)
{
	struct stat made;
	int fd = open("masked", O_CREAT | O_WRONLY, 0777);
	CHECK(fd >= 0 && !fstat(fd, &made) && !close(fd) && !unlink("masked"));
	CHECK((made.st_mode & 0777) == 0640);
	return 1;
}

static void umask_harm(void)
{
	umask(022);
}

static char start_folder[PATH_MAX];

static void cwd_set(void)
{
	NEED(getcwd(start_folder, sizeof start_folder));
	NEED(!mkdir("a", 0755) && !mkdir("a/folder with blanks", 0755) && !chdir("a/folder with blanks"));
	if (!strcmp(mode_name, "cwd-deleted"))
		NEED(!rmdir("../folder with blanks"));
}

static int cwd_check(void)
{
	char now[PATH_MAX], wanted[PATH_MAX + 64];
	snprintf(wanted, sizeof wanted, "%s/a/folder with blanks", start_folder);
	CHECK(getcwd(now, sizeof now) && !strcmp(now, wanted));
	return 1;
}

static int cwd_deleted_check(void)
{
	char now[PATH_MAX], link[PATH_MAX];
	struct stat here;
	CHECK(!getcwd(now, sizeof now) && errno == ENOENT);
	ssize_t length = readlink("/proc/self/cwd", link, sizeof link - 1);
	CHECK(length > 0);
	link[length] = 0;
	CHECK(strstr(link, "/a/folder with blanks (deleted)"));
	CHECK(!stat(".", &here) && S_ISDIR(here.st_mode) && here.st_nlink == 0);
	return 1;
}

static void cwd_harm(void)
{
	NEED(!chdir(start_folder));
}

static void chroot_set(void)
{
	NEED(!mkdir("jail", 0755) && !mkdir("jail/inside", 0755));
	close(make_file("jail/here", 4096, 1));
	NEED(!chroot("jail") && !chdir("/inside"));
}

static int chroot_check(void)
{
	char now[PATH_MAX], byte;
	int fd = open("/here", O_RDONLY);
	CHECK(fd >= 0 && read(fd, &byte, 1) == 1 && !close(fd));
	CHECK(access("/proc", F_OK) && errno == ENOENT);
	CHECK(getcwd(now, sizeof now) && !strcmp(now, "/inside"));
	return 1;
}

static void chroot_harm(void)
{
	NEED(!chdir("/"));
}

/* ---- session, login ---- */

static void session_set(void)
{
}

static int session_check(void)
{
	CHECK(getsid(0) == getpid() && getpgrp() == getpid());
	CHECK(open("/dev/tty", O_RDWR) == -1 && errno == ENXIO);
	CHECK(setsid() == -1 && errno == EPERM);
	CHECK(getpid() == (pid_t)beat->pid);
	return 1;
}

static void session_harm(void)
{
	beat->pid++;
}

static void loginuid_set(void)
{
	if (spit("/proc/self/loginuid", "4321"))
		cannot_run("the kernel keeps no login uid, or it is set for good");
}

static int loginuid_check(void)
{
	char value[32];
	CHECK(slurp("/proc/self/loginuid", value, sizeof value) > 0 && atoi(value) == 4321);
	return 1;
}

static void loginuid_harm(void)
{
	spit("/proc/self/loginuid", "4322");
}

WORKLOAD(
	{"ordinary", become_ordinary, ordinary_check, ordinary_harm},
	{"four-ids", four_set, four_check, four_harm},
	{"ambient", ambient_set, ambient_check, ambient_harm},
	{"bounding", bounding_set, bounding_check, bounding_harm},
	{"securebits", securebits_set, securebits_check, securebits_harm},
	{"no-new-privs", nnp_set, nnp_check, nnp_harm},
	{"thread-creds", thread_creds_set, thread_creds_check, thread_creds_harm},
	{"limits", limits_set, limits_check, limits_harm},
	{"tight", tight_set, tight_check, tight_harm},
	{"umask", umask_set, umask_check, umask_harm},
	{"cwd", cwd_set, cwd_check, cwd_harm},
	{"cwd-deleted", cwd_set, cwd_deleted_check, cwd_harm},
	{"chroot", chroot_set, chroot_check, chroot_harm},
	{"session", session_set, session_check, session_harm},
	{"loginuid", loginuid_set, loginuid_check, loginuid_harm},
)
