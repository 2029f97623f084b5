"""Programs as they are: compressors, interpreters, a database, a virtual machine, checkpointed in mid-work.

None knows of the test. Each is dumped while it works and restored, twice, and its result must be what an undisturbed
run gives. Their standard streams are regular files or /dev/null.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, lasting_differences, portrait, wait_until
from programs import PATIENCE, finish, grows, program

# What a program that works changes by itself between two looks at it.
WORKING = (
    r".*status\.(Vm\w+|HugetlbPages|Sig\w+|ShdPnd|Threads)",
    r"stat\.(num_threads|priority)",
    r"mapping\..*",
    r"fd\..*",
    r"thread\..*",
    r"limits",
)

pytestmark = pytest.mark.skipif(firn_command() is None, reason="no firn command (set FIRN or make the venv)")


def _there_and_back(
    runner: Runner, target: Target, at_work: Callable[[], Callable[[], bool]], options: tuple[str, ...] = ()
) -> Target:
    """Dumps and restores a program twice while it works; *at_work* makes a test of whether it has got on."""
    for _ in range(2):
        wait_until("it works", at_work(), PATIENCE)
        assert not target.ended(), f"it {target.fate()} before the dump: the test has too little work for it"
        before = portrait(target.pid)
        target = runner.restore(runner.dump(target, *options), target, *options)
        changed = lasting_differences(before, partial(portrait, target.pid), WORKING)
        assert not changed, "the restored program differs:\n" + "\n".join(changed)
    return target


def _text(size: int) -> bytes:
    """Compressible bytes, the same in every run."""
    source = random.Random(7)
    words = [source.randbytes(source.randint(3, 12)).hex().encode() for _ in range(5000)]
    parts = []
    length = 0
    while length < size:
        parts.append(b" ".join(source.choices(words, k=2000)))
        length += len(parts[-1])
    return b"\n".join(parts)[:size]


@pytest.mark.parametrize(
    ("name", "options", "size", "unpack"),
    [("gzip", ["-9"], 48 << 20, gzip.decompress), ("xz", ["-6", "-T1"], 3 << 20, lzma.decompress)],
)
def test_compressor(
    name: str, options: list[str], size: int, unpack: Callable[[bytes], bytes], runner: Runner
) -> None:
    command = program(name)
    large, packed = runner.folder / "large", runner.folder / "packed"
    large.write_bytes(_text(size))
    target = runner.spawn([command, *options, "-c", large], stdout=packed)
    finish(_there_and_back(runner, target, lambda: grows(packed)))
    assert unpack(packed.read_bytes()) == large.read_bytes()
    undisturbed = subprocess.run([command, *options, "-c", large], stdout=subprocess.PIPE, check=True).stdout
    assert packed.read_bytes() == undisturbed


PYTHON = """
import hashlib, sys, threading
results = {}
def work(number):
    digest = hashlib.sha256(str(number).encode())
    total = 0
    for i in range(250000):
        digest.update(digest.digest())
        total = (total * 31 + i) % 1000003
        if not number and not i % 5000:
            print(i, flush=True)
    results[number] = f"{digest.hexdigest()} {total}"
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*(results[number] for number in sorted(results)), sep="\\n", flush=True)
"""


def _expected_python(number: int) -> str:
    digest, total = hashlib.sha256(str(number).encode()), 0
    for i in range(250000):
        digest.update(digest.digest())
        total = (total * 31 + i) % 1000003
    return f"{digest.hexdigest()} {total}"


def test_python_threads(runner: Runner) -> None:
    script, output = runner.folder / "script.py", runner.folder / "output"
    script.write_text(PYTHON)
    target = runner.spawn([sys.executable, "-I", "-S", script], stdout=output)
    finish(_there_and_back(runner, target, lambda: grows(output)))
    assert output.read_text().splitlines()[-4:] == [_expected_python(number) for number in range(4)]


PERL = """
$| = 1;
my %seen; my $x = 12345; my $sum = 0;
for my $i (1 .. 3000000) {
    $x = ($x * 1103515245 + 12345) % 2147483648;
    $seen{$x % 1009}++;
    $sum += $x % 7;
    print "$i\\n" unless $i % 50000;
}
print join(",", map { "$_=$seen{$_}" } sort { $a <=> $b } keys %seen), " $sum\\n";
"""


def test_perl(runner: Runner) -> None:
    perl = program("perl")
    script, output = runner.folder / "script.pl", runner.folder / "output"
    script.write_text(PERL)
    target = runner.spawn([perl, script], stdout=output)
    finish(_there_and_back(runner, target, lambda: grows(output)))
    x, total, seen = 12345, 0, dict.fromkeys(range(1009), 0)
    for _ in range(3000000):
        x = (x * 1103515245 + 12345) % 2147483648
        seen[x % 1009] += 1
        total += x % 7
    assert output.read_text().splitlines()[-1] == ",".join(f"{k}={v}" for k, v in sorted(seen.items())) + f" {total}"


# Each statement of the transaction inserts rows and takes a while; the journal lies on disk meanwhile.
SQL_STEP = """
INSERT INTO numbers SELECT {base} + value, value * value % 1000003 FROM
  (WITH RECURSIVE counter(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM counter WHERE value < 20000)
   SELECT value FROM counter);
