/* What parent and child share: descriptor tables, memory, positions in files, pages not written since the fork. */
#include "members.h"

#include <sys/mman.h>
#include <sys/stat.h>

static int fd = -1, other = -1;
static uint64_t *shared, *view, seen;

/* ---- one descriptor table (CLONE_FILES) in parent, child and grandchild; slot 2 has one of its own ---- */

/* On request each of the members opens a descriptor with a number of its own, that all sharers see at once. */
static int file_slot;

static int open_here(void)
{
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC && lseek(fd, 0, SEEK_CUR) == 24);
	CHECK(dup2(fd, 100 + file_slot) == 100 + file_slot);
	return 1;
}

static int open_apart(void)
{
	CHECK(fcntl(100, F_GETFD) < 0 && errno == EBADF);
	return open_here();
}

static pid_t bear_sharer(int i, void (*early)(void))
{
	SLOT(i)->pid = 0;
	pid_t child = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	NEED(child >= 0);
	if (!child) {
		file_slot = i;
		if (early)
			early();
		note_self();
		live_in(i, open_here);
	}
	NEED(wait_for(&SLOT(i)->pid, 5000));
	return child;
}

static void bear_grandchild(void)
{
	bear_sharer(1, NULL);
}

static void own_table(void)
{
	file_slot = 2;
}

static void table_set(void)
{
	fd = make_file("data", 4096, 1);
	NEED(lseek(fd, 24, SEEK_SET) == 24);
	bear_sharer(0, bear_grandchild);
	bear(2, own_table, open_apart);
	NEED(dup2(fd, 50) == 50);
}

static int table_check(void)
{
	CHECK_MEMBERS(3);
	CHECK(fcntl(102, F_GETFD) < 0 && errno == EBADF);
	for (int i = 0; i < 2; i++)
		CHECK(!close(100 + i));
	CHECK(ask_members(2, 3) == 1);
	CHECK(fcntl(50, F_GETFD) == 0);
	return 1;
}

static void table_apart(void)
{
	unshare(CLONE_FILES);
}

/* ---- memory ---- */

/* Everybody adds to a word that all of them see. */
static int add_one(void)
{
	CHECK(same(shared + 512, 3 * PAGE, 7));
	CHECK(__atomic_add_fetch(shared, 1, __ATOMIC_SEQ_CST) && __atomic_add_fetch(view + 512, 1, __ATOMIC_SEQ_CST));
	return 1;
}

static void bear_below(void)
{
	bear(1, NULL, add_one);
}

static void memory_set(void)
{
	if (!strcmp(mode_name, "memfd")) {
		int file = memfd_create("shared", MFD_CLOEXEC);
		NEED(file >= 0 && !ftruncate(file, 4 * PAGE));
		shared = map_pages(4, RW, MAP_SHARED, file);
		view = map_pages(4, RW, MAP_SHARED, file);
		NEED(!close(file));
	} else if (!strcmp(mode_name, "file")) {
		int file = make_file("mapped", 4 * PAGE, 3);
		shared = map_pages(4, RW, MAP_SHARED, file);
		view = map_pages(4, RW, MAP_SHARED, file);
		shared[0] = shared[512] = 0;
		NEED(!close(file));
	} else {
		shared = map_pages(4, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
		view = mremap(shared, 0, 4 * PAGE, MREMAP_MAYMOVE);
		NEED(view != MAP_FAILED);
	}
	fill(shared + 512, 3 * PAGE, 7);
	bear(0, bear_below, add_one);
	bear(2, NULL, add_one);
	seen = shared[0];
}

static int memory_check(void)
{
	uint64_t second = view[512];
	for (int turn = 0; turn < 3; turn++) {
		CHECK(ask_members(turn, turn + 1) == 1);
		CHECK(shared[0] == ++seen && view[0] == seen && shared[512] == second + 1);
		shared[512] = second;
	}
	return 1;
}

static void memory_apart(void)
{
	NEED(mmap(shared, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == shared);
	seen = shared[0];
}

/* ---- one open file, several tables: position and status flags are shared; `other` is opened anew, so they are not ---- */

static int read_on(void)
{
	uint64_t word;
	off_t before = lseek(fd, 0, SEEK_CUR), apart = lseek(other, 0, SEEK_CUR);
	CHECK(read(fd, &word, 8) == 8 && lseek(fd, 0, SEEK_CUR) == before + 8 && lseek(other, 0, SEEK_CUR) == apart);
	return 1;
}

static void reopen_other(void)
{
	other = open("data", O_RDONLY);
	NEED(other >= 0 && lseek(other, 512, SEEK_SET) == 512);
}

static void offset_set(void)
{
	fd = make_file("data", 4096, 1);
	other = open("data", O_RDONLY | O_CLOEXEC);
	NEED(other >= 0 && lseek(fd, 16, SEEK_SET) == 16);
	bear(0, NULL, read_on);
	bear(1, reopen_other, read_on);
}

static int offset_check(void)
{
	CHECK(lseek(fd, 16, SEEK_SET) == 16);
	CHECK(ask_members(0, 1) == 1 && ask_members(1, 2) == 1);
	CHECK(lseek(fd, 0, SEEK_CUR) == 32 && lseek(other, 0, SEEK_CUR) == 0);
	CHECK(!fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) ^ O_APPEND));
	return 1;
}

