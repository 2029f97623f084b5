/*
 * The processes of a tree that beats together. Every member has a slot in the free half of the beat file, so that none of
 * what is being tested (shared memory, descriptors, sockets) is needed to talk to it.
 */
#ifndef MEMBERS_H
#define MEMBERS_H

#include "workload.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { MEMBERS = 64, ASK = 1, LEAVE, NOTE };

struct member {
	int pid;
	int request;  /* ASK: check yourself; LEAVE: exit with status `word`; NOTE: what you are now is right */
	int verdict;
	int word;
	uint64_t beats;
	uint64_t value;
};

#define SLOT(i) ((struct member *)((char *)beat + 2048) + (i))
#define CHECK_MEMBERS(count) CHECK_ALL(ask_members(0, (count)))

/* Who a member was when it was set up; it has its own copy. */
static struct { pid_t pid, parent, group, session; uid_t uid; } self;

MAYBE void note_self(void)
{
	self.pid = getpid();
	self.parent = getppid();
	self.group = getpgrp();
	self.session = getsid(0);
	self.uid = geteuid();
}

MAYBE int same_self(void)
{
	CHECK(getpid() == self.pid && getppid() == self.parent);
	CHECK(getpgrp() == self.group && getsid(0) == self.session);
	CHECK(geteuid() == self.uid);
	return 1;
}

/* Lives in slot `i` until it is told to leave; `check` (may be NULL) is made besides the one of same_self. */
MAYBE void live_in(int i, int (*check)(void))
{
	struct member *slot = SLOT(i);
	__atomic_store_n(&slot->pid, getpid(), __ATOMIC_SEQ_CST);
	for (;;) {
		__atomic_add_fetch(&slot->beats, 1, __ATOMIC_SEQ_CST);
		int request = __atomic_load_n(&slot->request, __ATOMIC_SEQ_CST);
		if (request == LEAVE)
			_exit(slot->word);
		if (request) {
			slot->request = 0;
			if (request == NOTE)
				note_self();
			int verdict = same_self();
			if (verdict == 1 && check)
				verdict = check();
			__atomic_store_n(&slot->verdict, verdict, __ATOMIC_SEQ_CST);
		}
		nap_ms(2);
	}
}

/* Forks a member for slot `i` and waits until it lives. `early` (may be NULL) runs first in the child. */
MAYBE pid_t bear(int i, void (*early)(void), int (*check)(void))
{
	SLOT(i)->pid = 0;
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		if (early)
			early();
		note_self();
		live_in(i, check);
	}
	NEED(wait_for(&SLOT(i)->pid, 5000));
	return child;
}

MAYBE char state_of(pid_t pid)
{
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	if (slurp(path, text, sizeof text) < 0)
		return 0;
	char *end = strrchr(text, ')');
	return end ? end[2] : 0;
}

MAYBE int is_alive(int i)
{
	uint64_t before = __atomic_load_n(&SLOT(i)->beats, __ATOMIC_SEQ_CST);
	for (int ms = 0; ms < 5000; ms++) {
		if (__atomic_load_n(&SLOT(i)->beats, __ATOMIC_SEQ_CST) > before)
			return 1;
		nap_ms(1);
	}
	return 0;
}

/* Asks the members in slots `first` up to before `end`. A member that failed has put its reason into the beat's text. */
MAYBE void tell(int i, int request)
{
	SLOT(i)->verdict = 0;
	__atomic_store_n(&SLOT(i)->request, request, __ATOMIC_SEQ_CST);
}

/* Whether member `i` has answered; at once, if it cannot any more. */
MAYBE int answered(int i)
{
	for (int ms = 0; ms < 5000; ms++) {
		if (__atomic_load_n(&SLOT(i)->verdict, __ATOMIC_SEQ_CST))
			return 1;
		char state = state_of(SLOT(i)->pid);
		if (!state || state == 'Z')
			return 0;
		nap_ms(1);
	}
	return 0;
}

MAYBE int ask_members(int first, int end)
{
	for (int i = first; i < end; i++)
		tell(i, ASK);
	for (int i = first; i < end; i++) {
		CHECK(answered(i));
		if (SLOT(i)->verdict != 1)
			return SLOT(i)->verdict;
	}
	return 1;
}

/* In a setup: member `i` has got another parent. */
MAYBE void has_moved(int i)
{
	tell(i, NOTE);
	NEED(wait_for(&SLOT(i)->verdict, 5000) && SLOT(i)->verdict == 1);
}

/* Makes member `i` exit with `code` and answers whether this process reaped it. */
MAYBE int dismiss(int i, int code)
{
	int status = 0, pid = SLOT(i)->pid;
	SLOT(i)->word = code;
	tell(i, LEAVE);
	return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == code;
}

MAYBE int reaches_state(pid_t pid, char state)
{
	for (int ms = 0; ms < 5000; ms++) {
		if (state_of(pid) == state)
			return 1;
		nap_ms(1);
	}
	return 0;
}

/* Waits until a child has ended and leaves it a zombie. */
MAYBE void await_zombie(pid_t pid)
{
	siginfo_t info;
	NEED(!waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT));
}

/* Runs `steps` in a forked child that then exits with 0, and reaps it. */
MAYBE void in_between(void (*steps)(void))
{
	int status;
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		steps();
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child && !status);
}

#endif
