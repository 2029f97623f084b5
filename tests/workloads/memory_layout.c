/* The shape of the address space: growing stacks, the heap, protections, many mappings, reservations. */
#include "workload.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/prctl.h>

static char *area;

/* ---- faults, caught ---- */

static sigjmp_buf back;

static void on_fault(int number)
{
	siglongjmp(back, number);
}

/* Can this byte be read (written)? */
static int can_touch(volatile char *at, int write)
{
	struct sigaction action = {.sa_handler = on_fault}, segv, bus;
	sigaction(SIGSEGV, &action, &segv);
	sigaction(SIGBUS, &action, &bus);
	int good = !sigsetjmp(back, 1);
	if (good) {
		if (write)
			*at = *at;
		else
			(void)*at;
	}
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return good;
}

/* ---- a stack that grows: the main thread's, and a mapping made to grow down ---- */

static char *low;

static __attribute__((noinline)) int recurse(int depth, char *deepest)
{
	volatile char frame[4096];
	memset((char *)frame, depth, sizeof frame);
	if ((char *)frame < deepest)
		deepest = (char *)frame;
	if (depth && !recurse(depth - 1, deepest))
		return 0;
	return frame[100] == (char)depth;
}

static void growsdown_set(void)
{
	/* The kernel keeps a gap of 256 pages below such a mapping, so it needs room. */
	char *room = mmap(NULL, 2048 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(room != MAP_FAILED && !munmap(room, 2048 * PAGE));
	area = mmap(room + 2000 * PAGE, 16 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0);
	NEED(area == room + 2000 * PAGE);
	fill(area, 16 * PAGE, 1);
	low = area - 4 * PAGE;
	for (char *at = area - PAGE; at >= low; at -= PAGE)
		fill(at, PAGE, 2);
	NEED(recurse(40, (char *)&low));
}

static int growsdown_check(void)
{
	CHECK(same(area, 16 * PAGE, 1));
	CHECK(same(low, PAGE, 2));
	for (int i = 0; i < 8; i++) {
		low -= PAGE;
		CHECK(can_touch(low, 1));
		fill(low, PAGE, 2);
	}
	CHECK(same(low, PAGE, 2));
	CHECK(recurse(200 + (int)beat->checks, (char *)&low));
	return 1;
}

static void growsdown_harm(void)
{
	mmap(low - 2 * PAGE, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

/* ---- the heap ---- */

static char *heap, *heap_end;

static void brk_set(void)
{
	heap = sbrk(0);
	NEED(sbrk(64 * PAGE + 123) == heap);
	fill(heap, 64 * PAGE, 3);
	heap_end = sbrk(0);
}

static int brk_check(void)
{
	CHECK((char *)syscall(SYS_brk, 0) == heap_end);
	CHECK(same(heap, 64 * PAGE, 3));
	CHECK((char *)syscall(SYS_brk, heap_end + 300 * PAGE) == heap_end + 300 * PAGE);
	CHECK(can_touch(heap_end + 299 * PAGE, 1));
	CHECK((char *)syscall(SYS_brk, heap + 10 * PAGE) == heap + 10 * PAGE);
	CHECK(!can_touch(heap + 12 * PAGE, 0));
	CHECK((char *)syscall(SYS_brk, heap_end) == heap_end);
	CHECK(same(heap, 10 * PAGE, 3) && all_zero(heap + 11 * PAGE, 50 * PAGE));
	fill(heap, 64 * PAGE, 3);
	return 1;
}

static void brk_harm(void)
{
	syscall(SYS_brk, heap_end + PAGE);
}

/* ---- protections ---- */

/* Contents behind PROT_NONE (never readable by the dumping side through the task) come back with mprotect. */
static void protnone_set(void)
{
	area = map_anon(64);
	fill(area, 64 * PAGE, 4);
	NEED(!mprotect(area + 8 * PAGE, 48 * PAGE, PROT_NONE));
}

static int protnone_check(void)
{
	CHECK(!can_touch(area + 8 * PAGE, 0) && !can_touch(area + 55 * PAGE, 0));
	CHECK(!mprotect(area + 8 * PAGE, 48 * PAGE, RW));
	CHECK(same(area, 64 * PAGE, 4));
	CHECK(!mprotect(area + 8 * PAGE, 48 * PAGE, PROT_NONE));
	return 1;
}

static void protnone_harm(void)
{
	mprotect(area + 8 * PAGE, PAGE, RW);
	area[8 * PAGE] ^= 1;
	mprotect(area + 8 * PAGE, PAGE, PROT_NONE);
}

/* Every combination of rights, alternating page by page. */
static int hidden; /* the right under which this processor's memory cannot be read */

static void patchwork_set(void)
{
	int key = pkey_alloc(0, 0);
	if (key > 0) {
		hidden = PROT_EXEC;
		pkey_free(key);
	}
	area = map_anon(256);
	fill(area, 256 * PAGE, 5);
	for (int page = 0; page < 256; page++)
		NEED(!mprotect(area + page * PAGE, PAGE, (page * 5) & 7));
}

static int patchwork_check(void)
{
	for (int page = 0; page < 256; page++) {
		int rights = (page * 5) & 7;
		/* x86 cannot write without reading, nor, without protection keys, execute without reading. */
		CHECK(can_touch(area + page * PAGE, 0) == !!(rights & ~hidden));
		CHECK(can_touch(area + page * PAGE, 1) == !!(rights & PROT_WRITE));
	}
	CHECK(!mprotect(area, 256 * PAGE, RW) && same(area, 256 * PAGE, 5));
	for (int page = 0; page < 256; page++)
		CHECK(!mprotect(area + page * PAGE, PAGE, (page * 5) & 7));
	return 1;
}

static void patchwork_harm(void)
{
	mprotect(area + 100 * PAGE, PAGE, PROT_NONE);
	mprotect(area + 101 * PAGE, PAGE, PROT_NONE);
}

/* ---- sizes ---- */

enum { MANY = 10000 };

/* 10,000 mappings: neighbours differ in their rights, so the kernel cannot merge them. */
static void many_set(void)
{
	area = map_anon(MANY);
	for (int page = 0; page < MANY; page += 2) {
		if (page % 8 == 0)
			*(int *)(area + page * PAGE) = page + 1;
		NEED(!mprotect(area + page * PAGE, PAGE, PROT_READ));
	}
}

static int many_check(void)
{
	for (int page = 0; page < MANY; page += 2)
		CHECK(*(int *)(area + page * PAGE) == (page % 8 ? 0 : page + 1));
	for (int page = 0; page < MANY; page += 100) {
		CHECK(!can_touch(area + page * PAGE, 1));
		CHECK(can_touch(area + (page + 1) * PAGE, 1));
	}
	return 1;
}

static void many_harm(void)
{
	mprotect(area + 5000 * PAGE, PAGE, RW);
}

/* 100 GB of address space with a few pages in it. */
static const size_t reservation = 100UL << 30;
static const size_t islands[] = {0, 4096, 1UL << 30, (37UL << 30) + 40960, (100UL << 30) - 4096};
enum { ISLANDS = sizeof islands / sizeof *islands };

static void reserve_set(void)
{
	area = mmap(NULL, reservation, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(area != MAP_FAILED);
	NEED(!madvise(area, reservation, MADV_NOHUGEPAGE));
	for (int i = 0; i < ISLANDS; i++)
		fill(area + islands[i], PAGE, i);
}

static int reserve_check(void)
{
	for (int i = 0; i < ISLANDS; i++)
		CHECK(same(area + islands[i], PAGE, i));
	CHECK(strtoul(field("/proc/self/status", "RssAnon"), NULL, 10) < 2048);
	CHECK(all_zero(area + (50UL << 30), PAGE));
	return 1;
}

static void reserve_harm(void)
{
	area[islands[3]] ^= 1;
}

/* Names of anonymous mappings (PR_SET_VMA_ANON_NAME), where the kernel knows them. */
static void names_set(void)
{
	area = map_anon(8);
	fill(area, 8 * PAGE, 6);
	if (prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, area, 8 * PAGE, "a name"))
		cannot_run("the kernel has no names for anonymous mappings");
}

static int names_check(void)
{
	static char maps[65536];
	CHECK(slurp("/proc/self/maps", maps, sizeof maps) > 0);
	CHECK(strstr(maps, "[anon:a name]"));
	CHECK(same(area, 8 * PAGE, 6));
	return 1;
}

static void names_harm(void)
{
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, area, 8 * PAGE, "other");
}

WORKLOAD(
	{"growsdown", growsdown_set, growsdown_check, growsdown_harm},
	{"brk", brk_set, brk_check, brk_harm},
	{"protnone", protnone_set, protnone_check, protnone_harm},
	{"patchwork", patchwork_set, patchwork_check, patchwork_harm},
	{"many", many_set, many_check, many_harm},
	{"reserve", reserve_set, reserve_check, reserve_harm},
	{"names", names_set, names_check, names_harm},
)
