/* What has been advised about memory, as VmFlags of smaps shows it; locked memory; guard pages; huge pages. */
#include "workload.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif

enum { PAGES = 64 };

static char *area;

/* Does the mapping at `at` have the two-letter flag? */
static int has_flag(const char *at, const char *flag)
{
	static char smaps[1 << 20];
	char head[32], padded[8];
	snprintf(head, sizeof head, "\n%lx-", (unsigned long)at);
	snprintf(padded, sizeof padded, " %s ", flag);
	smaps[0] = '\n';
	if (slurp("/proc/self/smaps", smaps + 1, sizeof smaps - 1) <= 0)
		return -1;
	char *found = strstr(smaps, head);
	found = found ? strstr(found, "\nVmFlags:") : NULL;
	if (!found)
		return -1;
	found[1 + strcspn(found + 1, "\n")] = 0;
	return !!strstr(found, padded);
}

/* ---- madvise: mode name, advice, what takes it back, the flag ---- */

static const struct advice { const char *mode; int give, take; const char *flag; } advices[] = {
	{"dontfork", MADV_DONTFORK, MADV_DOFORK, "dc"},
	{"dontdump", MADV_DONTDUMP, MADV_DODUMP, "dd"},
	{"wipeonfork", MADV_WIPEONFORK, MADV_KEEPONFORK, "wf"},
	{"hugepage", MADV_HUGEPAGE, MADV_NOHUGEPAGE, "hg"},
	{"nohugepage", MADV_NOHUGEPAGE, MADV_HUGEPAGE, "nh"},
	{"mergeable", MADV_MERGEABLE, MADV_UNMERGEABLE, "mg"},
	{"random", MADV_RANDOM, MADV_NORMAL, "rr"},
	{"sequential", MADV_SEQUENTIAL, MADV_NORMAL, "sr"},
};

static const struct advice *advice(void)
{
	for (size_t i = 0; i < sizeof advices / sizeof *advices; i++)
		if (!strcmp(advices[i].mode, mode_name))
			return &advices[i];
	abort();
}

static void advice_set(void)
{
	area = map_anon(PAGES);
	fill(area, PAGES * PAGE, 1);
	if (madvise(area + 16 * PAGE, 32 * PAGE, advice()->give))
		cannot_run("the kernel does not take this advice");
	NEED(has_flag(area + 16 * PAGE, advice()->flag) == 1);
}

static int advice_check(void)
{
	CHECK(has_flag(area + 16 * PAGE, advice()->flag) == 1);
	CHECK(has_flag(area + 48 * PAGE, advice()->flag) != 1);
	CHECK(same(area, PAGES * PAGE, 1));
	return 1;
}

static void advice_harm(void)
{
	madvise(area + 16 * PAGE, 32 * PAGE, advice()->take);
}

/* Memory that the kernel may drop: it may read as zeros, but its kind must stay. */
static void droppable_set(void)
{
	area = mmap(NULL, PAGES * PAGE, RW, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED)
		cannot_run("the kernel has no droppable mappings");
	fill(area, PAGES * PAGE, 2);
	NEED(has_flag(area, "dp") == 1);
}

static int droppable_check(void)
{
	CHECK(has_flag(area, "dp") == 1);
	for (int page = 0; page < PAGES; page++)
		CHECK(area[page * PAGE] == 0 || page || same(area, PAGE, 2));
	fill(area, PAGES * PAGE, 2);
	return 1;
}

