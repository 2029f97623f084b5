/* Attributes of a process that prctl(2), personality(2) and files of /proc set. */
#include "workload.h"

#include <linux/membarrier.h>
#include <signal.h>
#include <sys/personality.h>
#include <sys/prctl.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
enum { REFUSE_EXEC_GAIN = 1, GET_REGISTRATIONS = 1 << 9 };

static char *area;

/* ---- prctl options with a plain value: mode, how to set and get it, the value and another one ---- */

static const struct option { const char *mode; int set, get; unsigned long value, other; int by_pointer; } options[] = {
	{"thp-disable", PR_SET_THP_DISABLE, PR_GET_THP_DISABLE, 1, 0, 0},
	{"dumpable", PR_SET_DUMPABLE, PR_GET_DUMPABLE, 0, 1, 0},
	{"subreaper", PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER, 1, 0, 1},
	{"pdeathsig", PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, SIGURG, 0, 1},
	{"slack", PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, 123456, 50000, 0},
};

static const struct option *option(void)
{
	for (size_t i = 0; i < sizeof options / sizeof *options; i++)
		if (!strcmp(options[i].mode, mode_name))
			return &options[i];
	abort();
}

static void option_set(void)
{
	if (prctl(option()->set, option()->value, 0, 0, 0))
		cannot_run("the kernel does not know this option");
}

static int option_check(void)
{
	int value = -1;
	if (option()->by_pointer)
		CHECK(!prctl(option()->get, &value, 0, 0, 0));
	else
		value = prctl(option()->get, 0, 0, 0, 0);
	CHECK(value == (int)option()->value);
	return 1;
}

static void option_harm(void)
{
	prctl(option()->set, option()->other, 0, 0, 0);
}

/* ---- files of /proc/self: mode, file, value, another value ---- */

static const struct setting { const char *mode, *path, *value, *other; } settings[] = {
	{"oom", "/proc/self/oom_score_adj", "500\n", "600"},
	{"coredump-filter", "/proc/self/coredump_filter", "0000007f\n", "0x33"},
	{"comm", "/proc/self/comm", "a new name\n", "x"},
	{"session-nice", "/proc/self/autogroup", "7\n", "8"},
};

static const struct setting *setting(void)
{
	for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
		if (!strcmp(settings[i].mode, mode_name))
			return &settings[i];
	abort();
}

static void setting_set(void)
{
	char value[64] = "0x";
	/* coredump_filter shows hexadecimal digits without a prefix, but wants the prefix. */
	int hex = !strcmp(mode_name, "coredump-filter");
	snprintf(value, sizeof value, "%s%.*s", hex ? "0x" : "", (int)strlen(setting()->value) - 1, setting()->value);
	if (spit(setting()->path, value))
		cannot_run(setting()->path);
}

static int setting_check(void)
{
	char value[64];
	CHECK(slurp(setting()->path, value, sizeof value) > 0);
	/* That of a session has a name, another one in each incarnation, before its number. */
	char *number = strrchr(value, ' ');
	CHECK(!strcmp(strcmp(mode_name, "session-nice") || !number ? value : number + 1, setting()->value));
	return 1;
}

static void setting_harm(void)
{
	spit(setting()->path, setting()->other);
}

/* ---- personality ---- */

enum { ASK = 0xffffffff };

static void personality_set(void)
{
	int flag = !strcmp(mode_name, "no-randomize") ? ADDR_NO_RANDOMIZE : READ_IMPLIES_EXEC;
	NEED(personality((unsigned long)personality(ASK) | (unsigned long)flag) != -1);
	area = map_pages(4, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

static int personality_check(void)
{
	int wanted = !strcmp(mode_name, "no-randomize") ? ADDR_NO_RANDOMIZE : READ_IMPLIES_EXEC;
	char maps[32768], head[32];
	CHECK((personality(ASK) & (ADDR_NO_RANDOMIZE | READ_IMPLIES_EXEC)) == wanted);
	char *fresh = map_pages(4, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	CHECK(!mprotect(fresh + PAGE, PAGE, PROT_NONE));
	CHECK(slurp("/proc/self/maps", maps, sizeof maps) > 0);
	snprintf(head, sizeof head, "\n%lx-", (unsigned long)fresh);
	char *line = strstr(maps, head);
	CHECK(line && !strncmp(strchr(line, ' '), wanted == READ_IMPLIES_EXEC ? " r-xp" : " r--p", 5));
	CHECK(!munmap(fresh, 4 * PAGE));
	return 1;
}

static void personality_harm(void)
{
	personality(0);
}

/* ---- memory that may never gain the right to be executed ---- */

static void mdwe_set(void)
{
	if (prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0))
		cannot_run("the kernel has no PR_SET_MDWE");
	area = map_anon(4);
	fill(area, 4 * PAGE, 1);
}

static int mdwe_check(void)
{
	CHECK(prctl(PR_GET_MDWE, 0, 0, 0, 0) == REFUSE_EXEC_GAIN);
	CHECK(mprotect(area, PAGE, PROT_READ | PROT_EXEC) && errno == EACCES);
	CHECK(same(area, 4 * PAGE, 1));
	return 1;
}

static void flip_harm(void)
{
	area[9] ^= 1;
}

/* ---- membarrier: what was registered works without registering ---- */

static int withdrawn;

static void membarrier_set(void)
{
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0))
		cannot_run("membarrier");
	NEED(!syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0));
	NEED(!syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0));
}

static int membarrier_check(void)
{
	int kind = withdrawn ? MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ : MEMBARRIER_CMD_PRIVATE_EXPEDITED;
	CHECK(!syscall(SYS_membarrier, kind, 0, 0));
	CHECK(!syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0));
	long registered = syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0);
	CHECK(registered == -1 || registered == (MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED |
						 MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE |
						 MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED));
	return 1;
}

/* A registration cannot be taken back: the check is made to want the one that was never made. */
static void membarrier_harm(void)
{
	withdrawn = 1;
}

WORKLOAD(
	{"thp-disable", option_set, option_check, option_harm},
	{"dumpable", option_set, option_check, option_harm},
	{"subreaper", option_set, option_check, option_harm},
	{"pdeathsig", option_set, option_check, option_harm},
	{"slack", option_set, option_check, option_harm},
	{"oom", setting_set, setting_check, setting_harm},
	{"coredump-filter", setting_set, setting_check, setting_harm},
	{"comm", setting_set, setting_check, setting_harm},
	{"session-nice", setting_set, setting_check, setting_harm},
	{"no-randomize", personality_set, personality_check, personality_harm},
	{"read-implies-exec", personality_set, personality_check, personality_harm},
	{"mdwe", mdwe_set, mdwe_check, flip_harm},
	{"membarrier", membarrier_set, membarrier_check, membarrier_harm},
)
