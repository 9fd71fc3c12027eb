"""The strategies, in the order in which they are tried.

A strategy is one file with NAME and `lower(program, training) -> Lowering | Reason`. None imports cudnn before
it writes nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cudnn_flex_compile.engine.lowering import Lowering
from cudnn_flex_compile.engine.strategies import chained, dense, native
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Program


@dataclass(frozen=True, slots=True)
class Strategy:
    name: str
    lower: Callable[[Program, bool], Lowering | Reason]


STRATEGIES = tuple(Strategy(m.NAME, m.lower) for m in (native, chained, dense))
