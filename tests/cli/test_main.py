"""The commands from outside: streams, exit statuses, and what a failure looks like. The work itself is faked."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli.runner import SOURCE, Runner

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the commands need root")

DUMP = """
def dump(options, log, post_dump=None):
    log.info("working")
    print(options.tree, options.images_dir, options.work_dir, options.verbosity, os.getcwd(), flush=True)
    return {"freezing_time": 7, "pages_written": 300}
"""

RESTORE = """
class Result:
    root_pid = 5
    exit_status = 42
    stats = {"pages_restored": 16, "restore_time": 9}
def restore(options, log, done):
    print(options.restore_detached, options.foreground_status, flush=True)
    done(Result)
    return Result
"""


def failing(text: str) -> str:
    return f"def dump(options, log, post_dump=None):\n    import firn.errors as e, firn.scripts as s\n    {text}\n"


def test_version(run: Runner) -> None:
    for word in ("-V", "--version", "--vers"):
        assert (run("criu", word).stdout, run("firn", word).stdout) == ("Version: 4.2\n", "firn 0.1.0\n")
    assert run("/usr/local/sbin/criu", "-V").stdout == "Version: 4.2\n"


def test_a_full_stdout_is_an_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        for word in ("--version", "--help"):
            command = [sys.executable, "-m", "firn.cli", word]
            done = subprocess.run(
                command, env={"PYTHONPATH": str(SOURCE)}, stdout=full, stderr=subprocess.PIPE, text=True
            )
            assert (done.returncode, done.stderr) == (1, "firn: error: No space left on device\n")


@pytest.mark.parametrize("words", [["--help"], ["dump", "-h", "--zork"], ["zork", "-h"]])
def test_help(run: Runner, words: list[str]) -> None:
    done = run("criu", *words)
    assert done.returncode == 0 and done.stderr == ""
    for part in ("Usage:", "Commands:", "Check options", "Logging", "--tcp-established", "uffd-noncoop"):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 150


def test_no_words(run: Runner) -> None:
    done = run("criu")
    assert done.returncode == 1 and done.stdout.startswith("\nUsage:\n") and done.stderr == ""
    assert done.stdout.endswith("Try -h|--help for more info\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-v4"], "command is required"),
        (["zork"], "unknown command: zork"),
        (["dump", "more"], "excessive parameter for command dump"),
        (["dump", "more", "words"], "excessive parameters for command dump"),
        (["dump", "--manage-cgroups", "full"], "excessive parameter"),
        (["cpuinfo"], "requires an action"),
        (["cpuinfo", "zork"], "requires an action"),
        (["cpuinfo", "dump", "more"], "excessive parameter"),
        (["check", "--stream"], "--stream cannot be used with the check command"),
        (["restore", "--exec-cmd"], "--exec-cmd requires a command"),
        (["dump", "--exec-cmd", "--", "ls"], "restore only"),
        (["restore", "-d", "--exec-cmd", "--", "ls"], "exclude each other"),
        (["dump", "--file-validation", "zork"], "zork"),
    ],
)
def test_usage_errors(run: Runner, words: list[str], message: str) -> None:
    """criu: the error goes to stderr, the usage to stdout. firn: both to stderr, the usage as a hint."""
    done = run("criu", *words)
    assert done.returncode == 1 and "Usage:" in done.stdout
    assert re.search(rf"^Error \(firn/cli/\w+\.py:\d+\): .*{re.escape(message)}", done.stderr)
    done = run("firn", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("firn: error: ") and done.stderr.endswith("\nTry: firn --help\n")


def test_getopt_speaks_for_itself(run: Runner) -> None:
    done = run("/sbin/criu", "dump", "--zork")
    assert done.returncode == 1 and "Usage:" in done.stdout
    assert done.stderr == "/sbin/criu: unrecognized option '--zork'\n"
    assert run("criu", "swrk").stderr == "Usage: criu swrk <fd>\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dump"], "pid not specified"),
        (["dump", "-t", "0"], "invalid argument for -t: 0"),
        (["dump", "-t", "5", "-D", "/nonexistent"], "image directory /nonexistent: No such file or directory"),
        (["dump", "-t", "5", "-D", "/etc/passwd"], "image directory /etc/passwd: Not a directory"),
        (["dump", "-t", "5", "-W", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["dump", "-t", "5", "-o", "/nonexistent/log"], "/nonexistent/log: No such file or directory"),
        (["restore", "-S"], "--restore-detached"),
        (["dump", "-t", "5", "--inherit-fd", "fd[0]:k"], "restore only"),
        (["check", "--mntns-compat-mode"], "restore only"),
        (["restore", "--log-pid"], "needs --log-file"),
        (["restore", "--empty-ns", "net", "-J", "net:/proc/self/ns/net"], "--join-ns and --empty-ns conflict"),
        (["dump", "-t", "5", "--ps-socket", "2", "--daemon"], "--ps-socket"),
        (["dump", "-t", "5", "--track-mem"], "option --track-mem is not built yet"),
        (["pre-dump", "-t", "5"], "command pre-dump is not built yet"),
        (["page-server"], "command page-server is not built yet"),
        (["lazy-pages"], "command lazy-pages is not built yet"),
        (["service"], "command service is not built yet"),
        (["swrk", "3"], "command swrk is not built yet"),
        (["dedup"], "command dedup is not built yet"),
    ],
)
def test_errors_without_usage(run: Runner, words: list[str], message: str) -> None:
    for program in ("criu", "firn"):
        done = run(program, *words, fake=DUMP + RESTORE)
        assert done.returncode == 1 and done.stdout == ""
        assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr == f"firn: error: {done.stderr.removeprefix('firn: error: ').splitlines()[0]}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["dump", "-t5", "--restore-sibling"],
        ["dump", "-t5", "--log-pid", "-o", "log"],
        ["restore", "-t5", "--track-mem"],
        ["restore", "--freeze-cgroup", "/x"],
        ["dump", "-t5", "--join-ns", "net:/proc/self/ns/net"],
    ],
)
def test_what_criu_ignores_is_ignored(run: Runner, words: list[str]) -> None:
    extra = ["-d"] if words[-1] == "--restore-sibling" else []
    assert run("criu", *words, *extra, fake=DUMP + RESTORE).returncode == 0


@pytest.mark.parametrize(("value", "code"), [("1", 0), ("138", 0), ("139", 1), ("0", 1), ("zork", 1), ("", 1)])
def test_faults(run: Runner, value: str, code: int) -> None:
    assert run("criu", "dump", "-t5", fake=DUMP, environment={"CRIU_FAULT": value}).returncode == code


@pytest.mark.parametrize(("command", "lines"), [("exec", 1), ("show", 2)])
def test_retired_commands(run: Runner, command: str, lines: int) -> None:
    done = run("criu", command)
    assert done.returncode == 255 and len(done.stderr.splitlines()) == lines


def test_a_dump(run: Runner) -> None:
    (run.directory / "i").mkdir()
    (run.directory / "w").mkdir()
    done = run("criu", "dump", "-t", "5", "-D", "i", "-W", "w", "-v4", "-o", "log", fake=DUMP)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"5 {run.directory}/i {run.directory}/w 4 {run.directory}/w\n"
    log = run.directory / "w" / "log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    lines = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    assert lines[1] == "Version: 4.2 (gitid 0)" and lines[3:] == ["working", "Dumping finished successfully"]


def test_directories_default(run: Runner) -> None:
    assert run("firn", "dump", "-t5", fake=DUMP).stdout.split()[1:3] == [str(run.directory)] * 2


def test_statistics(run: Runner) -> None:
    done = run("criu", "dump", "-t", "5", "--display-stats", fake=DUMP)
    assert done.stdout.splitlines()[1:] == [
        "Displaying dump stats:",
        "Freezing time: 7 us",
        "Frozen time: 0 us",
        "Memory dump time: 0 us",
        "Memory write time: 0 us",
        "IRMAP resolve time: 0 us",
        "Memory pages scanned: 0 (0x0)",
        "Memory pages skipped from parent: 0 (0x0)",
        "Memory pages written: 300 (0x12c)",
        "Lazy memory pages: 0 (0x0)",
    ]
    done = run("criu", "restore", "--display-stats", fake=RESTORE)
    assert done.stdout.splitlines()[1:] == [
        "Displaying restore stats:",
        "Pages compared: 0 (0x0)",
        "Pages skipped COW: 0 (0x0)",
        "Pages restored: 16 (0x10)",
        "Restore time: 9 us",
        "Forking time: 0 us",
    ]


def test_the_status_of_a_foreground_restore(run: Runner) -> None:
    """firn passes the program's on; criu says 0."""
    done = run("firn", "restore", fake=RESTORE)
    assert (done.returncode, done.stdout) == (42, "False True\n")
    done = run("criu", "restore", fake=RESTORE)
    assert (done.returncode, done.stdout) == (0, "False False\n")
    detached = RESTORE.replace("42", "None")
    assert run("firn", "restore", "-d", fake=detached).returncode == 0


