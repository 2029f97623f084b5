/* State that hardly anything shows: it has to be found, and the dump to be refused. */
#include <dirent.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "workload.h"

/* ---- a directory that tells of changes ---- */

static volatile sig_atomic_t changes;
static int folder;

static void on_change(int number)
{
	(void)number;
	changes++;
}

static void notify_set(void)
{
	NEED(signal(SIGIO, on_change) != SIG_ERR);
	folder = open(".", O_RDONLY);
	NEED(folder >= 0);
	if (fcntl(folder, F_NOTIFY, (int)(DN_CREATE | DN_MULTISHOT)))
		cannot_run("no directory notifications");
}

static int notify_check(void)
{
	int before = changes;
	int fd = open("made", O_WRONLY | O_CREAT, 0600);
	CHECK(fd >= 0 && !close(fd) && !unlink("made"));
	CHECK(changes > before);
	return 1;
}

static void notify_harm(void)
{
	fcntl(folder, F_NOTIFY, 0);
}

/* ---- a ring that neither a descriptor nor a mapping leads to ---- */

#ifndef IORING_ENTER_REGISTERED_RING
#define IORING_ENTER_REGISTERED_RING 16
#endif
enum { PLACE = 3 };

static void ring_set(void)
{
	struct io_uring_params parameters = {0};
	int fd = (int)syscall(SYS_io_uring_setup, 4, &parameters);
	struct io_uring_rsrc_update place = {.offset = PLACE, .data = (uint64_t)fd};
	if (fd < 0 || syscall(SYS_io_uring_register, fd, 20 /* IORING_REGISTER_RING_FDS */, &place, 1) != 1)
		cannot_run("no io_uring, or none that can be registered");
	close(fd);
}

static int ring_check(void)
{
	CHECK(!syscall(SYS_io_uring_enter, PLACE, 0, 0, IORING_ENTER_REGISTERED_RING, NULL, 0));
	return 1;
}

static void ring_harm(void)
{
	struct io_uring_rsrc_update place = {.offset = PLACE};
	/* 21: IORING_UNREGISTER_RING_FDS; its descriptor may be a registered one (1 << 31). */
	syscall(SYS_io_uring_register, PLACE, 21u | 1u << 31, &place, 1);
}

/* ---- a ring whose thread is a thread of the process ---- */

static int ring;

static void worker_set(void)
{
	struct io_uring_params parameters = {.flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 100000};
	ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);
	if (ring < 0)
		cannot_run("no io_uring");
	/* Its thread gives itself a name when it begins to run. */
	for (int found = 0; !found; nap_ms(1)) {
		DIR *tasks = opendir("/proc/self/task");
		NEED(tasks);
		for (struct dirent *entry; (entry = readdir(tasks));) {
			char path[300], name[32] = "";
			snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
			int fd = open(path, O_RDONLY);
			found |= fd >= 0 && read(fd, name, sizeof name - 1) > 0 && !strncmp(name, "iou-", 4);
			close(fd);
		}
		closedir(tasks);
	}
}

static int worker_check(void)
{
	CHECK(fcntl(ring, F_GETFD) >= 0);
	return 1;
}

static void worker_harm(void)
{
	close(ring);
}

/* ---- memory whose pager is elsewhere: in a queue, for a start ---- */

static int ends[2];
static char *paged;

static void pager_set(void)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = "";
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				 .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	struct uffdio_api api = {.api = UFFD_API};
	int fd = (int)syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY);
	if (fd < 0)
		cannot_run("no userfaultfd");
	paged = mmap(NULL, 4 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register area = {.range = {(uintptr_t)paged, 4 * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	NEED(paged != MAP_FAILED && !ioctl(fd, UFFDIO_API, &api) && !ioctl(fd, UFFDIO_REGISTER, &area));
	*header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends) && sendmsg(ends[0], &message, 0) == 1);
	close(fd);
}

static int pager_check(void)
{
	char line[256], start[32];
	int found = 0, here = 0;
	FILE *maps = fopen("/proc/self/smaps", "r");
	snprintf(start, sizeof start, "%lx-", (unsigned long)paged);
	CHECK(maps);
	while (fgets(line, sizeof line, maps)) {
		here = !strncmp(line, start, strlen(start)) || (here && strncmp(line, "VmFlags:", 8));
		if (!strncmp(line, "VmFlags:", 8) && strstr(line, " um"))
			found = 1;
	}
	fclose(maps);
	CHECK(found);
	return 1;
}

static void pager_harm(void)
{
	close(ends[0]);
	close(ends[1]);
}

/* ---- a filter that asks a listener; the runner has it, if it has taken it ---- */

static int listener;

static void asked_set(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_sethostname, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {4, code};
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (listener < 0)
		cannot_run("no seccomp listeners");
	beat->tokens[0] = (uint64_t)listener;
}

/* Asked for the check, it closes its listener. */
static int asked_check(void)
{
	CHECK(listener < 0 || !close(listener));
	listener = -1;
	CHECK(prctl(PR_GET_SECCOMP) == 2 && !beat->tokens[1]);
	return 1;
}

static void asked_harm(void)
{
	beat->tokens[1] = 1;
}

/* ---- a working directory on a mount that is nowhere; a message queue without a name ---- */

static int place = -1;

static void detached_set(void)
{
	int context = (int)syscall(SYS_fsopen, "tmpfs", 0);
	if (context < 0 || syscall(SYS_fsconfig, context, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0))
		cannot_run("no fsopen");
	int mount = (int)syscall(SYS_fsmount, context, 0, 0);
	NEED(mount >= 0 && !fchdir(mount));
	close(mount);
	close(context);
	place = open("kept", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	NEED(place >= 0 && write(place, "kept", 4) == 4);
	close(place);
}

static int detached_check(void)
{
	char got[8];
	int fd = open("kept", O_RDONLY);
	CHECK(fd >= 0 && read(fd, got, sizeof got) == 4 && !memcmp(got, "kept", 4));
	close(fd);
	return 1;
}

static void detached_harm(void)
{
	unlink("kept");
}

static void queue_set(void)
{
	char name[32];
	snprintf(name, sizeof name, "firn-test-%d", getpid());
	place = (int)syscall(SYS_mq_open, name, O_RDWR | O_CREAT | O_EXCL, 0600, NULL);
	if (place < 0)
		cannot_run("no message queues");
	NEED(!syscall(SYS_mq_unlink, name) && !syscall(SYS_mq_timedsend, place, "kept", 4L, 1, NULL));
}

static int queue_check(void)
{
	char got[16384];
	CHECK(syscall(SYS_mq_timedreceive, place, got, sizeof got, NULL, NULL) == 4 && !memcmp(got, "kept", 4));
	CHECK(!syscall(SYS_mq_timedsend, place, "kept", 4L, 1, NULL));
	return 1;
}

static void queue_harm(void)
{
	close(place);
}

WORKLOAD(
	{"detached", detached_set, detached_check, detached_harm},
	{"queue", queue_set, queue_check, queue_harm},
	{"notify", notify_set, notify_check, notify_harm},
	{"ring", ring_set, ring_check, ring_harm},
	{"worker", worker_set, worker_check, worker_harm},
	{"pager", pager_set, pager_check, pager_harm},
	{"asked", asked_set, asked_check, asked_harm},
)
