/* Mappings of every common kind, with contents that only the checkpoint can bring back. */
#include "workload.h"

enum { PAGES = 256, BYTES = PAGES * 4096 };

static char *area, *other;
static int file;

/* Private anonymous memory: a full pattern, read-only and executable neighbours, and a page that was never touched. */
static void anon_set(void)
{
	area = map_anon(PAGES);
	fill(area, BYTES / 2, 1);
	NEED(!mprotect(area + 4 * PAGE, 2 * PAGE, PROT_READ));
	NEED(!mprotect(area + 8 * PAGE, PAGE, PROT_READ | PROT_EXEC));
	other = malloc(100000);
	fill(other, 100000, 2);
}

static int anon_check(void)
{
	CHECK(same(area, BYTES / 2, 1));
	CHECK(all_zero(area + BYTES / 2, BYTES / 2));
	CHECK(same(other, 100000, 2));
	area[BYTES - 1] = 1;
	area[BYTES - 1] = 0;
	return 1;
}

static void area_harm(void)
{
	area[100] ^= 1;
}

/* A private mapping of a file: some pages written, some only read, some never touched. */
static void file_private_set(void)
{
	file = make_file("mapped", BYTES, 3);
	area = map_pages(PAGES, RW, MAP_PRIVATE, file);
	close(file);
	for (int page = 0; page < PAGES; page += 3)
		fill(area + page * PAGE, PAGE, 1000 + page);
	other = map_pages(PAGES, PROT_READ, MAP_PRIVATE, (file = open("mapped", O_RDONLY)));
	close(file);
}

static int file_private_check(void)
{
	for (int page = 0; page < PAGES; page++)
		CHECK(page % 3 ? !memcmp(area + page * PAGE, other + page * PAGE, PAGE)
			       : same(area + page * PAGE, PAGE, 1000 + page));
	CHECK(same(other, BYTES, 3));
	return 1;
}

/* A private file mapping that starts at an offset and reaches beyond the end of its file. */
static void file_offset_set(void)
{
	file = make_file("short", 5 * PAGE + 808, 4);
	area = mmap(NULL, 8 * PAGE, RW, MAP_PRIVATE, file, 2 * PAGE);
	NEED(area != MAP_FAILED);
	other = mmap(NULL, 3 * PAGE, PROT_READ, MAP_SHARED, file, PAGE);
	NEED(other != MAP_FAILED);
	close(file);
	area[3 * PAGE + 1000] = 77;
}

static int file_offset_check(void)
{
	CHECK(area[3 * PAGE + 1000] == 77);
	CHECK(!memcmp(area, other + PAGE, 2 * PAGE));
	char whole[5 * PAGE + 808];
	fill(whole, sizeof whole, 4);
	CHECK(!memcmp(area, whole + 2 * PAGE, 3 * PAGE));
	CHECK(!memcmp(area + 3 * PAGE, whole + 5 * PAGE, 808));
	return 1;
}

/* Shared anonymous memory, mapped twice (mremap with old size 0 duplicates a shared mapping). */
static void anon_shared_set(void)
{
	area = map_pages(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	fill(area, BYTES / 2, 5);
	other = mremap(area, 0, BYTES, MREMAP_MAYMOVE);
	NEED(other != MAP_FAILED);
}

static int anon_shared_check(void)
{
	CHECK(same(area, BYTES / 2, 5));
	CHECK(same(other, BYTES / 2, 5));
	CHECK(all_zero(area + BYTES / 2, BYTES / 2));
	area[BYTES - 8] = 9;
	CHECK(other[BYTES - 8] == 9);
	other[BYTES - 8] = 0;
	CHECK(!area[BYTES - 8]);
	return 1;
}

/* A shared mapping of a file: contents are the file's, writes reach it. */
static void file_shared_set(void)
{
	file = make_file("shared", BYTES, 6);
	area = map_pages(PAGES, RW, MAP_SHARED, file);
	other = map_pages(PAGES, PROT_READ, MAP_SHARED, file);
	fill(area + 7 * PAGE, PAGE, 7);
}

static int file_shared_check(void)
{
	char page[4096];
	CHECK(same(area, 7 * PAGE, 6));
	CHECK(same(area + 7 * PAGE, PAGE, 7));
	CHECK(same(other + 7 * PAGE, PAGE, 7));
	CHECK(pread(file, page, PAGE, 7 * PAGE) == (ssize_t)PAGE && same(page, PAGE, 7));
	fill(page, PAGE, 8);
	CHECK(pwrite(file, page, PAGE, 20 * PAGE) == (ssize_t)PAGE);
	CHECK(same(area + 20 * PAGE, PAGE, 8));
	return 1;
}

/* /dev/zero: private is anonymous memory with a name, shared is shared anonymous memory. */
static void dev_zero_set(void)
{
	file = open("/dev/zero", O_RDWR | O_CLOEXEC);
	NEED(file >= 0);
	area = map_pages(PAGES, RW, MAP_PRIVATE, file);
	other = map_pages(PAGES, RW, MAP_SHARED, file);
	close(file);
	fill(area, BYTES / 4, 9);
	fill(other, BYTES / 4, 10);
}

static int dev_zero_check(void)
{
	CHECK(same(area, BYTES / 4, 9) && all_zero(area + BYTES / 4, 3 * BYTES / 4));
	CHECK(same(other, BYTES / 4, 10) && all_zero(other + BYTES / 4, 3 * BYTES / 4));
	return 1;
}

/* Mappings of a file that has lost its name: one shared, one private with written pages, the fd closed. */
static void unlinked_set(void)
{
	file = make_file("gone", BYTES, 11);
	area = map_pages(PAGES, RW, MAP_SHARED, file);
	other = map_pages(PAGES, RW, MAP_PRIVATE, file);
	close(file);
	NEED(!unlink("gone"));
	fill(area, PAGE, 12);
	fill(other + PAGE, PAGE, 13);
}

static int unlinked_check(void)
{
	CHECK(same(area, PAGE, 12) && same(other, PAGE, 12));
	CHECK(same(other + PAGE, PAGE, 13));
	CHECK(!memcmp(area + 2 * PAGE, other + 2 * PAGE, BYTES - 2 * PAGE));
	area[BYTES - 8] ^= 5;
	CHECK(area[BYTES - 8] == other[BYTES - 8]);
	area[BYTES - 8] ^= 5;
	CHECK(access("gone", F_OK) && errno == ENOENT);
	return 1;
}

WORKLOAD(
	{"anon", anon_set, anon_check, area_harm},
	{"file-private", file_private_set, file_private_check, area_harm},
	{"file-offset", file_offset_set, file_offset_check, area_harm},
	{"anon-shared", anon_shared_set, anon_shared_check, area_harm},
	{"file-shared", file_shared_set, file_shared_check, area_harm},
	{"dev-zero", dev_zero_set, dev_zero_check, area_harm},
	{"unlinked", unlinked_set, unlinked_check, area_harm},
)