def test_exec_cmd(run: Runner) -> None:
    words = ("restore", "--exec-cmd", "--", "sh", "-c", "echo $0 $$; grep SigIgn /proc/$$/status; exit 7", "-x")
    process = run.start("firn", *words, fake=RESTORE)
    out, _ = process.communicate(timeout=30)
    lines = out.splitlines()
    assert process.returncode == 7 and lines[1] == f"-x {process.pid}"
    assert not int(lines[2].split()[1], 16) & 1 << (signal.SIGXFSZ - 1)
    done = run("criu", "restore", "--exec-cmd", "--", "/nonexistent/program", fake=RESTORE)
    assert done.returncode == 1 and "cannot run /nonexistent/program: No such file" in done.stderr


def test_obstacles_are_all_told(run: Runner) -> None:
    fake = failing('raise e.Refused([e.Obstacle("fd 3", "a socket", "not yet"), e.Obstacle("fd 4", "a pipe")])')
    done = run("firn", "dump", "-t5", fake=fake)
    assert done.returncode == 1
    assert done.stderr == "firn: error: 2 obstacles to this dump:\n  fd 3: a socket; not yet\n  fd 4: a pipe\n"
    done = run("criu", "dump", "-t5", "-o", "log", fake=fake)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    lines = (run.directory / "log").read_text().splitlines()
    assert all(line.startswith("Error (") for line in lines)
    assert lines[2].endswith("):   fd 4: a pipe") and lines[-1].endswith("): Dumping FAILED.")


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('raise e.TargetError("process 5 is not there", "look again")', 1, "process 5 is not there (look again)"),
        ('raise OSError(1, "ptrace 5: not permitted")', 1, "ptrace 5: not permitted"),
        ('open("/nonexistent")', 1, "/nonexistent: No such file or directory"),
        ('raise s.ScriptFailed("post-dump", ["/x"])', 255, "post-dump script failed: /x"),
        ('raise s.ScriptFailed("pre-dump", ["/x"])', 1, "pre-dump script failed: /x"),
        ("{}[5]", 1, "internal error: KeyError: 5; at <string>:"),
        ("raise MemoryError", 1, "internal error: MemoryError"),
        ("dump(options, log)", 1, "internal error: RecursionError"),
        ("raise e.NotBuilt('pipes are not built yet')", 1, "pipes are not built yet"),
    ],
)
def test_failures(run: Runner, text: str, code: int, message: str) -> None:
    done = run("firn", "dump", "-t5", fake=failing(text))
    assert done.returncode == code and done.stderr.startswith(f"firn: error: {message}")
    assert "Traceback" not in done.stderr
    done = run("criu", "dump", "-t5", fake=failing(text))
    assert done.returncode == code and done.stderr.endswith("): Dumping FAILED.\n") and message in done.stderr


