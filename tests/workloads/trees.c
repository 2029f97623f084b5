/* Trees of processes: who is whose child, in which session and group, alive, stopped or dead. */
#include "members.h"

#include <sys/resource.h>
#include <sys/stat.h>

enum { FAN = 20, CHAIN = 10 };

static pid_t pids[MEMBERS];
static uint64_t *own;
static int number;

/* ---- width and depth: every member has pages of its own ---- */

static void own_pages(void)
{
	own = map_anon(8);
	fill(own, 8 * PAGE, (uint64_t)number + 1);
}

static int own_pages_right(void)
{
	CHECK(same(own, 8 * PAGE, (uint64_t)number + 1));
	return 1;
}

static void fan_set(void)
{
	for (number = 0; number < FAN; number++)
		pids[number] = bear(number, own_pages, own_pages_right);
}

static int fan_check(void)
{
	CHECK_MEMBERS(FAN);
	for (int i = 0; i < FAN; i++)
		CHECK(SLOT(i)->pid == pids[i] && waitpid(pids[i], NULL, WNOHANG) == 0);
	return 1;
}

static void kill_fourth(void)
{
	kill(SLOT(3)->pid, SIGKILL);
	reaches_state(SLOT(3)->pid, 'Z');
}

static void chain_link(void)
{
	own_pages();
	if (number + 1 < CHAIN) {
		number++;
		bear(number, chain_link, own_pages_right);
		number--;
	}
}

static void chain_set(void)
{
	bear(0, chain_link, own_pages_right);
}

static int chain_check(void)
{
	CHECK_MEMBERS(CHAIN);
	return 1;
}

static void kill_last(void)
{
	kill(SLOT(CHAIN - 1)->pid, SIGKILL);
}

/* ---- sessions and groups ---- */

static void leave_session(void)
{
	NEED(setsid() == getpid());
}

static void own_group(void)
{
	NEED(!setpgid(0, 0));
}

static void group_of_first(void)
{
	NEED(!setpgid(0, SLOT(0)->pid));
}

/* Slot 0 leaves the session between the births of slot 1, which stays in the old one, and of slots 2 and 3. */
static void leave_between(void)
{
	bear(1, NULL, NULL);
	leave_session();
	bear(2, NULL, NULL);
	bear(3, own_group, NULL);
}

static void leave_and_bear(void)
{
	leave_session();
	bear(5, own_group, NULL);
}

static void sessions_set(void)
{
	bear(0, leave_between, NULL);
	bear(4, leave_and_bear, NULL);
}

static int sessions_check(void)
{
	CHECK_MEMBERS(6);
	pid_t left = SLOT(0)->pid;
	CHECK(getsid(left) == left && getsid(SLOT(1)->pid) == getpid());
	CHECK(getsid(SLOT(2)->pid) == left && getpgid(SLOT(2)->pid) == left);
	CHECK(getsid(SLOT(3)->pid) == left && getpgid(SLOT(3)->pid) == SLOT(3)->pid);
	CHECK(getsid(SLOT(5)->pid) == SLOT(4)->pid);
	return 1;
}

static void kill_sixth(void)
{
	kill(SLOT(5)->pid, SIGKILL);
}

/* Groups in one session: a leader with two members, one that is alone, a parent in the group of its child. */
static void join_the_child(void)
{
	bear(5, own_group, NULL);
	NEED(!setpgid(0, SLOT(5)->pid));
}

static void groups_set(void)
{
	bear(0, own_group, NULL);
	bear(1, group_of_first, NULL);
	bear(2, group_of_first, NULL);
	bear(3, own_group, NULL);
	bear(4, join_the_child, NULL);
	has_moved(5);
}

static int groups_check(void)
{
	CHECK_MEMBERS(6);
	for (int i = 0; i < 3; i++)
		CHECK(getpgid(SLOT(i)->pid) == SLOT(0)->pid);
	CHECK(getpgid(SLOT(4)->pid) == SLOT(5)->pid);
	return 1;
}

