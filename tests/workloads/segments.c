/* System V shared memory: segments that live on by themselves, and such as vanish with their last user. */
#include <sys/ipc.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/wait.h>

#include "workload.h"

enum { PAGES = 8, BYTES = PAGES * 4096, KEY = 0x66690000 };

static int segment, other_segment;
static char *area, *second, *third;
static pid_t child;

static struct shmid_ds state_of(int id)
{
	struct shmid_ds state;
	memset(&state, 0, sizeof state);
	shmctl(id, IPC_STAT, &state);
	return state;
}

static char *attach(int id, void *at, int flags)
{
	char *start = shmat(id, at, flags);
	NEED(start != (void *)-1);
	return start;
}

/* One with a key and an owner of its own, attached for writing, for reading, and a page of it protected. */
static void kept_set(void)
{
	key_t key = KEY | (getpid() & 0xffff);
	struct shmid_ds state;
	segment = shmget(key, BYTES - 3000, IPC_CREAT | IPC_EXCL | 0640);
	NEED(segment >= 0);
	area = attach(segment, NULL, 0);
	fill(area + PAGE, 2 * PAGE, 1);
	second = attach(segment, NULL, SHM_RDONLY);
	NEED(!mprotect(area + 4 * PAGE, PAGE, PROT_NONE));
	NEED(!shmctl(segment, IPC_STAT, &state));
	state.shm_perm.uid = 77;
	state.shm_perm.gid = 88;
	state.shm_perm.mode = 0604;
	NEED(!shmctl(segment, IPC_SET, &state));
}

static int kept_check(void)
{
	struct shmid_ds state = state_of(segment);
	CHECK(state.shm_perm.__key == (KEY | (getpid() & 0xffff)));
	CHECK(state.shm_segsz == BYTES - 3000 && state.shm_nattch == 4);
	CHECK(state.shm_perm.uid == 77 && state.shm_perm.gid == 88 && state.shm_perm.cuid == 0);
	CHECK(state.shm_perm.mode == 0604);
	CHECK(same(area + PAGE, 2 * PAGE, 1) && all_zero(area, PAGE) && all_zero(area + 3 * PAGE, PAGE));
	area[5 * PAGE] = 9;
	CHECK(second[5 * PAGE] == 9 && same(second + PAGE, 2 * PAGE, 1));
	area[5 * PAGE] = 0;
	CHECK(mprotect(second, PAGE, RW) && errno == EACCES);
	return 1;
}

static void kept_harm(void)
{
	area[PAGE + 5] ^= 1;
}

static void sleeper(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;)
		pause();
}

/* Marked while attached: gone with the last user. In two processes, one of which has more; with a part detached, and
 * one locked into memory and made by another user. */
static void marked_set(void)
{
	segment = shmget(IPC_PRIVATE, BYTES, IPC_CREAT | 0600);
	NEED(segment >= 0);
	area = attach(segment, NULL, 0);
	fill(area, BYTES, 2);
	NEED(!munmap(area + 2 * PAGE, PAGE) && !munmap(area + 6 * PAGE, 2 * PAGE));
	map_anon(2);
	child = fork();
	NEED(child >= 0);
	if (!child) {
		second = attach(segment, NULL, SHM_RDONLY);
		sleeper();
	}
	NEED(!setegid(5) && !seteuid(6));
	other_segment = shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0600);
	NEED(!seteuid(0) && !setegid(0) && other_segment >= 0);
	third = attach(other_segment, (void *)0x500000000000, 0);
	fill(third, PAGE, 3);
	NEED(!shmctl(other_segment, SHM_LOCK, NULL) && !shmctl(other_segment, IPC_RMID, NULL));
	nap_ms(20);
	NEED(!shmctl(segment, IPC_RMID, NULL));
}

static int marked_check(void)
{
	struct shmid_ds state = state_of(segment);
	CHECK(state.shm_perm.mode == (0600 | SHM_DEST) && state.shm_segsz == BYTES && state.shm_perm.cuid == 0);
	CHECK(state.shm_nattch == 4 || state.shm_nattch == 5);
	CHECK(same(area, 2 * PAGE, 2));
	area[5 * PAGE] ^= 1;
	char *again = attach(segment, NULL, SHM_RDONLY);
	area[5 * PAGE] ^= 1;
	CHECK(same(again, BYTES, 2) && !memcmp(area + 3 * PAGE, again + 3 * PAGE, 3 * PAGE));
	CHECK(!shmdt(again));
	state = state_of(other_segment);
	CHECK(state.shm_perm.mode == (0600 | SHM_DEST | SHM_LOCKED) && state.shm_perm.cuid == 6 && state.shm_perm.cgid == 5);
	CHECK(same(third, PAGE, 3));
	/* Both pieces are of one attachment: detached at once. */
	unsigned long before = state_of(segment).shm_nattch;
	CHECK(!shmdt(area) && state_of(segment).shm_nattch == before - 2);
	CHECK(!kill(child, 0));
	return 1;
}

static void marked_harm(void)
{
	area[9] ^= 1;
}

WORKLOAD(
	{"kept", kept_set, kept_check, kept_harm},
	{"marked", marked_set, marked_check, marked_harm},
)
