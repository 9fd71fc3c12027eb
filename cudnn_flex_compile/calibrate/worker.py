"""Compiles the calls of one kind and head dim, waits for its turn, and measures them: a process of its own.

    python -m cudnn_flex_compile.calibrate.worker KIND DIM

It prints a line when all is compiled, and its rows as JSON after a line on its standard input. Several compile side by
side; one measures at a time.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cudnn_flex_compile import backend, inductor_seam, torch_private
from cudnn_flex_compile.bench.case import with_own_code
from cudnn_flex_compile.calibrate.grid import BLOCK, CAP, HEADS, LENGTHS, WAYS, Cell
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.passes.decide.device_times import CAPPED, INDUCTOR, MASKED
from cudnn_flex_compile.report.report import collect

READY = "ready"
Contender = Callable[[], Any]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def capped(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return CAP * torch.tanh(score / CAP)


def block_mask(cell: Cell) -> BlockMask:
    if cell.kind != MASKED:
        return create_block_mask(causal, None, None, cell.length, cell.length, device="cuda")
    visible = torch.ones(cell.batch, cell.length, dtype=torch.bool, device="cuda")
    blocks = cell.length // BLOCK
    indices = torch.arange(blocks, dtype=torch.int32, device="cuda").expand(1, 1, blocks, blocks).contiguous()
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device="cuda")
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, kv: visible[b, kv])


def contenders(cell: Cell, way: str) -> tuple[Contender, Contender] | str:
    """The forward and the backward of a call, which has run once; or why the backend keeps it."""
    shape = (cell.batch, cell.length, HEADS, cell.dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask, score_mod = block_mask(cell), capped if cell.kind == CAPPED else None

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flex_attention(q, k, v, score_mod, mask)

    function = with_own_code(attend, f"attend_{way}_{cell.length}")
    if way == INDUCTOR:
        compiled: Any = torch.compile(function, dynamic=False, options=inductor_seam.STOCK)
    else:
        how: dict[str, Any] = {"lower": "always", "strategy": way}
        compiled = torch.compile(function, dynamic=False, backend=backend.cudnn_flex, options=how)
    with collect() as report:
        out = compiled(*leaves)
    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    if report.kept:
        return str(report.kept[0].reason)
    return lambda: compiled(*leaves), lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def main(kind: str, dim: int) -> None:
    torch_private.keep_buffers()  # a backward is called several times
    cells = [Cell(kind, dim, length) for length in LENGTHS]
    calls = {(cell, way): contenders(cell, way) for cell in cells for way in WAYS[kind]}
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
            rows.append({"way": way, "kind": kind, "dim": dim, "length": cell.length, **rates})
        for way, call in found.items():
            if isinstance(call, str):
                print(f"{way}, {kind}, dim {dim}, length {cell.length}: {call}", file=sys.stderr)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
