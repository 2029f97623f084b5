/* Open files whose name is gone ("ghosts"), and files that are left under another name only. */
#include "workload.h"

#include <dirent.h>
#include <sys/xattr.h>

enum { BYTES = 65536, BLOCK = 512 };

static int fds[4];
static char expected[BYTES];

/* An unlinked file: contents, position, mode, owner and times. */
static void ghost_set(void)
{
	struct timespec times[2] = {{1000000000, 5}, {1100000000, 6}};
	fds[0] = make_file("ghost", BYTES, 1);
	fill(expected, BYTES, 1);
	NEED(!fchmod(fds[0], 0751) && !fchown(fds[0], 1234, 4321) && lseek(fds[0], 4000, SEEK_SET) == 4000);
	NEED(!unlink("ghost") && !futimens(fds[0], times));
}

static int ghost_check(void)
{
	struct stat now;
	char got[BYTES];
	CHECK(!fstat(fds[0], &now) && now.st_nlink == 0 && now.st_size == BYTES);
	CHECK((now.st_mode & 07777) == 0751 && now.st_uid == 1234 && now.st_gid == 4321);
	CHECK(now.st_mtim.tv_sec == 1100000000 && now.st_mtim.tv_nsec == 6);
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 4000);
	CHECK(pread(fds[0], got, BYTES, 0) == BYTES && !memcmp(got, expected, BYTES));
	CHECK(access("ghost", F_OK) && errno == ENOENT);
	return 1;
}

static void ghost_harm(void)
{
	NEED(!fchmod(fds[0], 0750));
}

/* A ghost with holes: little of it takes space, and that must stay so. */
static const off_t spots[] = {0, 8 << 20, 100 << 20};
enum { SPOTS = sizeof spots / sizeof *spots };

static void sparse_set(void)
{
	fds[0] = open("sparse", O_RDWR | O_CREAT | O_TRUNC, 0600);
	NEED(fds[0] >= 0 && !ftruncate(fds[0], 200 << 20));
	fill(expected, BYTES, 2);
	for (int i = 0; i < SPOTS; i++)
		NEED(pwrite(fds[0], expected, BYTES, spots[i]) == BYTES);
	NEED(!unlink("sparse"));
}

static int sparse_check(void)
{
	struct stat now;
	char got[BYTES];
	CHECK(!fstat(fds[0], &now) && now.st_size == 200 << 20);
	CHECK(now.st_blocks * BLOCK >= SPOTS * BYTES && now.st_blocks * BLOCK <= 4 * SPOTS * BYTES);
	for (int i = 0; i < SPOTS; i++)
		CHECK(pread(fds[0], got, BYTES, spots[i]) == BYTES && !memcmp(got, expected, BYTES));
	CHECK(pread(fds[0], got, BYTES, 50 << 20) == BYTES && all_zero(got, BYTES));
	CHECK(lseek(fds[0], 4 << 20, SEEK_DATA) == 8 << 20 && lseek(fds[0], 0, SEEK_SET) == 0);
	return 1;
}

static void sparse_harm(void)
{
	NEED(!posix_fallocate(fds[0], 20 << 20, 10 << 20));
}

/* A ghost of 3 MB: more than is taken along without being told. */
enum { LARGE = 3 << 20 };

static void large_set(void)
{
	fds[0] = make_file("large", LARGE, 3);
	NEED(!unlink("large"));
}

static int large_check(void)
{
	static char got[LARGE];
	CHECK(pread(fds[0], got, LARGE, 0) == LARGE && same(got, LARGE, 3));
	return 1;
}

static void large_harm(void)
{
	NEED(pwrite(fds[0], "x", 1, LARGE / 2) == 1);
}

/* One ghost, opened twice, and once more as a copy of a descriptor: one file, two positions. */
static void two_set(void)
{
	fds[0] = make_file("two", BYTES, 4);
	fds[1] = open("two", O_RDONLY);
	NEED(fds[1] >= 0 && !unlink("two"));
	fds[2] = dup(fds[0]);
	NEED(lseek(fds[0], 100, SEEK_SET) == 100 && lseek(fds[1], 200, SEEK_SET) == 200);
}

static int two_check(void)
{
	struct stat one, other;
	char got[8];
	CHECK(!fstat(fds[0], &one) && !fstat(fds[1], &other) && one.st_ino == other.st_ino && one.st_dev == other.st_dev);
	CHECK(lseek(fds[2], 0, SEEK_CUR) == 100 && lseek(fds[1], 0, SEEK_CUR) == 200);
	CHECK(pread(fds[0], got, 8, 5000) == 8);
	got[0]++;
	CHECK(pwrite(fds[0], got, 8, 5000) == 8);
	char seen[8];
	CHECK(pread(fds[1], seen, 8, 5000) == 8 && !memcmp(seen, got, 8));
	return 1;
}

static void two_harm(void)
{
	NEED(dup2(make_file("again", BYTES, 4), fds[1]) >= 0 && lseek(fds[1], 200, SEEK_SET) == 200);
}

