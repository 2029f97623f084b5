/* Watches on files: inotify and fanotify. */
#include "workload.h"

#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>

static int watcher, number[64];

static void touch(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	NEED(fd >= 0 && write(fd, "x", 1) == 1 && !close(fd));
}

/* Whether the next event is this one. */
static int comes(int watch, uint32_t mask, const char *name)
{
	char buffer[4096] __attribute__((aligned(8)));
	struct inotify_event *event = (void *)buffer;
	ssize_t got = read(watcher, buffer, sizeof *event + (*name ? 16 : 0));
	return got >= (ssize_t)sizeof *event && got == (ssize_t)(sizeof *event + event->len) && event->wd == watch &&
	       event->mask == mask && !strcmp(event->len ? event->name : "", name);
}

static int nothing(void)
{
	char buffer[4096];
	return read(watcher, buffer, sizeof buffer) < 0 && errno == EAGAIN;
}

static int watch(const char *path, uint32_t mask)
{
	int got = inotify_add_watch(watcher, path, mask);
	NEED(got > 0);
	return got;
}

static void start(void)
{
	NEED((watcher = inotify_init1(IN_NONBLOCK | IN_CLOEXEC)) >= 0);
}

static void forget_harm(void)
{
	inotify_rm_watch(watcher, number[0]);
	nothing();
}

/* ---- inotify ---- */

static void folder_set(void)
{
	start();
	NEED(!mkdir("folder", 0700) || errno == EEXIST);
	touch("folder/old");
	number[0] = watch("folder", IN_CREATE | IN_DELETE | IN_ONLYDIR);
}

static int folder_check(void)
{
	CHECK(nothing() && fcntl(watcher, F_GETFD) == FD_CLOEXEC);
	touch("folder/new");
	CHECK(comes(number[0], IN_CREATE, "new"));
	CHECK(!unlink("folder/new") && comes(number[0], IN_DELETE, "new") && nothing());
	return 1;
}

static void file_set(void)
{
	start();
	touch("watched");
	number[0] = watch("watched", IN_MODIFY);
}

static int file_check(void)
{
	CHECK(nothing());
	touch("watched");
	CHECK(comes(number[0], IN_MODIFY, "") && nothing());
	return 1;
}

/* Numbers with holes; a new watch must not get one that is in use. */
static void numbers_set(void)
{
	char path[32];
	start();
	for (int i = 0; i < 64; i++) {
		snprintf(path, sizeof path, "file-%d", i);
		touch(path);
		number[i] = watch(path, IN_ATTRIB);
	}
	for (int i = 0; i < 64; i++)
		if (i % 5 != 3) {
			NEED(!inotify_rm_watch(watcher, number[i]));
			NEED(comes(number[i], IN_IGNORED, ""));
		}
	number[0] = number[3];
}

static int numbers_check(void)
{
	char path[32];
	for (int i = 3; i < 64; i += 5) {
		snprintf(path, sizeof path, "file-%d", i);
		CHECK(!chmod(path, 0600) && comes(number[i], IN_ATTRIB, ""));
	}
	int fresh = watch("file-1", IN_ATTRIB);
	for (int i = 3; i < 64; i += 5)
		CHECK(fresh != number[i]);
	CHECK(!inotify_rm_watch(watcher, fresh) && comes(fresh, IN_IGNORED, "") && nothing());
	return 1;
}

/* IN_ONESHOT, IN_EXCL_UNLINK. */
static int kept_open;

static void special_set(void)
{
	start();
	NEED(!mkdir("busy", 0700) || errno == EEXIST);
	kept_open = open("busy/gone", O_RDWR | O_CREAT, 0600);
	NEED(kept_open >= 0 && !unlink("busy/gone"));
	number[0] = watch("busy", IN_MODIFY | IN_EXCL_UNLINK);
	touch("once");
	number[1] = watch("once", IN_ATTRIB | IN_ONESHOT);
}

static int special_check(void)
{
	CHECK(write(kept_open, "x", 1) == 1 && nothing());
	CHECK(!chmod("once", 0640) && comes(number[1], IN_ATTRIB, "") && comes(number[1], IN_IGNORED, ""));
	CHECK(!chmod("once", 0600) && nothing());
	number[1] = watch("once", IN_ATTRIB | IN_ONESHOT);
	return 1;
}

