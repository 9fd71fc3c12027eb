"""Graphs that torch's caches keep: what they hold of this package does not change without a new version.

A compiled graph holds the text of programs and calls of our ops, and asserts the layouts of what those return. It is
found again by its own text, of which the version in a program's header is a part.
"""

import hashlib
import inspect
import json
import types

import torch
from torch._subclasses import FakeTensorMode

from cudnn_flex_compile import ops
from cudnn_flex_compile.engine.tiles.tile_list import Geometry
from cudnn_flex_compile.ops import undispatched
from cudnn_flex_compile.ops.schemas import SCHEMAS, namespace
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.optable import TABLE, make
from cudnn_flex_compile.scoremod.text import HEADER, SEPARATOR, text

# What the version stands for. A test that fails prints what belongs here.
VERSION = "cudnn_flex 12"
DIGESTS = {
    "schemas of ops": "328d1eae905b",
    "functions that code calls": "d9d034cd7521",
    "text of programs": "4696a37780aa",
    "names in programs": "2a1af0fcd7f3",
    "numbers of a geometry": "032ea48d3a73",
    "layouts of outputs": "71d6a02dcbcd",
}

BSHD, GAPPED, EXPANDED = (96, 8, 32, 1), (99, 17, 33, 2), (0, 0, 8, 1)
SHAPE = (2, 3, 4, 8)


def signature(function):
    """Names, kinds and defaults; annotations are spelled in another way by each Python."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, "" if p.default is p.empty else repr(p.default)) for p in parameters]


def example():
    """A program with every kind of leaf, and a learned operand."""
    row, column = ir.index("q"), ir.index("k")
    scalars = ir.SCORE * ir.scalar(0, F32) + ir.operand(0, F32, "h") * ir.cast(row - column, F32)
    return ir.program(with_bias(scalars, ir.operand(1, F32, "bqk")), make("ge", row, ir.scalar(0, I32)))


def layouts():
    """What the fakes say that the ops return, for a few layouts of their inputs."""
    found = []
    program = text(example())
    with FakeTensorMode():
        for strides in (BSHD, GAPPED, EXPANDED):
            query = torch.empty_strided(SHAPE, strides, dtype=torch.bfloat16)
            rest = ([torch.empty(1, 3, 1, 1), torch.empty(2, 1, 4, 4)], [1], [torch.empty(())], program, 1.0)
            out, stats = ops.attention_forward(query, query, query, *rest, True, [], [], "")
            gradients = ops.attention_backward(out, stats, query, query, query, out, stats, *rest, [], [], "")
            found += [(list(t.shape), t.stride(), str(t.dtype)) for t in (out, stats, *gradients)]
    return found


def contract():
    """All that a kept graph relies on, by name."""
    functions = {n: signature(f) for n, f in vars(namespace).items() if isinstance(f, types.FunctionType)}
    assert {undispatched.FORWARD, undispatched.BACKWARD} <= set(functions)
    return {
        "schemas of ops": SCHEMAS,
        "functions that code calls": functions,
        "text of programs": text(example()).split(SEPARATOR)[1:],
        "names in programs": sorted((row.name, row.signature, row.arity) for row in TABLE.values()),
        "numbers of a geometry": Geometry(*range(8), True, torch.bfloat16).numbers,
        "layouts of outputs": layouts(),
    }


def digests():
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:12]
        for name, part in contract().items()
    }


def test_what_kept_graphs_rely_on_has_this_version():
    found = digests()
    changed = [name for name in {**DIGESTS, **found} if found.get(name) != DIGESTS.get(name)]
    new = HEADER if HEADER != VERSION else f"cudnn_flex {int(VERSION.split()[1]) + 1}"
    lines = "\n".join(f'    "{name}": "{digest}",' for name, digest in found.items())
    assert (HEADER, changed) == (VERSION, []), (
        f"Changed since {VERSION}: {', '.join(changed) or 'nothing'}. Graphs in torch's caches were compiled "
        f'for what was. Write HEADER = "{new}" in cudnn_flex_compile/scoremod/text.py, unless it is there, '
        f'and in tests/test_version.py\nVERSION = "{new}"\nDIGESTS = {{\n{lines}\n}}'
    )