static void regroup_second(void)
{
	setpgid(SLOT(1)->pid, SLOT(1)->pid);
}

/* A group whose leader is gone for good; a child and a grandchild are in it. */
static void join_first_pid(void)
{
	NEED(!setpgid(0, pids[0]));
	bear(1, NULL, NULL);
}

static void idle_child(void)
{
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0])
		for (;;)
			pause();
}

static void gone_set(void)
{
	idle_child();
	NEED(!setpgid(pids[0], pids[0]));
	bear(0, join_first_pid, NULL);
	NEED(!kill(pids[0], SIGKILL) && waitpid(pids[0], NULL, 0) == pids[0]);
}

static int gone_check(void)
{
	CHECK_MEMBERS(2);
	CHECK(getpgid(SLOT(0)->pid) == pids[0] && getpgid(SLOT(1)->pid) == pids[0]);
	CHECK(kill(pids[0], 0) < 0 && errno == ESRCH);
	CHECK(!kill(-pids[0], 0));
	return 1;
}

static void regroup_first(void)
{
	setpgid(SLOT(0)->pid, SLOT(0)->pid);
}

/* ---- orphans ---- */

static void bear_third(void)
{
	bear(2, NULL, NULL);
}

/* Slot 0 is a subreaper: what becomes an orphan below it is its child, now (slot 2) and later (slot 3). */
static int adopt_another(void)
{
	siginfo_t info;
	CHECK(waitid(P_PID, (id_t)SLOT(2)->pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0);
	pid_t between = fork();
	CHECK(between >= 0);
	if (!between) {
		pid_t orphan = fork();
		if (!orphan)
			live_in(3, NULL);
		_exit(orphan < 0);
	}
	int status = -1;
	CHECK(waitpid(between, &status, 0) == between && status == 0);
	CHECK(wait_for(&SLOT(3)->pid, 5000));
	CHECK(dismiss(3, 5));
	SLOT(3)->pid = SLOT(3)->request = 0;
	return 1;
}

static void adopt(void)
{
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	in_between(bear_third);
	has_moved(2);
	bear(1, NULL, NULL);
}

static void adopted_set(void)
{
	bear(0, adopt, adopt_another);
}

static int adopted_check(void)
{
	CHECK_MEMBERS(3);
	return 1;
}

static void kill_adopted(void)
{
	kill(SLOT(2)->pid, SIGKILL);
	reaches_state(SLOT(2)->pid, 'Z');
}

/* What daemons do: fork, leave the session, fork again, and the leader goes. */
static void daemon_steps(void)
{
	leave_session();
	bear(0, NULL, NULL);
}

static void daemon_set(void)
{
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	in_between(daemon_steps);
	has_moved(0);
	NEED(getsid(SLOT(0)->pid) != getpid() && getsid(SLOT(0)->pid) != SLOT(0)->pid);
}

static int daemon_check(void)
{
	CHECK_MEMBERS(1);
	return 1;
}

static void kill_second(void)
{
	kill(SLOT(1)->pid, SIGKILL);
}

static void kill_first(void)
{
	kill(SLOT(0)->pid, SIGKILL);
	reaches_state(SLOT(0)->pid, 'Z');
}

/* The leader lives on, but the one between it and slot 1 has gone: slot 1 is in the session of its sibling. */
static void bear_second(void)
{
	bear(1, NULL, NULL);
}

static void leave_and_orphan(void)
{
	leave_session();
	in_between(bear_second);
}

static void sibling_set(void)
{
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	bear(0, leave_and_orphan, NULL);
	has_moved(1);
	NEED(getsid(SLOT(1)->pid) == SLOT(0)->pid);
}

static int sibling_check(void)
{
	CHECK_MEMBERS(2);
	return 1;
}

/* ---- the dead ---- */

/* Exit codes, and signals as negative numbers. */
enum { FATES = 8 };
static const int fates[FATES] = {0, 7, 255, -SIGKILL, -SIGTERM, -SIGSEGV, -SIGPIPE, -64};
static volatile sig_atomic_t notices;

static void count_notice(int signal)
{
	(void)signal;
	notices++;
}

static void meet(int fate)
{
	sigset_t none;
	if (fate >= 0)
		_exit(fate);
	signal(-fate, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	kill(getpid(), -fate);
	pause();
}

/* The dead are in groups and sessions too: the second led a session, the third a group that the fourth was in. */
static void zombies_set(void)
{
	struct sigaction action = {.sa_handler = count_notice, .sa_flags = SA_RESTART};
	struct rlimit none = {0, 0};
	NEED(!sigaction(SIGCHLD, &action, NULL) && !setrlimit(RLIMIT_CORE, &none));
	bear(0, NULL, NULL);
	for (int i = 0; i < FATES; i++) {
		pids[i] = fork();
		NEED(pids[i] >= 0);
		if (!pids[i]) {
			char name[16];
			snprintf(name, sizeof name, "dead (%d) x", i);
			prctl(PR_SET_NAME, name);
			if (i == 1)
				setsid();
			if (i == 2)
				setpgid(0, 0);
			if (i == 3)
				setpgid(0, pids[2]);
			meet(fates[i]);
		}
		await_zombie(pids[i]);
	}
	notices = 0;
}

/* One that has left a core, where this machine leaves cores in the working directory. */
static void core_set(void)
{
	struct rlimit small = {1 << 20, 1 << 20};
	bear(0, NULL, NULL);
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0]) {
		NEED(!mkdir("cores", 0755) || errno == EEXIST);
		NEED(!chdir("cores") && !setrlimit(RLIMIT_CORE, &small));
		meet(-SIGQUIT);
	}
	await_zombie(pids[0]);
	siginfo_t info;
	NEED(!waitid(P_PID, (id_t)pids[0], &info, WEXITED | WNOWAIT));
	pids[1] = info.si_code;
}