static void special_harm(void)
{
	watch("once", IN_ATTRIB);
}

/* A file that has no name any more. */
static void unlinked_set(void)
{
	start();
	kept_open = open("unlinked", O_RDWR | O_CREAT, 0600);
	NEED(kept_open >= 0);
	number[0] = watch("unlinked", IN_MODIFY);
	NEED(!unlink("unlinked"));
}

static int unlinked_check(void)
{
	CHECK(write(kept_open, "x", 1) == 1 && comes(number[0], IN_MODIFY, "") && nothing());
	return 1;
}

/* A symbolic link itself, not what it leads to. */
static void link_set(void)
{
	start();
	touch("aim");
	NEED(!symlink("aim", "link") || errno == EEXIST);
	number[0] = watch("link", IN_ATTRIB | IN_DONT_FOLLOW);
}

static int link_check(void)
{
	CHECK(!chmod("aim", 0640) && nothing());
	CHECK(!lchown("link", getuid(), getgid()) && comes(number[0], IN_ATTRIB, "") && nothing());
	return 1;
}

/* File systems whose handles lead nowhere. */
static void odd_set(void)
{
	start();
	number[0] = watch("/proc/self", IN_ATTRIB);
	number[1] = watch("/dev", IN_DELETE_SELF);
	number[2] = watch("/sys", IN_DELETE_SELF);
}

static int odd_check(void)
{
	char path[64], text[2048];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", watcher);
	CHECK(slurp(path, text, sizeof text) > 0);
	for (int i = 0; i < 3; i++) {
		char key[32];
		snprintf(key, sizeof key, "inotify wd:%x ", number[i]);
		CHECK(strstr(text, key));
	}
	CHECK(watch("/proc/self", IN_ATTRIB) == number[0] && watch("/dev", IN_DELETE_SELF) == number[1]);
	return 1;
}

/* Events that wait to be read. */
static void unread_set(void)
{
	folder_set();
	touch("folder/unread");
	NEED(!unlink("folder/unread"));
}

/* After a restore one event stands for all that were lost. */
static int unread_check(void)
{
	static int told;
	int waiting = 0;
	CHECK(!ioctl(watcher, FIONREAD, &waiting));
	if (!beat->phase) {
		CHECK(waiting == 2 * (sizeof(struct inotify_event) + 16));
		return 1;
	}
	if (!told) {
		CHECK(waiting == sizeof(struct inotify_event) && comes(-1, IN_Q_OVERFLOW, ""));
		told = 1;
	}
	return folder_check();
}

static void unread_harm(void)
{
	char buffer[4096];
	NEED(read(watcher, buffer, sizeof buffer) > 0);
}

/* ---- fanotify ---- */

static void group(unsigned flags)
{
	watcher = fanotify_init(flags | FAN_NONBLOCK | FAN_CLOEXEC, O_RDONLY | O_LARGEFILE);
	if (watcher < 0)
		cannot_run("fanotify_init");
}

/* The next event that this process has made; others are at work as well. */
static ssize_t next_own(char *buffer)
{
	struct fanotify_event_metadata *event = (void *)buffer;
	ssize_t got;
	while ((got = read(watcher, buffer, sizeof *event)) > 0 && event->pid != getpid())
		if (event->fd >= 0)
			close(event->fd);
	return got;
}

/* Between the beats: an unread event, whoever made it, would be an obstacle. */
static void drain(void)
{
	char buffer[sizeof(struct fanotify_event_metadata)];
	while (next_own(buffer) > 0)
		;
	short_nap();
}

/* Whether the next event has this mask and is about `path`. */
static int told(uint64_t mask, const char *path)
{
	char buffer[4096] __attribute__((aligned(8)));
	struct fanotify_event_metadata *event = (void *)buffer;
	struct stat one, other;
	ssize_t got = next_own(buffer);
	if (got != (ssize_t)event->event_len || event->mask != mask)
		return 0;
	int same = !fstat(event->fd, &one) && !stat(path, &other) && one.st_ino == other.st_ino;
	close(event->fd);
	return same;
}

static void lost_set(void)
{
	group(strcmp(mode_name, "lost") ? FAN_CLASS_NOTIF | FAN_REPORT_FID : FAN_CLASS_NOTIF);
	touch("marked");
	NEED(!fanotify_mark(watcher, FAN_MARK_ADD, FAN_CLOSE_WRITE, AT_FDCWD, "marked"));
	touch("marked");
}

