"""Runs the deterministic backward by tile lists once, in a process of its own, for ordered.py to see that it ends.

    python -m cudnn_flex_compile.engine.tiles.trial RATIO DIM VALUE_DIM DTYPE DEVICE

RATIO is the number of heads that share keys. The mask has all kinds of tiles (edge_mask.py).
"""

import sys

import torch

from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.choose import run_of
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.engine.tiles.edge_mask import EDGE_PROGRAM
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.plan import TilePlan

# More blocks of threads than a device runs at once, and more tiles in a row than a word has bits.
BATCH, KV_HEADS, LENGTH = 2, 2, 4352


def problem_of(ratio: int, dim: int, value_dim: int, dtype: torch.dtype, device: int) -> Problem:
    """The problem that is tried, a forward."""

    def spec(heads: int, dim: int) -> TensorSpec:
        return dense(TensorSpec((BATCH, heads, LENGTH, dim), (), dtype))

    query, key, value = spec(ratio * KV_HEADS, dim), spec(KV_HEADS, dim), spec(KV_HEADS, value_dim)
    return Problem(
        EDGE_PROGRAM, FORWARD, query, key, value, out_spec(query, value), (), scale=dim**-0.5, device=device,
        deterministic=True, tiled=1, replay=False,
    )  # fmt: skip


def main(ratio: str, dim: str, value_dim: str, dtype: str, device: str) -> None:
    """Runs the backward twice, and waits for its end."""
    with torch.cuda.device(int(device)):
        kernels_missing()  # has compiled kernels kept, so that the caller finds them
        problem = problem_of(int(ratio), int(dim), int(value_dim), getattr(torch, dtype), int(device))
        forward, backward = TilePlan(problem), TilePlan(problem.backward())
        run = run_of(backward, forward, ProgramReference(EDGE_PROGRAM))
        for _ in range(2):
            run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
