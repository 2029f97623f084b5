/* The thread group's leader has ended (a zombie until the last thread goes), while another thread lives and beats. */
#include "workload.h"

static char *area;
static pid_t leader;

static int leader_is_dead(void)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/task/%d/status", leader);
	return field(path, "State")[0] == 'Z';
}

static void *outlive(void *argument)
{
	(void)argument;
	while (!leader_is_dead())
		nap_ms(1);
	live();
	return NULL;
}

static void leader_set(void)
{
	area = map_anon(16);
	fill(area, 16 * PAGE, 1);
	leader = thread_id();
	start_thread(outlive, NULL);
	syscall(SYS_exit, 0);
}

static int leader_check(void)
{
	CHECK(same(area, 16 * PAGE, 1));
	CHECK(thread_id() != leader && getpid() == leader);
	CHECK(leader_is_dead());
	return 1;
}

static void leader_harm(void)
{
	area[1] ^= 1;
}

WORKLOAD(
	{"gone", leader_set, leader_check, leader_harm},
)