static void droppable_harm(void)
{
	mmap(area, PAGES * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

/* ---- locked memory ---- */

static unsigned long locked_kb(void)
{
	return strtoul(field("/proc/self/status", "VmLck"), NULL, 10);
}

static void mlock_set(void)
{
	area = map_anon(PAGES);
	fill(area, 4 * PAGE, 3);
	NEED(!mlock(area, PAGES / 2 * PAGE));
}

static int mlock_check(void)
{
	unsigned char resident[PAGES];
	CHECK(has_flag(area, "lo") == 1 && has_flag(area + PAGES / 2 * PAGE, "lo") != 1);
	CHECK(locked_kb() == PAGES / 2 * 4);
	CHECK(!mincore(area, PAGES / 2 * PAGE, resident));
	for (int page = 0; page < PAGES / 2; page++)
		CHECK(resident[page] & 1);
	CHECK(same(area, 4 * PAGE, 3));
	return 1;
}

static void mlock_harm(void)
{
	munlock(area, PAGE);
}

/* Locked when touched: untouched pages must stay away. */
static void onfault_set(void)
{
	area = strcmp(mode_name, "onfault-shared") ? map_anon(PAGES) : map_pages(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	if (mlock2(area, PAGES * PAGE, MLOCK_ONFAULT))
		cannot_run("mlock2");
	fill(area, 4 * PAGE, 4);
}

static int onfault_check(void)
{
	char path[] = "/proc/self/pagemap";
	uint64_t entries[PAGES];
	int fd = open(path, O_RDONLY | O_CLOEXEC), there = 0;
	CHECK(fd >= 0 && pread(fd, entries, sizeof entries, (uintptr_t)area / PAGE * 8) == (ssize_t)sizeof entries);
	CHECK(!close(fd));
	CHECK(has_flag(area, "lo") == 1 && has_flag(area, "lf") != 0);
	for (int page = 0; page < PAGES; page++)
		there += entries[page] >> 63;
	CHECK(there < PAGES / 2);
	CHECK(same(area, 4 * PAGE, 4));
	return 1;
}

static void onfault_harm(void)
{
	mlock(area, PAGES * PAGE);
	memset(area + 4 * PAGE, 1, (PAGES - 4) * PAGE);
}

/* What is mapped in the future is locked too: a new mapping shows it. */
static void future_set(void)
{
	NEED(!mlockall(MCL_FUTURE));
	area = map_anon(4);
}

static int future_check(void)
{
	CHECK(has_flag(area, "lo") == 1);
	char *fresh = map_anon(4);
	CHECK(mprotect(fresh, PAGE, PROT_READ) == 0 && has_flag(fresh, "lo") == 1);
	CHECK(!munmap(fresh, 4 * PAGE));
	return 1;
}

static void future_harm(void)
{
	munlockall();
}

/* ---- guard pages: they fault although the mapping allows access, and carry no contents ---- */

static int guarded(char *at)
{
	/* Reading through this file answers instead of raising a signal. */
	char byte;
	int probe = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	ssize_t got = pread(probe, &byte, 1, (off_t)(uintptr_t)at);
	close(probe);
	return got != 1;
}

static void guard_set(void)
{
	area = strcmp(mode_name, "guard-shared") ? map_anon(PAGES)
						 : map_pages(PAGES, RW, MAP_SHARED, make_file("mapped", PAGES * PAGE, 1));
	fill(area, PAGES * PAGE, 5);
	if (madvise(area + 8 * PAGE, 4 * PAGE, MADV_GUARD_INSTALL))
		cannot_run("the kernel has no guard pages");
	NEED(!madvise(area + 63 * PAGE, PAGE, MADV_GUARD_INSTALL));
	NEED(guarded(area + 8 * PAGE));
}

static int guard_check(void)
{
	for (int page = 0; page < PAGES; page++)
		CHECK(guarded(area + page * PAGE) == ((page >= 8 && page < 12) || page == 63));
	CHECK(same(area, 8 * PAGE, 5));
	return 1;
}

static void guard_harm(void)
{
	madvise(area + 9 * PAGE, PAGE, MADV_GUARD_INSTALL + 1 /* MADV_GUARD_REMOVE */);
}

/* ---- pages of the machine's pool of huge pages (the runner fills it) ---- */

enum { HUGE = 2 << 20 };

static void hugetlb_set(void)
{
	int kind = !strcmp(mode_name, "hugetlb-shared") ? MAP_SHARED : MAP_PRIVATE;
	area = mmap(NULL, 2 * HUGE, RW, kind | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (area == MAP_FAILED)
		cannot_run("no huge pages");
	fill(area, HUGE, 6);
}

static int hugetlb_check(void)
{
	CHECK(has_flag(area, "ht") == 1);
	CHECK(same(area, HUGE, 6) && all_zero(area + HUGE, HUGE));
	return 1;
}

static void hugetlb_harm(void)
{
	area[1 << 20] ^= 1;
}

WORKLOAD(
	{"dontfork", advice_set, advice_check, advice_harm},
	{"dontdump", advice_set, advice_check, advice_harm},
	{"wipeonfork", advice_set, advice_check, advice_harm},
	{"hugepage", advice_set, advice_check, advice_harm},
	{"nohugepage", advice_set, advice_check, advice_harm},
	{"mergeable", advice_set, advice_check, advice_harm},
	{"random", advice_set, advice_check, advice_harm},
	{"sequential", advice_set, advice_check, advice_harm},
	{"droppable", droppable_set, droppable_check, droppable_harm},
	{"mlock", mlock_set, mlock_check, mlock_harm},
	{"onfault", onfault_set, onfault_check, onfault_harm},
	{"onfault-shared", onfault_set, onfault_check, onfault_harm},
	{"future", future_set, future_check, future_harm},
	{"guard", guard_set, guard_check, guard_harm},
	{"guard-shared", guard_set, guard_check, guard_harm},
	{"hugetlb-private", hugetlb_set, hugetlb_check, hugetlb_harm},
	{"hugetlb-shared", hugetlb_set, hugetlb_check, hugetlb_harm},
)