def test_traceback_on_demand(run: Runner) -> None:
    done = run("firn", "dump", "-t5", fake=failing("{}[5]"), environment={"FIRN_TRACEBACK": "1"})
    assert "Traceback (most recent call last)" in done.stderr and "KeyError: 5" in done.stderr


WAITING = """
def dump(options, log, post_dump=None):
    import time
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)
        print("undone", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(run: Runner, number: int) -> None:
    """What was done is undone, even if the user insists; then firn exits with 128 + signal, criu dies by it."""
    for program, code in (("firn", 128 + number), ("criu", -number)):
        process = run.start(program, "dump", "-t5", fake=WAITING)
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.send_signal(number)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (out, process.returncode) == ("undone\n", code)
        assert f"interrupted by signal {number}" in err


def test_ignored_signals_stay_ignored(run: Runner) -> None:
    fake = 'def dump(o, l, p=None):\n    os.kill(os.getpid(), 1)\n    print("still here", flush=True)\n    return {}\n'
    fake = "import _signal; _signal.signal(1, _signal.SIG_IGN)\n" + fake
    assert run("firn", "dump", "-t5", fake=fake).stdout == "still here\n"


def test_scripts_around_a_dump(run: Runner) -> None:
    script = run.directory / "script"
    script.write_text('#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID; exit "$(cat code)"\n')
    script.chmod(0o755)
    (run.directory / "code").write_text("0")
    fake = "def dump(o, l, post=None):\n    print('dumped', flush=True)\n    post(5)\n    return {}\n"
    words = ("dump", "-t5", "--action-script", str(script), "-o", "-")
    done = run("criu", *words, fake=fake)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["pre-dump 5", "dumped", "post-dump 5"])
    (run.directory / "code").write_text("9")
    done = run("criu", *words, fake=fake)
    assert done.returncode == 1 and "dumped" not in done.stdout and "pre-dump script failed" in done.stdout


def test_check(run: Runner) -> None:
    fake = """
def check(options, out, log):
    out(f'{options.feature} {options.all} {options.criu_style}')
    return 1
