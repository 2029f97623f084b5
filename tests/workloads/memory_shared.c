/* Objects that are mapped in several ways and places at once, by several processes, which have cut and moved what they had. */
#include "members.h"

#include <sys/mman.h>

enum { PAGES = 16, WORDS = PAGE / 8 };

static uint64_t *room, *again, *moved, *lent;

static uint64_t *page(uint64_t *base, int number)
{
	return base + number * WORDS;
}

static int file = -1;

/* ---- shared anonymous memory: with a hole, moved apart, at two places with different protections ---- */

static int vector(uint64_t *at)
{
	unsigned char there;
	return mincore(at, PAGE, &there) == 0;
}

/* Everybody sees what everybody writes into the object's pages 0, 6 and 15, wherever they are mapped. */
static int parted_parent(void)
{
	CHECK(vector(page(room, 1)) && !vector(page(room, 2)) && !vector(page(room, 3)) && vector(page(room, 4)));
	CHECK(page(again, 0)[0] == page(room, 0)[0] && page(again, 6)[0] == page(room, 6)[0]);
	CHECK(page(again, 2)[1] == 102 && page(again, 3)[1] == 103);
	page(room, 0)[0]++;
	page(room, 15)[0]++;
	CHECK(page(again, 0)[0] == page(room, 0)[0] && page(again, 15)[0] == page(room, 15)[0]);
	return 1;
}

static int parted_child(void)
{
	uint64_t before = page(moved, 2)[0];
	CHECK(!vector(page(room, 4)) && !vector(page(room, 7)) && vector(page(room, 8)));
	for (int i = 0; i < 16; i++)
		CHECK(page(i >= 4 && i < 8 ? moved - 4 * WORDS : room, i)[1] == 100 + i);
	page(moved, 2)[0]++;
	CHECK(page(moved, 2)[0] == before + 1);
	CHECK(page(room, 0)[0] == page(room, 15)[0]);
	return 1;
}

static void part_child(void)
{
	moved = mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(moved != MAP_FAILED);
	NEED(mremap(page(room, 4), 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	NEED(!mprotect(page(room, 12), 2 * PAGE, PROT_READ));
}

static void parted_set(void)
{
	room = map_pages(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	for (int i = 0; i < PAGES; i++)
		page(room, i)[1] = 100 + i;
	bear(0, part_child, parted_child);
	again = mremap(room, 0, PAGES * PAGE, MREMAP_MAYMOVE);
	NEED(again != MAP_FAILED && !mprotect(again, PAGES * PAGE, PROT_READ));
	NEED(!munmap(page(room, 2), 2 * PAGE));
	bear(1, NULL, parted_parent);
}

static int parted_check(void)
{
	uint64_t six = page(room, 6)[0];
	CHECK_ALL(parted_parent());
	CHECK_MEMBERS(2);
	CHECK(page(room, 6)[0] == six + 1);
	return 1;
}

static void parted_harm(void)
{
	page(room, 15)[0] += 5;
}

/* ---- private mappings of /dev/zero, a memfd, a file that is gone, shared anonymous memory: written in one process ---- */

static uint64_t *zero, *gone, *shown;

static int private_right(void)
{
	int i, writer = self.pid != 0 && lent != NULL;
	for (i = 0; i < PAGES; i++) {
		CHECK(page(zero, i)[0] == (i < 4 ? 10 + i : 0) + (writer && i == 9 ? 77 : 0));
		CHECK(page(again, i)[1] == (i == 1 ? 55 : 200 + i) + (writer && i == 9 ? 77 : 0));
		CHECK(page(gone, i)[1] == (i == 2 ? 56 : 300 + i) + (writer && i == 9 ? 77 : 0));
		CHECK(page(moved, i)[1] == (i == 3 ? 57 : 400 + i) + (writer && i == 9 ? 77 : 0));
	}
	/* What nobody has written for himself is still the object's. */
	CHECK(page(again, 5)[0] == page(room, 5)[0] && page(moved, 6)[0] == page(shown, 6)[0]);
	return 1;
}

static void write_privately(void)
{
	lent = room;
	page(zero, 9)[0] += 77;
	page(again, 9)[1] += 77;
	page(gone, 9)[1] += 77;
	page(moved, 9)[1] += 77;
}

static uint64_t *map_file(int fd, int flags)
{
	uint64_t *at = mmap(NULL, PAGES * PAGE, RW, flags, fd, 0);
	NEED(at != MAP_FAILED && !close(fd));
	return at;
}

static void private_set(void)
{
	int device = open("/dev/zero", O_RDWR), i;
	NEED(device >= 0);
	zero = map_file(device, MAP_PRIVATE);
	file = memfd_create("private", MFD_CLOEXEC);
	NEED(file >= 0 && !ftruncate(file, PAGES * PAGE));
	room = map_file(dup(file), MAP_SHARED);
	again = map_file(file, MAP_PRIVATE);
	file = make_file("gone", PAGES * PAGE, 1);
	uint64_t *all = map_file(dup(file), MAP_SHARED);
	gone = map_file(file, MAP_PRIVATE);
	NEED(!unlink("gone"));
	shown = map_pages(PAGES, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	char name[128];
	snprintf(name, sizeof name, "/proc/self/map_files/%lx-%lx", (long)shown, (long)shown + PAGES * PAGE);
	int object = open(name, O_RDWR);
	NEED(object >= 0);
	moved = map_file(object, MAP_PRIVATE);
	for (i = 0; i < PAGES; i++) {
		page(room, i)[1] = 200 + i;
		page(all, i)[1] = 300 + i;
		page(shown, i)[1] = 400 + i;
	}
	for (i = 0; i < 4; i++)
		page(zero, i)[0] = 10 + i;
	page(again, 1)[1] = 55;
	page(gone, 2)[1] = 56;
	page(moved, 3)[1] = 57;
	bear(0, write_privately, private_right);
	bear(1, NULL, private_right);
}

static int private_check(void)
{
	page(room, 5)[0]++;
	page(shown, 6)[0]++;
	CHECK_ALL(private_right());
	CHECK_MEMBERS(2);
	return 1;
}

static void private_harm(void)
{
	page(again, 1)[1]++;
}

WORKLOAD(
	{"parted", parted_set, parted_check, parted_harm},
	{"private", private_set, private_check, private_harm},
)