/* The name that was opened is gone, but the file has another one: it must stay the same file. */
static void relinked_set(void)
{
	fds[0] = make_file("first", BYTES, 5);
	NEED(!link("first", "second") && !unlink("first") && lseek(fds[0], 808, SEEK_SET) == 808);
	fill(expected, BYTES, 5);
}

static int relinked_check(void)
{
	struct stat open_one, named;
	char got[8];
	CHECK(!fstat(fds[0], &open_one) && !stat("second", &named));
	CHECK(open_one.st_ino == named.st_ino && open_one.st_nlink == 1);
	CHECK(pread(fds[0], got, 8, 808) == 8 && !memcmp(got, expected + 808, 8));
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 808);
	/* No helper name may be left beside it. */
	DIR *folder = opendir(".");
	int names = 0;
	CHECK(folder);
	for (struct dirent *entry; (entry = readdir(folder));)
		names += strstr(entry->d_name, "link") != NULL;
	CHECK(!closedir(folder) && !names);
	return 1;
}

static void relinked_harm(void)
{
	NEED(!unlink("second"));
	close(make_file("second", BYTES, 5));
}

/* A folder that is gone. */
static void folder_set(void)
{
	NEED(!mkdir("folder", 0751));
	fds[0] = open("folder", O_RDONLY | O_DIRECTORY);
	NEED(fds[0] >= 0 && !rmdir("folder"));
}

static int folder_check(void)
{
	struct stat now;
	CHECK(!fstat(fds[0], &now) && S_ISDIR(now.st_mode) && now.st_nlink == 0 && (now.st_mode & 07777) == 0751);
	CHECK(openat(fds[0], "x", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT);
	CHECK(access("folder", F_OK) && errno == ENOENT);
	return 1;
}

static void folder_harm(void)
{
	NEED(dup2(open(".", O_RDONLY | O_DIRECTORY), fds[0]) >= 0);
}

/* Never had a name, but can be given one; and a second description of it. */
static void nameless_set(void)
{
	char path[64];
	fds[0] = open(".", O_TMPFILE | O_WRONLY, 0640);
	NEED(fds[0] >= 0);
	fill(expected, BYTES, 5);
	NEED(write(fds[0], expected, BYTES) == BYTES && lseek(fds[0], 77, SEEK_SET) == 77);
	/* A file system without such attributes: then there is nothing to keep. */
	fsetxattr(fds[0], "user.firn", "value", 5, 0);
	fsetxattr(fds[0], "trusted.firn", "", 0, 0);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fds[0]);
	fds[1] = open(path, O_RDONLY);
	NEED(fds[1] >= 0);
	NEED((fds[2] = (int)fgetxattr(fds[0], "user.firn", NULL, 0)) != 0);
}

static int nameless_check(void)
{
	struct stat now, other;
	char got[BYTES];
	CHECK(!fstat(fds[0], &now) && now.st_nlink == 0 && (now.st_mode & 07777) == 0640);
	CHECK(!fstat(fds[1], &other) && now.st_ino == other.st_ino && lseek(fds[0], 0, SEEK_CUR) == 77);
	CHECK(pread(fds[1], got, BYTES, 0) == BYTES && !memcmp(got, expected, BYTES));
	CHECK((fcntl(fds[0], F_GETFL) & O_TMPFILE) == O_TMPFILE);
	CHECK((int)fgetxattr(fds[0], "user.firn", got, BYTES) == fds[2]);
	CHECK(fds[2] < 0 || (!memcmp(got, "value", 5) && fgetxattr(fds[0], "trusted.firn", NULL, 0) == 0));
	snprintf(got, sizeof got, "/proc/self/fd/%d", fds[0]);
	CHECK(!linkat(AT_FDCWD, got, AT_FDCWD, "named", AT_SYMLINK_FOLLOW) && !unlink("named"));
	return 1;
}

static void nameless_harm(void)
{
	dup2(fds[1], fds[0]);
}

/* A file whose folder is gone, and another file has that name now. */
static void misplaced_set(void)
{
	NEED(!mkdir("folder", 0751));
	fds[0] = make_file("folder/file", BYTES, 6);
	NEED(!unlink("folder/file") && !rmdir("folder"));
	close(make_file("folder", BYTES, 7));
}

static int misplaced_check(void)
{
	char got[BYTES];
	struct stat now;
	CHECK(pread(fds[0], got, BYTES, 0) == BYTES && same(got, BYTES, 6));
	CHECK(!fstat(fds[0], &now) && now.st_nlink == 0);
	CHECK(slurp("folder", got, BYTES) == BYTES - 1 && !access("folder", F_OK));
	return 1;
}

static void misplaced_harm(void)
{
	NEED(pwrite(fds[0], "x", 1, 0) == 1);
}

WORKLOAD(
	{"misplaced", misplaced_set, misplaced_check, misplaced_harm},
	{"ghost", ghost_set, ghost_check, ghost_harm},
	{"sparse", sparse_set, sparse_check, sparse_harm},
	{"large", large_set, large_check, large_harm},
	{"two", two_set, two_check, two_harm},
	{"relinked", relinked_set, relinked_check, relinked_harm},
	{"nameless", nameless_set, nameless_check, nameless_harm},
	{"folder", folder_set, folder_check, folder_harm},
)
