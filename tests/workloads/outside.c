/* Descriptors of what belongs to the machine: its namespaces, and devices that keep nothing for each opener. */
#include "workload.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/if_tun.h>
#include <linux/nsfs.h>
#include <linux/sched.h>

static int fds[16];

/* ---- namespaces ---- */

static const struct { const char *path; int type; } spaces[] = {
	{"/proc/self/ns/pid", CLONE_NEWPID}, {"/proc/self/ns/net", CLONE_NEWNET}, {"/proc/self/ns/ipc", CLONE_NEWIPC},
	{"/proc/self/ns/uts", CLONE_NEWUTS}, {"/proc/self/ns/mnt", CLONE_NEWNS}, {"/proc/self/ns/user", CLONE_NEWUSER},
	{"/proc/self/ns/cgroup", CLONE_NEWCGROUP}, {"/proc/self/ns/time", CLONE_NEWTIME},
	{"/proc/self/ns/pid_for_children", CLONE_NEWPID},
};
enum { SPACES = sizeof spaces / sizeof spaces[0] };

static void namespaces_set(void)
{
	for (int i = 0; i < SPACES; i++) {
		fds[i] = open(spaces[i].path, O_RDONLY | (i & 1 ? O_CLOEXEC : 0));
		NEED(fds[i] >= 0);
	}
	fds[SPACES] = open(spaces[1].path, O_PATH);
	NEED(fds[SPACES] >= 0);
}

static int namespaces_check(void)
{
	struct stat mine, opened;
	for (int i = 0; i < SPACES; i++) {
		CHECK(ioctl(fds[i], NS_GET_NSTYPE) == spaces[i].type);
		CHECK(!stat(spaces[i].path, &mine) && !fstat(fds[i], &opened));
		CHECK(mine.st_dev == opened.st_dev && mine.st_ino == opened.st_ino);
	}
	CHECK(fcntl(fds[SPACES], F_GETFL) & O_PATH && ioctl(fds[SPACES], NS_GET_NSTYPE) == -1 && errno == EBADF);
	CHECK(!stat(spaces[1].path, &mine) && !fstat(fds[SPACES], &opened) && mine.st_ino == opened.st_ino);
	return 1;
}

static void namespaces_harm(void)
{
	dup2(fds[2], fds[3]);
}

/* ---- devices ---- */

static void devices_set(void)
{
	static const char *const names[] = {"/dev/cpu/0/cpuid", "/dev/hwrng", "/dev/loop-control", "/dev/loop7"};
	for (int i = 0; i < 4; i++) {
		fds[i] = open(names[i], i == 2 ? O_RDWR : O_RDONLY);
		if (fds[i] < 0)
			cannot_run(names[i]);
	}
	NEED(lseek(fds[0], 1, SEEK_SET) == 1);
}

static int devices_check(void)
{
	struct stat opened;
	char told[16];
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 1);
	/* Function 0 of the instruction tells the vendor. */
	CHECK(pread(fds[0], told, 16, 0) == 16 && (!memcmp(told + 4, "Genu", 4) || !memcmp(told + 4, "Auth", 4)));
	CHECK(!fstat(fds[1], &opened) && opened.st_rdev == (10 << 8 | 183));
	CHECK(!fstat(fds[2], &opened) && S_ISCHR(opened.st_mode) && (fcntl(fds[2], F_GETFL) & O_ACCMODE) == O_RDWR);
	CHECK(!fstat(fds[3], &opened) && S_ISBLK(opened.st_mode) && opened.st_rdev == (7 << 8 | 7));
	CHECK(read(fds[3], told, 16) == 0);
	return 1;
}

static void devices_harm(void)
{
	lseek(fds[0], 0, SEEK_SET);
}

/* ---- tun and tap ---- */

enum { MTU = 1380, TUN_FLAGS = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE, TAP_FLAGS = IFF_TAP | IFF_VNET_HDR };
static const unsigned char mac[6] = {2, 0x46, 0x49, 0x52, 0x4e, 1};
static struct ifreq tun, tap;
static int net, indexes[2];

static int told(struct ifreq *device, unsigned long request)
{
	struct ifreq asked = *device;
	return ioctl(net, request, &asked) ? -1 : request == SIOCGIFMTU ? asked.ifr_mtu : asked.ifr_flags;
}

