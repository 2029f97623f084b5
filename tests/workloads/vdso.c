/* What the kernel gives a program at its start: the vdso, the auxiliary vector, arguments and environment. */
#include "mm_map.h"

#include <elf.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/time.h>

static unsigned long vdso_start, random_start;
static unsigned char random_bytes[16];

/* Functions of the vdso, as the C library found them at the start, and its place. */
static void vdso_set(void)
{
	vdso_start = getauxval(AT_SYSINFO_EHDR);
	NEED(vdso_start);
}

static int vdso_check(void)
{
	struct timespec direct, through;
	struct timeval wall;
	char maps[16384], line[64];
	unsigned cpu = 99999;
	CHECK(getauxval(AT_SYSINFO_EHDR) == vdso_start);
	CHECK(!memcmp((void *)vdso_start, ELFMAG, SELFMAG));
	CHECK(slurp("/proc/self/maps", maps, sizeof maps) > 0);
	snprintf(line, sizeof line, "\n%lx-", vdso_start);
	char *found = strstr(maps, line);
	CHECK(found && !strncmp(found + strcspn(found + 1, "\n") + 1 - 6, "[vdso]", 6));
	static const clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_COARSE};
	for (int i = 0; i < 4; i++) {
		CHECK(!syscall(SYS_clock_gettime, clocks[i], &direct));
		CHECK(!clock_gettime(clocks[i], &through));
		long apart = (through.tv_sec - direct.tv_sec) * 1000 + (through.tv_nsec - direct.tv_nsec) / 1000000;
		CHECK(apart > -100 && apart < 1000);
	}
	CHECK(!gettimeofday(&wall, NULL) && labs(wall.tv_sec - time(NULL)) <= 1);
	CHECK(!syscall(SYS_getcpu, &cpu, NULL, NULL) && cpu < 99999 && sched_getcpu() >= 0);
	/* The kernel's copy of the vector says the same. */
	unsigned long pairs[128] = {0};
	int fd = open("/proc/self/auxv", O_RDONLY | O_CLOEXEC), known = 0;
	CHECK(fd >= 0 && read(fd, pairs, sizeof pairs) > 0 && !close(fd));
	for (int i = 0; i < 128 && pairs[i]; i += 2)
		known += pairs[i] == AT_SYSINFO_EHDR && pairs[i + 1] == vdso_start;
	CHECK(known == 1);
	return 1;
}

/* Tells the kernel another vector, in which the vdso is elsewhere. */
static void vdso_harm(void)
{
	static unsigned long vector[] = {AT_PAGESZ, 4096, AT_SYSINFO_EHDR, 0x10000, AT_NULL, 0};
	struct prctl_mm_map map = current_map();
	map.auxv = (void *)vector;
	map.auxv_size = sizeof vector;
	set_map(&map);
}

/* The vector itself, what it points to, and the strings above the stack. */
static char command_line[4096], variables[4096];
static ssize_t command_length, variables_length;
static unsigned long values[64];

static void auxv_set(void)
{
	random_start = getauxval(AT_RANDOM);
	memcpy(random_bytes, (void *)random_start, 16);
	for (int i = 0; i < 64; i++)
		values[i] = getauxval(i);
	command_length = slurp("/proc/self/cmdline", command_line, sizeof command_line);
	variables_length = slurp("/proc/self/environ", variables, sizeof variables);
	NEED(command_length > 0 && variables_length > 0 && getenv("PATH"));
}

static int auxv_check(void)
{
	char now[4096];
	CHECK(!memcmp((void *)random_start, random_bytes, 16));
	for (int i = 0; i < 64; i++)
		CHECK(getauxval(i) == values[i]);
	CHECK(slurp("/proc/self/cmdline", now, sizeof now) == command_length);
	CHECK(!memcmp(now, command_line, command_length));
	CHECK(slurp("/proc/self/environ", now, sizeof now) == variables_length);
	CHECK(!memcmp(now, variables, variables_length));
	CHECK(!strcmp(arguments[2], mode_name));
	CHECK(getenv("PATH") && stat_field(28) > (uint64_t)(uintptr_t)&now);
	return 1;
}

static void auxv_harm(void)
{
	arguments[0][0]++;
}

/* A program that writes over its arguments to change its title. */
static void overwritten_set(void)
{
	auxv_set();
	snprintf(arguments[0], command_length, "overwritten: title");
	command_length = slurp("/proc/self/cmdline", command_line, sizeof command_line);
	NEED(!strncmp(command_line, "overwritten:", 12));
}

static int overwritten_check(void)
{
	char now[4096];
	CHECK(slurp("/proc/self/cmdline", now, sizeof now) == command_length);
	CHECK(!memcmp(now, command_line, command_length));
	return 1;
}

/* A program that moves its arguments elsewhere (PR_SET_MM_MAP), as daemons with long titles do. */
static char *place;

static void title_set(void)
{
	place = map_anon(2);
	snprintf(place, PAGE, "a title that is longer than the arguments were and lies in anonymous memory");
	struct prctl_mm_map map = current_map();
	map.arg_start = (uintptr_t)place;
	map.arg_end = (uintptr_t)place + strlen(place) + 1;
	map.env_start = (uintptr_t)place + PAGE;
	map.env_end = (uintptr_t)place + PAGE + 6;
	memcpy(place + PAGE, "A=b\0C", 6);
	if (set_map(&map))
		cannot_run("PR_SET_MM_MAP");
}

static int title_check(void)
{
	char now[4096];
	CHECK(slurp("/proc/self/cmdline", now, sizeof now) == (ssize_t)strlen(place) + 1 && !strcmp(now, place));
	CHECK(slurp("/proc/self/environ", now, sizeof now) == 6 && !memcmp(now, "A=b\0C", 6));
	CHECK(stat_field(48) == (uintptr_t)place && stat_field(50) == (uintptr_t)place + PAGE);
	CHECK(strlen(place) > 60);
	return 1;
}

static void title_harm(void)
{
	struct prctl_mm_map map = current_map();
	map.arg_end -= 3;
	set_map(&map);
}

WORKLOAD(
	{"vdso", vdso_set, vdso_check, vdso_harm},
	{"auxv", auxv_set, auxv_check, auxv_harm},
	{"overwritten", overwritten_set, overwritten_check, auxv_harm},
	{"title", title_set, title_check, title_harm},
)
