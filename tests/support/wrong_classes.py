"""The classes of graphs that cuDNN accepts and computes wrongly: of each, a program and the raw graph that goes wrong.

Knows nothing of how graphs are run. Where a rewrite of the support table stands between the program and the wrong
graph, the class names it; else `raw` writes the graph by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies.chained import FILL
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.support import BOTH, V919, V928
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import derive
from cudnn_flex_compile.scoremod.ir import BOOL, F32, GRAD, I32, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.legalize import legalize
from cudnn_flex_compile.scoremod.masks.form import hides
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make

ONE_OR_OTHER = (FORWARD, BACKWARD)
CAUSAL = make("ge", Q, KV)
FAR_FILL = ir.const(-1e9, F32)
ZERO = ir.const(0, I32)
Operands = tuple[tuple[str, torch.dtype], ...]


@dataclass(frozen=True)
class Class:
    """One class.

    Attributes:
        program: what is asked for.
        operands: the axes and dtype of each.
        off: rewrites without which the program becomes the wrong graph.
        raw: (program, training) -> the wrong graph, where no rewrite can be switched off for it.
        directions: in which it goes wrong.
        versions: of cuDNN on which it goes wrong; on later and earlier ones the raw graph must be right.
        lengths: of q and kv. shift: added to all scores.
        fatal: whether it may read illegal memory, so that it needs a process of its own.
        right: a program over other operands that computes the same, and these from the first ones: what a call with
            these functions becomes.
    """

    program: Program
    operands: Operands = ()
    off: tuple[str, ...] = ()
    raw: Callable[[Program, bool], Lowering] | None = None
    directions: tuple[str, ...] = ONE_OR_OTHER
    versions: tuple[int, ...] = BOTH
    lengths: tuple[int, int] = (512, 512)
    shift: float = 0.0
    fatal: bool = False
    right: tuple[Program, Operands, Callable[[list[torch.Tensor]], list[torch.Tensor]]] | None = None


def _raw(program: Program, write: Callable[[Any], Any], *leaves: Expr) -> Lowering:
    return Lowering("raw", {}, write, None, (SCORE, FILL, *leaves))


def _selected(emitter: Any, running: Any, visible: Any, fill: Expr = FILL) -> Any:
    return emitter.node("where", F32, visible, running, emitter.inputs.constants[fill])


def _causal(emitter: Any, running: Any) -> Any:
    rows, columns = emitter.index("q", running), emitter.index("k", running)
    return _selected(emitter, running, emitter.node("ge", BOOL, rows, columns))


def strict(program: Program, training: bool) -> Lowering:
    def write(emitter: Any) -> Any:
        running = emitter.emit(SCORE)
        rows, columns = emitter.index("q", running), emitter.index("k", running)
        return _selected(emitter, running, emitter.node("gt", BOOL, rows, columns))

    return _raw(program, write)


NEAR_OR_FIRST = make("or", make("ge", ir.const(64, I32), Q - KV), make("ge", ir.const(15, I32), KV))


def causal_then_or(program: Program, training: bool) -> Lowering:
    either = legalize(NEAR_OR_FIRST)
    return _raw(program, lambda e: _selected(e, _causal(e, e.emit(SCORE)), e.emit(either)), either)


def _broadcast(index: Expr, operand: Expr) -> Expr:
    return ir.intern("add", I32, (ir.intern("mul", I32, (index, ZERO)), operand))


def documents(program: Program, training: bool) -> Lowering:
    same = make("eq", _broadcast(Q, ir.operand(0, I32, "bq")), _broadcast(KV, ir.operand(1, I32, "bk")))
    return _raw(program, lambda e: _selected(e, e.emit(SCORE), e.emit(same)), same)


def _bias_of_documents(operands: list[torch.Tensor]) -> list[torch.Tensor]:
    of_rows, of_columns = operands
    return [torch.where(of_rows == of_columns, 0.0, float("-inf")).to(torch.bfloat16)]


AHEAD = make("ge", KV - Q, ir.const(40, I32))


def finite_fill(program: Program, training: bool) -> Lowering:
    mask = legalize(AHEAD)
    return _raw(program, lambda e: _selected(e, e.emit(SCORE), e.emit(mask), FAR_FILL), mask, FAR_FILL)


RAISED = make("eq", make("mod", Q - KV + ir.const(3 * 5592405, I32), ir.const(3, I32)), ZERO)


def large_dividends(program: Program, training: bool) -> Lowering:
    return _raw(program, lambda e: _selected(e, e.emit(SCORE), e.emit(RAISED)), RAISED)


def _scores(score: Expr, gradient: Expr) -> Lowering:
    return Lowering("raw", {}, lambda e: e.emit(score), lambda e: e.emit(gradient), (score, gradient))


def result_in_relu_backward(program: Program, training: bool) -> Lowering:
    highest = ir.intern("max", F32, (SCORE, ir.const(-0.5, F32)))
    return _scores(highest, ir.intern("relu_grad", F32, (GRAD, highest + 0.5)))


CAPPED = make("tanh", SCORE * 0.05) * 20.0


def cube(program: Program, training: bool) -> Lowering:
    power = ir.intern("pow", F32, (CAPPED, ir.const(3.0, F32))) * 0.125
    return _scores(power, legalize(derive(program.score) or GRAD))


F, BF, I = torch.float32, torch.bfloat16, torch.int32  # noqa: E741
LIMITED = make("gt", ir.operand(0, I32, "b"), KV)
BIASED = ir.program(SCORE + ir.operand(0, F32, "qk"))
CLASSES: dict[str, Class] = {
    "AUTO with a score_mod": Class(
        ir.program(SCORE * SCORE), off=("composite",), directions=(FORWARD,), versions=(V928,), fatal=True),
    "strict bound": Class(ir.program(mask=make("gt", Q, KV)), raw=strict),
    "diagonal turned": Class(
        ir.program(SCORE * 0.5, make("ge", KV, Q)), off=("diagonal turned",)),
    "operand along kv": Class(
        ir.program(SCORE + ir.operand(0, F32, "bk")), (("bk", F),), ("columns expanded",), directions=(BACKWARD,)),
    "[B, H, 1, 1] operand": Class(
        ir.program(SCORE * ir.operand(0, F32, "bh")), (("bh", F),), ("heads expanded", "every head")),
    "[B, 1, 1, 1] integers": Class(
        ir.program(SCORE * 0.5, LIMITED), (("b", I),), ("integers expanded", "every head")),
    "pair operand and low scores": Class(
        BIASED, (("qk", BF),), ("ends guarded",), directions=(BACKWARD,), versions=(V919,), lengths=(512, 448),
        shift=-100.0),
    "or after a causal select": Class(
        ir.program(mask=make("and", CAUSAL, NEAR_OR_FIRST)), raw=causal_then_or, versions=()),
    "documents compared in the graph": Class(
        ir.program(mask=make("eq", ir.operand(0, I32, "bq"), ir.operand(1, I32, "bk"))), (("bq", I), ("bk", I)),
        raw=documents, off=("columns expanded",), directions=(BACKWARD,),
        right=(ir.program(mask=hides(ir.operand(0, F32, "bqk"))), (("bqk", BF),), _bias_of_documents)),
    "finite fill": Class(ir.program(mask=AHEAD), raw=finite_fill, directions=(FORWARD,)),
    "dividends beyond 2**24": Class(
        ir.program(mask=make("eq", make("mod", Q - KV, ir.const(3, I32)), ZERO)), raw=large_dividends),
    "max beside relu_backward": Class(
        ir.program(make("clamp_min", SCORE, ir.const(-0.5, F32))), off=("max by relu",),
        raw=result_in_relu_backward, directions=(BACKWARD,)),
    "power of a negative number": Class(ir.program(CAPPED * CAPPED * CAPPED * 0.125), raw=cube),
    "columns beyond the end": Class(
        ir.program(SCORE * SCORE, CAUSAL), off=("ends guarded",), directions=(BACKWARD,), lengths=(1000, 1000)),
    "gradient of the result": Class(
        ir.program(make("sigmoid", SCORE)), off=("results guarded",), directions=(BACKWARD,)),
    "difference of a scalar and the score": Class(
        ir.program(make("sub", ir.const(1.0, F32), SCORE * SCORE)), off=("scalar right",), directions=(BACKWARD,)),
    "operand on the left of a compare": Class(
        ir.program(SCORE * 0.5, make("and", LIMITED, make("or", CAUSAL, make("ge", ir.operand(1, I32, "bq"), KV)))),
        (("b", I), ("bq", I)), off=("operand right",)),
}  # fmt: skip