static void offset_apart(void)
{
	int mine = open("data", O_RDWR | O_CLOEXEC);
	dup3(mine, fd, O_CLOEXEC);
	close(mine);
}

/* ---- a prefork server: much memory, written before the fork, and little of it since ---- */

enum { WORKERS = 50, COW_PAGES = 16384, TOUCHED = 64, REWRITTEN = 2048 };

static int worker;

/* The parent has written the first pages anew since: only its children share what was there. */
static int cow_right(void)
{
	for (size_t i = 0; i < COW_PAGES; i++) {
		uint64_t want = i * 3 + 1;
		if (worker == COW_PAGES && i < REWRITTEN)
			want = i * 5;
		else if (i % (COW_PAGES / TOUCHED) == worker + 1)
			want = (uint64_t)worker << 32 | i;
		CHECK(shared[i * 512 + 5] == want);
	}
	return 1;
}

static void write_some(void)
{
	for (size_t i = worker + 1; i < COW_PAGES; i += COW_PAGES / TOUCHED)
		shared[i * 512 + 5] = (uint64_t)worker << 32 | i;
}

static void cow_set(void)
{
	shared = map_anon(COW_PAGES);
	NEED(!madvise(shared, COW_PAGES * PAGE, MADV_NOHUGEPAGE));
	for (size_t i = 0; i < COW_PAGES; i++)
		shared[i * 512 + 5] = i * 3 + 1;
	for (worker = 0; worker < WORKERS; worker++)
		bear(worker, write_some, cow_right);
	worker = COW_PAGES;
	for (size_t i = 0; i < REWRITTEN; i++)
		shared[i * 512 + 5] = i * 5;
}

static int cow_check(void)
{
	CHECK_MEMBERS(WORKERS);
	CHECK_ALL(cow_right());
	return 1;
}

static void cow_harm(void)
{
	shared[512 * 1000 + 5]++;
}

/* ---- families in a family: who is in slot 0 has written a part anew before its own children were born, and the parent of
 * those in slots 5 to 8 is gone, with memory that nobody else has ---- */

enum { KIN = 4096, ANEW = 2048, BROTHERS = 4 };

static uint64_t *orphaned, generation;

static int kin_right(void)
{
	for (size_t i = 0; i < KIN; i++)
		CHECK(shared[i * 512] == (i < ANEW ? generation : 0) + i);
	for (size_t i = 0; i < KIN && orphaned; i++)
		CHECK(orphaned[i * 512] == i * 7);
	/* and it is everybody's own */
	shared[KIN * 512 - 1] += getpid();
	return 1;
}

static void renew(void)
{
	generation = 1000;
	for (size_t i = 0; i < ANEW; i++)
		shared[i * 512] = generation + i;
	for (int i = 1; i <= BROTHERS; i++)
		bear(i, NULL, kin_right);
}

static void leave_orphans(void)
{
	orphaned = map_anon(KIN);
	NEED(!madvise(orphaned, KIN * PAGE, MADV_NOHUGEPAGE));
	for (size_t i = 0; i < KIN; i++)
		orphaned[i * 512] = i * 7;
	for (int i = 0; i < BROTHERS; i++)
		bear(5 + i, NULL, kin_right);
}

static void kin_set(void)
{
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	shared = map_anon(KIN);
	NEED(!madvise(shared, KIN * PAGE, MADV_NOHUGEPAGE));
	for (size_t i = 0; i < KIN; i++)
		shared[i * 512] = i;
	bear(0, renew, kin_right);
	in_between(leave_orphans);
	for (int i = 0; i < BROTHERS; i++)
		has_moved(5 + i);
}

static int kin_check(void)
{
	CHECK_MEMBERS(9);
	CHECK_ALL(kin_right());
	return 1;
}

static void kin_harm(void)
{
	generation++;
}

/* ---- mappings that were inherited and have changed their size since: to mremap(2) each is still one ---- */

static char *grown, *cut;

/* Each is as long as it was set up; it can be resized as a whole. */
static int resizable(void)
{
	CHECK(same(grown, 12 * PAGE, 5) && same(cut, 3 * PAGE, 6));
	grown = mremap(grown, 12 * PAGE, 20 * PAGE, MREMAP_MAYMOVE);
	CHECK(grown != MAP_FAILED && same(grown, 12 * PAGE, 5));
	CHECK(mremap(grown, 20 * PAGE, 12 * PAGE, 0) == grown);
	return 1;
}

static void resize(void)
{
	NEED(mremap(grown, 8 * PAGE, 12 * PAGE, 0) == grown);
	fill(grown, 12 * PAGE, 5);
	NEED(mremap(cut, 8 * PAGE, 3 * PAGE, 0) == cut);
}

