"""System V IPC: include/uapi/linux/ipc.h, shm.h, sem.h and include/uapi/asm-generic/{ipcbuf,shmbuf}.h."""

from __future__ import annotations

import struct

IPC_PRIVATE = 0
IPC_CREAT = 0o1000
IPC_EXCL = 0o2000
IPC_RMID = 0
IPC_SET = 1
IPC_STAT = 2
IPC_NOWAIT = 0o4000
SHM_RDONLY = 0o10000
SHM_HUGETLB = 0o4000
SHM_LOCK = 11
SHM_DEST = 0o1000
SHM_LOCKED = 0o2000
"""Set in the mode that IPC_STAT tells: removed, and gone with the last user; locked into memory."""
SHMID64_DS = struct.Struct("<6I24x4Q2iQ16x")
"""struct shmid64_ds: key, uid, gid, cuid, cgid, mode; size, atime, dtime, ctime; cpid, lpid; nattch."""

GETPID = 11
SEM_UNDO = 0x1000
SEMAEM = 32767
"""The highest amount that an operation with SEM_UNDO can leave to be given back; the lowest is -SEMAEM - 1."""
SEMBUF = struct.Struct("<H2h")
"""struct sembuf: the semaphore's number, what is added, flags."""
