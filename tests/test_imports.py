"""Who may import whom, and what the command's hot path may import at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "firn"

# part -> the parts that it may import. Names of types (under TYPE_CHECKING) are free: they bind nothing at run time.
BELOW = {
    "abi": set[str](),
    "errors": set[str](),
    "log": {""},
    "scripts": {"errors"},
    "images": {"errors"},
    "host": {"abi", "errors"},
    "tracee": {"abi", "errors", "host"},
    "resources": {"abi", "errors", "host", "images", "tracee"},
    "faults": {"abi"},
    "dump": {"abi", "errors", "faults", "host", "images", "resources", "scripts", "tracee"},
    "restore": {"abi", "errors", "faults", "host", "images", "resources", "scripts", "tracee"},
    "check": {"abi", "errors", "host", "log"},
    "api": {"check", "dump", "errors", "log", "restore", "scripts"},
    "cli": {"api", "check", "errors", "host", "inspect", "log", "scripts", "unlock", ""},
    "rpc": {"api", "errors", "log", "scripts", ""},
    "crit": {"errors", "images"},
    "inspect": {"errors", "images"},
    "unlock": {"errors", "host", "images", "resources"},
    "": {"api", "errors"},
}

# What costs milliseconds to import, or drags in what does (array: collections.abc).
HEAVY = {
    "argparse",
    "array",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "importlib",
    "json",
    "logging",
    "pathlib",
    "re",
    "signal",
    "socket",
    "subprocess",
    "traceback",
    "typing",
}

# Only ever run off the hot path: the check, the launcher's writer, and what ``main`` prints when asked to.
COLD = {
    "check", "host/probes_*.py", "cli/inspect.py", "cli/launcher.py", "cli/unlock.py", "cli/usage.py", "crit",
    "inspect", "rpc", "unlock.py",
}  # fmt: skip
ON_DEMAND = {("cli/main.py", "traceback")}

FILES = sorted(PACKAGE.rglob("*.py"))


def runtime_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every import that is executed; those for the type checker alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield from runtime_imports(other)
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"
        else:
            yield from runtime_imports(node)


def imports_of(file: Path) -> list[tuple[int, str]]:
    return list(runtime_imports(ast.parse(file.read_text(encoding="utf-8"))))


def is_module(name: str) -> bool:
    path = SOURCE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def ours(file: Path) -> Iterator[tuple[int, str]]:
    """The modules of firn that *file* imports: ``firn`` itself, ``firn.abi.nr``, ..."""
    for line, name in imports_of(file):
        if name.split(".")[0] == "firn":
            yield line, name if is_module(name) else name.rpartition(".")[0]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_direction(file: Path) -> None:
    me = part_of(module_of(file))
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {module}"
        for line, module in ours(file)
        if part_of(module) != me and part_of(module) not in BELOW[me]
    ]
    assert not wrong


@pytest.mark.parametrize("file", sorted((PACKAGE / "resources").rglob("*.py")), ids=lambda file: file.stem)
def test_resources_do_not_know_each_other(file: Path) -> None:
    """A resource is a module or a package in ``resources/``; where two meet, they meet in ``resources/base.py``."""

    def resource(module: str) -> str:
        return ".".join(module.split(".")[2:3])

    me = resource(module_of(file))
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {module}"
        for line, module in ours(file)
        if part_of(module) == "resources" and resource(module) not in ("base", me)
    ]
    assert not wrong


def hot_files() -> list[Path]:
    return [file for file in FILES if not any(file.is_relative_to(PACKAGE / name) for name in COLD)]


@pytest.mark.parametrize("file", hot_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_anywhere_on_the_hot_path(file: Path) -> None:
    """Not even inside a function: what a dump or restore may run through must not pay for it."""
    place = str(file.relative_to(PACKAGE))
    if any(file.match(pattern) for pattern in COLD if "*" in pattern):
        pytest.skip("off the hot path")
    wrong = [
        f"{place}:{line} imports {name}"
        for line, name in imports_of(file)
        if name.split(".")[0] in HEAVY and (place, name.split(".")[0]) not in ON_DEMAND
    ]
    assert not wrong


def loaded_by(code: str) -> set[str]:
    """The modules that are there after *code*, in an interpreter started as the launcher starts it."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{code}\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import firn.dump.orchestrator",
        "import firn.restore.orchestrator",
        "import firn.api, firn.log, firn.scripts; firn.api.DumpOptions(tree=5); firn.log.Log().open()",
        "from firn.cli.main import main; assert main(['firn', 'dump', '-t', '5', '--track-mem', '-D', '/']) == 1",
        "from firn.cli.main import main; assert main(['criu', 'restore', '--lazy-pages', '-d', '-D', '/']) == 1",
    ],
)
def test_the_hot_path_loads_nothing_heavy(code: str) -> None:
    heavy = loaded_by(code) & HEAVY
    assert not heavy


def test_this_test_can_fail() -> None:
    assert "dataclasses" in loaded_by("import dataclasses") & HEAVY
    tree = ast.parse(
        "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    import typing\ndef f():\n    import re\nimport os.path"
    )
    assert [name for _, name in runtime_imports(tree)] == ["re", "os.path"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a dump needs root")
def test_a_whole_dump_and_restore_load_nothing_heavy(tmp_path: Path) -> None:
    """The real thing, with all that is imported on the way."""
    with open("/dev/null", "r+b") as null:
        target = subprocess.Popen(
            ["/bin/sleep", "1000"], stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
        )
    main = "from firn.cli.main import main; assert main(['firn', {}, '-D', '" + str(tmp_path) + "']) == 0"
    try:
        heavy = loaded_by(main.format(f"'dump', '-R', '-t', '{target.pid}'")) & HEAVY
    finally:
        target.kill()
        target.wait()
    # The restored sleep becomes a child of init, which the command cannot wait for: it is ended by its pid.
    restore = main.format("'restore', '-d'") + f"; import os; os.kill({target.pid}, 9)"
    heavy |= loaded_by(restore) & HEAVY
    try:
        os.waitpid(target.pid, 0)  # ours after all, if this process is a subreaper by now
    except ChildProcessError:
        pass
    assert not heavy
