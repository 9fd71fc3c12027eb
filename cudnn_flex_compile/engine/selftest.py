"""The self-test of `cudnn-flex doctor`: a fixed set of programs, planned and certified on this machine.

cli.py runs it and shows the results. A program fails where one direction has no right plan: calls like it would be
kept. A new program is one row here.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.key import Meta, backward_key, forward_key, problem_of
from cudnn_flex_compile.engine.problem import TensorSpec, dense
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import AXES, F32, I32, SCORE, TRUE, Expr
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.masks.form import hides
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

BF16, FP16 = torch.bfloat16, torch.float16
ANEW = Policy(certify="always").text


@dataclass(frozen=True, slots=True)
class Program:
    """A call: operands by their axes and dtype, query and kv heads, lengths of q and kv."""

    name: str
    score: Expr = SCORE
    mask: Expr = TRUE
    operands: tuple[tuple[str, torch.dtype], ...] = ()
    heads: tuple[int, int] = (4, 4)
    lengths: tuple[int, int] = (1024, 1024)
    head_dim: int = 64
    dtype: torch.dtype = BF16


def _within(count: int) -> Expr:
    return make("ge", ir.const(count, I32), Q - KV)


CAUSAL = make("ge", Q, KV)
CAPPED = make("tanh", SCORE / 20.0) * 20.0
ALIBI = SCORE + ir.operand(0, F32, "h") * ir.cast(KV - Q, F32)
PROGRAMS = (
    Program("full"),
    Program("causal", mask=CAUSAL),
    Program("sliding window", mask=make("and", CAUSAL, _within(200))),
    Program("soft cap, causal, grouped heads", CAPPED, CAUSAL, heads=(8, 2), head_dim=128),
    Program("ALiBi, causal", ALIBI, CAUSAL, (("h", torch.float32),)),
    Program("lengths of batch entries", mask=make("gt", ir.operand(0, I32, "b"), KV), operands=(("b", torch.int32),)),
    Program("causal, a limit of each row", mask=make("and", CAUSAL, make("gt", ir.operand(0, I32, "bq"), KV)),
            operands=(("bq", torch.int32),)),
    Program("causal, hidden columns", mask=make("and", CAUSAL, hides(ir.operand(0, F32, "bk"))),
            operands=(("bk", BF16),)),
    Program("prefix-LM", mask=make("or", CAUSAL, make("ge", ir.const(511, I32), KV)), lengths=(4096, 4096)),
    Program("symmetric window", mask=make("and", _within(64), make("ge", ir.const(64, I32), KV - Q))),
    Program("odd lengths, a bias of pairs", SCORE + ir.operand(0, F32, "hqk"), CAUSAL, (("hqk", BF16),),
            lengths=(777, 1000)),
    Program("learned bias, causal", with_bias(SCORE, ir.operand(0, F32, "hqk")), CAUSAL, (("hqk", torch.float32),)),
    Program("square, guarded ends", SCORE * SCORE * 0.125, CAUSAL, lengths=(1000, 1000)),
    Program("half precision, sigmoid", SCORE * make("sigmoid", SCORE), CAUSAL, dtype=FP16, head_dim=128),
    Program("head dim 256, relative positions", SCORE + ir.cast(Q - KV, F32) * 0.01, head_dim=256,
            lengths=(512, 640)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one program: the strategies of forward and backward, or the reason why there is no right plan."""

    name: str
    strategies: tuple[str, ...]
    reason: Reason | None
    seconds: float


def run(device: int) -> Iterator[Outcome]:
    """Plans and certifies all programs on a CUDA device, one after the other, whatever verdicts are stored."""
    for program in PROGRAMS:
        start = time.perf_counter()
        strategies, reason = _planned(program, device)
        yield Outcome(program.name, strategies, reason, time.perf_counter() - start)


def _planned(program: Program, index: int) -> tuple[tuple[str, ...], Reason | None]:
    from cudnn_flex_compile.engine.find_plan import find_plan

    call, device = call_of(program, index), torch.device("cuda", index)
    strategies: list[str] = []
    with torch.cuda.device(device):
        for key in (call, backward_key(call, Meta(problem_of(call).out, device))):
            found = find_plan(key)
            if isinstance(found, Reason):
                return tuple(strategies), found
            strategies.append(found.plan.strategy)
    return tuple(strategies), None


def call_of(program: Program, index: int, batch: int = 2) -> tuple[object, ...]:
    """The key of the forward call, for tensors whose heads are innermost."""
    device = torch.device("cuda", index)

    def meta(heads: int, length: int) -> Meta:
        stride = (length * heads * program.head_dim, program.head_dim, heads * program.head_dim, 1)
        return Meta(TensorSpec((batch, heads, length, program.head_dim), stride, program.dtype), device)

    sizes = dict(zip(AXES, (batch, program.heads[0], *program.lengths), strict=True))
    operands: list[Meta] = []
    for dims, dtype in program.operands:
        shape = tuple(n if axis in dims else 1 for axis, n in sizes.items())
        operands.append(Meta(dense(TensorSpec(shape, shape, dtype)), device))
    query, key = meta(program.heads[0], program.lengths[0]), meta(program.heads[1], program.lengths[1])
    of_text = text(ir.program(program.score, program.mask))
    return forward_key(of_text, query, key, key, operands, program.head_dim**-0.5, True, policy=ANEW)
