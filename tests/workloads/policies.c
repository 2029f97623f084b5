/* Rare settings: NUMA policy, speculation control and huge pages on advice only come back; the others are refused. */
#include <linux/keyctl.h>
#include <linux/mempolicy.h>
#include <stddef.h>
#include <sys/prctl.h>

#include "workload.h"

#ifndef PR_THP_DISABLE_EXCEPT_ADVISED
#define PR_THP_DISABLE_EXCEPT_ADVISED 2
#endif

static unsigned long nodes = 1;

/* ---- saved ---- */

static int thread_policy, thread_speculation, thread_clock, thread_machine, other_done, other_go;

static void *other(void *argument)
{
	(void)argument;
	NEED(!syscall(SYS_set_mempolicy, MPOL_BIND | MPOL_F_STATIC_NODES, &nodes, 64));
	NEED(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
	NEED(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0));
	__atomic_store_n(&other_done, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		if (__atomic_exchange_n(&other_go, 0, __ATOMIC_SEQ_CST)) {
			syscall(SYS_get_mempolicy, &thread_policy, NULL, 0, NULL, 0);
			prctl(PR_GET_TSC, &thread_clock, 0, 0, 0);
			thread_machine = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
			thread_speculation = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0);
			__atomic_store_n(&other_done, 1, __ATOMIC_SEQ_CST);
		}
		nap_ms(1);
	}
	return NULL;
}

static int speculation_before, huge_before;

static void set_set(void)
{
	NEED(!syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, &nodes, 64));
	start_thread(other, NULL);
	NEED(wait_for(&other_done, 2000));
	/* A processor that cannot be told, or a kernel that does not know: then it has to stay so. */
	prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE, 0, 0);
	prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_FORCE_DISABLE, 0, 0);
	NEED(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	prctl(PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED, 0, 0);
	speculation_before = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0) << 8 |
			     prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_INDIRECT_BRANCH, 0, 0, 0);
	huge_before = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
}

static int set_check(void)
{
	int policy = 0, speculation;
	unsigned long mask[16] = {0};
	CHECK(!syscall(SYS_get_mempolicy, &policy, mask, 1025, NULL, 0) && policy == MPOL_INTERLEAVE && mask[0] == 1);
	other_done = 0;
	__atomic_store_n(&other_go, 1, __ATOMIC_SEQ_CST);
	CHECK(wait_for(&other_done, 2000) && thread_policy == (MPOL_BIND | MPOL_F_STATIC_NODES));
	CHECK(thread_clock == PR_TSC_SIGSEGV && thread_machine == PR_MCE_KILL_LATE);
	CHECK(!prctl(PR_GET_TSC, &policy, 0, 0, 0) && policy == PR_TSC_ENABLE);
	CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY);
	speculation = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0);
	CHECK(speculation == speculation_before >> 8);
	CHECK(!(speculation & PR_SPEC_DISABLE) || !(thread_speculation & PR_SPEC_DISABLE));
	speculation = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_INDIRECT_BRANCH, 0, 0, 0);
	CHECK(speculation == (speculation_before & 0xff));
	CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == huge_before);
	return 1;
}

static void set_harm(void)
{
	syscall(SYS_set_mempolicy, MPOL_DEFAULT, NULL, 0);
}

/* ---- refused ---- */

static char selector;

static void dispatch_set(void)
{
	if (prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0L, 0L, &selector))
		cannot_run("no syscall user dispatch");
}

static int dispatch_check(void)
{
	/* The kernel reads it at every call. */
	CHECK(getppid() > 0 && !selector);
	return 1;
}

static void dispatch_harm(void)
{
	prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0L, 0L, 0L);
	selector = 2;
}

static void keyring_set(void)
{
	if (syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1) <= 0)
		cannot_run("no keyrings");
}

static int keyring_check(void)
{
	CHECK(syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 0) > 0);
	return 1;
}

static void keyring_harm(void)
{
	syscall(SYS_keyctl, KEYCTL_REVOKE, KEY_SPEC_PROCESS_KEYRING);
}

/* As root, or as a user. */
static void landlock_set(void)
{
	struct { uint64_t files; } rules = {1 << 1};
	int fd = (int)syscall(444, &rules, sizeof rules, 0);
	if (fd < 0)
		cannot_run("no Landlock");
	if (!strcmp(mode_name, "landlock-user"))
		NEED(!setgid(77) && !setuid(77));
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !syscall(446, fd, 0) && !close(fd));
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
}

static int landlock_check(void)
{
	CHECK(open("beat", O_WRONLY) == -1 && errno == EACCES);
	return 1;
}

static void landlock_harm(void)
{
	chdir("/proc");
}

WORKLOAD(
	{"set", set_set, set_check, set_harm},
	{"dispatch", dispatch_set, dispatch_check, dispatch_harm},
	{"keyring", keyring_set, keyring_check, keyring_harm},
	{"landlock", landlock_set, landlock_check, landlock_harm},
	{"landlock-user", landlock_set, landlock_check, landlock_harm},
)
