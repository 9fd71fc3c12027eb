"""The strategies, in the order in which they are tried.

A strategy is one file with NAME and `lower(program, training, inside) -> Lowering | Reason`. `inside` is None, or in a
backward that takes a gradient of the log-sum-exp a predicate of the pairs at which this counts: those below the lengths
of q and kv (tail.ends). None imports cudnn before it writes nodes.
"""

from dataclasses import dataclass
from typing import Protocol

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies import chained, dense, native
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Expr, Program


class Lower(Protocol):
    def __call__(self, program: Program, training: bool, inside: Expr | None = None) -> Lowering | Reason: ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """name: as reports have it. lower: see above."""

    name: str
    lower: Lower


STRATEGIES = tuple(Strategy(m.NAME, m.lower) for m in (native, chained, dense))
