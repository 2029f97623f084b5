/* crowd PROCESSES MOUNTS FOLDER: a machine full of other things, in a mount namespace of its own.
 *
 * Makes MOUNTS mounts below FOLDER and PROCESSES sleeping children, says so with one byte, and waits to be killed; the
 * children die with it, and the mounts with the last process of the namespace.
 */
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(const char *what) {
    perror(what);
    return 1;
}

int main(int count, char **words) {
    if (count != 4)
        return 2;
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return fail("mount namespace");
    for (int i = 0; i < atoi(words[2]); i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s/%d", words[3], i);
        if (mkdir(name, 0700) || mount("bench", name, "tmpfs", 0, "size=64k"))
            return fail(name);
    }
    for (int i = 0; i < atoi(words[1]); i++) {
        pid_t pid = fork();
        if (pid < 0)
            return fail("fork");
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    }
    if (write(1, "!", 1) != 1)
        return 1;
    for (;;)
        pause();
}
