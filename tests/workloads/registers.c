/*
 * Registers that are live across the checkpoint: a thread loads patterns, spins in a loop that touches no register,
 * and compares what it still has with what it had. The integer registers by plain loads; everything else through
 * XRSTOR of a made-up image and XSAVE before and after the spin (layout: Intel SDM vol. 1, chapter 13).
 */
#include "workload.h"

#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

enum { X87, SSE, AVX, OPMASK = 5, ZMM_HIGH, HI16_ZMM, PKRU = 9, AREA = 16384, SW_BYTES = 464 };

volatile int spin_go;
uint64_t wanted[15], found[15], found_flags, kept_stack;
char image[AREA] __attribute__((aligned(64))), before[AREA] __attribute__((aligned(64))),
	after[AREA] __attribute__((aligned(64)));
uint32_t components;

void spin_integer(void);
void spin_extended(void);

__asm__(
	".text\n"
	".macro each op\n"
	"  .set i, 0\n"
	"  .irp r, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15\n"
	"    \\op \\r\n"
	"    .set i, i + 8\n"
	"  .endr\n"
	".endm\n"
	".macro load r\n mov wanted+i(%rip), %\\r\n .endm\n"
	".macro store r\n mov %\\r, found+i(%rip)\n .endm\n"
	".macro saved op\n"
	"  .irp r, rbx, rbp, r12, r13, r14, r15\n \\op %\\r\n .endr\n"
	".endm\n"
	".macro restored op\n"
	"  .irp r, r15, r14, r13, r12, rbp, rbx\n \\op %\\r\n .endr\n"
	".endm\n"
	"spin_integer:\n"
	"  saved push\n"
	"  mov %rsp, kept_stack(%rip)\n"
	"  each load\n"
	"  std\n"
	"1: pause\n"
	"  cmpl $0, spin_go(%rip)\n"
	"  je 1b\n"
	"  each store\n"
	"  mov kept_stack(%rip), %rcx\n"
	"  sub %rsp, %rcx\n"
	"  pushfq\n"
	"  cld\n"
	"  pop %rax\n"
	"  and $0x400, %eax\n"
	"  or %rcx, %rax\n"
	"  mov %rax, found_flags(%rip)\n"
	"  restored pop\n"
	"  ret\n"
	"spin_extended:\n"
	"  mov components(%rip), %eax\n"
	"  xor %edx, %edx\n"
	"  xrstor64 image(%rip)\n"
	"  xsave64 before(%rip)\n"
	"1: pause\n"
	"  cmpl $0, spin_go(%rip)\n"
	"  je 1b\n"
	"  xsave64 after(%rip)\n"
	"  fninit\n"
	"  vzeroall\n"
	"  ret\n");

static volatile int spinning, done, spinner_tid;

/* Where component `number` lies in a standard-format XSAVE image; the length is 0 if the CPU lacks it. */
static uint32_t place(int number, uint32_t *length)
{
	uint32_t a, b, c, d;
	if (number == X87) {
		*length = 160;
		return 0;
	}
	if (number == SSE) {
		*length = 256;
		return 160;
	}
	__cpuid_count(0xd, number, a, b, c, d);
	*length = a;
	return b;
}

static void need_components(uint32_t mask)
{
	uint32_t a, b, c, d;
	errno = 0;
	__cpuid_count(1, 0, a, b, c, d);
	if (!(c & bit_OSXSAVE) || !(c & bit_AVX))
		cannot_run("the CPU has no AVX");
	__asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	if ((a & mask) != mask)
		cannot_run("the CPU or kernel lacks these registers");
	components = mask;
}

static void fill_image(void)
{
	uint32_t length, offset;
	memset(image, 0, sizeof image);
	for (int number = 0; number <= PKRU; number++) {
		if (!(components >> number & 1) || number == X87)
			continue;
		offset = place(number, &length);
		fill(image + offset, length & ~7u, 100 + number);
	}
	if (components & 1 << X87) {
		uint16_t control = 0x0c7f, status = 0x1a00;  /* round towards zero, double-extended off; top = 3 */
		memcpy(image, &control, 2);
		memcpy(image + 2, &status, 2);
		image[4] = 0x7e;  /* two registers are empty */
		for (int i = 0; i < 8; i++) {
			fill(image + 32 + 16 * i, 8, 50 + i);
			image[32 + 16 * i + 7] |= 0x80;  /* a normal number has its integer bit set */
			image[32 + 16 * i + 9] = 0x3f;
			image[32 + 16 * i + 8] = (char)(0xf0 + i);
		}
	}
	uint32_t mxcsr = 0x1f80 | 0x8000 | 0x6000 | 0x15;  /* flush to zero, round towards zero, three sticky flags */
	memcpy(image + 24, &mxcsr, 4);
	if (components & 1 << PKRU) {
		uint32_t rights = 0x55555554 ^ 0x30;
		memcpy(image + place(PKRU, &length), &rights, 4);
	}
	*(uint64_t *)(image + 512) = components;
}

