/* System V semaphores whose operations the kernel takes back when the process ends (SEM_UNDO of semop(2)). */
#include "workload.h"

#include <sys/sem.h>

static int set = -1;
static volatile int up;

static int value(void)
{
	return semctl(set, 0, GETVAL);
}

static void remove_set(void)
{
	semctl(set, 0, IPC_RMID);
}

static void undo_set(void)
{
	/* No permissions, so that it is nobody's but ours: programs that other tests checkpoint are not to be suspected. */
	NEED((set = semget(IPC_PRIVATE, 1, 0)) >= 0);
	NEED(!semctl(set, 0, SETVAL, 5));
	NEED(!semop(set, &(struct sembuf){.sem_num = 0, .sem_op = -2, .sem_flg = SEM_UNDO}, 1));
}

static int undo_check(void)
{
	CHECK(value() == 3);
	return 1;
}

/* Threads share one undo list (CLONE_SYSVSEM), which is empty here. */
static void *stand_by(void *unused)
{
	(void)unused;
	up = 1;
	for (;;)
		nap_ms(1000);
	return NULL;
}

static void threads_set(void)
{
	start_thread(stand_by, NULL);
	NEED(wait_for(&up, 5000));
}

static int threads_check(void)
{
	char text[64];
	CHECK(slurp("/proc/self/stat", text, sizeof text) > 0 && atoi(field("/proc/self/status", "Threads")) == 2);
	CHECK(up);
	return 1;
}

static void threads_harm(void)
{
	up = 0;
}

WORKLOAD(
	{"undo", undo_set, undo_check, remove_set},
	{"threads", threads_set, threads_check, threads_harm},
)
