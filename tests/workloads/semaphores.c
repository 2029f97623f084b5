/* System V semaphores whose operations the kernel takes back when the process ends (SEM_UNDO of semop(2)). */
#include "workload.h"

#include <sched.h>
#include <sys/sem.h>

enum { KEY = 0x66690000, COUNT = 70, HIGH = 30000 };

static int set = -1;
static volatile int up;
static time_t used;
static unsigned short values[COUNT];

static time_t last_use(void)
{
	struct semid_ds state;
	return semctl(set, 0, IPC_STAT, &state) ? -1 : state.sem_otime;
}

static void add(int number, int amount)
{
	NEED(!semop(set, &(struct sembuf){.sem_num = number, .sem_op = amount, .sem_flg = SEM_UNDO}, 1));
}

static void make_set(void)
{
	NEED((set = semget(KEY | (getpid() & 0xffff), COUNT, IPC_CREAT | IPC_EXCL | 0600)) >= 0);
	for (int i = 0; i < COUNT; i++)
		values[i] = 5;
	values[5] = HIGH;
	NEED(!semctl(set, 0, SETALL, values));
}

static void remember(void)
{
	NEED(!semctl(set, 0, GETALL, values) && (used = last_use()) > 0);
	up = 1;
}

static int unchanged(void)
{
	unsigned short now[COUNT];
	CHECK(!semctl(set, 0, GETALL, now) && !memcmp(now, values, sizeof now));
	CHECK(semctl(set, 0, GETPID) == getpid() && semctl(set, 0, GETNCNT) == 0 && semctl(set, 0, GETZCNT) == 0);
	return 1;
}

static void remove_set(void)
{
	semctl(set, 0, IPC_RMID);
}

/* Some are taken, some given, one is high, one too high, one is given back; the other ones are not touched. */
static void *use_some(void *own_list)
{
	NEED(!own_list || !unshare(CLONE_SYSVSEM));
	add(0, -2);
	add(1, 7);
	add(5, -3);
	add(6, -2);
	add(6, 2);
	add(68, 32700);
	add(69, 20000);
	remember();
	for (;;)
		nap_ms(1000);
	return NULL;
}

static void shared_set(void)
{
	make_set();
	start_thread(use_some, NULL);
	NEED(wait_for(&up, 5000));
}

static void own_set(void)
{
	make_set();
	start_thread(use_some, &set);
	NEED(wait_for(&up, 5000));
}

static int undo_check(void)
{
	CHECK(last_use() == used);
	return unchanged();
}

/* A process of other people, which may not use the set any more. */
static void denied_set(void)
{
	make_set();
	add(0, -2);
	remember();
	NEED(!setresgid(65534, 65534, 65534) && !setresuid(65534, 65534, 65534));
}

static int denied_check(void)
{
	CHECK(semctl(set, 0, GETVAL) == -1 && errno == EACCES && getuid() == 65534);
	return 1;
}

static void denied_harm(void)
{
	set = -1;
}

/* What was taken or given is given back or taken; a high value does not hide it. */
static void returned_set(void)
{
	make_set();
	for (int i = 0; i < COUNT; i += 5) {
		add(i, i % 2 ? 3 : -3);
		add(i, i % 2 ? -3 : 3);
	}
	remember();
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
	{"shared", shared_set, undo_check, remove_set},
	{"own", own_set, undo_check, remove_set},
	{"denied", denied_set, denied_check, denied_harm},
	{"returned", returned_set, unchanged, remove_set},
	{"threads", threads_set, threads_check, threads_harm},
)
