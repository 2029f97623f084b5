"""A server with its clients in one tree: inside.py KIND SOCKET OUTPUT STOP CLIENTS COMMAND...

Starts COMMAND, connects CLIENTS clients to its unix socket, lets them work in turns and writes the number of right
answers to the file OUTPUT, until a file STOP is there. Then ends the server and writes "right"; any fault ends with 1.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

from clients.protocols import CLIENTS, PATIENCE, Client

PR_SET_CHILD_SUBREAPER = 36


def end(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group, and wait for all of it: its orphans are ours."""
    os.killpg(server.pid, signal.SIGTERM)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def main() -> None:
    kind, path, output, stop, count, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
    deadline = time.monotonic() + PATIENCE
    clients: list[Client] = []
    while len(clients) < int(count):
        try:
            clients.append(CLIENTS[kind](path))
        except (FileNotFoundError, ConnectionRefusedError):
            # It is not bound yet, or does not listen yet.
            assert time.monotonic() < deadline and server.poll() is None, "the server does not start"
            time.sleep(0.01)
    with open(output, "w") as written:
        while not os.path.exists(stop):
            for client in clients:
                client.step()
            print(clients[0].steps, file=written, flush=True)
        for client in clients:
            client.close()
        end(server)
        print("right", file=written, flush=True)


main()
