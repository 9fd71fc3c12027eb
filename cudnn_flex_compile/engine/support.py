"""The support table: what is refused before a plan is built, since when it is right, and how that was measured.

Knows nothing of how plans are built. A row that applies names the reason; no row means that cuDNN and then
certification decide.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Expr, Program
from cudnn_flex_compile.scoremod.ranges import AXIS_LIMIT

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """code: the reason. applies: what is wrong with this problem, or None. fixed: the first cuDNN that is right.
    evidence: how it was measured.
    """

    code: Code
    applies: Callable[[Problem, Program], str | None]
    fixed: int | None = None
    evidence: str = ""


def _dtype(problem: Problem, program: Program) -> str | None:
    wrong = {t.dtype for t in (problem.query, problem.key, problem.value)}
    return None if wrong <= {problem.query.dtype} and wrong <= set(DTYPES) else f"{', '.join(map(str, wrong))}"


def _head_dim(problem: Problem, program: Program) -> str | None:
    dims = (problem.query.shape[3], problem.value.shape[3])
    return None if all(0 < d <= MAX_HEAD_DIM and d % 8 == 0 for d in dims) else f"head dims {dims}"


def _length(problem: Problem, program: Program) -> str | None:
    if 0 in (*problem.query.shape, *problem.key.shape):
        return "a dimension of size 0"
    return f"lengths {problem.lengths}" if max(problem.lengths) >= AXIS_LIMIT else None


def _single(problem: Problem, program: Program) -> str | None:
    return "s_q = s_kv = 1" if problem.direction == BACKWARD and problem.lengths == (1, 1) else None


def _two_operands(problem: Problem, program: Program) -> str | None:
    for node in ir.walk(program.score, program.mask):
        if node.args and all(_fed_by_operands(a) for a in node.args):
            return f"{node.kind} of captured tensors alone, one along q and one along kv"
    return None


def _fed_by_operands(root: Expr) -> bool:
    leaves = [n for n in ir.walk(root) if not n.args]
    return any(n.kind == "operand" for n in leaves) and all(n.kind in ("operand", "scalar", "const") for n in leaves)


RULES: tuple[Rule, ...] = (
    Rule(Code.DTYPE, _dtype, evidence="cuDNN's flash attention takes bf16 and fp16"),
    Rule(Code.HEAD_DIM, _head_dim, evidence="cudnn_dialect: head dims tried on the H200"),
    Rule(Code.LENGTH, _length, evidence="index arithmetic is 32-bit (scoremod/ranges.py)"),
    Rule(Code.SHAPE_REFUSED, _single, evidence="cuDNN refuses this backward"),
    Rule(Code.ILLEGAL_OP, _two_operands, evidence="a node that does not descend from the score is refused"),
)  # fmt: skip


def refused(problem: Problem, program: Program, cudnn_version: int) -> Reason | None:
    """The first rule that applies, as a reason."""
    for rule in RULES:
        if rule.fixed is not None and cudnn_version >= rule.fixed:
            continue
        detail = rule.applies(problem, program)
        if detail is not None:
            since = f" (right since cuDNN {rule.fixed})" if rule.fixed else ""
            return Reason(rule.code, detail + since)
    return None
