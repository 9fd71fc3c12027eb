"""A mask that is hard on lists of tiles, and on the kernels that read them, at any lengths.

Each plan by a list is certified on it, too, because a user's own mask may have no such rows. Blocks of BLOCK rows,
which no tile exceeds, come in turn: rows that see the keys up to an edge of tiles, or one beside it, or from there on;
one pair in the whole block; all pairs but one; nothing; everything.
"""

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, I32, Expr
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify

BLOCK, STEP, KINDS = 128, 16, 5  # all lengths of tiles are multiples of STEP
FIRST, COUNT = 4, 9  # the edges are at 4 to 12 times STEP


def _number(value: int) -> Expr:
    return ir.const(value, I32)


def _equal(one: Expr, value: int) -> Expr:
    return make("eq", one, _number(value))


def _edge_mask() -> Expr:
    row, key = ir.index("q"), ir.index("k")
    block, place = make("mod", make("idiv", row, _number(BLOCK)), _number(KINDS)), make("mod", row, _number(BLOCK))
    beside = make("mod", make("idiv", row, _number(COUNT)), _number(3)) - _number(1)
    edge = (make("mod", row, _number(COUNT)) + _number(FIRST)) * _number(STEP) + beside
    before, even = make("gt", edge, key), _equal(make("mod", row, _number(2)), 0)
    runs = make("or", make("and", even, before), make("and", make("not", even), make("not", before)))
    pair = make("eq", key, edge)
    one = make("and", _equal(place, BLOCK - 1), pair)
    all_but_one = make("not", make("and", _equal(place, 0), pair))
    kinds = (runs, one, all_but_one, ir.const(False, BOOL), ir.const(True, BOOL))
    mask = ir.const(False, BOOL)
    for number, kind in enumerate(kinds):
        mask = make("or", mask, make("and", _equal(block, number), kind))
    return simplify(mask)


EDGE_MASK = _edge_mask()
EDGE_PROGRAM = ir.program(mask=EDGE_MASK)
