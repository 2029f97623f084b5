/* memfd_create: mapped shared and private, sealed, after the descriptor is closed, and as plain files. */
#include "workload.h"

enum { PAGES = 64, BYTES = PAGES * 4096 };

static char *area, *other;
static int file, second;

static int make_memfd(const char *name, unsigned flags, uint64_t seed)
{
	int fd = memfd_create(name, flags);
	NEED(fd >= 0 && !ftruncate(fd, BYTES));
	char *content = mmap(NULL, BYTES, RW, MAP_SHARED, fd, 0);
	NEED(content != MAP_FAILED);
	fill(content, BYTES / 2, seed);
	munmap(content, BYTES);
	return fd;
}

/* One file, mapped shared and private; the private copy has pages of its own. */
static void mapped_set(void)
{
	file = make_memfd("mapped file", MFD_CLOEXEC, 1);
	area = map_pages(PAGES, RW, MAP_SHARED, file);
	other = map_pages(PAGES, RW, MAP_PRIVATE, file);
	fill(other, PAGE, 2);
	if (!strcmp(mode_name, "closed")) {
		close(file);
		file = -1;
	}
}

static int mapped_check(void)
{
	char page[4096];
	CHECK(same(area, BYTES / 2, 1) && all_zero(area + BYTES / 2, BYTES / 2));
	CHECK(same(other, PAGE, 2) && !memcmp(other + PAGE, area + PAGE, BYTES - PAGE));
	area[BYTES - 8] = 3;
	CHECK(other[BYTES - 8] == 3);
	if (file >= 0)
		CHECK(pread(file, page, PAGE, BYTES - PAGE) == (ssize_t)PAGE && page[PAGE - 8] == 3);
	area[BYTES - 8] = 0;
	return 1;
}

static void mapped_harm(void)
{
	area[77] ^= 1;
}

/* Seals, of a file that is still mapped read-only. */
enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE };

static void sealed_set(void)
{
	file = make_memfd("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC, 3);
	NEED(!fcntl(file, F_ADD_SEALS, SEALS));
	area = map_pages(PAGES, PROT_READ, MAP_PRIVATE, file);
	second = make_memfd("half sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC, 4);
	NEED(!fcntl(second, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SEAL));
}

static int sealed_check(void)
{
	CHECK(fcntl(file, F_GET_SEALS) == SEALS);
	CHECK(fcntl(second, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SEAL));
	CHECK(same(area, BYTES / 2, 3));
	CHECK(pwrite(file, "x", 1, 0) == -1 && errno == EPERM);
	CHECK(ftruncate(second, 2 * BYTES) && errno == EPERM);
	CHECK(fcntl(second, F_ADD_SEALS, F_SEAL_WRITE) && errno == EPERM);
	return 1;
}

static void sealed_harm(void)
{
	close(file);
	file = make_memfd("sealed", MFD_ALLOW_SEALING, 3);
}

/* As files: a position, a shared description, and a second open through /proc with its own. */
static void positions_set(void)
{
	char path[64];
	file = make_memfd("positions", 0, 5);
	NEED(lseek(file, 4096, SEEK_SET) == 4096);
	snprintf(path, sizeof path, "/proc/self/fd/%d", file);
	second = open(path, O_RDONLY);
	NEED(second >= 0 && lseek(second, 800, SEEK_SET) == 800);
	NEED(dup2(file, 50) == 50);
}

static int positions_check(void)
{
	char got[8], all[BYTES];
	struct stat one, two;
	fill(all, BYTES, 5);
	CHECK(lseek(file, 0, SEEK_CUR) == 4096 && lseek(50, 0, SEEK_CUR) == 4096 && lseek(second, 0, SEEK_CUR) == 800);
	CHECK(read(50, got, 8) == 8 && !memcmp(got, all + 4096, 8) && lseek(file, -8, SEEK_CUR) == 4096);
	CHECK(read(second, got, 8) == 8 && !memcmp(got, all + 800, 8) && lseek(second, -8, SEEK_CUR) == 800);
	CHECK(write(second, got, 8) == -1 && errno == EBADF);
	CHECK(!fstat(file, &one) && !fstat(second, &two) && one.st_ino == two.st_ino && one.st_size == BYTES);
	CHECK(fcntl(file, F_GET_SEALS) == F_SEAL_SEAL);
	return 1;
}

static void positions_harm(void)
{
	lseek(50, 0, SEEK_SET);
}

WORKLOAD(
	{"mapped", mapped_set, mapped_check, mapped_harm},
	{"closed", mapped_set, mapped_check, mapped_harm},
	{"sealed", sealed_set, sealed_check, sealed_harm},
	{"positions", positions_set, positions_check, positions_harm},
)
