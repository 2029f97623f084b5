"""The demo's program: three threads that compute and append their results to one file, and a main thread that reports.

Started as ``worker.py RESULTS``; progress goes to stdout. It knows nothing of checkpoints.
"""

from __future__ import annotations

import sys
import threading
import time

THREADS = 3
ROUND = 20_000
MASK = (1 << 64) - 1


def advance(value: int) -> int:
    """One step of the computation: each result is the start of the next, so a lost or repeated step shows."""
    for _ in range(ROUND):
        value = (value * 6364136223846793005 + 1442695040888963407) & MASK
    return value


def main() -> None:
    """Compute until somebody ends the program."""
    steps = [0] * THREADS
    lock = threading.Lock()
    with open(sys.argv[1], "a", encoding="ascii") as results:

        def compute(thread: int) -> None:
            value = thread
            while True:
                value = advance(value)
                with lock:
                    steps[thread] += 1
                    results.write(f"{thread} {steps[thread]} {value}\n")
                    results.flush()
                time.sleep(0.05)

        for thread in range(THREADS):
            threading.Thread(target=compute, args=(thread,), daemon=True).start()
        while True:
            print(f"{sum(steps)} results so far", flush=True)
            time.sleep(0.5)


if __name__ == "__main__":
    main()
