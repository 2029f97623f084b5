/* What a single thread has for itself though usually a process has it, or a process for its children to come. */
#include <sched.h>

#include "workload.h"

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

static int done, go, verdict, flag;

static void *thread_apart(void *argument)
{
	(void)argument;
	if (unshare(flag))
		cannot_run("no such unshare");
	if (flag == CLONE_FS)
		chdir("/");
	if (flag == CLONE_FILES)
		dup2(0, 77);
	__atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
	for (;; nap_ms(1)) {
		char own[PATH_MAX] = "", path[64], theirs[64] = "";
		if (!__atomic_exchange_n(&go, 0, __ATOMIC_SEQ_CST))
			continue;
		snprintf(path, sizeof path, "/proc/%d/ns/uts", getpid());
		readlink("/proc/thread-self/ns/uts", own, sizeof own - 1);
		readlink(path, theirs, sizeof theirs - 1);
		verdict = strcmp(own, theirs) != 0;
		if (flag == CLONE_FS)
			verdict = getcwd(own, sizeof own) && !strcmp(own, "/");
		if (flag == CLONE_FILES)
			verdict = fcntl(77, F_GETFD) >= 0;
		__atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
	}
	return NULL;
}

static void apart_set(void)
{
	flag = !strcmp(mode_name, "files") ? CLONE_FILES : !strcmp(mode_name, "directories") ? CLONE_FS : CLONE_NEWUTS;
	start_thread(thread_apart, NULL);
	NEED(wait_for(&done, 2000));
}

static int apart_check(void)
{
	char here[PATH_MAX];
	done = 0;
	__atomic_store_n(&go, 1, __ATOMIC_SEQ_CST);
	CHECK(wait_for(&done, 2000) && verdict);
	CHECK(fcntl(77, F_GETFD) < 0 && getcwd(here, sizeof here) && strcmp(here, "/"));
	return 1;
}

static void apart_harm(void)
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
	{"files", apart_set, apart_check, apart_harm},
	{"directories", apart_set, apart_check, apart_harm},
	{"namespace", apart_set, apart_check, apart_harm},
	{"children", children_set, children_check, children_harm},
)
