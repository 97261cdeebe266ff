"""The architecture: helpers.py is pure and small, rooms are small and without cycles, what is named exists.

Every check is a function over source text that lists what is wrong; beside it stands a bad example that it finds.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import helpers

HELPERS = (ROOT / "helpers.py").read_text(encoding="utf-8")
ROOMS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "engine").glob("[a-z]*.py"))}

# What helpers.py may import inside a function, and why that is no effect.
LAZY = {
    "pycld2": "finds the language of a text, as 2024's filter did; compiled, and needed for the filter alone",
    "scipy": "the bootstrap, always with the same seed; takes a second to import",
    "sacrebleu": "chrF, a pure function; needed for scores alone",
    "rouge_score": "ROUGE-L, a pure function; needed for scores alone",
    "fugashi": "MeCab's words: reads its own dictionary once, and nothing else",
}
# Modules of the standard library that read, write, wait, ask or run something.
EFFECTS = {
    "asyncio",
    "builtins",
    "ctypes",
    "datetime",
    "fileinput",
    "ftplib",
    "getpass",
    "glob",
    "http",
    "io",
    "logging",
}
EFFECTS |= {"mmap", "multiprocessing", "os", "pathlib", "random", "runpy", "secrets", "selectors", "shelve", "shutil"}
EFFECTS |= {"signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "tempfile", "threading"}
EFFECTS |= {"time", "urllib", "uuid", "warnings", "webbrowser", "xmlrpc"}
ACTS = {"open", "print", "input", "exec", "eval", "compile", "breakpoint", "__import__", "import_module"}
# Methods of paths and of numpy that read or write.
ACTS |= {
    "read_text",
    "write_text",
    "read_bytes",
    "write_bytes",
    "mkdir",
    "unlink",
    "rmdir",
    "iterdir",
    "rglob",
    "touch",
}
ACTS |= {"fromfile", "tofile", "loadtxt", "savetxt", "genfromtxt", "memmap", "savez", "savez_compressed"}
STREAMS = {"stdin", "stdout", "stderr", "argv", "path", "modules", "exit", "environ"}  # of sys


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names, by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def is_for_editors(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running(node: ast.AST, door: str = "") -> Iterator[ast.AST]:
    """All nodes below `node` without what is for editors and without the function `door`."""
    for child in ast.iter_child_nodes(node):
        if not is_for_editors(child) and not (isinstance(child, ast.FunctionDef) and child.name == door):
            yield child
            yield from running(child, door)


def at_top(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: those outside functions."""

    def below(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not is_for_editors(child) and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield child
                yield from below(child)

    return below(tree)


def foreign_imports(source: str, allowed: set[str]) -> list[str]:
    """The modules imported at the top that are neither of the standard library nor `allowed`."""
    names = [name for node in at_top(ast.parse(source)) for name in imported(node)]
    return [name for name in names if name.partition(".")[0] not in allowed | sys.stdlib_module_names]


def impurities(source: str) -> list[str]:
    """The lines of helpers.py with an effect, or with an import beyond the standard library, numpy and LAZY; the door,
    a module's `__getattr__`, is left out.
    """
    found = []
    for node in running(ast.parse(source), door="__getattr__"):
        modules = {name.partition(".")[0] for name in imported(node)}
        wrong = modules & EFFECTS | modules - sys.stdlib_module_names - LAZY.keys() - {"numpy"}
        if isinstance(node, ast.Name) and node.id in ACTS:
            wrong.add(node.id)
        elif isinstance(node, ast.Attribute):
            of_module = isinstance(node.value, ast.Name) and node.value.id
            if node.attr in ACTS and not (of_module == "re" and node.attr == "compile"):
                wrong.add(node.attr)
            elif (of_module == "sys" and node.attr in STREAMS) or (
                of_module in ("np", "numpy") and node.attr in ("load", "save", "random")
            ):
                wrong.add(f"{of_module}.{node.attr}")
        found += [f"line {node.lineno}: {name}" for name in sorted(wrong)]
    return found


def too_long(sources: Mapping[str, str], limit: int) -> dict[str, int]:
    """The files with more lines than `limit`."""
    lines = {name: len(source.splitlines()) for name, source in sources.items()}
    return {name: count for name, count in lines.items() if count > limit}


def rooms_used(source: str) -> set[str]:
    """The rooms that a room imports or reaches through helpers, anywhere in it."""
    used = set()
    for node in running(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "engine":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "helpers":
            used.add(node.attr)
        used |= {name.removeprefix("engine.") for name in imported(node) if name.startswith("engine.")}
    return used


def cycle(rooms: Mapping[str, str]) -> list[str]:
    """A cycle of imports among rooms (name: source), [] if there is none."""
    graph = {name: rooms_used(source) & rooms.keys() for name, source in rooms.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@lru_cache
def defined(source: str) -> set[str]:
    """The names that a module has: what is assigned, defined or imported at its top."""
    names = set()
    for node in at_top(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    functions = (ast.FunctionDef, ast.ClassDef)
    return names | {node.name for node in ast.parse(source).body if isinstance(node, functions)}


def chain(node: ast.AST) -> tuple[str, ...]:
    """`helpers.records.read` as ("helpers", "records", "read"); () for what is no chain of names."""
    if isinstance(node, ast.Name):
        return (node.id,)
    left = chain(node.value) if isinstance(node, ast.Attribute) else ()
    return (*left, node.attr) if left else ()


def rooms_by_name(tree: ast.Module) -> set[str]:
    """The rooms that code imports by name (`from engine import files`) and whose name it uses for nothing else."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "engine"]
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {alias.name for node in imports for alias in node.names if not alias.asname} - stored


def unknown_names(source: str, helpers: str, rooms: Mapping[str, str]) -> list[str]:
    """What code names of helpers and its rooms although it does not exist, by the syntax tree of all of them."""
    known = {name: defined(text) for name, text in rooms.items()} | {"helpers": defined(helpers) | rooms.keys()}
    wrong, tree = [], ast.parse(source)
    by_name = rooms_by_name(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = chain(node)
            reached = len(names) == 2 if names[:1] != ("helpers",) else len(names) in (2, 3)
            if reached and names[0] in {"helpers", *by_name}:
                module, name = names[-2:]
                if name not in known.get(module, {name}):
                    wrong.append(".".join(names))
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("engine.")
            names = rooms.keys() if module == "engine" else known.get(module, {alias.name for alias in node.names})
            wrong += [f"{module}.{alias.name}" for alias in node.names if alias.name not in names]
    return sorted(set(wrong))


def code_of(path: Path) -> str:
    """The Python code of a script or notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


SCRIPTS = [path for folder in ("benchmarks", "pipelines", "tests", "data") for path in (ROOT / folder).rglob("*.py")]
SCRIPTS += [*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]


def test_the_door_opens_every_room():
    assert sorted(helpers.ROOMS) == sorted(ROOMS)
    with pytest.raises(AttributeError, match="has no attribute 'cellar'"):
        getattr(helpers, "cellar")  # noqa: B009  so that the check below does not find it


def test_helpers_imports_nothing_but_the_standard_library_and_numpy():
    assert foreign_imports(HELPERS, {"numpy"}) == []
    assert foreign_imports("import torch\nfrom engine import files", {"numpy"}) == ["torch", "engine"]
    assert foreign_imports("try:\n    import yaml\nexcept ImportError:\n    pass", {"numpy"}) == ["yaml"]
    for_editors = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine import files"
    assert foreign_imports(for_editors + "\ndef f():\n    import torch", {"numpy"}) == []


def test_helpers_has_no_effect():
    assert impurities(HELPERS) == []


@pytest.mark.parametrize(
    "effect",
    [
        "print(1)",
        "open('rows.jsonl')",
        "eval('1')",
        "show = print",
        "import os",
        "from os import environ",
        "import os.path",
        "import subprocess",
        "import socket",
        "from urllib.request import urlopen",
        "import time",
        "from pathlib import Path",
        "def f(path):\n    return path.read_text()",
        "def f():\n    import torch",
        "def f():\n    from engine import files",
        "import sys\nsys.stdout.write('1')",
        "import numpy as np\nnp.save('a', 1)",
        "import importlib\nimportlib.import_module('torch')",
    ],
)
def test_an_effect_in_helpers_is_found(effect):
    assert impurities(HELPERS + "\n" + effect)


def test_every_lazy_import_is_needed():
    used = {name.partition(".")[0] for node in running(ast.parse(HELPERS)) for name in imported(node)}
    assert LAZY.keys() <= used


def test_files_keep_their_size():
    assert too_long({"helpers.py": HELPERS}, 1000) == {}
    assert too_long(ROOMS, 350) == {}
    assert too_long({"small": "a = 1\n" * 350, "large": "a = 1\n" * 351}, 350) == {"large": 351}


def test_rooms_have_no_cycle():
    assert cycle(ROOMS) == []
    rooms = {"one": "from engine import two", "two": "from engine.three import f", "three": ""}
    assert cycle(rooms) == []
    assert set(cycle(rooms | {"three": "def f():\n    from engine import one"})) == {"one", "two", "three"}
    assert set(cycle({"one": "import helpers\nhelpers.two.f()", "two": "import engine.one"})) == {"one", "two"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_name_exists(path):
    assert unknown_names(code_of(path), HELPERS, ROOMS) == []


def test_a_name_that_does_not_exist_is_found():
    helpers, rooms = "import re\nLIMIT = 3\ndef f(): pass", {"files": "class File: pass\nA, B = 1, 2"}
    right = "helpers.f(helpers.LIMIT)\nhelpers.files.File.read\nhelpers.files.B\nfrom helpers import f\n"
    assert unknown_names(right + "from engine.files import A\nother.g()", helpers, rooms) == []
    wrong = "helpers.g()\nhelpers.files.C\nhelpers.cellar.x\nfrom helpers import h\nfrom engine import cellar"
    wrong += "\nfrom engine.files import D\nfrom engine import files\nfiles.E"
    expected = ["engine.cellar", "files.D", "files.E", "helpers.cellar", "helpers.files.C", "helpers.g", "helpers.h"]
    assert unknown_names(wrong, helpers, rooms) == expected


def loaded_by(module: str) -> set[str]:
    """The packages beyond the standard library that `import module` loads, in a process of its own."""
    code = f"import sys; before = {{*sys.modules}}; import {module}; print(*{{*sys.modules}} - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    return packages - sys.stdlib_module_names - {"helpers", "engine"}


def test_what_the_set_up_cell_uses_needs_nothing_that_it_installs():
    """helpers, parameters and machine are imported before anything is installed, and before unsloth."""
    for source in (HELPERS, ROOMS["parameters"], ROOMS["machine"]):
        assert foreign_imports(source, {"numpy", "helpers"}) == []
    assert loaded_by("helpers, engine.parameters, engine.machine") == {"numpy"}


def test_run_py_imports_no_pandas():
    loaded = loaded_by("run")
    assert "papermill" in loaded and not {"pandas", "torch", "transformers", "datasets"} & loaded