static int core_check(void)
{
	siginfo_t info = {0};
	CHECK(!waitid(P_PID, (id_t)pids[0], &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid == pids[0]);
	CHECK(info.si_code == pids[1] && info.si_status == SIGQUIT);
	return 1;
}

static void reap_core(void)
{
	waitpid(pids[0], NULL, 0);
}

static int zombies_check(void)
{
	CHECK(notices == 0);
	for (int i = 0; i < FATES; i++) {
		siginfo_t info = {0};
		CHECK(!waitid(P_PID, (id_t)pids[i], &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid == pids[i]);
		CHECK(info.si_code == (fates[i] < 0 ? CLD_KILLED : CLD_EXITED) && info.si_status == abs(fates[i]));
	}
	CHECK(getpgid(pids[3]) == pids[2] && getsid(pids[1]) == pids[1]);
	CHECK_MEMBERS(1);
	return 1;
}

static void reap_one(void)
{
	waitpid(pids[4], NULL, 0);
}

/* ---- the stopped ---- */

static void stopped_set(void)
{
	bear(0, NULL, NULL);
	bear(1, own_group, NULL);
	bear(2, NULL, NULL);
	NEED(!kill(SLOT(0)->pid, SIGSTOP) && !kill(SLOT(1)->pid, SIGTSTP));
	for (int i = 0; i < 2; i++) {
		NEED(reaches_state(SLOT(i)->pid, 'T'));
		NEED(waitpid(SLOT(i)->pid, NULL, WUNTRACED) == SLOT(i)->pid);
	}
}

static int stopped_check(void)
{
	static const int how[] = {SIGSTOP, SIGTSTP};
	for (int i = 0; i < 2; i++)
		CHECK(state_of(SLOT(i)->pid) == 'T');
	for (int i = 0; i < 2; i++)
		CHECK(!kill(SLOT(i)->pid, SIGCONT));
	CHECK_MEMBERS(3);
	for (int i = 0; i < 2; i++) {
		int status = 0;
		CHECK(!kill(SLOT(i)->pid, how[i]) && waitpid(SLOT(i)->pid, &status, WUNTRACED) == SLOT(i)->pid);
		CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == how[i]);
	}
	return 1;
}

static void continue_first(void)
{
	kill(SLOT(0)->pid, SIGCONT);
}

static void continue_one(void)
{
	kill(SLOT(1)->pid, SIGCONT);
}

static void *thread_body(void *unused)
{
	for (;;)
		nap_ms(5);
	return unused;
}

static void with_thread(void)
{
	start_thread(thread_body, NULL);
}

/* The parent has a handler and has seen the signals; it has taken the status of the first child, but not the second's. */
static void told_set(void)
{
	struct sigaction action = {.sa_handler = count_notice, .sa_flags = SA_RESTART};
	NEED(!sigaction(SIGCHLD, &action, NULL));
	bear(0, with_thread, NULL);
	bear(1, NULL, NULL);
	NEED(!kill(SLOT(0)->pid, SIGSTOP) && waitpid(SLOT(0)->pid, NULL, WUNTRACED) == SLOT(0)->pid);
	NEED(!kill(SLOT(1)->pid, SIGSTOP) && reaches_state(SLOT(1)->pid, 'T'));
	while (!notices)
		nap_ms(1);
	nap_ms(20);
	notices = 0;
}

static int told_check(void)
{
	siginfo_t info = {0};
	CHECK(state_of(SLOT(0)->pid) == 'T' && state_of(SLOT(1)->pid) == 'T');
	CHECK(notices == 0);
	CHECK(waitpid(SLOT(0)->pid, NULL, WUNTRACED | WNOHANG) == 0);
	CHECK(!waitid(P_PID, (id_t)SLOT(1)->pid, &info, WSTOPPED | WNOHANG | WNOWAIT) && info.si_pid == SLOT(1)->pid);
	return 1;
}

/* The first child was stopped and goes on, and the parent has not taken that report; of the second it has. */
static void continued_set(void)
{
	struct sigaction action = {.sa_handler = count_notice, .sa_flags = SA_RESTART};
	NEED(!sigaction(SIGCHLD, &action, NULL));
	bear(0, with_thread, NULL);
	bear(1, NULL, NULL);
	for (int i = 0; i < 2; i++) {
		NEED(!kill(SLOT(i)->pid, SIGSTOP) && waitpid(SLOT(i)->pid, NULL, WUNTRACED) == SLOT(i)->pid);
		NEED(!kill(SLOT(i)->pid, SIGCONT));
	}
	NEED(waitpid(SLOT(1)->pid, NULL, WCONTINUED) == SLOT(1)->pid);
	siginfo_t info = {0};
	for (int ms = 0; ms < 2000 && !info.si_pid; ms++) {
		nap_ms(1);
		NEED(!waitid(P_PID, (id_t)SLOT(0)->pid, &info, WCONTINUED | WNOHANG | WNOWAIT));
	}
	NEED(info.si_pid == SLOT(0)->pid);
	nap_ms(20);
	notices = 0;
}

static int continued_check(void)
{
	siginfo_t info = {0};
	CHECK(notices == 0);
	CHECK(state_of(SLOT(0)->pid) != 'T' && state_of(SLOT(1)->pid) != 'T');
	CHECK(waitpid(SLOT(1)->pid, NULL, WCONTINUED | WNOHANG) == 0);
	CHECK(!waitid(P_PID, (id_t)SLOT(0)->pid, &info, WSTOPPED | WCONTINUED | WNOHANG | WNOWAIT));
	CHECK(info.si_pid == SLOT(0)->pid && info.si_code == CLD_CONTINUED);
	return 1;
}

static void take_report(void)
{
	waitpid(SLOT(0)->pid, NULL, WCONTINUED | WNOHANG);
}

/* ---- other users ---- */

static void become_other(void)
{
	NEED(!setresgid(1001, 1002, 1003) && !setresuid(1001, 1002, 1003) && !prctl(PR_SET_DUMPABLE, 1));
}

static int still_other(void)
{
	uid_t r, e, s;
	CHECK(!getresuid(&r, &e, &s) && r == 1001 && e == 1002 && s == 1003);
	CHECK(!getresgid(&r, &e, &s) && r == 1001 && e == 1002 && s == 1003);
	CHECK(setresuid(0, 0, 0) < 0 && errno == EPERM);
	return 1;
}

static void other_with_child(void)
{
	become_other();
	bear(1, own_group, still_other);
}

static void users_set(void)
{
	bear(0, other_with_child, still_other);
	bear(2, NULL, NULL);
}

static int users_check(void)
{
	CHECK_MEMBERS(3);
	CHECK(!setpgid(SLOT(2)->pid, SLOT(2)->pid) && !setpgid(SLOT(2)->pid, getpgrp()));
	return 1;
}

/* ---- other programs ---- */

static pid_t run(char **words)
{
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		execv(words[0], words);
		_exit(127);
	}
	return child;
}

