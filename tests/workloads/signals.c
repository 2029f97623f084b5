/* Signal handling: actions, ignored signals, masks, and signals that wait to be delivered. */
#include "workload.h"

#include <sched.h>
#include <signal.h>

enum { QUEUED = 20 };

struct ksigaction {
	void *handler;
	unsigned long flags;
	void *restorer;
	uint64_t mask;
};

static struct ksigaction actions[65];

static long kernel_action(int number, struct ksigaction *put, struct ksigaction *get)
{
	return syscall(SYS_rt_sigaction, number, put, get, sizeof(uint64_t));
}

static void handler_a(int number)
{
	(void)number;
}

static void handler_b(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
}

/* Handlers with every flag and with masks, for ordinary and realtime signals; the raw actions are compared. */
static void handlers_set(void)
{
	static const int flags[] = {0, SA_RESTART, SA_NODEFER, SA_RESETHAND, SA_NOCLDSTOP, SA_NOCLDWAIT, SA_ONSTACK};
	for (int number = 1; number <= 64; number++) {
		if (number == SIGKILL || number == SIGSTOP || number == 32 || number == 33)
			continue;
		struct sigaction action = {.sa_flags = flags[number % 7]};
		if (number % 5 == 0) {
			action.sa_handler = SIG_DFL;
		} else if (number % 2) {
			action.sa_handler = handler_a;
		} else {
			action.sa_flags |= SA_SIGINFO;
			action.sa_sigaction = handler_b;
		}
		sigaddset(&action.sa_mask, number % 60 + 3);
		NEED(!sigaction(number, &action, NULL));
	}
	for (int number = 1; number <= 64; number++)
		NEED(!kernel_action(number, NULL, &actions[number]));
}

static int handlers_check(void)
{
	struct ksigaction now;
	for (int number = 1; number <= 64; number++) {
		CHECK(!kernel_action(number, NULL, &now));
		CHECK(now.handler == actions[number].handler && now.flags == actions[number].flags);
		CHECK(now.restorer == actions[number].restorer && now.mask == actions[number].mask);
	}
	return 1;
}

static void handlers_harm(void)
{
	struct ksigaction action = actions[SIGUSR2];
	action.mask ^= 1 << 7;
	kernel_action(SIGUSR2, &action, NULL);
}

/* Ignored signals, SIGTRAP among them: a tracer must not lose or deliver it. */
static const int ignored[] = {SIGHUP, SIGINT, SIGTERM, SIGPIPE, SIGTRAP, SIGCHLD, SIGTSTP, SIGTTOU, SIGUSR1};

static void ignored_set(void)
{
	for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
		NEED(signal(ignored[i], SIG_IGN) != SIG_ERR);
}

static int ignored_check(void)
{
	struct sigaction action;
	for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++) {
		CHECK(!sigaction(ignored[i], NULL, &action) && action.sa_handler == SIG_IGN);
		CHECK(!raise(ignored[i]));
	}
	CHECK(!sigaction(SIGUSR2, NULL, &action) && action.sa_handler == SIG_DFL);
	return 1;
}

static void ignored_harm(void)
{
	signal(SIGTSTP, SIG_DFL);
}

/* Everything that can be blocked is blocked, SIGTRAP included, and SIGTRAP is pending. */
static volatile int trapped;

static void on_trap(int number)
{
	trapped = number;
}

static void blocked_set(void)
{
	sigset_t all;
	signal(SIGTRAP, on_trap);
	sigfillset(&all);
	NEED(!sigprocmask(SIG_SETMASK, &all, NULL));
	NEED(!raise(SIGTRAP));
}

static int blocked_check(void)
{
	sigset_t mask, trap;
	CHECK(!sigprocmask(SIG_SETMASK, NULL, &mask));
	for (int number = 1; number <= 64; number++)
		if (number != SIGKILL && number != SIGSTOP && number != 32 && number != 33)
			CHECK(sigismember(&mask, number) == 1);
	CHECK(!trapped);
	CHECK(!sigpending(&mask) && sigismember(&mask, SIGTRAP) == 1);
	sigemptyset(&trap);
	sigaddset(&trap, SIGTRAP);
	CHECK(!sigprocmask(SIG_UNBLOCK, &trap, NULL));
	CHECK(trapped == SIGTRAP);
	trapped = 0;
	blocked_set();
	return 1;
}