"""
    done = run("criu", "check", "--feature", "a", "--feature", "uffd", fake=fake)
    assert (done.returncode, done.stdout) == (1, "uffd False True\n")
    done = run("firn", "check", "--all", fake=fake)
    assert (done.returncode, done.stdout) == (1, "None True False\n")


def test_warnings_of_restore(run: Runner) -> None:
    done = run("firn", "restore", "-t", "5", "--network-lock", "skip", fake=RESTORE)
    assert done.returncode == 42
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["warning", "warning"]
    assert "SIGHUP" in run("firn", "restore", "-dsj", fake=RESTORE).stderr
    assert run("firn", "restore", "-ds", fake=RESTORE).stderr == ""
    done = run("firn", "restore", fake=RESTORE, environment={"CRIU_LIBS_DIR": "/x"})
    assert "plugins" in done.stderr


def test_verbosity_zero_is_silent(run: Runner) -> None:
    done = run("criu", "dump", "-v0", "-o", "log", "-t5", fake=failing("raise e.TargetError('x')"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (run.directory / "log").read_bytes() == b""


def test_closed_standard_descriptors(run: Runner) -> None:
    """No file of firn's takes the number of stdout or stderr, and so no message goes into it."""
    fake = """
def dump(options, log, post_dump=None):
    descriptor = os.open("image", os.O_WRONLY | os.O_CREAT, 0o600)
    assert descriptor > 2 and options.images_dir_fd > 2
    return {}
"""
    process = run.start("firn", "dump", "-t5", "--display-stats", fake=fake, closed=(0, 1, 2))
    assert process.wait(timeout=30) == 0
    assert (run.directory / "image").read_bytes() == b""


@pytest.mark.parametrize(
    ("program", "uid", "capabilities", "words"),
    [
        ("criu", 0, 0, ["dump", "-t5"]),
        ("criu", 1000, 1 << 40, ["dump", "-t5"]),
        ("firn", 0, 0, ["dump", "-t5"]),
        ("firn", 1000, 1 << 21, ["restore"]),
        ("criu", 0, 0, ["check"]),
    ],
)
def test_privileges(run: Runner, program: str, uid: int, capabilities: int, words: list[str]) -> None:
    fake = (
        f"from firn.host import features\nfeatures.effective_caps = lambda: {capabilities}\nos.geteuid = lambda: {uid}"
    )
    done = run(program, *words, fake=DUMP + RESTORE + fake)
    assert done.returncode == 1
    shown, silent = (done.stdout, done.stderr) if program == "criu" else (done.stderr, done.stdout)
    assert silent == "" and len(shown.splitlines()) == (2 if program == "criu" else 1)
    assert ("CAP_SYS_ADMIN" in shown) == (uid == 0) and ("--unprivileged" in shown) == (uid != 0)


def test_anybody_may_ask_what_firn_needs(run: Runner) -> None:
    fake = (
        "from firn.host import features\nfeatures.effective_caps = lambda: 0\ndef check(o, out, log):\n    return 0\n"
    )
    assert run("firn", "check", fake=fake).returncode == 0


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "firn.cli", "--version"], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert done.stdout == "firn 0.1.0\n"


@pytest.mark.skipif(not Path("/usr/sbin/criu").exists(), reason="needs Debian's criu")
@pytest.mark.parametrize(
    "words",
    [
        ["--tr", "dump"],
        ["--zork"],
        ["--zork=5", "dump"],
        ["-q"],
        ["-vq"],
        ["-jq", "dump"],
        ["-t"],
        ["dump", "--tree"],
        ["dump", "--tree=0"],
        ["dump", "-t", "-5"],
        ["dump", "--leave-running=1"],
        ["dump", "--leave"],
        ["dump", "--port", "zork"],
        ["dump", "--veth-pair", "zork"],
        ["dump", "-M", "zork"],
        ["dump", "--empty-ns", "zork"],
        ["check", "--feature"],
        ["dump", "--external"],
        ["dump", "--extern", "macvlan[a]:no-such-device"],
    ],
)
def test_the_same_answer_as_criu(run: Runner, words: list[str]) -> None:
    """Where an older CRIU that is at hand knows the same options: status, usage, and the message's text."""
    theirs = subprocess.run(["criu", *words], executable="/usr/sbin/criu", capture_output=True, text=True, timeout=30)
    ours = run("criu", *words)
    assert ours.returncode == theirs.returncode
    assert ("Usage:" in ours.stdout) == ("Usage:" in theirs.stdout)
    if not theirs.stderr.startswith("Error") or "invalid argument" in theirs.stderr:
        assert ours.stderr.partition("): ")[2] == theirs.stderr.partition("): ")[2]
