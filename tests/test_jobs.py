"""Jobs of many processes, checkpointed in the middle: their result must be that of an undisturbed run."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, wait_until
from programs import PATIENCE, PYTHON, cycle, descendants, finish, goes_on, program, reap, tail

pytestmark = pytest.mark.skipif(firn_command() is None, reason="no firn command (set FIRN or make the venv)")

BASH = """
set -m
# A coprocess that answers, a pipeline in the background, a here-document, a trap, a process substitution.
coproc ADD { while read a b; do echo $((a + b)); done; }
trap 'echo trapped' USR1
exec 5> >(exec sha256sum > digest); DIGEST=$!
seq 1 1000000 | awk '{ s += $1; if (s % 3 == 0) print s }' | gzip -1 | gunzip | tail -n 1 > last &
sum=0
for i in {1..800}; do
    echo $sum $i >&"${ADD[1]}"; read -u "${ADD[0]}" sum
    (exit $((i % 7))); status=$?
    word=$(printf '%s' $i | tr 0-9 a-j)
    echo $i $word $status >&5
    ((i % 100)) || echo $i $sum
done
kill -USR1 $$
wait %2; echo pipeline $?
exec 5>&-
wait $DIGEST
eval "exec ${ADD[1]}>&-"
wait $ADD_PID
echo end $sum
"""


def test_bash_job(runner: Runner) -> None:
    script, output = runner.folder / "script", runner.folder / "output"
    script.write_text(BASH)
    target = runner.spawn([program("bash"), "--norc", script], stdout=output, stderr=runner.folder / "errors")
    for _ in range(2):
        goes_on(target, output)
        target = cycle(runner, target)
    finish(target)
    assert tail(runner.folder / "errors") == ""
    total, progress = 0, []
    digest = hashlib.sha256()
    for i in range(1, 801):
        total += i
        digest.update(b"%d %s %d\n" % (i, b"%d" % i, i % 7))
        progress += [f"{i} {total}"] if not i % 100 else []
    assert output.read_text().splitlines() == [*progress, "trapped", "pipeline 0", f"end {total}"]
    wanted = subprocess.run("seq 1 1000000 | awk '{ s += $1; if (s % 3 == 0) print s }' | tail -n 1", shell=True,
                            stdout=subprocess.PIPE, check=True).stdout  # fmt: skip
    assert (runner.folder / "last").read_bytes() == wanted


def _runs(target: Target, name: str, output: Path) -> None:
    """Wait until a process called *name* is below it."""
    wait_until(f"{name} runs", lambda: target.ended() or name in descendants(target.pid).values(), PATIENCE)
    assert not target.ended(), f"it {target.fate()}: {tail(output)}"


def _project(folder: Path, files: int) -> None:
    """A C project: many small files, a header, an archive, a program that prints a sum."""
    folder.mkdir()
    (folder / "all.h").write_text("".join(f"long f{n}(long);\n" for n in range(files)))
    for n in range(files):
        body = "".join(f"    x = x * {n + k + 3} % 1000003 + {k};\n" for k in range(120))
        (folder / f"f{n}.c").write_text(
            f'#include <stdio.h>\n#include "all.h"\nlong f{n}(long x) {{\n{body}    return x;\n}}\n'
        )
    calls = "".join(f"    x = f{n}(x);\n" for n in range(files))
    main = f'int main(void) {{\n    long x = 1;\n{calls}    printf("%ld\\n", x);\n}}\n'
    (folder / "main.c").write_text(f'#include <stdio.h>\n#include "all.h"\n{main}')
    (folder / "Makefile").write_text(
        "all: program\n"
        f"OBJECTS := {' '.join(f'f{n}.o' for n in range(files))}\n"
        "%.o: %.c all.h\n\t@gcc -pipe -O2 -c -o $@ $< && echo $@\n"
        "libf.a: $(OBJECTS)\n\t@ar rcD $@ $^\n"
        "program: main.o libf.a\n\t@gcc -o $@ $^\n"
    )


def _expected(files: int) -> int:
    x = 1
    for n in range(files):
        for k in range(120):
            x = x * (n + k + 3) % 1000003 + k
    return x


def test_make_with_four_jobs(runner: Runner) -> None:
    """Compilers, assemblers and the linker in all phases of their lives, over make's pipe of job tokens."""
    make, folder, output = program("make"), runner.folder / "project", runner.folder / "output"
    program("gcc")
    _project(folder, 24)
    target = runner.spawn([make, "-j4", "-C", folder, "--no-print-directory"], stdout=output,
                          stderr=runner.folder / "errors")  # fmt: skip
    for _ in range(3):
        goes_on(target, output)
        _runs(target, "cc1", output)
        target = cycle(runner, target)
    finish(target)
    assert tail(runner.folder / "errors") == ""
    assert sorted(output.read_text().split()) == sorted([*(f"f{n}.o" for n in range(24)), "main.o"])
    done = subprocess.run([folder / "program"], capture_output=True, text=True, check=True)
    assert int(done.stdout) == _expected(24)
    again = subprocess.run([make, "-C", folder, "-q"], check=False)
    assert again.returncode == 0, "something is out of date"


