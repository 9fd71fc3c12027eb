"""torch has the private names that the package uses, and one that it has not costs a feature, never the model."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.torch_private import NAMES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cudnn_flex_compile"
KEPT = ("torch._subclasses.fake_tensor:FakeTensorMode", "torch._subclasses.fake_tensor:FakeTensor")
WITHOUT_CONSTANTS = "torch.utils._python_dispatch:_disable_current_modes"


def test_torch_has_them_all():
    lines = [f"{name.where}: {name.use}; without it: {name.without}" for name in torch_private.missing()]
    print("\n".join([f"torch {torch.__version__}; the names are those of {torch_private.SEEN}; missing:", *lines]))
    assert not lines


def test_each_says_what_it_is_for_and_what_is_done_without_it():
    assert all(name.use and name.without for name in NAMES)
    assert len({name.where for name in NAMES}) == len(NAMES)


@pytest.fixture(scope="module")
def hidden():
    """By name: what becomes of a model's calls without it."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # `import torch` then loads no module of ours
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.hidden_names", *(name.where for name in NAMES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in found}, done.stderr


@pytest.mark.any_torch
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name", [name.where for name in NAMES])
def test_without_it_the_backend_imports_and_a_model_compiles(hidden, name):
    lines, errors = hidden
    assert "error" not in lines.get(name, {"error": "did not come to an end"}), (lines.get(name), errors[-3000:])
    assert lines[name]["calls"] == (["TORCH"] * 2 if name in KEPT else [None] * 2)


def _names(tree):
    """The names that a module imports, those that it reads of what it has imported, and those that it has as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch[\w.]*", str(node.value)):
            yield str(node.value)


PRIVATE = ("_version", "_schema", "_cdata", "_orig_mod", "_compiled_call_impl", "_execution_engine", "_op_dispatcher")


def _is_private(name):
    first, *rest = name.split(".")
    of_torch = first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)
    return of_torch or (bool(rest) and rest[-1] in PRIVATE) or name.endswith((".node.hint", ".node.expr"))


def test_no_other_module_uses_one():
    """Also `meta["example_value"]` is written and read in one place."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if path.name == "torch_private.py":
            continue
        found += [f"{path.relative_to(ROOT)}: {name}" for name in _names(ast.parse(text)) if _is_private(name)]
        found += [f"{path.relative_to(ROOT)}: example_value"] if '"example_value"' in text else []
    assert not found, "\n".join(found)


class Through(TorchDispatchMode):
    """Calls each op as it is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_compiles_attention_under_a_dispatch_mode(training):
    """As a shape without a plan needs it at the first call of a graph, which AOTAutograd runs under such a mode."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 32, 16)
    expected = flex_attention(x, x, x)

    def kernel(given):
        with torch_private.above_autograd(), torch.set_grad_enabled(training):
            return torch.compile(flex_attention, backend="aot_eager", fullgraph=True)(given, given, given)

    with torch.library._scoped_library("cudnn_flex_test", "FRAGMENT") as library:
        library.define("attention(Tensor x) -> Tensor")
        library.impl("attention", kernel, "CPU")
        with Through():
            found = torch.ops.cudnn_flex_test.attention(x)
    torch.testing.assert_close(found, expected)


def test_a_kernel_is_compiled_once_whether_a_default_device_is_set_or_not():
    """As torch has it where the backward of a graph runs for the first time, and not where a CUDA graph records it."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=counter, fullgraph=True)
    x = torch.randn(4)
    for device in (torch.device("cpu"), contextlib.nullcontext()):
        with device:
            modes = torch.overrides._get_current_function_mode_stack()
            with torch_private.above_autograd():
                compiled(x)
            assert torch.overrides._get_current_function_mode_stack() == modes
    assert counter.frame_count == 1
