"""Programs on terminals, used as one uses them: keys go in, a screen is looked at, before and after a checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness import Runner, Target, firn_command, low_numbers_in_use, wait_until
from programs import PATIENCE, cycle, descendants, program, reap

pytestmark = [
    pytest.mark.skipif(firn_command() is None, reason="no firn command (set FIRN or make the venv)"),
    pytest.mark.xdist_group("terminals"),
]


class Tmux:
    """A tmux server with a socket of its own; it is a daemon and becomes our child. ``target`` is the server."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._command = [program("tmux"), "-S", str(runner.folder / "socket"), "-f", "/dev/null"]
        self._environment = runner.environment | {"TERM": "screen", "LC_ALL": "C.UTF-8", "PS1": "$ "}

    def start(self, *words: str) -> None:
        with low_numbers_in_use():
            self.run("new-session", "-d", "-x", "80", "-y", "24", *words)
        self.target = Target(int(self.run("display-message", "-p", "#{pid}")), None)

    def run(self, *words: str) -> str:
        """A tmux command, as a user gives it from outside."""
        done = subprocess.run(
            [*self._command, *words], cwd=self._runner.folder, env=self._environment, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert not done.returncode, f"tmux {' '.join(words)}: {done.stderr}"
        return done.stdout

    def new_window(self, *words: str) -> None:
        """A program in a window with the next number; the one that is shown stays the same."""
        with low_numbers_in_use():
            self.run("new-window", "-d", *words)

    def type(self, window: int, *keys: str) -> None:
        self.run("send-keys", "-t", f":{window}", *keys)

    def screen(self, window: int) -> str:
        return self.run("capture-pane", "-p", "-t", f":{window}")

    def shows(self, window: int, *texts: str) -> None:
        """Wait until the window shows the texts."""
        try:
            wait_until(f"{texts} on the screen", lambda: all(text in self.screen(window) for text in texts), PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}; there is\n{self.screen(window)}") from None

    def cycle(self) -> None:
        panes = self.run("list-panes", "-a", "-F", "#{pane_pid} #{pane_tty} #{pane_width} #{pane_dead}")
        self.target = cycle(self._runner, self.target)
        assert self.run("list-panes", "-a", "-F", "#{pane_pid} #{pane_tty} #{pane_width} #{pane_dead}") == panes
        assert {int(line.split()[0]) for line in panes.splitlines()} <= descendants(self.target.pid).keys()

    def end(self) -> None:
        members = descendants(self.target.pid)
        self.run("kill-server")
        wait_until("the server ends", self.target.ended, PATIENCE)
        reap(members)


@contextmanager
def _tmux(runner: Runner, *words: str) -> Iterator[Tmux]:
    made = Tmux(runner)
    made.start(*words)
    yield made
    made.end()


def test_tmux_with_an_editor_and_a_shell(runner: Runner) -> None:
    vim, text = program("vim"), runner.folder / "text"
    text.write_text("".join(f"line {number}\n" for number in range(100)))
    with _tmux(runner, vim, "-u", "NONE", "-N", str(text)) as tmux:
        tmux.new_window("bash --norc")
        tmux.shows(0, "line 0")
        tmux.type(0, "50G", "A", " changed", "Escape", "oan unsaved line")
        tmux.shows(0, "line 49 changed", "an unsaved line")
        tmux.type(1, "x=$((6 * 7)); cd /; sleep 1000 & jobs", "Enter")
        tmux.shows(1, "Running")
        tmux.type(1, "echo $((x + 1)); cat; echo the end of cat $x $PWD", "Enter")
        # Only now the settings of the terminal are those under which cat reads.
        tmux.shows(1, "\n43\n")
        tmux.type(1, "half a line")
        tmux.shows(1, "half a line")
        before = [tmux.screen(window) for window in (0, 1)]
        for _ in range(2):
            tmux.cycle()
        assert [tmux.screen(window) for window in (0, 1)] == before
        # The editor is still inserting, knows its undo list, and writes the file.
        tmux.type(0, " goes on", "Escape", ":w", "Enter")
        tmux.shows(0, "written")
        assert text.read_text().splitlines()[48:52] == [
            "line 48", "line 49 changed", "an unsaved line goes on", "line 50"
        ]  # fmt: skip
        tmux.type(0, "uu:w", "Enter")
        wait_until("the undone file is written", lambda: text.read_text().count("\n") == 100)
        # The line half typed is still in the terminal; the end of file comes from the keyboard.
        tmux.type(1, " is whole", "Enter", "C-d")
        tmux.shows(1, "half a line is whole\nhalf a line is whole\n", "the end of cat 42 /")
        # Job control works in both directions.
        tmux.type(1, "fg", "Enter")
        tmux.shows(1, "\nsleep 1000\n")
        tmux.type(1, "C-z")
        tmux.shows(1, "Stopped")
        tmux.type(1, "kill %1; wait; clear", "Enter")
        # A client that attaches, and a new window with the next number of a terminal.
        tmux.run("resize-window", "-t", ":1", "-x", "60", "-y", "20")
        tmux.type(1, "stty size", "Enter")
        tmux.shows(1, "20 60")
        tmux.new_window("sh")
        tmux.type(2, "tty; echo new=$((1 + 1))", "Enter")
        tmux.shows(2, "/dev/pts/", "new=2")


def test_less_watch_and_nano_in_tmux(runner: Runner) -> None:
    """Full-screen programs: each is in the middle of something, one under script(1), one under timeout(1)."""
    text, counter, typescript = (runner.folder / name for name in ("text", "counter", "typescript"))
    text.write_text("".join(f"line {number}\n" for number in range(1000)))
    counter.write_text("before")
    with _tmux(runner, "timeout", "600", program("less"), str(text)) as tmux:
        tmux.new_window(program("watch"), "-n", "0.2", "cat", str(counter))
        with low_numbers_in_use():
            tmux.new_window(program("script"), "-q", "-f", "-c", "bash --norc", str(typescript))
            wait_until("script has made its terminal", lambda: "bash" in descendants(tmux.target.pid).values())
        tmux.shows(0, "line 5")
        tmux.type(0, "/line 500", "Enter")
        tmux.shows(0, "line 500")
        tmux.shows(1, "before")
        tmux.type(2, "echo one $((1 + 2))", "Enter")
        tmux.shows(2, "one 3")
        for _ in range(2):
            tmux.cycle()
        tmux.type(0, "/line 777", "Enter")
        tmux.shows(0, "line 777")
        counter.write_text("after")
        tmux.shows(1, "after")
        tmux.type(2, "echo two $((2 + 3))", "Enter")
        tmux.shows(2, "one 3", "two 5")
        tmux.type(2, "exit", "Enter")
        wait_until("script has ended", lambda: len(tmux.run("list-windows").splitlines()) == 2)
        assert "two 5" in typescript.read_text()
        tmux.type(0, "q")
        wait_until("less has ended", lambda: len(tmux.run("list-windows").splitlines()) == 1)


def test_screen(runner: Runner) -> None:
    """GNU screen, its server a daemon, with an editor in it."""
    command, text = program("screen"), runner.folder / "text"
    folder = runner.folder / "screens"
    folder.mkdir(mode=0o700)
    runner.environment |= {"SCREENDIR": str(folder), "TERM": "vt100", "HOME": str(runner.folder)}
    (runner.folder / "hardcopy").touch()

    def run(*words: str) -> bool:
        done = subprocess.run(
            [command, "-S", "test", *words], env=runner.environment, cwd=runner.folder, capture_output=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        return not done.returncode

    def shows(wanted: str, patience: float = PATIENCE) -> None:
        def there() -> bool:
            # Before its server listens, screen calls it dead.
            done = run("-X", "hardcopy", str(runner.folder / "hardcopy"))
            return done and wanted in (runner.folder / "hardcopy").read_text(errors="replace")

        wait_until(f"{wanted!r} on the screen", there, patience)

    def start() -> None:
        with low_numbers_in_use():
            run("-c", "/dev/null", "-dm", program("nano"), "-I", str(text))
            shows("GNU nano", PATIENCE / 6)

    try:
        start()
    except AssertionError:
        # Now and then, on a busy machine, screen starts without ever showing its program.
        for name in os.listdir(folder):
            runner.kill(Target(int(name.partition(".")[0]), None))
        pytest.skip("screen does not show its program")
    server = Target(int(os.listdir(folder)[0].partition(".")[0]), None)
    assert run("-X", "stuff", "typed before")
    shows("typed before")
    for _ in range(2):
        server = cycle(runner, server)
    assert run("-X", "stuff", " and after")
    shows("typed before and after")
    assert run("-X", "stuff", "^O^M")
    wait_until("the file is written", lambda: text.exists() and text.read_text() == "typed before and after\n")
    members = descendants(server.pid)
    assert run("-X", "quit")
    wait_until("screen ends", server.ended, PATIENCE)
    reap(members)
    shutil.rmtree(folder)
