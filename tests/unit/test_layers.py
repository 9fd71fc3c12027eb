"""Imports run one way, and importing the package imports little: no cuDNN, and no torch before it is wanted.

pyproject.toml has ruff ban `cudnn` outside of engine/, and torch's private modules outside of torch_private.py.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cudnn_flex_compile"
# From the lowest up. A module imports those of lower layers, and of its own; also inside of functions.
LAYERS = (
    ("locks", "reasons", "config", "settings", "phases", "torch_private", "inductor_seam", "script", ""),
    ("scoremod",),
    ("engine",),
    ("kernels",),
    ("ops",),
    ("report",),
    ("passes",),
    ("inner",),
    ("backend",),
    ("inductor_pass", "outside"),
    ("installation", "explanation", "testing", "bench", "calibrate"),
    ("run",),
    ("cli",),
)
MOST_ROOMS = {"engine": 20, "passes": 8}  # files and folders at the top
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """Each file, by the name of its module within the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(modules())


def executed(node):
    """All nodes but those that are for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from executed(child)


def imports(path):
    """The modules of the package that a file imports, wherever."""
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, module = name.partition(".")
            if head == PACKAGE.name and module:
                yield module if module in FILES else module.rpartition(".")[0]


IMPORTS = {name: set(imports(path)) - {name, ""} for name, path in FILES.items() if name}


def test_each_part_has_a_layer():
    assert {name.split(".")[0] for name in FILES} == set(LEVEL)


def test_folders_can_be_seen_at_a_glance():
    rooms = {folder: {name.split(".")[1] for name in FILES if name.startswith(f"{folder}.")} for folder in MOST_ROOMS}
    assert all(len(rooms[folder]) <= most for folder, most in MOST_ROOMS.items()), rooms


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_run_one_way(name):
    mine = LEVEL[name.split(".")[0]]
    assert not {other for other in IMPORTS[name] if LEVEL[other.split(".")[0]] > mine}


def test_no_module_imports_itself_by_way_of_others():
    left = dict(IMPORTS)
    while leaves := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


IMPORTERS = ("import_module", "__import__", "find_spec", "resolve_name")


def named(node):
    """The modules that a node imports, by a statement or by a call."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)]
    calls = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS
    return [str(a.value) for a in node.args if isinstance(a, ast.Constant)] if calls else []


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("engine")])
def test_only_the_engine_imports_cudnn(name):
    found = [module for node in ast.walk(ast.parse(FILES[name].read_text())) for module in named(node)]
    assert not [module for module in found if module.split(".")[0] == "cudnn"]


def compares_residual(node):
    return isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "residual"


def asks_itself(node):
    """Whether a node reads the side of a bound, or derives from the parts of a mask what a `MaskForm` answers."""
    return (isinstance(node, ast.Attribute) and node.attr == "side") or compares_residual(node)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("scoremod.masks")])
def test_masks_are_asked(name):
    """A new side of `Bound` is the work of scoremod/masks and of the strategies that write it."""
    found = [node.lineno for node in ast.walk(ast.parse(FILES[name].read_text())) if asks_itself(node)]
    assert not found or name.startswith("engine.graph.strategies"), f"{FILES[name]}, lines {found}"


FRESH = """
import json, sys
{statement}
print(json.dumps([name for name in {watched} if name in sys.modules]))
"""
PASS = "import cudnn_flex_compile.passes.lower_graph, cudnn_flex_compile.kernels.cuda, cudnn_flex_compile.backend"
LITTLE = {
    "import cudnn_flex_compile": [],
    "import cudnn_flex_compile.cli": [],
    "import cudnn_flex_compile.backend": ["torch", "torch._dynamo"],
    "import cudnn_flex_compile.testing": ["torch"],
    PASS: ["torch"],
}
WATCHED = ("torch", "torch._dynamo", "torch._inductor.lowering", "cudnn", "rich", "matplotlib", "pytest")


@pytest.mark.parametrize("statement", LITTLE)
def test_what_importing_imports(statement):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    source = FRESH.format(statement=statement, watched=WATCHED)
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    print(statement, json.loads(done.stdout))
    assert "cudnn" not in json.loads(done.stdout)
    assert set(json.loads(done.stdout)) <= {*LITTLE[statement], *(("pytest",) if "testing" in statement else ())}
