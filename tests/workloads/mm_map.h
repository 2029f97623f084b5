/* Changing what the kernel remembers of the address space's layout: PR_SET_MM_MAP of prctl(2). */
#ifndef MM_MAP_H
#define MM_MAP_H

#include "workload.h"

#include <sys/prctl.h>

/* Field `number` (proc(5)) of /proc/self/stat. */
MAYBE uint64_t stat_field(int number)
{
	char text[2048];
	if (slurp("/proc/self/stat", text, sizeof text) <= 0)
		return 0;
	char *at = strrchr(text, ')') + 2;
	for (int i = 3; i < number; i++)
		at = strchr(at, ' ') + 1;
	return strtoull(at, NULL, 10);
}

/* The layout as it is now, ready to be changed and set. */
MAYBE struct prctl_mm_map current_map(void)
{
	return (struct prctl_mm_map){
		.start_code = stat_field(26), .end_code = stat_field(27), .start_stack = stat_field(28),
		.start_data = stat_field(45), .end_data = stat_field(46), .start_brk = stat_field(47),
		.arg_start = stat_field(48), .arg_end = stat_field(49),
		.env_start = stat_field(50), .env_end = stat_field(51),
		.brk = (uint64_t)syscall(SYS_brk, 0), .exe_fd = (uint32_t)-1,
	};
}

MAYBE int set_map(struct prctl_mm_map *map)
{
	return prctl(PR_SET_MM, PR_SET_MM_MAP, map, sizeof *map, 0);
}

#endif
