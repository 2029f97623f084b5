/* Memory protection keys: allocated ones, those of mappings, the kernel's own for memory that can only be executed, and
 * what a child has of them. */
#include "workload.h"

enum { PAGES = 16 };

static char *area, *code;
static int spare, mine, hole, file;

/* May this thread touch `at`? Asked by a system call: a handler would run with other rights. */
static int can_touch(char *at, int write)
{
	return (write ? pread(file, at, 1, 0) : pwrite(file, at, 1, 1)) == 1;
}

static void keys_set(void)
{
	spare = pkey_alloc(0, PKEY_DISABLE_WRITE);
	if (spare < 0)
		cannot_run("this processor has no protection keys");
	NEED((hole = pkey_alloc(0, 0)) > 0);
	NEED((mine = pkey_alloc(0, PKEY_DISABLE_ACCESS)) > 0);
	NEED((file = memfd_create("one byte", 0)) >= 0);
	area = map_anon(PAGES);
	fill(area, PAGES * PAGE, 1);
	NEED(pwrite(file, area + 3 * PAGE, 1, 0) == 1);
	NEED(!pkey_mprotect(area + 4 * PAGE, 4 * PAGE, RW, mine));
	NEED(!pkey_mprotect(area + 8 * PAGE, 4 * PAGE, PROT_READ, spare));
	code = map_anon(1);
	fill(code, PAGE, 2);
	NEED(!mprotect(code, PAGE, PROT_EXEC));
	NEED(!pkey_free(hole));
}

static int keys_check(void)
{
	CHECK(pkey_get(spare) == PKEY_DISABLE_WRITE && pkey_get(mine) == PKEY_DISABLE_ACCESS);
	CHECK(!can_touch(area + 4 * PAGE, 0) && !can_touch(area + 7 * PAGE, 0) && !can_touch(code, 0));
	CHECK(can_touch(area + 3 * PAGE, 1) && can_touch(area + 8 * PAGE, 0) && !can_touch(area + 8 * PAGE, 1));
	CHECK(pkey_alloc(0, 0) == hole && !pkey_free(hole));
	/* A key that is not allocated is refused. */
	CHECK(pkey_mprotect(area, PAGE, RW, hole) == -1 && errno == EINVAL);
	CHECK(!pkey_set(mine, 0) && same(area, PAGES * PAGE, 1) && !pkey_set(mine, PKEY_DISABLE_ACCESS));
	CHECK(!mprotect(code, PAGE, PROT_READ) && same(code, PAGE, 2) && !mprotect(code, PAGE, PROT_EXEC));
	return 1;
}

static void keys_harm(void)
{
	pkey_mprotect(area + 7 * PAGE, PAGE, RW, 0);
}

/* ---- a child that gave its keys back, and one that has taken another ---- */

static struct { volatile int request, verdict; } *shared;

static int child_check(void)
{
	CHECK(can_touch(area + 4 * PAGE, 0) && same(area, PAGES * PAGE, 1) && can_touch(area + 3 * PAGE, 1));
	CHECK(pkey_alloc(0, 0) == spare && pkey_alloc(0, 0) == hole && pkey_alloc(0, 0) == mine);
	CHECK(!pkey_free(spare) && !pkey_free(hole) && !pkey_free(mine));
	return 1;
}

static void child_set(void)
{
	keys_set();
	shared = mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(shared != MAP_FAILED);
	pid_t child = fork();
	NEED(child >= 0);
	if (child)
		return;
	mprotect(area, PAGES * PAGE, RW);
	pkey_mprotect(area, PAGES * PAGE, RW, 0);
	pkey_free(spare);
	pkey_free(mine);
	for (;;) {
		if (shared->request) {
			shared->request = 0;
			shared->verdict = child_check();
		}
		nap_ms(1);
	}
}

static int both_check(void)
{
	CHECK_ALL(keys_check());
	shared->verdict = 0;
	shared->request = 1;
	CHECK(wait_for(&shared->verdict, 5000));
	return shared->verdict;
}

WORKLOAD(
	{"keys", keys_set, keys_check, keys_harm},
	{"child", child_set, both_check, keys_harm},
)