static void programs_set(void)
{
	char *sleep[] = {"/bin/sleep", "1000", NULL}, *again[] = {"/proc/self/exe", arguments[1], "member", NULL};
	SLOT(0)->pid = 0;
	pids[0] = run(again);
	NEED(wait_for(&SLOT(0)->pid, 5000));
	pids[1] = run(sleep);
	char comm[64];
	snprintf(comm, sizeof comm, "/proc/%d/comm", pids[1]);
	char text[64] = "";
	for (int i = 0; i < 1000 && strcmp(text, "sleep\n"); i++) {
		NEED(slurp(comm, text, sizeof text) > 0);
		nap_ms(1);
	}
	NEED(reaches_state(pids[1], 'S'));
}

static int programs_check(void)
{
	CHECK_MEMBERS(1);
	CHECK(state_of(pids[1]) == 'S' && waitpid(pids[1], NULL, WNOHANG) == 0);
	return 1;
}

/* The program that was executed: a member by itself. */
static void member_set(void)
{
	note_self();
	live_in(0, NULL);
}

static int nothing(void)
{
	return 1;
}

static void no_harm(void)
{
}

/* ---- a parent that waits ---- */

static void wait_forever(void)
{
	for (int status;; SLOT(0)->value++) {
		bear(1, NULL, NULL);
		SLOT(0)->pid = getpid();
		/* No handler, so nothing may interrupt this, least of all a checkpoint. */
		pid_t child = (pid_t)syscall(SYS_wait4, SLOT(1)->pid, &status, 0, NULL);
		if (child != SLOT(1)->pid || !WIFEXITED(status) || WEXITSTATUS(status) != SLOT(1)->word) {
			SLOT(0)->word = errno ? errno : -1;
			_exit(1);
		}
		SLOT(1)->request = 0;
	}
}

