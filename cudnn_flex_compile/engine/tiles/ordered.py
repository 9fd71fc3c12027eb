"""Finds out whether the deterministic backward by tile lists can run: for which lists, and whether it comes to an end.

Blocks of threads add to dQ, dK and dV in a fixed order there, so each waits for others, which started before it. If a
kernel waited for ever, nothing but the end of its process would stop it. So each kind of kernel runs in a process of
its own first (trial.py), once for each version of our code and of the libraries.
"""

import subprocess
import sys

import torch

from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.identity import environment
from cudnn_flex_compile.engine.store.texts import keep_text, recall_text
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, NAME
from cudnn_flex_compile.reasons import Code, Reason

LIMIT = 300.0  # seconds for the process, in which kernels are compiled, too
COMMAND = (sys.executable, "-m", "cudnn_flex_compile.engine.tiles.trial")
ENDS = "ends"


def refused(problem: Problem) -> Reason | None:
    """Why a problem that asks for the deterministic backward cannot have it; None where it can, or does not ask for it.

    Raises the frontend's error for head dims that it refuses.
    """
    if not problem.deterministic or problem.direction != BACKWARD:
        return None
    heads, kv_heads, dim, value_dim = (
        problem.query.shape[1], problem.key.shape[1], problem.query.shape[3], problem.value.shape[3],
    )  # fmt: skip
    if has_other_tiles(heads, kv_heads, dim, value_dim, problem.query.dtype):
        detail = f"{NAME}: the deterministic backward of head dim {dim}, no heads sharing keys, takes a list of its own"
        return Reason(Code.SHAPE_REFUSED, detail)
    kind = heads // kv_heads, dim, value_dim, str(problem.query.dtype).removeprefix("torch."), problem.device
    return _unending(tuple(map(str, kind)))


def has_other_tiles(heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether the deterministic backward has other tiles than the backward for which lists are made (tiler.py)."""
    from cudnn_flex_compile.engine.frontend import tile_builder

    given = {"num_q_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "head_dim_v": value_dim, "dtype": dtype}
    plain, ordered = (
        tile_builder().resolve_sm90_bwd_consumer_config(
            arch=ARCHITECTURE, is_varlen=False, deterministic=deterministic, **given
        )
        for deterministic in (False, True)
    )
    return plain != ordered


def _unending(kind: tuple[str, ...]) -> Reason | None:
    """The reason against kernels that do not end; known from before, or found out now."""
    *numbers, device = kind
    key = "\n".join(["the deterministic backward", *environment(int(device)), *numbers])
    known = engine.times.get(key) or recall_text(key)
    if known is None:
        known = _watched(kind)
        if isinstance(known, Reason):
            return known
        keep_text(key, known)
    engine.times.put(key, known)
    return None if known == ENDS else Reason(Code.CERTIFICATION, known)


def _watched(kind: tuple[str, ...]) -> str | Reason:
    """ENDS, or that the kernels did not; a Reason where a process could not find out."""
    command = [*COMMAND, *kind]
    try:
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"{NAME}: the deterministic backward did not end within {LIMIT:.0f} s in a process of its own"
    if ran.returncode == 0:
        return ENDS
    last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
    detail = f"{NAME}: the process that tries the deterministic backward failed: {' '.join(last)[:200]}"
    return Reason(Code.SHAPE_REFUSED, detail, lasting=False)
