/*
 * A tree that grows from a text in the file "plan", one letter per step of the process that it is in:
 *
 *     ( ... )  a child by fork takes the steps in between, and then lives on     [ ... ]  the same, sharing descriptors
 *     < ... >  the same, sharing directories     { ... }  the same, but it ends when it has taken them
 *     ^ before any of these: not a child, but a sibling (CLONE_PARENT)
 *     S setsid     G a group of its own     J the group that was made last, if it can be joined     R subreaper
 *     P private pages     A shared anonymous memory     F an open file with a position     D a duplicate of it
 *     C another working directory     N a descriptor table of its own     T another thread     U another user
 *     X ends with an exit code     K ends by a signal     W is stopped
 */
#include "members.h"

static int slot, file = -1, stops, fleeting;
static char folder[32];
static volatile int thread_up;
static uint64_t *pages[MEMBERS], *common;
static int page_count;
static pid_t *last_group;

static int member_right(void)
{
	for (int i = 0; i < page_count; i++)
		CHECK(same(pages[i], 4 * PAGE, (uint64_t)slot * 100 + i));
	if (file >= 0)
		CHECK(lseek(file, 0, SEEK_CUR) > 0);
	if (*folder) {
		char path[4096];
		CHECK(getcwd(path, sizeof path) && !strcmp(strrchr(path, '/') + 1, folder));
	}
	if (common)
		CHECK(__atomic_add_fetch(common, 1, __ATOMIC_SEQ_CST));
	return 1;
}

static void *thread_body(void *unused)
{
	thread_up = 1;
	for (;;)
		nap_ms(5);
	return unused;
}

/* The children's pages are not the parent's: each checks what it has made itself. */
static void forget(void)
{
	page_count = 0;
}

static int opens(char c)
{
	return c && strchr("([<{", c) != NULL;
}

static int closes(char c)
{
	return c && strchr(")]>}", c) != NULL;
}

static int count_slots(const char *plan)
{
	int count = 0;
	for (; *plan; plan++)
		count += opens(*plan);
	return count;
}

static const char *after_child(const char *plan)
{
	int depth = 1;
	while (depth) {
		char c = *plan++;
		depth += opens(c) - closes(c);
	}
	return plan;
}

