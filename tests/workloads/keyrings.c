/* A session keyring of its own, with a name or without; a child has it too. */
#include <linux/keyctl.h>
#include <sys/wait.h>

#include "workload.h"

enum { RIGHTS = 0x3f1b0000 };

static long secret, empty;
static char ring_name[64];
static pid_t child;

static long keyctl(int how, long a, long b, long c, long d)
{
	return syscall(SYS_keyctl, how, a, b, c, d);
}

static long find(const char *name)
{
	return keyctl(KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, (long)"user", (long)name, 0);
}

static int has(const char *name, const char *content)
{
	char got[64] = "";
	long key = find(name);
	return key > 0 && keyctl(KEYCTL_READ, key, (long)got, sizeof got, 0) == (long)strlen(content) &&
	       !strcmp(got, content);
}

static int describes(long key, const char *wanted)
{
	char text[256] = "";
	return keyctl(KEYCTL_DESCRIBE, key, (long)text, sizeof text, 0) > 0 && strstr(text, wanted) != NULL;
}

static void session_set(void)
{
	int named = strcmp(mode_name, "anonymous");
	snprintf(ring_name, sizeof ring_name, "firn-test-%d", getpid());
	if (keyctl(KEYCTL_JOIN_SESSION_KEYRING, named ? (long)ring_name : 0, 0, 0, 0) <= 0)
		cannot_run("no keyrings");
	secret = syscall(SYS_add_key, "user", "firn-test:secret", "very secret", 11L, KEY_SPEC_SESSION_KEYRING);
	empty = syscall(SYS_add_key, "user", "firn-test:more", "x", 1L, KEY_SPEC_SESSION_KEYRING);
	NEED(secret > 0 && empty > 0);
	NEED(!keyctl(KEYCTL_SETPERM, secret, RIGHTS, 0, 0));
	NEED(!keyctl(KEYCTL_CHOWN, empty, 1234, 1235, 0));
	NEED(!keyctl(KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_SESSION_KEYRING, 0, 0));
	if (!named) {
		child = fork();
		NEED(child >= 0);
		while (!child) {
			int answer = beat->tokens[0] && has("firn-test:secret", "very secret");
			if (beat->tokens[0])
				beat->tokens[1] = answer ? 1 : 2;
			nap_ms(1);
		}
	}
}

static int session_check(void)
{
	CHECK(has("firn-test:secret", "very secret") && has("firn-test:more", "x"));
	CHECK(describes(find("firn-test:secret"), ";3f1b0000;"));
	CHECK(describes(find("firn-test:more"), "user;1234;1235;"));
	CHECK(describes(KEY_SPEC_SESSION_KEYRING, child ? ";_ses" : ring_name));
	CHECK(keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0, 0, 0) !=
	      keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_SESSION_KEYRING, 0, 0, 0));
	if (child) {
		beat->tokens[1] = 0;
		beat->tokens[0] = 1;
		for (int ms = 0; ms < 2000 && !beat->tokens[1]; ms++)
			nap_ms(1);
		beat->tokens[0] = 0;
		CHECK(beat->tokens[1] == 1);
	}
	return 1;
}

static void session_harm(void)
{
	keyctl(KEYCTL_UNLINK, find("firn-test:secret"), KEY_SPEC_SESSION_KEYRING, 0, 0);
}

/* What cannot be read, or not by all: refused. */
static void apart_set(void)
{
	session_set();
	child = fork();
	NEED(child >= 0);
	if (!child) {
		keyctl(KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0);
		beat->tokens[2] = 1;
		for (;;)
			pause();
	}
	for (int ms = 0; ms < 2000 && !beat->tokens[2]; ms++)
		nap_ms(1);
	NEED(beat->tokens[2]);
	child = 0;
}

static void sealed_set(void)
{
	session_set();
	NEED(syscall(SYS_add_key, "logon", "firn-test:sealed", "x", 1L, KEY_SPEC_SESSION_KEYRING) > 0);
}

WORKLOAD(
	{"named", session_set, session_check, session_harm},
	{"anonymous", session_set, session_check, session_harm},
	{"apart", apart_set, session_check, session_harm},
	{"sealed", sealed_set, session_check, session_harm},
)