static void *spinner(void *argument)
{
	void (*spin)(void) = (void (*)(void))argument;
	spinner_tid = thread_id();
	for (;;) {
		spinning = 1;
		spin();
		__atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&spin_go, __ATOMIC_SEQ_CST))
			nap_ms(1);
	}
	return NULL;
}

/* Damages the spinning thread's live registers: what its signal frame holds is loaded back at the return. */
static void spoil(int number, siginfo_t *info, void *context)
{
	ucontext_t *frame = context;
	uint32_t length = 0, offset = 0;
	(void)number, (void)info;
	frame->uc_mcontext.gregs[REG_R12] ^= 1;
	for (int i = PKRU; i >= 0 && !length; i--)
		if (components >> i & 1)
			offset = place(i, &length);
	if (!length)
		return;
	char *area = (char *)frame->uc_mcontext.fpregs;
	if (offset == 0)
		area[32 + 1] ^= 4;
	else
		area[offset + 1] ^= 4;
}

static void start(void (*spin)(void))
{
	struct sigaction action = {.sa_sigaction = spoil, .sa_flags = SA_SIGINFO};
	NEED(!sigaction(SIGUSR1, &action, NULL));
	start_thread(spinner, (void *)spin);
	NEED(wait_for(&spinning, 5000));
	nap_ms(5);
}

static void spinner_harm(void)
{
	syscall(SYS_tgkill, getpid(), spinner_tid, SIGUSR1);
	nap_ms(100);
}

static int collect(void)
{
	done = 0;
	__atomic_store_n(&spin_go, 1, __ATOMIC_SEQ_CST);
	int in_time = wait_for(&done, 5000);
	__atomic_store_n(&spinning, 0, __ATOMIC_SEQ_CST);
	__atomic_store_n(&spin_go, 0, __ATOMIC_SEQ_CST);
	return in_time && wait_for(&spinning, 5000);
}

static void integer_set(void)
{
	fill(wanted, sizeof wanted, 31);
	start(spin_integer);
}

static int integer_check(void)
{
	CHECK(collect());
	for (int i = 0; i < 15; i++)
		CHECK(found[i] == wanted[i]);
	CHECK(found_flags == 0x400);
	return 1;
}

static const struct { const char *name; uint32_t mask; } sets[] = {
	{"x87", 1 << X87},
	{"sse", 1 << SSE},
	{"avx", 1 << SSE | 1 << AVX},
	{"avx512", 1 << SSE | 1 << AVX | 1 << OPMASK | 1 << ZMM_HIGH | 1 << HI16_ZMM},
	{"masks", 1 << OPMASK},
	{"pkru", 1 << PKRU},
	{"all", 1 << X87 | 1 << SSE | 1 << AVX},
};

static void extended_set(void)
{
	for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
		if (!strcmp(sets[i].name, mode_name))
			need_components(sets[i].mask);
	fill_image();
	start(spin_extended);
}

static int extended_check(void)
{
	uint32_t length, offset, mxcsr;
	CHECK(collect());
	for (int number = 0; number <= PKRU; number++) {
		if (!(components >> number & 1))
			continue;
		offset = place(number, &length);
		/* MXCSR and its mask belong to SSE and AVX, though they lie in the x87 part. */
		CHECK(!memcmp(before + offset, after + offset, number ? length : 24));
		if (!number)
			CHECK(!memcmp(before + 32, after + 32, 128));
		CHECK(!all_zero(after + offset, 16) || number > AVX);
	}
	if (components & (1 << SSE | 1 << AVX)) {
		memcpy(&mxcsr, after + 24, 4);
		CHECK(mxcsr == (0x1f80 | 0x8000 | 0x6000 | 0x15));
	}
	return 1;
}

/* The segment bases: fs is the thread pointer, gs is the program's own. */
static void bases_set(void)
{
	NEED(!syscall(SYS_arch_prctl, ARCH_SET_GS, 0x123456789000));
}

static int bases_check(void)
{
	uint64_t fs = 0, gs = 0;
	CHECK(!syscall(SYS_arch_prctl, ARCH_GET_GS, &gs) && gs == 0x123456789000);
	CHECK(!syscall(SYS_arch_prctl, ARCH_GET_FS, &fs) && fs == (uint64_t)__builtin_thread_pointer());
	return 1;
}

static void bases_harm(void)
{
	syscall(SYS_arch_prctl, ARCH_SET_GS, 0x1000);
}

WORKLOAD(
	{"integer", integer_set, integer_check, spinner_harm},
	{"bases", bases_set, bases_check, bases_harm},
	{"x87", extended_set, extended_check, spinner_harm},
	{"sse", extended_set, extended_check, spinner_harm},
	{"avx", extended_set, extended_check, spinner_harm},
	{"avx512", extended_set, extended_check, spinner_harm},
	{"masks", extended_set, extended_check, spinner_harm},
	{"pkru", extended_set, extended_check, spinner_harm},
	{"all", extended_set, extended_check, spinner_harm},
)
