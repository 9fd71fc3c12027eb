"""The support table: the calls that are refused, and the forms that are rewritten, because cuDNN gets them wrong.

Each row has its evidence. A rule that applies names the reason why no plan is tried; without one, cuDNN and then
certification decide. A rewrite is made wherever its form comes up, on every version: the new form is right on all.
tests/gpu/test_wrong_classes.py builds each wrong form, and has certification judge it.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.integers import LONGEST
from cudnn_flex_compile.scoremod.ir import F32, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.learned import without_bias
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.ranges import AXIS_LIMIT
from cudnn_flex_compile.scoremod.switches import switched_off

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
FAR_SCORE = 2.0**16  # from here on a float32 log-sum-exp is rounded by as much as bfloat16 rounds a weight


@dataclass(frozen=True, slots=True)
class Rule:
    """code: the reason. applies: the detail of the reason for this problem, or None. evidence: how it was measured, and
    where. of_plans: whether it holds for plans of cuDNN alone, and not for the CPU's kernel.
    """

    code: Code
    applies: Callable[[Problem, Program], str | None]
    evidence: str = ""
    of_plans: bool = False
    measured: str = "one H200 (SM90), cuDNN 9.19 and 9.28"


def wrong_dtypes(query: torch.dtype, key: torch.dtype, value: torch.dtype) -> str | None:
    """Says which dtypes a call has, if no plan takes them."""
    if query == key == value:
        return None if query in DTYPES else f"queries, keys and values are {query}"
    return f"queries are {query}, keys {key}, values {value}"


def _dtype(problem: Problem, program: Program) -> str | None:
    return wrong_dtypes(problem.query.dtype, problem.key.dtype, problem.value.dtype)


def _head_dim(problem: Problem, program: Program) -> str | None:
    dims = (problem.query.shape[3], problem.value.shape[3])
    return None if all(0 < d <= MAX_HEAD_DIM and d % 8 == 0 for d in dims) else f"head dims {dims}"


def _length(problem: Problem, program: Program) -> str | None:
    if 0 in (*problem.query.shape, *problem.key.shape):
        return "a dimension of size 0"
    return f"lengths {problem.lengths}" if max(problem.lengths) >= AXIS_LIMIT else None


def _single(problem: Problem, program: Program) -> str | None:
    by_graph = problem.direction == BACKWARD and not problem.tiled
    return "s_q = s_kv = 1" if by_graph and problem.lengths == (1, 1) else None


def _two_operands(problem: Problem, program: Program) -> str | None:
    if problem.tiled:  # then no kernel computes the mask
        return None
    computed = without_bias(program.score)[0], split(program.mask).residual  # bounds have an index, biases are added
    for node in ir.walk(*computed):
        if node.args and all(_fed_by_operands(a) for a in node.args):
            return f"{node.kind} of captured tensors alone, one along q and one along kv"
    return None


def _long_division(problem: Problem, program: Program) -> str | None:
    if problem.tiled or max(*problem.query.shape[:3], *problem.lengths) <= LONGEST:
        return None
    divided = any(n.kind in ("idiv", "mod") for n in ir.walk(program.score, program.mask))
    return f"// or % of indices, for a call longer than {LONGEST}" if divided else None


def _fed_by_operands(root: Expr) -> bool:
    leaves = [n for n in ir.walk(root) if not n.args]
    return any(n.kind == "operand" for n in leaves) and all(n.kind in ("operand", "scalar", "const") for n in leaves)


def _bias_beside_others(problem: Problem, program: Program) -> str | None:
    rest, bias = without_bias(program.score)
    if bias is None:
        return None
    if rest is not SCORE:
        return "a captured tensor that requires grad is added to a score that is modified, too"
    band = split(program.mask).skips_tiles
    return None if band else "a captured tensor that requires grad, under a mask that is no band"


def _bias_in_float16(problem: Problem, program: Program) -> str | None:
    learned = without_bias(program.score)[1] is not None and problem.query.dtype != torch.bfloat16
    return "a captured tensor that requires grad, in another dtype than bfloat16" if learned else None


def _lse_in_float16(problem: Problem, program: Program) -> str | None:
    added = problem.lse_gradient and not problem.tiled and problem.query.dtype != torch.bfloat16
    return "the LSE takes part in the loss, in another dtype than bfloat16" if added else None


def _finite_fill(problem: Problem, program: Program) -> str | None:
    numbers = [float(n.value or 0) for n in ir.walk(program.score) if n.kind == "const" and n.dtype == F32]
    far = [n for n in numbers if FAR_SCORE <= abs(n) < math.inf]
    return f"{far[0]:g} in the score" if far else None


RULES: tuple[Rule, ...] = (
    Rule(Code.DTYPE, _dtype, evidence="cuDNN's flash attention takes bf16 and fp16"),
    Rule(Code.HEAD_DIM, _head_dim, evidence="cudnn_dialect: head dims tried on the H200"),
    Rule(Code.LENGTH, _length, evidence="index arithmetic is 32-bit (scoremod/ranges.py)"),
    Rule(Code.SHAPE_REFUSED, _single, evidence="cuDNN refuses this backward"),
    Rule(Code.CAPTURED_GRADIENT, _bias_beside_others, evidence="bias beside a score_mod: dBias off by 90%; beside a "
         "predicate: out off by 70% (tests/gpu/test_learned.py). A gradient for each pair that leaves score_mod's "
         "backward by a node of its own is accepted, and off by 100%, or dQ beside it by a multiple",
         measured="one H200 (SM90), cuDNN 9.19"),
    Rule(Code.CAPTURED_GRADIENT, _bias_in_float16, evidence="dBias is float16, too: that of T5's table is off by 2.04 "
         "times what stock's is (S 1000, D 128)", measured="one H200 (SM90), cuDNN 9.19"),
    Rule(Code.LSE_GRADIENT, _lse_in_float16, evidence="an output that holds the gradient may be too large for float16 "
         "(engine/plans/folded_output.py); by row vectors or wider values cuDNN took 1.1 to 3.4 times as long as "
         "Inductor's kernel for plain scores"),
    Rule(Code.FINITE_FILL, _finite_fill, evidence="rows that only see such scores: out is off by 0.24 for "
         "finfo(bfloat16).min, which becomes -inf on the way; at -1e9 a float32 log-sum-exp has lost log n, and the "
         "backward's weights add up to n (tests/compile/test_numbers.py)", of_plans=True),
    Rule(Code.ILLEGAL_OP, _two_operands, evidence="a node that does not descend from the score is refused"),
    Rule(Code.ILLEGAL_OP, _long_division, evidence="cuDNN divides integers in float32 (scoremod/integers.py)",
         of_plans=True),
)  # fmt: skip


def refused(problem: Problem, program: Program, on_cpu: bool = False) -> Reason | None:
    """The first rule that applies, as a reason. `on_cpu`: whether the CPU's kernel runs the program."""
    for rule in RULES:
        if on_cpu and rule.of_plans:
            continue
        detail = rule.applies(problem, program)
        if detail is not None:
            return Reason(rule.code, detail)
    return None


