/* What each thread has of its own: signal mask, alternate signal stack, name. */
#include "workers.h"

#include <signal.h>
#include <sys/prctl.h>

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1U << 31)
#endif

/* Masks: a different one per thread, with realtime signals. */
static void mask_of(int index, sigset_t *mask)
{
	sigemptyset(mask);
	sigaddset(mask, SIGUSR1);
	sigaddset(mask, SIGRTMIN + index);
	if (index & 1)
		sigaddset(mask, SIGTRAP);
	if (index & 2)
		sigaddset(mask, SIGRTMAX);
}

static void mask_prepare(struct worker *self)
{
	sigset_t mask;
	mask_of(self->index, &mask);
	NEED(!pthread_sigmask(SIG_SETMASK, &mask, NULL));
}

static int mask_job(struct worker *self)
{
	sigset_t mask, expected;
	mask_of(self->index, &expected);
	CHECK(!pthread_sigmask(SIG_SETMASK, NULL, &mask));
	for (int number = 1; number <= SIGRTMAX; number++)
		CHECK(sigismember(&mask, number) == sigismember(&expected, number));
	return 1;
}

static struct worker main_worker = {.index = 9};

static void masks_set(void)
{
	prepare = mask_prepare;
	job = mask_job;
	start_workers(THREADS);
	mask_prepare(&main_worker);
}

static int masks_check(void)
{
	CHECK_ALL(mask_job(&main_worker));
	return ask_all();
}

static void masks_harm(void)
{
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &one, NULL);
}

/* Alternate signal stacks: each thread's own, and a handler really runs on it. */
enum { ALT_BYTES = 65536 };
static __thread volatile int handler_was_on_stack;
static __thread char *alt_stack;

static void on_signal(int number)
{
	char here;
	(void)number;
	handler_was_on_stack = &here >= alt_stack && &here < alt_stack + ALT_BYTES;
}

static void altstack_prepare(struct worker *self)
{
	alt_stack = malloc(ALT_BYTES);
	stack_t stack = {.ss_sp = alt_stack, .ss_size = ALT_BYTES - self->index * 1024,
			 .ss_flags = self->index & 1 ? (int)SS_AUTODISARM : 0};
	NEED(!sigaltstack(&stack, NULL));
}

static int altstack_job(struct worker *self)
{
	stack_t stack;
	CHECK(!sigaltstack(NULL, &stack));
	CHECK(stack.ss_sp == alt_stack && stack.ss_size == (size_t)ALT_BYTES - self->index * 1024);
	CHECK(stack.ss_flags == (self->index & 1 ? (int)SS_AUTODISARM : 0));
	handler_was_on_stack = 0;
	CHECK(!syscall(SYS_tgkill, getpid(), thread_id(), SIGUSR1));
	CHECK(handler_was_on_stack);
	return 1;
}

static void altstack_set(void)
{
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
	NEED(!sigaction(SIGUSR1, &action, NULL));
	main_worker.index = 2;
	prepare = altstack_prepare;
	job = altstack_job;
	altstack_prepare(&main_worker);
	start_workers(THREADS);
}

static int altstack_check(void)
{
	CHECK_ALL(altstack_job(&main_worker));
	return ask_all();
}

static void altstack_harm(void)
{
	stack_t stack = {.ss_flags = SS_DISABLE};
	sigaltstack(&stack, NULL);
}

/* A thread that is inside a handler on its alternate stack, then returns from it to where it was. */
static volatile int inside, leave, returned, on_stack_then;

static void stay(int number)
{
	stack_t stack;
	(void)number;
	inside = 1;
	while (!__atomic_load_n(&leave, __ATOMIC_SEQ_CST))
		nap_ms(2);
	on_stack_then = !sigaltstack(NULL, &stack) && stack.ss_flags == SS_ONSTACK;
}

static void *interrupted(void *argument)
{
	char buffer[512];
	double number = 1.5;
	(void)argument;
	struct worker self = {.index = 0};
	fill(buffer, sizeof buffer, 77);
	altstack_prepare(&self);
	NEED(!syscall(SYS_tgkill, getpid(), thread_id(), SIGUSR1));
	stack_t stack;
	int good = !sigaltstack(NULL, &stack) && !stack.ss_flags && same(buffer, sizeof buffer, 77) && number == 1.5;
	returned = good ? 1 : 2;
	return NULL;
}

static pthread_t guest;

static void onstack_set(void)
{
	struct sigaction action = {.sa_handler = stay, .sa_flags = SA_ONSTACK};
	NEED(!sigaction(SIGUSR1, &action, NULL));
	inside = leave = returned = on_stack_then = 0;
	guest = start_thread(interrupted, NULL);
	NEED(wait_for(&inside, 5000));
}

static int onstack_check(void)
{
	CHECK(!returned);
	__atomic_store_n(&leave, 1, __ATOMIC_SEQ_CST);
	CHECK(wait_for(&returned, 5000));
	CHECK(on_stack_then);
	CHECK(returned == 1);
	CHECK(!pthread_join(guest, NULL));
	onstack_set();
	return 1;
}

static void onstack_harm(void)
{
	leave = 1;
	wait_for(&returned, 5000);
}

/* Names, with characters that break careless parsers of /proc/PID/stat. */
static const char *const names[THREADS] = {"a b", "x) R 1 (", "((", "fifteen-letters", "", "tab\there", "new\nline", "\\x"};

static void name_prepare(struct worker *self)
{
	NEED(!prctl(PR_SET_NAME, names[self->index]));
}

static int name_job(struct worker *self)
{
	char name[16];
	CHECK(!prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, names[self->index]));
	return 1;
}

static void names_set(void)
{
	prepare = name_prepare;
	job = name_job;
	start_workers(THREADS);
	NEED(!prctl(PR_SET_NAME, "leader) Z 1"));
}

static int names_check(void)
{
	char name[16];
	CHECK(!prctl(PR_GET_NAME, name) && !strcmp(name, "leader) Z 1"));
	return ask_all();
}

static void names_harm(void)
{
	prctl(PR_SET_NAME, "other");
}

WORKLOAD(
	{"masks", masks_set, masks_check, masks_harm},
	{"altstack", altstack_set, altstack_check, altstack_harm},
	{"on-altstack", onstack_set, onstack_check, onstack_harm},
	{"names", names_set, names_check, names_harm},
)
