/* Seccomp: strict mode, and filters: one, several, one for all threads, one per thread. */
#include "workers.h"

#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

/* From now on system call `number` answers `error` (and nothing else changes). */
static long forbid(int number, int error, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static int forbidden(int number, int error)
{
	return syscall(number, 0, 0, 0) == -1 && errno == error;
}

/* ---- strict mode: only read, write, _exit and sigreturn are left, so it beats and checks without a call ---- */

static char *area;
static int file, times_read;

static void spin(void)
{
	for (int i = 0; i < 20000; i++)
		__builtin_ia32_pause();
}

static void strict_set(void)
{
	area = map_anon(16);
	fill(area, 16 * PAGE, 1);
	file = make_file("data", 4096, 2);
	idle = spin;
	NEED(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
}

static int strict_check(void)
{
	char got[8], all[4096];
	fill(all, sizeof all, 2);
	CHECK(same(area, 16 * PAGE, 1));
	CHECK(read(file, got, 8) == 8 && !memcmp(got, all + 8 * times_read++, 8));
	return 1;
}

static void strict_harm(void)
{
	area[3] ^= 1;
}

/* ---- filters ---- */

static void one_set(void)
{
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	NEED(!forbid(SYS_getppid, 77, 0));
}

static int one_check(void)
{
	CHECK(forbidden(SYS_getppid, 77));
	CHECK(syscall(SYS_getuid) != -1);
	CHECK(prctl(PR_GET_SECCOMP) == SECCOMP_MODE_FILTER);
	return 1;
}

/* A newer filter's answer wins over an older one's of the same kind. */
static void newer_harm(void)
{
	forbid(SYS_getppid, 78, 0);
}

/* Three of them, without no_new_privs; the second answers for what the first does too, and with flags. */
static void stacked_set(void)
{
	NEED(!forbid(SYS_getppid, 76, 0));
	NEED(!forbid(SYS_getppid, 77, SECCOMP_FILTER_FLAG_LOG));
	NEED(!forbid(SYS_getpgid, 79, 0));
}

static int stacked_check(void)
{
	CHECK_ALL(one_check());
	CHECK(forbidden(SYS_getpgid, 79));
	CHECK(atoi(field("/proc/self/status", "Seccomp_filters")) == 3);
	CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
	return 1;
}

/* One filter set by main for all threads at once, after main had one alone. */
static int tsync_job(struct worker *self)
{
	(void)self;
	return one_check();
}

static void tsync_set(void)
{
	job = tsync_job;
	start_workers(4);
	NEED(!forbid(SYS_getpgid, 79, 0));
	NEED(!forbid(SYS_getppid, 77, SECCOMP_FILTER_FLAG_TSYNC));
}

static int tsync_check(void)
{
	CHECK_ALL(one_check());
	return ask_workers(4);
}

/* A filter and groups that are as many as there may be, also of threads. */
enum { LONGEST = 4096, GROUPS = 20000 };

static void long_set(void)
{
	static struct sock_filter code[LONGEST];
	static gid_t groups[GROUPS];
	struct sock_fprog program = {LONGEST, code};
	code[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0);
	for (int i = 1; i < LONGEST - 3; i++)
		code[i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 70000 + i, 0, 0);
	code[LONGEST - 3] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1);
	code[LONGEST - 2] = (struct sock_filter)BPF_STMT(BPF_RET, SECCOMP_RET_ERRNO | 77);
	code[LONGEST - 1] = (struct sock_filter)BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW);
	for (int i = 0; i < GROUPS; i++)
		groups[i] = 3 * i;
	NEED(!setgroups(GROUPS, groups));
	job = tsync_job;
	start_workers(2);
	NEED(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

static int long_check(void)
{
	CHECK_ALL(one_check());
	CHECK(getgroups(0, NULL) == GROUPS);
	return ask_workers(2);
}

/* Every thread has filters of its own; the first and main have none. */
static void threads_prepare(struct worker *self)
{
	for (int i = 0; i < self->index; i++)
		NEED(!forbid(SYS_getppid, 70 + self->index + i, 0));
}

static int threads_job(struct worker *self)
{
	int i = self->index;
	if (i)
		CHECK(forbidden(SYS_getppid, 70 + 2 * i - 1));
	else
		CHECK(syscall(SYS_getppid) >= 0);
	CHECK(atoi(field("/proc/thread-self/status", "Seccomp_filters")) == i);
	return 1;
}

static void threads_set(void)
{
	prepare = threads_prepare;
	job = threads_job;
	start_workers(4);
}

static int threads_check(void)
{
	CHECK(syscall(SYS_getppid) >= 0 && prctl(PR_GET_SECCOMP) == 0);
	return ask_workers(4);
}

WORKLOAD(
	{"strict", strict_set, strict_check, strict_harm},
	{"one", one_set, one_check, newer_harm},
	{"stacked", stacked_set, stacked_check, newer_harm},
	{"tsync", tsync_set, tsync_check, newer_harm},
	{"long", long_set, long_check, newer_harm},
	{"threads", threads_set, threads_check, newer_harm},
)
