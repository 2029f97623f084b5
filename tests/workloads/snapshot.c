/*
 * Memory that never rests, and that tells whether a copy of it was taken at one moment.
 *
 * Each writer goes over its pages again and again and writes the number of its round into one after the other, so at
 * every moment a prefix of the pages is in round r and the rest in round r - 1, and the step lies where the writer is. A
 * copy that was not taken at one moment has several steps, or one elsewhere than where the writer's registers are: the
 * writer finds out, because it looks at what it overwrites, and so does the check, by the tickets around each store.
 */
#include "members.h"

#include <sys/resource.h>

enum { WRITERS = 3, CHAIN_PAGES = 2048, APART = 64 };

struct writer {
	uint64_t *pages;
	size_t count;
	/* Tickets are rounds * count + page; a writer announces one, stores the page, and confirms it. */
	volatile uint64_t announced;
	char apart[4096];
	volatile uint64_t confirmed;
};

static struct writer writers[WRITERS + 3];
static volatile int hold;
static volatile int held[WRITERS + 3];
static volatile int torn;
static int writer_count;
static uint64_t *ballast;

static void *write_on(void *argument)
{
	struct writer *w = argument;
	int me = (int)(w - writers);
	for (uint64_t ticket = w->count;; ticket++) {
		while (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) {
			held[me] = 1;
			nap_ms(1);
		}
		held[me] = 0;
		__atomic_store_n(&w->announced, ticket, __ATOMIC_SEQ_CST);
		uint64_t round = ticket / w->count;
		if (__atomic_exchange_n(w->pages + ticket % w->count * 512, round, __ATOMIC_SEQ_CST) != round - 1)
			torn = me + 1;
		__atomic_store_n(&w->confirmed, ticket, __ATOMIC_SEQ_CST);
		/* Two processors are shared by all tests; the pace need only be far above that of copying a page. */
		if (ticket % 64 == 0)
			nap_ms(1);
	}
	return NULL;
}

/* The state of one writer that stands still. */
static int consistent(struct writer *w)
{
	uint64_t first = w->pages[0], last = w->pages[(w->count - 1) * 512];
	uint64_t done = w->confirmed;
	CHECK(w->announced == done || w->announced == done + 1);
	CHECK(first == last || first == last + 1);
	size_t step = 0;
	while (step < w->count && w->pages[step * 512] == first)
		step++;
	for (size_t i = step; i < w->count; i++)
		CHECK(w->pages[i * 512] == first - 1);
	/* Pages 0 .. step - 1 are in this round: the last stored ticket. */
	uint64_t stored = first * w->count + step - 1;
	CHECK(stored == done || stored == w->announced);
	return 1;
}

static void add_writer(uint64_t *pages, size_t count)
{
	struct writer *w = &writers[writer_count++];
	w->pages = pages;
	w->count = count;
	w->confirmed = w->announced = count - 1;
	start_thread(write_on, w);
}

static int torn_right(void)
{
	__atomic_store_n(&hold, 1, __ATOMIC_SEQ_CST);
	for (int i = 0; i < writer_count; i++) {
		CHECK(wait_for(&held[i], 5000));
		CHECK_ALL(consistent(&writers[i]));
	}
	uint64_t before[WRITERS + 3];
	for (int i = 0; i < writer_count; i++)
		before[i] = writers[i].confirmed;
	__atomic_store_n(&hold, 0, __ATOMIC_SEQ_CST);
	/* A whole round, so that every page has been looked at. */
	for (int i = 0; i < writer_count; i++)
		for (int ms = 0; writers[i].confirmed < before[i] + writers[i].count; ms++) {
			CHECK(ms < 10000);
			nap_ms(1);
		}
	CHECK(!torn);
	CHECK(same(ballast, 2048 * PAGE, 99));
	CHECK(waitpid(-1, NULL, __WALL | WNOHANG) < 0 && errno == ECHILD);
	return 1;
}

static uint64_t *advised(int advice)
{
	uint64_t *pages = map_anon(APART);
	memset(pages, 0, APART * PAGE);
	NEED(!madvise(pages, APART * PAGE, advice));
	return pages;
}

/* Private memory of several writers, and what a fork leaves out, empties or shares. */
static void torn_set(void)
{
	ballast = map_anon(2048);
	fill(ballast, 2048 * PAGE, 99);
	for (int i = 0; i < WRITERS; i++)
		add_writer(map_anon(CHAIN_PAGES), CHAIN_PAGES);
	add_writer(advised(MADV_DONTFORK), APART);
	add_writer(advised(MADV_WIPEONFORK), APART);
	add_writer(map_pages(APART, RW, MAP_SHARED | MAP_ANONYMOUS, -1), APART);
	if (!strcmp(mode_name, "subreaper"))
		NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	for (int i = 0; i < writer_count; i++)
		while (writers[i].confirmed < 2 * writers[i].count)
			nap_ms(1);
}

static int subreaper_right(void)
{
	int reaper = 0;
	CHECK(!prctl(PR_GET_CHILD_SUBREAPER, &reaper) && reaper == 1);
	return torn_right();
}

static void tear(void)
{
	__atomic_store_n(&hold, 1, __ATOMIC_SEQ_CST);
	wait_for(&held[0], 5000);
	writers[0].pages[50 * 512]--;
}

static void stop_reaping(void)
{
	prctl(PR_SET_CHILD_SUBREAPER, 0);
}

/* A user who may have no more processes than there are; it would adopt orphans, and that must not change either. */
static void limited_set(void)
{
	struct rlimit limit = {1, 1};
	ballast = map_anon(2048);
	fill(ballast, 2048 * PAGE, 99);
	uint64_t *pages = map_anon(APART);
	memset(pages, 0, APART * PAGE);
	add_writer(pages, APART);
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	NEED(!setresgid(4242, 4242, 4242) && !setresuid(4242, 4242, 4242) && !prctl(PR_SET_DUMPABLE, 1));
	NEED(!setrlimit(RLIMIT_NPROC, &limit));
	NEED(fork() < 0 && errno == EAGAIN);
}

/* A parent and a child that writes, each with a clone of its own; the parent may be who adopts orphans. */
static void pair_set(void)
{
	if (!strcmp(mode_name, "adopter"))
		NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	SLOT(0)->pid = 0;
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		torn_set();
		note_self();
		live_in(0, torn_right);
	}
	NEED(wait_for(&SLOT(0)->pid, 20000));
	ballast = map_anon(2048);
	fill(ballast, 2048 * PAGE, 98);
}

static int pair_right(void)
{
	CHECK_MEMBERS(1);
	CHECK(same(ballast, 2048 * PAGE, 98));
	CHECK(waitpid(-1, NULL, __WALL | WNOHANG) == 0);
	return 1;
}

static void pair_harm(void)
{
	ballast[7]++;
}

WORKLOAD(
	{"torn", torn_set, torn_right, tear},
	{"subreaper", torn_set, subreaper_right, stop_reaping},
	{"limited", limited_set, subreaper_right, tear},
	{"pair", pair_set, pair_right, pair_harm},
	{"adopter", pair_set, pair_right, pair_harm},
)