static void blocked_harm(void)
{
	sigset_t trap;
	sigemptyset(&trap);
	sigaddset(&trap, SIGTRAP);
	sigprocmask(SIG_UNBLOCK, &trap, NULL);
	sigprocmask(SIG_BLOCK, &trap, NULL);
}

/* Waiting signals with their payloads: sent to the thread (private) or to the process (shared). */
static int private_queue;

static void send(int number, int code, int payload)
{
	siginfo_t info = {.si_signo = number, .si_code = code};
	info.si_pid = getpid();
	info.si_uid = 4242;
	info.si_value.sival_int = payload;
	if (private_queue)
		NEED(!syscall(SYS_rt_tgsigqueueinfo, getpid(), thread_id(), number, &info));
	else
		NEED(!syscall(SYS_rt_sigqueueinfo, getpid(), number, &info));
}

static void block_queued(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGUSR1);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGCHLD);
	sigaddset(set, SIGRTMIN + 2);
	sigaddset(set, SIGRTMIN + 3);
	NEED(!sigprocmask(SIG_BLOCK, set, NULL));
}

static void pending_set(void)
{
	sigset_t set;
	private_queue = !strcmp(mode_name, "pending-private");
	block_queued(&set);
	send(SIGTERM, SI_QUEUE, 1);
	send(SIGUSR1, SI_QUEUE, 2);
	send(SIGUSR1, SI_QUEUE, 3);  /* an ordinary signal waits only once */
	send(SIGCHLD, SI_QUEUE, 4);
	for (int i = 0; i < QUEUED; i++)
		send(SIGRTMIN + 2 + i % 2, i % 3 ? SI_QUEUE : SI_MESGQ, 100 + i);
}

static int pending_check(void)
{
	static const int ordinary[] = {SIGUSR1, SIGTERM, SIGCHLD}, payload[] = {2, 1, 4};
	struct timespec none = {0, 0};
	siginfo_t info;
	sigset_t set, one;
	CHECK(!sigpending(&set) && sigismember(&set, SIGRTMIN + 3));
	CHECK(strtoull(field("/proc/thread-self/status", private_queue ? "ShdPnd" : "SigPnd"), NULL, 16) == 0);
	for (int i = 0; i < 3; i++) {
		sigemptyset(&one);
		sigaddset(&one, ordinary[i]);
		CHECK(sigtimedwait(&one, &info, &none) == ordinary[i]);
		CHECK(info.si_code == SI_QUEUE && info.si_value.sival_int == payload[i]);
		CHECK(info.si_pid == getpid() && info.si_uid == 4242);
		CHECK(sigtimedwait(&one, &info, &none) == -1 && errno == EAGAIN);
	}
	/* The lower number comes first; within one number the order of sending holds. */
	for (int turn = 0; turn < 2; turn++)
		for (int i = turn; i < QUEUED; i += 2) {
			sigemptyset(&one);
			sigaddset(&one, SIGRTMIN + 2);
			sigaddset(&one, SIGRTMIN + 3);
			CHECK(sigtimedwait(&one, &info, &none) == SIGRTMIN + 2 + turn);
			CHECK(info.si_value.sival_int == 100 + i && info.si_code == (i % 3 ? SI_QUEUE : SI_MESGQ));
		}
	CHECK(!sigpending(&set) && !sigismember(&set, SIGRTMIN + 2) && !sigismember(&set, SIGRTMIN + 3));
	pending_set();
	return 1;
}

static void pending_harm(void)
{
	struct timespec none = {0, 0};
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGRTMIN + 2);
	sigtimedwait(&one, NULL, &none);
}

/* Pending signals are delivered, through handlers, when they are unblocked after the restore. */
static volatile int delivered, total;

static void count(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	delivered++;
	total += info->si_value.sival_int;
}

static void deliver_set(void)
{
	struct sigaction action = {.sa_sigaction = count, .sa_flags = SA_SIGINFO};
	sigset_t set;
	NEED(!sigaction(SIGRTMIN + 2, &action, NULL) && !sigaction(SIGRTMIN + 3, &action, NULL));
	block_queued(&set);
	delivered = total = 0;
	for (int i = 0; i < QUEUED; i++) {
		private_queue = i % 3 == 0;
		send(SIGRTMIN + 2 + i % 2, SI_QUEUE, 1 << (i % 10));
	}
}

