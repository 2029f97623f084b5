/* The process that gets measured: target BEAT WAIT KIND COUNT
 *
 * BEAT is a file of one page, shared with the runner (struct beat). WAIT is "spin" (watch the own clock without a break,
 * keep the largest gap) or "idle" (count every millisecond). KIND and COUNT say what the process is made of:
 * none 0, memory MEGABYTES, huge MEGABYTES, threads N, vmas N, files N, connections N (ends of N/2 TCP connections),
 * family N: children with 64 MB of their parent's, of which each has written 16 pages, processes N (itself and its
 * children, which sleep).
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define HUGE (2UL << 20)
#define MEGABYTE (1UL << 20)

struct beat {
    volatile uint64_t ready, gap_ns, wanted, done, beats;
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static char *make_memory(size_t megabytes, int huge) {
    size_t size = megabytes * MEGABYTE;
    char *room = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        fail("mmap");
    room = (char *)(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1));
    if (madvise(room, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
        fail("madvise");
    for (size_t at = 0; at < size; at += 8)
        *(uint64_t *)(room + at) = at * 0x9E3779B97F4A7C15ULL + 1;
    return room;
}

static void make_family(long count) {
    char *room = make_memory(64, 0);
    for (long i = 0; i < count; i++) {
        int ready[2];
        char byte;
        if (pipe(ready))
            fail("pipe");
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (!child) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (long page = 0; page < 16; page++)
                room[(page * 1000 + i) * PAGE] = 1;
            close(ready[0]);
            close(ready[1]);
            for (;;)
                pause();
        }
        close(ready[1]);
        if (read(ready[0], &byte, 1))
            fail("a child");
        close(ready[0]);
    }
}

static void make_vmas(long count) {
    char *room = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        fail("mmap");
    for (long i = 0; i < count; i++) {
        room[i * PAGE] = 1 + i % 100;
        if (i % 2 && mprotect(room + i * PAGE, PAGE, PROT_READ))
            fail("mprotect");
    }
}

static void raise_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || (limit.rlim_cur = limit.rlim_max, setrlimit(RLIMIT_NOFILE, &limit)))
        fail("RLIMIT_NOFILE");
}

static void make_files(const char *beat, long count) {
    raise_limit();
    for (long i = 0; i < count; i++) {
        char name[PAGE];
        snprintf(name, sizeof name, "%s.%ld", beat, i);
        if (open(name, O_RDWR | O_CREAT, 0600) < 0)
            fail(name);
    }
}

static void make_connections(long count) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int server = socket(AF_INET, SOCK_STREAM, 0);
    raise_limit();
    if (bind(server, (void *)&address, length) || listen(server, 8) ||
        getsockname(server, (void *)&address, &length))
        fail("listen");
    for (long i = 0; i < count; i += 2) {
        int client = socket(AF_INET, SOCK_STREAM, 0);
        if (client < 0 || connect(client, (void *)&address, length) || accept(server, NULL, NULL) < 0)
            fail("connect");
    }
    close(server);
}

static void *sleeper(void *unused) {
    for (;;)
        pause();
    return unused;
}

static void make_threads(long count) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    for (long i = 1; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, sleeper, NULL))
            fail("pthread_create");
    }
}

static void make_processes(long count) {
    for (long i = 1; i < count; i++) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork");
        if (!pid)
            sleeper(NULL);
    }
}

static void make(const char *beat, const char *kind, long count) {
    if (!strcmp(kind, "memory") || !strcmp(kind, "huge"))
        make_memory(count, kind[0] == 'h');
    else if (!strcmp(kind, "family"))
        make_family(count);
    else if (!strcmp(kind, "vmas"))
        make_vmas(count);
    else if (!strcmp(kind, "files"))
        make_files(beat, count);
    else if (!strcmp(kind, "connections"))
        make_connections(count);
    else if (!strcmp(kind, "threads"))
        make_threads(count);
    else if (!strcmp(kind, "processes"))
        make_processes(count);
    else if (strcmp(kind, "none"))
        exit(2);
}

static void spin(struct beat *beat) {
    uint64_t last = now();
    for (;;) {
        uint64_t here = now();
        if (here - last > beat->gap_ns)
            beat->gap_ns = here - last;
        last = here;
        if (beat->wanted != beat->done) {
            beat->gap_ns = 0;
            beat->done = beat->wanted;
        }
        beat->beats++;
    }
}

static void idle(struct beat *beat) {
    struct timespec nap = {0, 1000000};
    for (;;) {
        nanosleep(&nap, NULL);
        beat->beats++;
    }
}

int main(int count, char **words) {
    if (count != 5)
        return 2;
    int file = open(words[1], O_RDWR);
    struct beat *beat = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || beat == MAP_FAILED)
        fail(words[1]);
    close(file);
    make(words[1], words[3], atol(words[4]));
    beat->ready = 1;
    if (!strcmp(words[2], "spin"))
        spin(beat);
    idle(beat);
}