static void waiting_set(void)
{
	SLOT(0)->pid = 0;
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0])
		wait_forever();
	NEED(wait_for(&SLOT(0)->pid, 5000));
	nap_ms(20);
}

static int waiting_check(void)
{
	uint64_t before = SLOT(0)->value;
	CHECK_ALL(ask_members(1, 2));
	SLOT(1)->word = 77;
	SLOT(0)->pid = 0;
	tell(1, LEAVE);
	CHECK(wait_for(&SLOT(0)->pid, 5000));
	CHECK(SLOT(0)->value == before + 1 && waitpid(pids[0], NULL, WNOHANG) == 0);
	return 1;
}

static void steal_child(void)
{
	kill(SLOT(1)->pid, SIGKILL);
}

/* ---- births at any moment ---- */

enum { BURST = 3 };

/* Forks a few that fork once and end; every one of them is accounted for by its parent. */
static void fork_on(void)
{
	for (;;) {
		pid_t children[BURST];
		for (int i = 0; i < BURST; i++) {
			children[i] = fork();
			if (children[i] < 0)
				_exit(90);
			if (!children[i]) {
				int status;
				pid_t below = fork();
				if (!below)
					_exit(i + 10);
				_exit(waitpid(below, &status, 0) == below && WEXITSTATUS(status) == i + 10 ? i : 80);
			}
		}
		for (int i = 0; i < BURST; i++) {
			int status;
			if (waitpid(children[i], &status, 0) != children[i])
				_exit(91);
			if (!WIFEXITED(status) || WEXITSTATUS(status) != i)
				_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 92);
		}
		__atomic_add_fetch(&SLOT(0)->beats, 1, __ATOMIC_SEQ_CST);
		nap_ms(1);
	}
}