def test_git_gc(runner: Runner) -> None:
    git, folder, output = program("git"), runner.folder / "repository", runner.folder / "output"
    runner.environment |= {"HOME": str(runner.folder), "GIT_CONFIG_NOSYSTEM": "1"}

    def run(*words: str, given: bytes | None = None) -> str:
        done = subprocess.run([git, "-C", str(folder), *words], input=given, env=runner.environment,
                              capture_output=True, timeout=PATIENCE, check=False)  # fmt: skip
        assert not done.returncode, f"git {words}: {done.stderr.decode()}"
        return (done.stdout + done.stderr).decode()

    folder.mkdir()
    run("init", "-q", "-b", "main")
    run("fast-import", "--quiet", given=_history(700))
    before = run("rev-list", "--objects", "--all")
    command: list[str | Path] = [git, "-C", folder, "-c", "pack.threads=2", "gc", "--aggressive", "--prune=now"]
    target = runner.spawn(command, stdout=output, stderr=output)
    for _ in range(2):
        _runs(target, "git", output)
        target = cycle(runner, target)
    finish(target)
    assert run("fsck", "--full", "--strict") == ""
    assert run("rev-list", "--objects", "--all") == before
    assert run("count-objects") == "0 objects, 0 kilobytes\n"


def _history(commits: int) -> bytes:
    """A stream for git fast-import: one file that changes in every commit, and one more with each."""
    source = random.Random(5)
    lines = [source.randbytes(20).hex() for _ in range(400)]
    parts = []
    for number in range(commits):
        lines[source.randrange(len(lines))] = source.randbytes(20).hex()
        text, other = "\n".join(lines).encode(), source.randbytes(200).hex().encode()
        parts.append(
            b"commit refs/heads/main\ncommitter A <a@b> %d +0000\ndata 1\nx\n" % (1700000000 + number)
            + b"M 100644 inline text\ndata %d\n%s\n" % (len(text), text)
            + b"M 100644 inline other%d\ndata %d\n%s\n" % (number, len(other), other)
        )
    return b"".join(parts)


POOL = """
import hashlib, multiprocessing, os, sys
def work(number):
    digest = hashlib.sha256(b"%d" % number)
    for _ in range(20000):
        digest.update(digest.digest())
    return number, digest.hexdigest()
def main():
    context = multiprocessing.get_context(sys.argv[1])
    with context.Manager() as manager, context.Pool(3) as pool:
        shared, lock = manager.dict(), context.Lock()
        for number, digest in pool.imap_unordered(work, range(120), chunksize=3):
            with lock:
                shared[number] = digest
            print(number, flush=True)
        print("result", *(shared[number] for number in range(120)), flush=True)
        pool.close()
        pool.join()
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str, runner: Runner) -> None:
    """Workers, queues over pipes, semaphores in /dev/shm, a manager behind a unix socket."""
    script, output = runner.folder / "script.py", runner.folder / "output"
    script.write_text(POOL)
    runner.environment["TMPDIR"] = str(runner.folder)
    target = runner.spawn([sys.executable, *PYTHON, script, method], stdout=output, stderr=runner.folder / "errors")
    for _ in range(2):
        goes_on(target, output)
        # A named semaphore in /dev/shm is made under another name, which is gone by now.
        target = cycle(runner, target, "--link-remap")
    members = descendants(target.pid)
    finish(target)
    reap(members)
    wanted = []
    for number in range(120):
        digest = hashlib.sha256(b"%d" % number)
        for _ in range(20000):
            digest.update(digest.digest())
        wanted.append(digest.hexdigest())
    assert output.read_text().splitlines()[-1].split() == ["result", *wanted], tail(runner.folder / "errors")


NODE = """
const { Worker, isMainThread, parentPort } = require('worker_threads');
const { createHash } = require('crypto'), { spawn } = require('child_process'), fs = require('fs');
if (!isMainThread) {
    parentPort.on('message', (number) => {
        let digest = String(number);
        for (let i = 0; i < 3000; i++) digest = createHash('sha256').update(digest).digest('hex');
        parentPort.postMessage([number, digest]);
    });
} else {
    const results = {}, child = spawn('cat'), workers = [new Worker(__filename), new Worker(__filename)];
    let sent = 0, echoed = 0, got = 0;
    child.stdout.on('data', (data) => { echoed += data.toString().split('\\n').length - 1; finish(); });
    const give = (worker) => { if (sent < 200) worker.postMessage(sent++); };
    const finish = () => {
        if (got < 200 || echoed < 200) return;
        child.stdin.end();
        workers.forEach((worker) => worker.terminate());
        fs.writeSync(1, 'result ' + Object.keys(results).map((key) => results[key]).join(' ') + '\\n');
    };
    workers.forEach((worker) => {
        worker.on('message', ([number, digest]) => {
            results[number] = digest; got++;
            child.stdin.write(number + '\\n');
            fs.writeSync(1, number + '\\n');
            give(worker); finish();
        });
        give(worker);
    });
}
"""


RUBY = """
require "digest"
$stdout.sync = true
results, lock, queue = {}, Mutex.new, Queue.new
600.times { |number| queue << number }
pipe = IO.popen("exec cat", "r+")
threads = 3.times.map do
  Thread.new do
    until queue.empty?
      number = queue.pop(true) rescue break
      digest = number.to_s
      3000.times { digest = Digest::SHA256.hexdigest(digest) }
      lock.synchronize do
        results[number] = digest
        pipe.puts number
        raise unless pipe.gets.to_i == number
        puts number
      end
    end
  end