static void tun_set(void)
{
	for (int i = 0; i < 4; i++)
		if ((fds[i] = open("/dev/net/tun", O_RDWR | O_NONBLOCK | (i & 1 ? O_CLOEXEC : 0))) < 0)
			cannot_run("/dev/net/tun");
	NEED((net = socket(AF_INET, SOCK_DGRAM, 0)) >= 0);
	/* Two queues, one of them detached; a tap device; the last has no device. */
	snprintf(tun.ifr_name, IFNAMSIZ, "firnt%d", getpid());
	tun.ifr_flags = TUN_FLAGS;
	NEED(!ioctl(fds[0], TUNSETIFF, &tun));
	tun.ifr_flags = TUN_FLAGS;
	NEED(!ioctl(fds[1], TUNSETIFF, &tun));
	struct ifreq detach = {.ifr_flags = IFF_DETACH_QUEUE};
	NEED(!ioctl(fds[1], TUNSETQUEUE, &detach));
	snprintf(tap.ifr_name, IFNAMSIZ, "firnp%d", getpid());
	tap.ifr_flags = TAP_FLAGS;
	NEED(!ioctl(fds[2], TUNSETIFF, &tap));

	struct ifreq set = tun;
	set.ifr_mtu = MTU;
	NEED(!ioctl(net, SIOCSIFMTU, &set));
	char command[256];
	snprintf(command, sizeof command, "ip addr add 198.51.100.1/30 dev %s && ip link set %s up && "
		 "ip route add 203.0.113.0/28 via 198.51.100.2 dev %s", tun.ifr_name, tun.ifr_name, tun.ifr_name);
	if (system(command))
		cannot_run("ip");
	set = tap;
	set.ifr_hwaddr.sa_family = ARPHRD_ETHER;
	memcpy(set.ifr_hwaddr.sa_data, mac, 6);
	NEED(!ioctl(net, SIOCSIFHWADDR, &set));
	int size = 12, buffer = 70000;
	NEED(!ioctl(fds[2], TUNSETVNETHDRSZ, &size) && !ioctl(fds[2], TUNSETSNDBUF, &buffer));
	NEED(!ioctl(fds[2], TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) && !ioctl(fds[2], TUNSETOWNER, 1234));
	indexes[0] = if_nametoindex(tun.ifr_name);
	indexes[1] = if_nametoindex(tap.ifr_name);
}

/* Whether a packet that is sent to this address comes out of the first queue. */
static int comes_out(const char *address)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	unsigned char packet[2048];
	ssize_t got;
	inet_pton(AF_INET, address, &to.sin_addr);
	if (sendto(net, "packet", 6, 0, (struct sockaddr *)&to, sizeof to) != 6)
		return 0;
	while ((got = read(fds[0], packet, sizeof packet)) > 0)
		if (packet[0] >> 4 == 4 && !memcmp(packet + 16, &to.sin_addr, 4))
			return got == 34 && !memcmp(packet + 28, "packet", 6);
	return 0;
}

static int tun_check(void)
{
	struct ifreq now = {0};
	int value = 0;
	char path[64];
	CHECK(if_nametoindex(tun.ifr_name) == indexes[0] && if_nametoindex(tap.ifr_name) == indexes[1]);
	for (int i = 0; i < 3; i++) {
		CHECK(!ioctl(fds[i], TUNGETIFF, &now) && !strcmp(now.ifr_name, (i < 2 ? &tun : &tap)->ifr_name));
		CHECK(!(now.ifr_flags & IFF_DETACH_QUEUE) == (i != 1));
		CHECK((now.ifr_flags & (i < 2 ? TUN_FLAGS : TAP_FLAGS)) == (i < 2 ? TUN_FLAGS : TAP_FLAGS));
		CHECK(fcntl(fds[i], F_GETFL) & O_NONBLOCK);
	}
	CHECK(ioctl(fds[3], TUNGETIFF, &now) == -1 && errno == EBADFD);
	CHECK(told(&tun, SIOCGIFMTU) == MTU && told(&tun, SIOCGIFFLAGS) & IFF_UP && !(told(&tap, SIOCGIFFLAGS) & IFF_UP));
	now = tap;
	CHECK(!ioctl(net, SIOCGIFHWADDR, &now) && !memcmp(now.ifr_hwaddr.sa_data, mac, 6));
	CHECK(!ioctl(fds[2], TUNGETVNETHDRSZ, &value) && value == 12);
	CHECK(!ioctl(fds[2], TUNGETSNDBUF, &value) && value == 70000);
	snprintf(path, sizeof path, "/sys/class/net/%s/owner", tap.ifr_name);
	FILE *owner = fopen(path, "r");
	CHECK(owner && fscanf(owner, "%d", &value) == 1 && value == 1234 && !fclose(owner));
	CHECK(comes_out("198.51.100.2") && comes_out("203.0.113.5"));
	return 1;
}

static void tun_harm(void)
{
	struct ifreq down = tun;
	down.ifr_flags = 0;
	ioctl(net, SIOCSIFFLAGS, &down);
}

WORKLOAD(
	{"tun", tun_set, tun_check, tun_harm},
	{"namespaces", namespaces_set, namespaces_check, namespaces_harm},
	{"devices", devices_set, devices_check, devices_harm},
)
