/* The process that gets measured: target BEAT WAIT KIND COUNT
 *
 * BEAT is a file of one page, shared with the runner (struct beat). WAIT is "spin" (watch the own clock without a break,
 * keep the largest gap) or "idle" (count every millisecond). KIND and COUNT say what the process is made of:
 * none 0, memory MEGABYTES, huge MEGABYTES, threads N, vmas N, files N, family N: children with 64 MB of their parent's, of
 * which each has written 16 pages.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
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

static void make_files(const char *beat, long count) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || (limit.rlim_cur = limit.rlim_max, setrlimit(RLIMIT_NOFILE, &limit)))
        fail("RLIMIT_NOFILE");
    for (long i = 0; i < count; i++) {
        char name[PAGE];
        snprintf(name, sizeof name, "%s.%ld", beat, i);
        if (open(name, O_RDWR | O_CREAT, 0600) < 0)
            fail(name);
    }
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

static void make(const char *beat, const char *kind, long count) {
    if (!strcmp(kind, "memory") || !strcmp(kind, "huge"))
        make_memory(count, kind[0] == 'h');
    else if (!strcmp(kind, "family"))
        make_family(count);
    else if (!strcmp(kind, "vmas"))
        make_vmas(count);
    else if (!strcmp(kind, "files"))
        make_files(beat, count);
    else if (!strcmp(kind, "threads"))
        make_threads(count);
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
