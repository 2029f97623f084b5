/* Threads that share less with their process than usual: directories come back, the rest is refused. */
#include <sched.h>

#include "workload.h"

static int settled, wanted, said;
static char here[PATH_MAX];

/* ---- working directory, root and umask of its own ---- */

static int goes_well(void)
{
	char now[PATH_MAX];
	struct stat root;
	mode_t mask = umask(0101);
	CHECK(mask == 0101);
	CHECK(getcwd(now, sizeof now) && !strcmp(now, "/below"));
	CHECK(!stat("/below/deeper", &root) && stat(here, &root) && errno == ENOENT);
	return 1;
}

static void *wanderer(void *argument)
{
	(void)argument;
	NEED(!unshare(CLONE_FS) && !chroot("jail") && !chdir("/below"));
	umask(0101);
	__atomic_store_n(&settled, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		if (__atomic_load_n(&wanted, __ATOMIC_SEQ_CST) == 1) {
			__atomic_store_n(&wanted, 0, __ATOMIC_SEQ_CST);
			__atomic_store_n(&said, goes_well(), __ATOMIC_SEQ_CST);
		} else if (__atomic_load_n(&wanted, __ATOMIC_SEQ_CST) == 2) {
			umask(0);
			__atomic_store_n(&wanted, 0, __ATOMIC_SEQ_CST);
		}
		nap_ms(1);
	}
	return NULL;
}

static void directories_set(void)
{
	NEED(!mkdir("jail", 0755) && !mkdir("jail/below", 0755) && !mkdir("jail/below/deeper", 0755));
	NEED(getcwd(here, sizeof here));
	umask(022);
	start_thread(wanderer, NULL);
	NEED(wait_for(&settled, 2000));
}

static int directories_check(void)
{
	char now[PATH_MAX];
	said = 0;
	__atomic_store_n(&wanted, 1, __ATOMIC_SEQ_CST);
	CHECK(wait_for(&said, 2000));
	CHECK_ALL(said);
	CHECK(getcwd(now, sizeof now) && !strcmp(now, here) && umask(022) == 022);
	return 1;
}

static void directories_harm(void)
{
	__atomic_store_n(&wanted, 2, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&wanted, __ATOMIC_SEQ_CST))
		nap_ms(1);
}

/* ---- refused ---- */

static void *leaver(void *argument)
{
	NEED(!unshare(*(int *)argument));
	__atomic_store_n(&settled, 1, __ATOMIC_SEQ_CST);
	for (;;)
		nap_ms(1000);
	return NULL;
}

static void leaver_set(void)
{
	static int what;
	what = !strcmp(mode_name, "table") ? CLONE_FILES : CLONE_NEWUTS;
	start_thread(leaver, &what);
	NEED(wait_for(&settled, 2000));
}

static void children_set(void)
{
	NEED(!unshare(CLONE_NEWPID));
	settled = 1;
}

static int refused_check(void)
{
	CHECK(settled == 1);
	return 1;
}

static void refused_harm(void)
{
	settled = 2;
}

WORKLOAD(
	{"directories", directories_set, directories_check, directories_harm},
	{"table", leaver_set, refused_check, refused_harm},
	{"namespace", leaver_set, refused_check, refused_harm},
	{"children", children_set, refused_check, refused_harm},
)