SELECT '{base}', (WITH RECURSIVE spin(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM spin WHERE n < 200000)
   SELECT count(*) FROM spin);
"""


@pytest.mark.parametrize(
    ("files", "options"),
    [
        pytest.param("unix-none", (), id="no-locks"),
        pytest.param("unix", ("--file-locks",), id="locks"),
    ],
)
def test_sqlite_transaction(files: str, options: tuple[str, ...], runner: Runner) -> None:
    sqlite = program("sqlite3")
    script, output, database = (runner.folder / name for name in ("script.sql", "output", "data.db"))
    steps = range(0, 1500000, 50000)
    script.write_text(
        "PRAGMA cache_size = 50;\nCREATE TABLE numbers (id INTEGER PRIMARY KEY, square INTEGER);\nBEGIN;\n"
        + "".join(SQL_STEP.format(base=base) for base in steps)
        + "COMMIT;\nPRAGMA integrity_check;\n"
    )
    target = runner.spawn([sqlite, "-batch", "-vfs", files, database], stdin=script, stdout=output)
    target = _there_and_back(runner, target, lambda: grows(output), options)
    assert Path(f"{database}-journal").exists(), "it is not in the middle of a transaction"
    finish(target)
    lines = output.read_text().splitlines()
    assert lines[-1] == "ok"
    assert lines[:-1] == [f"{base}|200000" for base in steps]
    with sqlite3.connect(database) as connection:
        count, total = connection.execute("SELECT count(*), sum(square) FROM numbers").fetchone()
    connection.close()
    assert count == 20000 * len(steps)
    assert total == len(steps) * sum(value * value % 1000003 for value in range(1, 20001))


JAVA = """
import java.util.*;
public class Work {
    static final long[] results = new long[4];
    static void work(int number) {
        Map<Integer, List<String>> map = new HashMap<>();
        long sum = number;
        for (int i = 0; i < 2000000; i++) {
            map.computeIfAbsent(i % 1000, k -> new ArrayList<>()).add("item" + i);
            if (map.get(i % 1000).size() > 20) map.remove(i % 1000);
            sum = sum * 31 + map.size() + i;
            if (number == 0 && i % 20000 == 0) System.out.println(i);
        }
        results[number] = sum;
    }
    public static void main(String[] arguments) throws Exception {
        Thread[] threads = new Thread[4];
        for (int i = 0; i < 4; i++) { int n = i; threads[i] = new Thread(() -> work(n)); threads[i].start(); }
        for (Thread thread : threads) thread.join();
        System.gc();
        System.out.println("done " + Arrays.toString(results));
    }
}
"""


@pytest.fixture(scope="module")
def java_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's class files: the compiler is a module of the run-time image where there is one."""
    java = program("java")
    folder = tmp_path_factory.mktemp("java")
    (folder / "Work.java").write_text(JAVA)
    compiler = [java, "-m", "jdk.compiler/com.sun.tools.javac.Main", "-d", str(folder), str(folder / "Work.java")]
    done = subprocess.run(compiler, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        pytest.skip(f"this Java has no compiler: {done.stderr[:200]}")
    return folder


def _java(runner: Runner, classes: Path, *options: str) -> tuple[Target, Path]:
    output = runner.folder / "output"
    command: list[str | Path] = [program("java"), "-XX:-UsePerfData", "-Xmx64m", *options, "-cp", classes, "Work"]
    return runner.spawn(command, stdout=output), output


@pytest.mark.parametrize("collector", ["-XX:+UseSerialGC", "-XX:+UseG1GC"])
def test_java_virtual_machine(collector: str, java_classes: Path, runner: Runner) -> None:
    """Threads, a just-in-time compiler, a collector that runs often in a small heap, and no sockets or pipes."""
    undisturbed, output = _java(runner, java_classes, collector)
    finish(undisturbed)
    wanted = output.read_text().splitlines()
    target, output = _java(runner, java_classes, collector)
    finish(_there_and_back(runner, target, lambda: grows(output)))
    assert output.read_text().splitlines() == wanted


SHELL = """
i=0
while [ $i -lt 400000 ]; do
    i=$((i + 1))
    case $i in *0000) echo $i;; esac
done
echo end
"""


def test_shell(runner: Runner) -> None:
    """A shell in a loop, with its script open at a position."""
    shell = program("sh")
    script, output = runner.folder / "script.sh", runner.folder / "output"
    script.write_text(SHELL)
    target = runner.spawn([shell, script], stdout=output)
    finish(_there_and_back(runner, target, lambda: grows(output)))
    assert output.read_text().split() == [*map(str, range(10000, 400001, 10000)), "end"]


def test_sleep(runner: Runner) -> None:
    """The program of that name: it must sleep as long as it was told."""
    target = runner.spawn([program("sleep"), "2"])
    started = time.monotonic()
    wait_until("it sleeps", lambda: target.state() == "S")
    images = runner.dump(target)
    frozen = time.monotonic()
    time.sleep(0.2)
    target = runner.restore(images, target)
    thawed = time.monotonic()
    finish(target)
    worked = (frozen - started) + (time.monotonic() - thawed)
    assert 1.7 < worked < 6, f"it has slept {worked:.2f} s"
