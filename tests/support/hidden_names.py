"""Compiles a small model with private names of torch hidden from the package, one at a time; prints a line for each.

    python3 -m tests.support.hidden_names [name ...]

Each name is hidden in a process of its own, into which nothing of the package was imported before. A line is JSON: the
name, and "calls" (the reasons of those kept, or null where lowered), or "error".
"""

import json
import os
import pkgutil
import sys
import traceback
from unittest.mock import patch

import torch
import torch._dynamo
from torch.nn.attention import flex_attention as stock

from tests.support.uncompiled import uncompiled

INDUCTORS = ("torch._inductor", "torch._functorch")


def hiding(name):
    """pkgutil.resolve_name, for which there is no such name."""
    resolve = pkgutil.resolve_name

    def found(where):
        if where == name:
            raise AttributeError(f"hidden: {where}")
        return resolve(where)

    return patch.object(pkgutil, "resolve_name", found)


slopes, shift = torch.linspace(0.1, 0.4, 4), torch.tensor(2.0)
pairs = stock.create_block_mask(stock.noop_mask, None, None, 64, 64, device="cpu")


def model(q, k, v):
    blocks = stock.create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cpu")
    out = stock.flex_attention(q, k, v, lambda s, b, h, i, j: s - slopes[h] * (i - j) + shift, blocks)
    return stock.flex_attention(torch.tanh(out), k, v, lambda s, b, h, i, j: 2 * torch.tanh(s / 2), pairs)


def warm():
    """Have torch import what it imports when a model is compiled, once for all processes that are forked.

    No backward runs: its threads would not be there in these processes.
    """
    given = [torch.randn(1, 4, 64, 16) for _ in range(3)]
    with torch.no_grad():
        torch.compile(model, backend="aot_eager")(*given)
        torch.compile(torch.sin)(*given[:1])
    torch._dynamo.reset()


def calls(inner_backend):
    """What becomes of a model's two calls, whose numbers and gradients are those of the model itself."""
    from cudnn_flex_compile.backend import cudnn_flex
    from cudnn_flex_compile.report.report import collect

    torch.manual_seed(0)

    def backend(graph_module, inputs):
        return cudnn_flex(graph_module, inputs, options={"lower": "always", "inner_backend": inner_backend})

    leaves = [torch.randn(1, 4, 64, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with collect() as report:
        out = torch.compile(model, backend=backend)(*leaves)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    with uncompiled():
        expected = model(*exact)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for found, true in zip((out, *gradients), (expected, *wanted), strict=True):
        assert (found - true).norm() <= 5e-2 * true.norm(), "the numbers are wrong"
    return [None if call.reason is None else call.reason.code.name for call in report.calls]


def verdict(name):
    """A line, of a process in which the package was not imported yet."""
    assert not any(module.startswith("cudnn_flex_compile") for module in sys.modules)
    stock._validate_device = lambda *_: None  # as tests/conftest.py's trainable
    try:
        with hiding(name):
            # Inductor takes seconds more: only for names that are read where it compiles.
            return {"name": name, "calls": calls("inductor" if name.startswith(INDUCTORS) else "aot_eager")}
    except BaseException as error:
        traceback.print_exc()
        return {"name": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def main():
    torch._dynamo.config.suppress_errors = False
    warm()
    for name in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            print(json.dumps(verdict(name)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