/* After a restore one event stands for all that were lost. */
static int lost_check(void)
{
	static int is_told;
	char buffer[4096] __attribute__((aligned(8)));
	struct fanotify_event_metadata *event = (void *)buffer;
	int waiting = 0;
	CHECK(!ioctl(watcher, FIONREAD, &waiting));
	if (!beat->phase) {
		CHECK(waiting == FAN_EVENT_METADATA_LEN);
		return 1;
	}
	if (!is_told) {
		CHECK(waiting == FAN_EVENT_METADATA_LEN && read(watcher, buffer, sizeof buffer) > 0);
		CHECK(event->mask == FAN_Q_OVERFLOW && event->fd == FAN_NOFD);
		is_told = 1;
	}
	CHECK(read(watcher, buffer, sizeof buffer) < 0 && errno == EAGAIN);
	touch("marked");
	CHECK(read(watcher, buffer, sizeof buffer) > 0 && event->mask == FAN_CLOSE_WRITE);
	CHECK(event->fd < 0 || !close(event->fd));
	return 1;
}

static void marks_set(void)
{
	group(FAN_CLASS_NOTIF | FAN_UNLIMITED_QUEUE);
	NEED(!mkdir("folder", 0700) || errno == EEXIST);
	touch("folder/inside");
	touch("folder/ignored");
	NEED(!fanotify_mark(watcher, FAN_MARK_ADD, FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD, AT_FDCWD, "folder"));
	NEED(!fanotify_mark(watcher, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY,
			    FAN_CLOSE_WRITE, AT_FDCWD, "folder/ignored"));
}

static int marks_check(void)
{
	CHECK(nothing());
	touch("folder/inside");
	CHECK(told(FAN_CLOSE_WRITE, "folder/inside"));
	touch("folder/ignored");
	CHECK(nothing());
	return 1;
}

static void marks_harm(void)
{
	fanotify_mark(watcher, FAN_MARK_FLUSH, 0, AT_FDCWD, NULL);
}

static void mount_set(void)
{
	group(FAN_CLASS_CONTENT);
	idle = drain;
	if (fanotify_mark(watcher, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_MODIFY, AT_FDCWD, "/dev/shm"))
		cannot_run("/dev/shm cannot be marked");
}

static int mount_check(void)
{
	char path[64];
	snprintf(path, sizeof path, "/dev/shm/firn-watches-%d", getpid());
	touch(path);
	int right = told(FAN_MODIFY, path);
	CHECK(!unlink(path) && right);
	return 1;
}

static void mount_harm(void)
{
	fanotify_mark(watcher, FAN_MARK_FLUSH | FAN_MARK_MOUNT, 0, AT_FDCWD, NULL);
}

static void whole_set(void)
{
	group(FAN_CLASS_NOTIF);
	if (fanotify_mark(watcher, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_MODIFY, AT_FDCWD, "/dev/shm"))
		cannot_run("/dev/shm cannot be marked");
}

static void deciding_set(void)
{
	group(FAN_CLASS_CONTENT);
	touch("guarded");
	if (fanotify_mark(watcher, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, "guarded"))
		cannot_run("no permission events");
}

static int open_check(void)
{
	CHECK(fcntl(watcher, F_GETFD) == FD_CLOEXEC);
	return 1;
}

static void open_harm(void)
{
	close(watcher);
}

WORKLOAD(
	{"folder", folder_set, folder_check, forget_harm},
	{"file", file_set, file_check, forget_harm},
	{"numbers", numbers_set, numbers_check, forget_harm},
	{"special", special_set, special_check, special_harm},
	{"unlinked", unlinked_set, unlinked_check, forget_harm},
	{"link", link_set, link_check, forget_harm},
	{"odd", odd_set, odd_check, forget_harm},
	{"unread", unread_set, unread_check, unread_harm},
	{"lost", lost_set, lost_check, unread_harm},
	{"lost-fid", lost_set, lost_check, unread_harm},
	{"marks", marks_set, marks_check, marks_harm},
	{"mount", mount_set, mount_check, mount_harm},
	{"whole", whole_set, open_check, open_harm},
	{"deciding", deciding_set, open_check, open_harm},
)
