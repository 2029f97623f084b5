"""PostgreSQL with two clients in one tree: sql.py FOLDER OUTPUT STOP POSTGRES INITDB PSQL

Makes a database in FOLDER, starts the server on a socket there, and lets two psql talk to it over pipes. One has a
transaction open all the time, the other commits one after the other and must never see the first one's rows. OUTPUT
gets a number for each round, until a file STOP is there; then the first commits and all is counted. Ends with "right".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PATIENCE = 60.0  # seconds


class Psql:
    """An interactive client; every answer ends with a line that was asked for."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._asked = 0

    def ask(self, statement: str) -> list[str]:
        assert self._process.stdin and self._process.stdout
        self._asked += 1
        end = f"answer {self._asked}"
        self._process.stdin.write(f"{statement};\n\\echo {end}\n".encode())
        answer = b""
        while not answer.endswith(f"{end}\n".encode()):
            got = self._process.stdout.read(4096)
            assert got, f"psql has ended: {answer.decode()}"
            answer += got
        return answer.decode().splitlines()[:-1]

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(PATIENCE) == 0


def is_ready(path: str) -> bool:
    """Whether the server says so in the last line of its pid file."""
    try:
        with open(path) as file:
            return "ready" in file.read()
    except FileNotFoundError:
        return False


def main() -> None:
    folder, output, stop, postgres, initdb, psql = sys.argv[1:]
    data = f"{folder}/data"
    options = ["-D", data, "-A", "trust", "-N", "--no-instructions"]
    subprocess.run([initdb, *options], check=True, stdout=subprocess.DEVNULL)
    server = subprocess.Popen([postgres, "-D", data, "-k", folder, "-h", ""])
    deadline = time.monotonic() + PATIENCE
    while not is_ready(f"{data}/postmaster.pid"):
        assert time.monotonic() < deadline and server.poll() is None, "the server does not start"
        time.sleep(0.02)
    command = [psql, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", folder, "postgres"]
    waiting, quick = Psql(command), Psql(command)
    quick.ask("CREATE TABLE t (who text, number int)")
    waiting.ask("BEGIN")
    number = 0
    with open(output, "w") as written:
        while not os.path.exists(stop):
            waiting.ask(f"INSERT INTO t VALUES ('waiting', {number})")
            quick.ask(f"BEGIN; INSERT INTO t VALUES ('quick', {number}); COMMIT")
            number += 1
            assert quick.ask("SELECT who, count(*) FROM t GROUP BY who") == [f"quick|{number}"]
            assert waiting.ask("SELECT sum(number), count(*) FROM t") == [f"{number * (number - 1)}|{2 * number}"]
            print(number, file=written, flush=True)
        waiting.ask("COMMIT")
        assert sorted(quick.ask("SELECT who, count(*) FROM t GROUP BY who")) == [f"quick|{number}", f"waiting|{number}"]
        waiting.end()
        quick.end()
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0
        print("right", file=written, flush=True)


main()