static void forking_set(void)
{
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0])
		fork_on();
	NEED(is_alive(0));
}

static int forking_check(void)
{
	CHECK(is_alive(0));
	CHECK(is_alive(0) && waitpid(pids[0], NULL, WNOHANG) == 0);
	return 1;
}

static void stop_forking(void)
{
	kill(pids[0], SIGSTOP);
	reaches_state(pids[0], 'T');
	nap_ms(20);
}

/* ---- a bomb of bounded size: everybody has two children, born one after the other ---- */

enum { BOMB = 63 };

static void grow(int i)
{
	for (int born = 0; born < 2 && 2 * i + 1 + born < BOMB;) {
		nap_ms(20);
		int child = 2 * i + 1 + born++;
		pid_t pid = fork();
		NEED(pid >= 0);
		if (!pid) {
			i = child;
			born = 0;
		}
	}
	note_self();
	live_in(i, NULL);
}

static void bomb_set(void)
{
	for (int i = 0; i < BOMB; i++)
		SLOT(i)->pid = 0;
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0])
		grow(0);
}

static int bomb_check(void)
{
	for (int i = 0; i < BOMB; i++)
		CHECK(wait_for(&SLOT(i)->pid, 5000));
	CHECK_MEMBERS(BOMB);
	return 1;
}

static void kill_bomb(void)
{
	bomb_check();
	kill(SLOT(BOMB - 1)->pid, SIGKILL);
}

/* ---- a parent that waits in vfork(2): as long as nobody asks ("vfork"), or for a second and a half ("vfork-short") ---- */

static void vfork_set(void)
{
	SLOT(0)->word = SLOT(0)->pid = 0;
	pids[0] = fork();
	NEED(pids[0] >= 0);
	if (!pids[0]) {
		note_self();
		if (!vfork()) {
			for (int ms = 0; !SLOT(0)->word && (ms < 1500 || !strcmp(mode_name, "vfork")); ms++)
				nap_ms(1);
			_exit(0);
		}
		live_in(0, NULL);
	}
	NEED(reaches_state(pids[0], 'D'));
}

static int vfork_check(void)
{
	SLOT(0)->word = 1;
	CHECK(wait_for(&SLOT(0)->pid, 5000));
	CHECK_MEMBERS(1);
	return 1;
}

WORKLOAD(
	{"vfork", vfork_set, vfork_check, kill_first},
	{"vfork-short", vfork_set, vfork_check, kill_first},
	{"bomb", bomb_set, bomb_check, kill_bomb},
	{"fan", fan_set, fan_check, kill_fourth},
	{"chain", chain_set, chain_check, kill_last},
	{"sessions", sessions_set, sessions_check, kill_sixth},
	{"groups", groups_set, groups_check, regroup_second},
	{"gone", gone_set, gone_check, regroup_first},
	{"adopted", adopted_set, adopted_check, kill_adopted},
	{"daemon", daemon_set, daemon_check, kill_first},
	{"sibling", sibling_set, sibling_check, kill_second},
	{"zombies", zombies_set, zombies_check, reap_one},
	{"stopped", stopped_set, stopped_check, continue_one},
	{"core", core_set, core_check, reap_core},
	{"told", told_set, told_check, continue_first},
	{"continued", continued_set, continued_check, take_report},
	{"users", users_set, users_check, kill_second},
	{"programs", programs_set, programs_check, kill_first},
	{"member", member_set, nothing, no_harm},
	{"waiting", waiting_set, waiting_check, steal_child},
	{"forking", forking_set, forking_check, stop_forking},
)