static void resized_set(void)
{
	grown = map_anon(32);
	cut = map_anon(32);
	NEED(!munmap(grown + 8 * PAGE, 24 * PAGE) && !munmap(cut + 8 * PAGE, 24 * PAGE));
	fill(grown, 8 * PAGE, 5);
	fill(cut, 8 * PAGE, 6);
	bear(0, resize, resizable);
	bear(1, resize, resizable);
}

static int resized_check(void)
{
	CHECK_MEMBERS(2);
	CHECK(same(grown, 8 * PAGE, 5) && same(cut, 8 * PAGE, 6));
	return 1;
}

static void resized_harm(void)
{
	grown[9]++;
}

/* ---- one memory in several processes (CLONE_VM), without and with one table of handlers (CLONE_SIGHAND) ---- */

enum { FRIENDS = 2, FRIEND_STACK = 16 };

static volatile uint64_t counter;
static int friend_flags;

static void on_signal(int number)
{
	(void)number;
	counter += 1000;
}

/* Everything but its stack is its parent's too; it has its slot's number as argument. */
static int friend(void *number)
{
	int i = (int)(long)number;
	pid_t me = getpid(), above = getppid();
	__atomic_store_n(&SLOT(i)->pid, me, __ATOMIC_SEQ_CST);
	for (;;) {
		__atomic_add_fetch(&SLOT(i)->beats, 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&SLOT(i)->request, __ATOMIC_SEQ_CST)) {
			SLOT(i)->request = 0;
			struct sigaction now;
			int right = getpid() == me && getppid() == above && !sigaction(SIGUSR2, NULL, &now);
			right = right && (now.sa_handler == on_signal) == (SLOT(i)->word == 1);
			counter++;
			__atomic_store_n(&SLOT(i)->verdict, right ? 1 : -1, __ATOMIC_SEQ_CST);
		}
		nap_ms(2);
	}
	return 0;
}

static void friends_set(void)
{
	friend_flags = CLONE_VM | SIGCHLD | (strcmp(mode_name, "vm") ? CLONE_SIGHAND : 0);
	for (long i = 0; i < FRIENDS; i++) {
		char *stack = (char *)map_anon(FRIEND_STACK);
		SLOT(i)->pid = 0;
		NEED(clone(friend, stack + FRIEND_STACK * PAGE, friend_flags | (i ? CLONE_FS : CLONE_FILES), (void *)i) > 0);
		NEED(wait_for(&SLOT(i)->pid, 5000));
	}
	bear(FRIENDS, NULL, NULL);
}

static int friends_check(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	CHECK(!sigaction(SIGUSR2, &action, NULL));
	for (int i = 0; i < FRIENDS; i++) {
		uint64_t before = counter;
		SLOT(i)->word = (friend_flags & CLONE_SIGHAND) != 0;
		CHECK_ALL(ask_members(i, i + 1));
		CHECK(counter == before + 1);
	}
	CHECK(!raise(SIGUSR2) && counter >= 1000);
	return ask_members(FRIENDS, FRIENDS + 1);
}

static void kill_friend(void)
{
	kill(SLOT(1)->pid, SIGKILL);
}

/* ---- one working directory, root and umask (CLONE_FS) of parent, child and grandchild ---- */

static int in_parent(void)
{
	char path[4096];
	/* Not by umask(2): the others, who share it, ask at the same time. */
	long mask = strtol(field("/proc/self/status", "Umask"), NULL, 8);
	CHECK(getcwd(path, sizeof path) && !strcmp(strrchr(path, '/') + 1, "inside") && mask == 0123);
	return 1;
}

static void bear_in(int i, void (*early)(void))
{
	SLOT(i)->pid = 0;
	pid_t child = (pid_t)syscall(SYS_clone, CLONE_FS | SIGCHLD, 0, 0, 0, 0);
	NEED(child >= 0);
	if (!child) {
		if (early)
			early();
		note_self();
		live_in(i, in_parent);
	}
	NEED(wait_for(&SLOT(i)->pid, 5000));
}

static void bear_inner(void)
{
	bear_in(1, NULL);
}

static void directories_set(void)
{
	NEED(!mkdir("inside", 0755) || errno == EEXIST);
	NEED(!mkdir("other", 0755) || errno == EEXIST);
	bear_in(0, bear_inner);
	NEED(!chdir("other"));
	umask(0123);
}

static int directories_check(void)
{
	CHECK(!chdir("../inside"));
	CHECK_MEMBERS(2);
	return !chdir("../other");
}

static void directories_apart(void)
{
	unshare(CLONE_FS);
}

WORKLOAD(
	{"vm", friends_set, friends_check, kill_friend},
	{"sighand", friends_set, friends_check, kill_friend},
	{"directories", directories_set, directories_check, directories_apart},
	{"table", table_set, table_check, table_apart},
	{"anon", memory_set, memory_check, memory_apart},
	{"memfd", memory_set, memory_check, memory_apart},
	{"file", memory_set, memory_check, memory_apart},
	{"offset", offset_set, offset_check, offset_apart},
	{"resized", resized_set, resized_check, resized_harm},
	{"cow", cow_set, cow_check, cow_harm},
	{"kin", kin_set, kin_check, kin_harm},
)