static void step(char letter)
{
	switch (letter) {
	case 'S':
		setsid();
		break;
	case 'G':
		if (!setpgid(0, 0))
			*last_group = getpid();
		break;
	case 'J':
		if (*last_group)
			setpgid(0, *last_group);
		break;
	case 'R':
		NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
		break;
	case 'C':
		/* Who shares directories with it has moved too, and is checked by the portraits alone. */
		snprintf(folder, sizeof folder, "folder-%d", slot);
		if (geteuid() || (mkdir(folder, 0755) && errno != EEXIST) || chdir(folder))
			*folder = 0;
		break;
	case 'N':
		NEED(!unshare(CLONE_FILES));
		break;
	case 'P':
		pages[page_count] = map_anon(4);
		fill(pages[page_count], 4 * PAGE, (uint64_t)slot * 100 + page_count);
		page_count++;
		break;
	case 'A':
		common = map_pages(2, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
		break;
	case 'F':
		if (geteuid())
			break;
		file = make_file("data", 4096, 1);
		NEED(lseek(file, 8 + slot, SEEK_SET) == 8 + slot);
		break;
	case 'D':
		NEED(file < 0 || dup(file) >= 0);
		break;
	case 'T':
		thread_up = 0;
		start_thread(thread_body, NULL);
		NEED(wait_for(&thread_up, 5000));
		break;
	case 'U':
		/* Of this thread only: the library's calls ask all threads, and do not know who is gone since the clone. */
		if (!geteuid())
			NEED(!syscall(SYS_setresgid, 1000 + slot, 1000, 1000) && !syscall(SYS_setresuid, 1000 + slot, 1000, 1000));
		break;
	case 'W':
		/* Where somebody between has ended, the group may be an orphan, and a stopped one is sent SIGHUP. */
		stops = !fleeting;
		break;
	case 'X':
		_exit(100 + slot);
	case 'K':
		kill(getpid(), SIGKILL);
		pause();
	}
}

static void follow(const char *plan, int next);

/* Waits until the process in slot `i` is set up, or has ended. */
static void await_member(int i, pid_t pid, int own)
{
	siginfo_t info;
	while (!__atomic_load_n(&SLOT(i)->pid, __ATOMIC_SEQ_CST)) {
		info.si_pid = 0;
		if (own && !waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid) {
			NEED(info.si_code != CLD_EXITED || info.si_status == 100 + i);
			SLOT(i)->word = -1;
			break;
		}
		if (!own && (state_of(pid) == 'Z' || !state_of(pid))) {
			SLOT(i)->word = -1;
			break;
		}
		nap_ms(1);
	}
	if (SLOT(i)->word == 1 && own)
		NEED(waitpid(pid, NULL, WUNTRACED) == pid);
	if (SLOT(i)->word == 1)
		NEED(reaches_state(pid, 'T'));
}

static void child(const char *plan, int i, char how, int sibling)
{
	int flags = SIGCHLD | (sibling ? CLONE_PARENT : 0) | (how == '[' ? CLONE_FILES : 0) | (how == '<' ? CLONE_FS : 0);
	SLOT(i)->pid = 0;
	pid_t pid = flags == SIGCHLD ? fork() : (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
	NEED(pid >= 0);
	if (!pid) {
		slot = i;
		stops = 0;
		fleeting |= how == '{';
		if (how == '<')
			*folder = 0;
		forget();
		follow(plan, i + 1);
		if (how == '{') {
			SLOT(i)->word = -1;
			_exit(100 + i);
		}
		note_self();
		/* Stopped and running members alike tell that they are set up by their pid. */
		SLOT(i)->word = stops;
		__atomic_store_n(&SLOT(i)->pid, getpid(), __ATOMIC_SEQ_CST);
		if (stops)
			kill(getpid(), SIGSTOP);
		live_in(i, member_right);
	}
	if (how == '<')
		*folder = 0;
	await_member(i, pid, !sibling);
	if (how == '{' && !sibling)
		NEED(waitpid(pid, NULL, 0) == pid);
}

/* Takes the steps of `plan` up to the bracket that ends it; children take slots from `next` on. */
static void follow(const char *plan, int next)
{
	int sibling = 0;
	for (;;) {
		char letter = *plan++;
		if (letter == '^') {
			sibling = slot != MEMBERS;
		} else if (opens(letter)) {
			const char *end = after_child(plan);
			child(plan, next, letter, sibling);
			for (; plan < end; plan++)
				next += opens(*plan);
			next++;
			sibling = 0;
		} else if (!letter || closes(letter)) {
			return;
		} else {
			step(letter);
		}
	}
}

static char plan_text[2048];
static int members;

static void plan_set(void)
{
	NEED(slurp("plan", plan_text, sizeof plan_text) >= 0);
	members = count_slots(plan_text);
	NEED(members < MEMBERS);
	last_group = map_pages(1, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
	slot = MEMBERS;
	if (strchr(plan_text, '{'))
		NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	follow(plan_text, 0);
	/* By now everybody has the parent that it keeps. */
	for (int i = 0; i < members; i++)
		if (SLOT(i)->word == 0)
			has_moved(i);
}

static int plan_check(void)
{
	for (int i = 0; i < members; i++)
		if (SLOT(i)->word == 0)
			CHECK_ALL(ask_members(i, i + 1));
		else if (SLOT(i)->word == 1)
			CHECK(state_of(SLOT(i)->pid) == 'T');
	CHECK_ALL(member_right());
	return 1;
}

static void plan_harm(void)
{
	kill(SLOT(0)->pid, SIGKILL);
	reaches_state(SLOT(0)->pid, 'Z');
	SLOT(0)->word = 0;
}

WORKLOAD(
	{"plan", plan_set, plan_check, plan_harm},
)
