/* Which pages are there: presence as pagemap shows it must survive, page by page. */
#include "workload.h"

enum { PAGES = 512 };

static char *area;
static uint64_t was[PAGES];

#define PRESENT (1UL << 63)
#define SWAPPED (1UL << 62)
#define FRAME ((1UL << 55) - 1)

static void read_pagemap(char *start, int pages, uint64_t *entries)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	NEED(fd >= 0);
	NEED(pread(fd, entries, 8 * pages, (uintptr_t)start / PAGE * 8) == 8 * pages);
	close(fd);
}

static int there(uint64_t entry)
{
	return !!(entry & (PRESENT | SWAPPED));
}

/* Small pages only, so that the kernel does not fill holes by itself. */
static char *small_pages(void)
{
	char *start = map_anon(PAGES);
	NEED(!madvise(start, PAGES * PAGE, MADV_NOHUGEPAGE));
	return start;
}

static int written(int page)
{
	return (page * 7 + page / 16) % 5 < 2;
}

/* Holes between written pages stay holes. */
static void presence_set(void)
{
	area = small_pages();
	for (int page = 0; page < PAGES; page++)
		if (written(page))
			fill(area + page * PAGE, PAGE, page);
	read_pagemap(area, PAGES, was);
}

static int presence_check(void)
{
	uint64_t now[PAGES];
	read_pagemap(area, PAGES, now);
	for (int page = 0; page < PAGES; page++)
		CHECK(there(now[page]) == there(was[page]));
	for (int page = 0; page < PAGES; page++)
		if (written(page))
			CHECK(same(area + page * PAGE, PAGE, page));
	return 1;
}

static void presence_harm(void)
{
	for (int page = 0; page < PAGES; page++)
		if (!written(page)) {
			area[page * PAGE] = 0;
			return;
		}
}

/* Pages that were only read are the zero page: they must not become memory. */
static void zero_set(void)
{
	volatile char sum = 0;
	area = small_pages();
	for (int page = 0; page < PAGES; page++)
		sum += area[page * PAGE];
	fill(area, 4 * PAGE, 1);
	memset(area + 100 * PAGE, 0, 4 * PAGE);  /* written, with zeros: either way of keeping them is right */
}

static unsigned long anonymous_kb(void)
{
	static char smaps[1 << 20];
	char head[32];
	snprintf(head, sizeof head, "%lx-", (unsigned long)area);
	if (slurp("/proc/self/smaps", smaps, sizeof smaps) <= 0)
		return 0;
	char *found = strstr(smaps, head);
	found = found ? strstr(found, "\nAnonymous:") : NULL;
	return found ? strtoul(found + 11, NULL, 10) : 0;
}

static int zero_check(void)
{
	CHECK(anonymous_kb() >= 16 && anonymous_kb() <= 32);
	CHECK(same(area, 4 * PAGE, 1));
	CHECK(all_zero(area + 4 * PAGE, (PAGES - 4) * PAGE));
	return 1;
}

static void zero_harm(void)
{
	memset(area + 200 * PAGE, 0, 20 * PAGE);
}

/* An area of transparent huge pages: contents, and the advice that made them. */
enum { HUGE_BYTES = 2 << 20, HUGE_AREA = 4 * HUGE_BYTES };

static void thp_set(void)
{
	char *start = mmap(NULL, HUGE_AREA + HUGE_BYTES, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(start != MAP_FAILED);
	area = (char *)(((uintptr_t)start + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1));
	if (madvise(area, HUGE_AREA, MADV_HUGEPAGE))
		cannot_run("the kernel has no transparent huge pages");
	fill(area, 2 * HUGE_BYTES, 7);
	fill(area + 3 * HUGE_BYTES, PAGE, 8);
}

static int thp_check(void)
{
	CHECK(same(area, 2 * HUGE_BYTES, 7));
	CHECK(same(area + 3 * HUGE_BYTES, PAGE, 8));
	CHECK(all_zero(area + 3 * HUGE_BYTES + PAGE, HUGE_BYTES - PAGE));
	return 1;
}

static void thp_harm(void)
{
	area[HUGE_BYTES + 5] ^= 1;
}

/* A private mapping of a file: pages that were only read belong to the file still, and follow it. */
static int file;

static void cow_set(void)
{
	file = make_file("original", PAGES * PAGE, 9);
	area = map_pages(PAGES, RW, MAP_PRIVATE, file);
	volatile char sum = 0;
	for (int page = 0; page < PAGES; page += 2)
		sum += area[page * PAGE];
	for (int page = 0; page < PAGES; page += 4)
		fill(area + page * PAGE, PAGE, page);
}

static int cow_check(void)
{
	char page[4096], old[4096];
	for (int i = 0; i < PAGES; i += 4)
		CHECK(same(area + i * PAGE, PAGE, i));
	CHECK(pread(file, old, PAGE, 6 * PAGE) == (ssize_t)PAGE && !memcmp(area + 6 * PAGE, old, PAGE));
	fill(page, PAGE, 99);
	CHECK(pwrite(file, page, PAGE, 6 * PAGE) == (ssize_t)PAGE);
	CHECK(!memcmp(area + 6 * PAGE, page, PAGE));
	CHECK(pwrite(file, old, PAGE, 6 * PAGE) == (ssize_t)PAGE);
	return 1;
}

static void cow_harm(void)
{
	volatile char *byte = &area[6 * PAGE];
	*byte = *byte;
}

WORKLOAD(
	{"presence", presence_set, presence_check, presence_harm},
	{"zero", zero_set, zero_check, zero_harm},
	{"thp", thp_set, thp_check, thp_harm},
	{"cow", cow_set, cow_check, cow_harm},
)