end
threads.each(&:join)
puts "result " + results.sort.map(&:last).join(" ")
pipe.close
"""


@pytest.mark.parametrize(("name", "text", "count"), [("node", NODE, 200), ("ruby", RUBY, 600)], ids=["node", "ruby"])
def test_interpreter(name: str, text: str, count: int, runner: Runner) -> None:
    """Worker threads and a child over pipes: Node.js with its compiler and event loop, Ruby with its timer thread."""
    interpreter, script, output = program(name), runner.folder / "script.js", runner.folder / "output"
    script.write_text(text)
    target = runner.spawn([interpreter, script], stdout=output, stderr=runner.folder / "errors")
    for _ in range(2):
        goes_on(target, output)
        target = cycle(runner, target)
    wait_until("it ends", target.ended, PATIENCE)
    assert target.status == 0, f"it {target.fate()}: {tail(runner.folder / 'errors')}"
    assert output.read_text().splitlines()[-1].split() == ["result", *_digests(count)]


def _digests(count: int) -> list[str]:
    """For each number the digest of its digits' digest's digest's ... 3000 times."""
    found = []
    for number in range(count):
        digest = str(number)
        for _ in range(3000):
            digest = hashlib.sha256(digest.encode()).hexdigest()
        found.append(digest)
    return found


SQLITE = """
import os, sqlite3, sys
path, stop = sys.argv[1:]
writer, reader = sqlite3.connect(path), sqlite3.connect(path)
writer.execute("PRAGMA journal_mode = WAL")
writer.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, value INTEGER)")
writer.commit()
step = 0
while not os.path.exists(stop):
    writer.execute("BEGIN")
    for k in range(50):
        writer.execute("INSERT INTO t (value) VALUES (?)", (step * k,))
    seen = reader.execute("SELECT count(*) FROM t").fetchone()[0]
    assert seen == step * 50, (seen, step)
    print(step, flush=True)
    writer.commit()
    step += 1
print("result", reader.execute("SELECT sum(value) FROM t").fetchone()[0],
      reader.execute("PRAGMA integrity_check").fetchone()[0], flush=True)
"""


def test_sqlite_with_a_write_ahead_log(runner: Runner) -> None:
    """Two connections, shared memory in a file, and POSIX locks on it."""
    script, output, database, stop = (runner.folder / name for name in ("script.py", "output", "data.db", "stop"))
    script.write_text(SQLITE)
    command: list[str | Path] = [sys.executable, *PYTHON, script, database, stop]
    target = runner.spawn(command, stdout=output, stderr=runner.folder / "errors")
    for _ in range(2):
        goes_on(target, output)
        target = cycle(runner, target, "--file-locks")
    goes_on(target, output)
    stop.touch()
    finish(target)
    *steps, result = output.read_text().splitlines()
    assert steps == [str(number) for number in range(len(steps))]
    assert result == f"result {sum(s * k for s in range(len(steps)) for k in range(50))} ok"
