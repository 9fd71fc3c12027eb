"""Compiles the calls of one head dim and kind of score, waits for its turn, and measures them: a process of its own.

    python -m cudnn_flex_compile.calibrate.worker DIM SCORE

It prints a line when all is compiled, and its rows as JSON after a line on its standard input. Several compile side by
side; one measures at a time.
"""

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import backend, inductor_seam, torch_private
from cudnn_flex_compile.calibrate.grid import CAP, HEADS, LENGTHS, PLAIN, WAYS, Cell
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.report.report import collect

READY = "ready"
Contender = Callable[[], Any]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def capped(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return CAP * torch.tanh(score / CAP)


def contenders(cell: Cell, score: str, way: str) -> tuple[Contender, Contender] | str:
    """The forward and the backward of a call, which has run once; or why the backend keeps it."""
    shape = (cell.batch, cell.length, HEADS, cell.dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = create_block_mask(causal, None, None, cell.length, cell.length, device="cuda")
    score_mod = None if score == PLAIN else capped

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flex_attention(q, k, v, score_mod, mask)

    # Dynamo compiles one piece of code only so often: each call has its own.
    code = attend.__code__.replace(co_name=f"attend_{way}_{cell.length}")
    function = types.FunctionType(code, attend.__globals__, None, None, attend.__closure__)
    options = WAYS[score][way]
    if options is None:
        compiled: Any = torch.compile(function, dynamic=False, options=inductor_seam.STOCK)
    else:
        how: dict[str, Any] = {"lower": "always", **options}
        compiled = torch.compile(function, dynamic=False, backend=backend.cudnn_flex, options=how)
    with collect() as report:
        out = compiled(*leaves)
    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    if report.kept:
        return str(report.kept[0].reason)
    return lambda: compiled(*leaves), lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def main(dim: int, score: str) -> None:
    torch_private.keep_buffers()  # a backward is called several times
    cells = [Cell(dim, length) for length in LENGTHS]
    calls = {(cell, way): contenders(cell, score, way) for cell in cells for way in WAYS[score]}
    print(READY, flush=True)
    sys.stdin.readline()
    rows: list[dict[str, Any]] = []
    for cell in cells:
        found = {way: call for (at, way), call in calls.items() if at == cell}
        ran = {way: call for way, call in found.items() if not isinstance(call, str)}
        times = timing.milliseconds([run for call in ran.values() for run in call])
        for place, way in enumerate(ran):
            forward, backward = (t / cell.tflop for t in times[2 * place : 2 * place + 2])
            rates = {"forward": round(forward, 3), "backward": round(backward, 3)}
            rows.append({"way": way, "score": score, "dim": dim, "length": cell.length, **rates})
        for way, call in found.items():
            if isinstance(call, str):
                print(f"{way}, {score}, dim {dim}, length {cell.length}: {call}", file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
