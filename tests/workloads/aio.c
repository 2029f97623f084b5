/* Kernel asynchronous input and output (io_setup(2)): the context's id is the address of its ring. */
#include "workload.h"

#include <linux/aio_abi.h>
#include <poll.h>

static aio_context_t context;
static char buffer[4096] __attribute__((aligned(4096)));
static int file;

static int submit(uint64_t tag, uint64_t offset)
{
	struct iocb request = {.aio_data = tag, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)file,
			       .aio_buf = (uintptr_t)buffer, .aio_nbytes = PAGE, .aio_offset = (int64_t)offset};
	struct iocb *list[] = {&request};
	return syscall(SYS_io_submit, context, 1L, list) == 1;
}

static int reap(uint64_t tag)
{
	struct timespec limit = {2, 0};
	struct io_event event;
	return syscall(SYS_io_getevents, context, 1L, 1L, &event, &limit) == 1 && event.data == tag &&
	       event.res == (int64_t)PAGE;
}

static void ring_set(void)
{
	file = make_file("data", 16 * PAGE, 1);
	if (syscall(SYS_io_setup, 100, &context))
		cannot_run("io_setup");
	/* The ring's counters are no longer at their start. */
	for (int i = 0; i < 7; i++)
		NEED(submit(i, 0) && reap(i));
}

static int ring_check(void)
{
	char all[8 * 4096];
	fill(all, sizeof all, 1);
	for (int i = 0; i < 300; i++) {
		memset(buffer, 0, PAGE);
		CHECK(submit(1000 + i, i % 8 * PAGE));
		CHECK(reap(1000 + i));
		CHECK(!memcmp(buffer, all + i % 8 * PAGE, PAGE));
	}
	return 1;
}

static void ring_harm(void)
{
	syscall(SYS_io_destroy, context);
}

/* Requests that have finished but whose events nobody has fetched. */
static void unreaped_set(void)
{
	ring_set();
	for (int i = 0; i < 5; i++)
		NEED(submit(50 + i, 0));
	nap_ms(5);
}

static int unreaped_check(void)
{
	for (int i = 0; i < 5; i++)
		CHECK(reap(50 + i));
	CHECK_ALL(ring_check());
	for (int i = 0; i < 5; i++)
		CHECK(submit(50 + i, 0));
	return 1;
}

static void unreaped_harm(void)
{
	reap(50);
}

/* A request that ends when somebody writes to a pipe. */
static int ends[2];

static void wait_for_pipe(void)
{
	struct iocb request = {.aio_data = 70, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = (uint32_t)ends[0],
			       .aio_buf = POLLIN};
	struct iocb *list[] = {&request};
	if (syscall(SYS_io_submit, context, 1L, list) != 1)
		cannot_run("no IOCB_CMD_POLL");
}

static void waiting_set(void)
{
	ring_set();
	NEED(!pipe(ends));
	wait_for_pipe();
}

static int waiting_check(void)
{
	struct timespec limit = {2, 0};
	struct io_event event = {0};
	CHECK(write(ends[1], "", 1) == 1);
	CHECK(syscall(SYS_io_getevents, context, 1L, 1L, &event, &limit) == 1 && event.data == 70);
	CHECK(event.res & POLLIN);
	char byte;
	CHECK(read(ends[0], &byte, 1) == 1);
	wait_for_pipe();
	return 1;
}

static void waiting_harm(void)
{
	syscall(SYS_io_destroy, context);
}

WORKLOAD(
	{"waiting", waiting_set, waiting_check, waiting_harm},
	{"ring", ring_set, ring_check, ring_harm},
	{"unreaped", unreaped_set, unreaped_check, unreaped_harm},
)
