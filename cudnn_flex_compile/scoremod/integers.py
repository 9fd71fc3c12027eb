"""Rewrites ops on integers that cuDNN computes in float32 into forms that are exact; legalize.py calls it.

These are absolute values, minima, maxima, // and %. The last two round toward zero: x % d is fmod, and x // d is x
times 1 / d. Sums, differences, products, comparisons and selects of integers are exact.
"""

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, interval, magnitude
from cudnn_flex_compile.scoremod.simplify import FLOAT_EXACT

LONGEST = 2**20  # of axes whose indices are divided; engine/support.py refuses plans of longer ones
# 1 / d and the product are off by 1.5 * 2**-23 at most, which moves no x + 1/2 up to here across a multiple of d.
LARGEST = 5 * 2**19
ONE, TWO = ir.const(1, I32), ir.const(2, I32)


class Illegal(Exception):
    """`op` has no form that cuDNN is known to compute right; `why` says what is wrong with it."""

    def __init__(self, op: str, why: str) -> None:
        super().__init__(f"{op}: {why}")
        self.op, self.why = op, why


def remainder(n: Expr) -> Expr:
    """x % d -> (x + m * d) % d, with m * d no less than any -x"""
    multiple = _multiple(n, FLOAT_EXACT)
    return ir.intern("mod", I32, (_raised(n, multiple), n.args[1])) if multiple else n


def quotient(n: Expr) -> Expr:
    """x // d -> (x + m * d) // d - m, as above; x // d -> (2 * x + 1) // (2 * d), unless d is a power of two

    The product of a multiple of d and a rounded 1 / d may be one too small. An odd number is no multiple of 2 * d.
    """
    dividend, divisor = n.args
    exact = divisor.kind == "const" and int(divisor.value or 0).bit_count() == 1
    odd = _is_odd(dividend) and int(divisor.value or 0) % 2 == 0
    multiple = _multiple(n, FLOAT_EXACT if exact else 2 * LARGEST + 1 if odd else LARGEST)
    if multiple:
        return ir.intern("idiv", I32, (_raised(n, multiple), divisor)) + ir.const(-multiple, I32)
    if exact or odd:
        return n
    return ir.intern("idiv", I32, (dividend * TWO + ONE, ir.const(2 * int(divisor.value or 0), I32)))


def extremum(n: Expr) -> Expr:
    """min(x, y) -> where(y >= x, x, y), and so max(x, y) and |x|, where float32 may round what they are computed of"""
    if all(magnitude(a) <= FLOAT_EXACT for a in n.args):
        return n
    x, y = n.args if len(n.args) == 2 else (n.args[0], -n.args[0])
    return make("where", make("ge", y, x) if n.kind == "min" else make("ge", x, y), x, y)


def _is_odd(dividend: Expr) -> bool:
    """Whether a dividend is 2 * x + 1, as `quotient` writes it."""
    if dividend.kind != "add" or dividend.args[1] is not ONE:
        return False
    twice = dividend.args[0]
    return twice.kind == "mul" and twice.args[1] is TWO


def _multiple(n: Expr, largest: int) -> int:
    """Counts the divisors that are added to a dividend, so that it is never negative.

    Raises Illegal where a divisor is no positive constant, or it or the raised dividend may be above `largest`.
    """
    dividend, right = n.args
    divisor = int(right.value or 0) if right.kind == "const" else 0
    if divisor <= 0:
        raise Illegal(n.kind, "the divisor is no positive constant")
    low, high = interval(dividend, LONGEST)
    multiple = max(0, -(low // divisor))
    if max(divisor, high + multiple * divisor) > largest or magnitude(dividend, longest=LONGEST) > INT32_LIMIT:
        raise Illegal(n.kind, "the dividend or the divisor may be too large for float32, in which cuDNN divides")
    return multiple


def _raised(n: Expr, multiple: int) -> Expr:
    return n.args[0] + ir.const(multiple * int(n.args[1].value or 0), I32)