WRONG, REFUSED, FATAL, SLOW = "wrong", "refused", "fatal", "slow"
V919, V928 = 91900, 92800
BOTH = (V919, V928)
MEASURED = "one H200 (SM90), bf16"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A form that cuDNN's graphs are never given.

    Attributes:
        name: the name that rewrites_off takes, if `switched`.
        form: before -> after.
        before: the effect of the form: WRONG numbers, REFUSED, FATAL (reads illegal memory) or SLOW.
        versions: the versions of cuDNN that showed it. Others were right, or were not tried: the rewrite is made on
            all.
        where: the function that makes it.
        evidence: how it shows.
        switched: whether a test can switch it off; other rewrites are how programs are built in the first place.
        measured: the device. The rewrite is made on every architecture.
    """

    name: str
    form: str
    before: str
    versions: tuple[int, ...]
    where: str
    evidence: str
    switched: bool = True
    measured: str = MEASURED


REWRITES: tuple[Rewrite, ...] = (
    Rewrite("composite", "sdpa with a score_mod, by AUTO -> by COMPOSITE", FATAL, (V928,),
            "engine/graph/build.py", "mul(x, x) on the unified engine reads illegal memory; no tiles are skipped"),
    Rewrite("columns expanded", "[., ., 1, Skv] operand -> [., ., Sq, Skv] with stride 0, in the backward", WRONG, BOTH,
            "engine/graph/emit.py", "dQ, dK and dV of score + bias[b, kv]"),
    Rewrite("heads expanded", "[B, H, 1, 1] operand -> [B, H, Sq, 1] with stride 0", WRONG, BOTH,
            "engine/graph/emit.py", "score * scale[b, h], both directions; [B, H, Sq, Skv] is refused by 9.28"),
    Rewrite("integers expanded", "int32 [B, 1, 1, 1] in a compare -> [B, 1, Sq, 1] with stride 0", WRONG, BOTH,
            "engine/graph/emit.py", "kv < length[b], both directions"),
    Rewrite("every head", "operands of different dims -> all [B, H, ., .], where the plain plan fails", WRONG, (V919,),
            "engine/plans/variants.py", "a last resort: tried only where certification rejects the plain plan"),
    Rewrite("ends guarded", "score_mod(x) -> score_mod(where(inside, x, 0)), -inf beyond the ends", WRONG, BOTH,
            "engine/guards.py", "backward: dQ and dK are NaN for x * x at length 1000; on 9.19 also for a pair operand "
            "at Skv % 128 == 64 where the LSE is below -88.7"),
    Rewrite("results guarded", "a gradient that reads the score_mod's result -> with a select behind it", WRONG, BOTH,
            "engine/guards.py", "backward: dV of sigmoid(x) is off by 200x"),
    Rewrite("max by relu", "max(x, c) -> x + relu(c - x)", WRONG, BOTH,
            "scoremod/legalize.py", "backward: dV is off by 300x where relu_backward reads max's result"),
    Rewrite("scalar right", "c - x -> x * -1 + c; c / x -> reciprocal(x) * c", REFUSED, BOTH,
            "scoremod/legalize.py", "backward: a scalar as the left operand"),
    Rewrite("operand right", "operand >= x -> x <= operand", REFUSED, BOTH,
            "scoremod/legalize.py", "an operand as the left side of a compare"),
    Rewrite("diagonal turned", "kv >= q -> kv + 0 >= q", WRONG, BOTH,
            "engine/graph/strategies/chained.py, scoremod/legalize.py", "computed as q >= kv, both directions"),
    Rewrite("gradient as a product", "g of a score_mod's backward -> g * 1, beside dBias", REFUSED, (V928,),
            "engine/graph/strategies/scores.py", "where(q >= kv, x, x / 2) + bias: g must be read once, by a product",
            switched=False, measured="without a GPU"),
    Rewrite("not strict", "q > kv -> q - 1 >= kv", WRONG, BOTH,
            "scoremod/masks, scoremod/legalize.py", "computed as q >= kv", switched=False),
    Rewrite("one predicate", "bounds, then an or, as selects -> one select by all of the mask", WRONG, (),
            "engine/graph/strategies/dense.py", "causal, then (q - kv <= w) | (kv < n): the or was dropped once; of "
            "it 64 forms tried since are right on 9.19, and 16 on 9.28", switched=False),
    Rewrite("small dividends", "(x + m * d) % d, m * d near 2**24 -> near the largest -x of calls up to 2**20", WRONG,
            BOTH, "scoremod/integers.py", "(q - kv) % 3 == 0: out is off by 0.05 to 0.8; % is computed in float32",
            switched=False),
    Rewrite("no multiples divided", "x // d -> (2 * x + 1) // (2 * d), unless d is a power of two", WRONG, (),
            "scoremod/integers.py", "x // d is x times a rounded 1 / d, which may be one too small for a multiple of d",
            switched=False, measured="without a GPU"),
    Rewrite("exact extrema", "min(x, y) of integers beyond 2**24 -> where(y >= x, x, y); so for max and abs", WRONG, (),
            "scoremod/integers.py", "computed in float32", switched=False, measured="without a GPU"),
    Rewrite("pairs outside", "documents[q] == documents[kv] in the graph -> a bias, computed outside", WRONG, BOTH,
            "scoremod/partition.py", "backward, with the operands broadcast in the graph", switched=False),
    Rewrite("infinite fill", "select(x, -1e9) -> select(x, -inf)", WRONG, BOTH,
            "engine/graph/strategies/chained.py", "forward: rows without a visible key give the mean of V",
            switched=False),
    Rewrite("powers as products", "pow(x, 3) -> x * x * x", WRONG, BOTH,
            "scoremod/simplify.py", "NaN for a negative x", switched=False),
    Rewrite("fresh indices", "one gen_index for all bounds -> one for each, of the running tensor", SLOW, BOTH,
            "engine/graph/strategies/chained.py", "right, but every tile is computed", switched=False),
)  # fmt: skip


@contextmanager
def rewrites_off(*names: str) -> Generator[None]:
    """For tests alone: plans that are built within have the wrong forms, which certification must reject.

    It holds in the whole process. Build such plans by candidates.attempts or graph_plan.build: the plan cache
    (find_plan) would keep them. Raises ValueError for a name that is no switched rewrite.
    """
    valid = {rewrite.name for rewrite in REWRITES if rewrite.switched}
    if not set(names) <= valid:
        raise ValueError(f"no such rewrite: {', '.join(sorted(set(names) - valid))}; valid: {', '.join(sorted(valid))}")
    with switched_off(set(names)):
        yield
