/* stopwatch OUTPUT COMMAND...: runs COMMAND, prints its wall time (ns), peak memory (kilobytes) and wait status.
 *
 * COMMAND's output goes to the file OUTPUT. It is started from here and not from the runner because a process inherits the
 * peak memory of the one that spawns it (getrusage(2)), and because the runner's own pauses must not be measured.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

int main(int count, char **words) {
    if (count < 3)
        return 2;
    uint64_t start = now();
    pid_t pid = fork();
    if (pid == 0) {
        int output = open(words[1], O_WRONLY | O_CREAT | O_TRUNC, 0600), nothing = open("/dev/null", O_RDONLY);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (output < 0 || nothing < 0 || dup2(nothing, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
            _exit(126);
        close(output);
        close(nothing);
        execv(words[2], words + 2);
        _exit(127);
    }
    int status;
    struct rusage used;
    if (pid < 0 || wait4(pid, &status, 0, &used) != pid)
        return 1;
    printf("%lu %ld %d\n", now() - start, used.ru_maxrss, status);
    return 0;
}
