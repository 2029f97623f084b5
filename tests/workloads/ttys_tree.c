/* A pseudoterminal between processes: a child leads a session on the slave, like a shell below a terminal emulator. */
#include "workload.h"
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <termios.h>

static int master, number;
static pid_t child;

static int puts_all(int fd, const char *text)
{
	return write(fd, text, strlen(text)) == (ssize_t)strlen(text);
}

/* Answers each line with the ids of session, terminal and foreground group, and how often it was interrupted. */
static volatile sig_atomic_t interrupts;

static void interrupted(int signal)
{
	(void)signal;
	interrupts++;
}

static void serve(void)
{
	char line[64], answer[128];
	for (;;) {
		ssize_t got = read(0, line, sizeof line);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			_exit(0);
		pid_t group = tcgetpgrp(0);
		int tty = open("/dev/tty", O_RDWR | O_NOCTTY);
		snprintf(answer, sizeof answer, "%d %d %d %d\n", tcgetsid(0) == getsid(0), group == getpgrp(), tty >= 0, (int)interrupts);
		close(tty);
		if (!puts_all(1, answer))
			_exit(1);
	}
}

static void become_session(int slave)
{
	struct sigaction action = {.sa_handler = interrupted};
	if (setsid() < 0 || ioctl(slave, TIOCSCTTY, 0))
		_exit(1);
	for (int fd = 0; fd < 3; fd++)
		dup2(slave, fd);
	close(slave);
	close(master);
	sigaction(SIGINT, &action, NULL);
	if (!strcmp(mode_name, "job")) {
		/* The leader keeps no descriptor of the terminal; a job of its own group, in the foreground, has it. */
		pid_t job = fork();
		if (!job) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			while (tcgetpgrp(0) != getpid())
				nap_ms(1);
			serve();
		}
		setpgid(job, job);
		signal(SIGTTOU, SIG_IGN);
		tcsetpgrp(0, job);
		close(0);
		close(1);
		close(2);
		for (;;)
			pause();
	}
	serve();
}

static int asks(const char *expected)
{
	char text[128] = "";
	size_t got = 0;
	struct pollfd ready = {.fd = master, .events = POLLIN};
	CHECK(puts_all(master, "?\n"));
	while (got < strlen(expected) && poll(&ready, 1, 2000) == 1) {
		ssize_t more = read(master, text + got, sizeof text - 1 - got);
		CHECK(more > 0);
		got += (size_t)more;
	}
	CHECK(!strcmp(text, expected));
	return 1;
}

static void forkpty_set(void)
{
	struct termios settings;
	char path[32];
	int unlocked = 0, slave;
	master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (master < 0)
		cannot_run("no terminals here");
	NEED(!ioctl(master, TIOCSPTLCK, &unlocked) && !ioctl(master, TIOCGPTN, &number));
	snprintf(path, sizeof path, "/dev/pts/%d", number);
	slave = open(path, O_RDWR | O_NOCTTY);
	NEED(slave >= 0 && !tcgetattr(slave, &settings));
	settings.c_lflag &= ~(tcflag_t)ECHO;
	settings.c_oflag = 0;
	NEED(!tcsetattr(slave, TCSANOW, &settings));
	child = fork();
	NEED(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		become_session(slave);
	}
	close(slave);
	NEED(asks("1 1 1 0\n") == 1);
}

static int times;

static int forkpty_check(void)
{
	char expected[32];
	int now = -1;
	snprintf(expected, sizeof expected, "1 1 1 %d\n", times);
	CHECK(!ioctl(master, TIOCGPTN, &now) && now == number);
	CHECK_ALL(asks(expected));
	CHECK(puts_all(master, "\x03"));
	nap_ms(20);
	snprintf(expected, sizeof expected, "1 1 1 %d\n", ++times);
	CHECK_ALL(asks(expected));
	return 1;
}

static void forkpty_harm(void)
{
	puts_all(master, "\x03");
	nap_ms(20);
}

WORKLOAD(
	{"forkpty", forkpty_set, forkpty_check, forkpty_harm},
	{"job", forkpty_set, forkpty_check, forkpty_harm},
)