static int deliver_check(void)
{
	sigset_t none;
	CHECK(!delivered);
	sigemptyset(&none);
	CHECK(!sigprocmask(SIG_SETMASK, &none, NULL));
	CHECK(delivered == QUEUED && total == 2 * 1023);
	deliver_set();
	return 1;
}

static void deliver_harm(void)
{
	pending_harm();
}

/* A task that is stopped (by the runner, before the dump) stays stopped and continues when told to. */
static volatile int continued;

static void on_continue(int number)
{
	(void)number;
	continued++;
}

static void stopped_set(void)
{
	signal(SIGCONT, on_continue);
}

static int stopped_check(void)
{
	/* The runner stops and continues the program once; it writes that it has done so. */
	CHECK(continued == (int)beat->tokens[0]);
	return 1;
}

static void stopped_harm(void)
{
	continued += 5;
}

/* The very signals with which programs of the dump end are pending, for the process and for its thread. */
static const int common[] = {SIGURG, SIGWINCH, SIGCHLD};

static void crowded_set(void)
{
	sigset_t all;
	sigfillset(&all);
	NEED(!sigprocmask(SIG_SETMASK, &all, NULL));
	for (int i = 0; i < 3; i++) {
		siginfo_t info = {.si_signo = common[i], .si_code = SI_QUEUE};
		info.si_pid = 4711;
		info.si_value.sival_int = i;
		NEED(!syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), common[i], &info));
		info.si_value.sival_int = i + 10;
		NEED(!syscall(SYS_rt_sigqueueinfo, getpid(), common[i], &info));
	}
}

static int crowded_check(void)
{
	const struct timespec none = {0, 0};
	for (int i = 0; i < 3; i++)
		for (int shared = 0; shared < 2; shared++) {
			sigset_t one;
			siginfo_t info;
			sigemptyset(&one);
			sigaddset(&one, common[i]);
			CHECK(sigtimedwait(&one, &info, &none) == common[i]);
			CHECK(info.si_pid == 4711 && info.si_value.sival_int == i + 10 * shared);
		}
	crowded_set();
	return 1;
}

static void crowded_harm(void)
{
	sigset_t one;
	const struct timespec none = {0, 0};
	sigemptyset(&one);
	sigaddset(&one, SIGURG);
	sigtimedwait(&one, NULL, &none);
}

/* A thread that traps after every instruction of its own (the trap flag), as some debuggers have programs do. */
static volatile int traps, untrap;

static void on_step(int number)
{
	(void)number;
	traps++;
}

static void *trapping(void *argument)
{
	(void)argument;
	__asm__ volatile("pushfq\n\torq $0x100, (%%rsp)\n\tpopfq" ::: "cc", "memory");
	while (!untrap)
		syscall(SYS_poll, NULL, 0, 1);
	__asm__ volatile("pushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq" ::: "cc", "memory");
	untrap = 2;
	for (;;)
		nap_ms(1000);
	return NULL;
}

static void trapping_set(void)
{
	struct sigaction action = {.sa_handler = on_step, .sa_flags = SA_RESTART};
	NEED(!sigaction(SIGTRAP, &action, NULL));
	start_thread(trapping, NULL);
	NEED(wait_for(&traps, 2000));
}

static int trapping_check(void)
{
	traps = 0;
	CHECK(wait_for(&traps, 1000));
	return 1;
}

static void trapping_harm(void)
{
	untrap = 1;
	while (untrap != 2)
		nap_ms(1);
}

WORKLOAD(
	{"trapping", trapping_set, trapping_check, trapping_harm},
	{"crowded", crowded_set, crowded_check, crowded_harm},
	{"handlers", handlers_set, handlers_check, handlers_harm},
	{"ignored", ignored_set, ignored_check, ignored_harm},
	{"blocked", blocked_set, blocked_check, blocked_harm},
	{"pending-private", pending_set, pending_check, pending_harm},
	{"pending-shared", pending_set, pending_check, pending_harm},
	{"deliver", deliver_set, deliver_check, deliver_harm},
	{"stopped", stopped_set, stopped_check, stopped_harm},
)
