/* Options and states of internet sockets. */
#ifndef INET_H
#define INET_H

#include "workload.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static inline void set_number(int fd, int level, int option, int value)
{
	NEED(!setsockopt(fd, level, option, &value, sizeof value));
}

static inline int number(int fd, int level, int option)
{
	int value = -12345;
	socklen_t length = sizeof value;
	return getsockopt(fd, level, option, &value, &length) ? -54321 : value;
}

static inline int state(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof info;
	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) ? -1 : info.tcpi_state;
}

static inline int in_state(int fd, int wanted)
{
	for (int i = 0; i < 2000 && state(fd) != wanted; i++)
		nap_ms(1);
	return state(fd) == wanted;
}

#endif
