"""Legal forms keep their value under cuDNN's own arithmetic, and keep the dialect's rules (facts/cudnn_dialect.md).

The arithmetic where cuDNN differs from torch is written down here: a strict comparison of integers is computed as
a non-strict one, and // and % in float32, toward zero.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import derive
from cudnn_flex_compile.scoremod.integers import LONGEST
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import BOOL, F32, GRAD, I32, I64, SCORE, Expr
from cudnn_flex_compile.scoremod.legalize import Illegal, legalize, unsupported
from cudnn_flex_compile.scoremod.optable import TABLE, make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT
from cudnn_flex_compile.scoremod.simplify import normalize, simplify
from cudnn_flex_compile.scoremod.text import infix
from tests.support import int_arithmetic
from tests.support.evaluate import PAIRS, differing, direct, interpreted, leaf_values, operands_of, program_of, scores
from tests.support.generate import Grammar, Mod, mask_mods, score_mods

pytestmark = pytest.mark.any_torch
Q, KV = ir.index("q"), ir.index("k")
DIALECT = {
    "gt": lambda a, b: a > b if a.is_floating_point() else a >= b,
    "lt": lambda a, b: a < b if a.is_floating_point() else a <= b,
    "idiv": int_arithmetic.quotient,
    "mod": int_arithmetic.remainder,
    **{name: int_arithmetic.in_float32(TABLE[name].evaluate) for name in ("abs", "min", "max")},
}


def as_cudnn_computes(root: Expr, score: torch.Tensor, operands: list[torch.Tensor], grad: torch.Tensor | None = None):
    return in_dialect(root, leaf_values(score, operands, grad)).expand(PAIRS)


def in_dialect(root: Expr, leaf: Callable[[Expr], torch.Tensor], **others: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The value of a legal form, with other functions for some kinds."""
    dialect, values = {**DIALECT, **others}, {}
    for node in ir.walk(root):
        args = [values[a] for a in node.args]
        if node.kind == F32:
            values[node] = args[0].to(leaf(SCORE).dtype)
        elif node.args:
            values[node] = dialect.get(node.kind, TABLE[node.kind].evaluate)(*args)
        else:
            values[node] = leaf(node)
    return values[root]


def assert_dialect(root: Expr) -> None:
    """The rules of the dialect, one by one."""
    for node in ir.walk(root):
        row, kinds = TABLE.get(node.kind), [a.kind for a in node.args]
        assert node.dtype != I64
        assert row is None or row.cudnn is not None or node.kind in (F32, I32), node.kind
        assert not (node.kind == "sub" and kinds[0] in ("const", "scalar")), "a scalar minus something"
        assert not (node.kind == "div" and kinds[0] in ("const", "scalar")), "a scalar divided by something"
        assert not (node.kind == "where" and kinds[1] in ("const", "scalar")), "a scalar as the first choice"
        if node.kind in ("ge", "gt", "le", "lt", "eq", "ne"):
            assert not any(ir.depends_on(a, SCORE) for a in node.args), "a comparison of the score"
            assert kinds[0] not in ("operand", "scalar", "const"), "an operand on the left of a comparison"
        if node.kind in ("max", "min"):
            assert not ir.depends_on(node, SCORE), "max with a relu_backward beside it"
        if node.kind in ("f32", "i32"):
            assert node.args[0].dtype != BOOL, "a cast of a predicate"


def legal(root: Expr) -> Expr | None:
    """The legal form, which keeps the dialect's rules; None where there is none."""
    try:
        done = legalize(root)
    except Illegal:
        return None
    if unsupported(done) is not None or any(_of_operands_alone(node) for node in ir.walk(root)):
        return None  # engine/support.py refuses the latter
    assert_dialect(done)
    return done


def _of_operands_alone(node: Expr) -> bool:
    leaves = {n.kind for a in node.args for n in ir.walk(a) if not n.args}
    return "operand" in leaves <= {"operand", "scalar", "const"}


def test_legal_scores_and_gradients_keep_their_value() -> None:
    count = [0, 0]

    @settings(max_examples=250)
    @given(score_mods(Grammar(predicates_of_score=False)))
    def check(mod: Mod) -> None:
        program, hoisted = partition(normalize(program_of(mod, None)))
        gradient = derive(program.score)
        score, operands = scores(high=True), operands_of(hoisted)
        grad = torch.linspace(-1, 1, PAIRS, dtype=torch.float64)
        for i, root in enumerate((program.score, None if gradient is None else simplify(gradient))):
            done = None if root is None else legal(root)
            if root is None or done is None:
                continue
            count[i] += 1
            got, expected = as_cudnn_computes(done, score, operands, grad), interpreted(root, score, operands, grad)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    check()
    assert min(count) >= 100, f"only {count} of the generated scores and gradients are legal"


@pytest.mark.parametrize(("captures", "least"), [(True, 30), (False, 150)])
def test_legal_masks_are_exact(captures: bool, least: int) -> None:
    count = 0

    @settings(max_examples=200)
    @given(mask_mods(Grammar(captures=captures)))
    def check(mod: Mod) -> None:
        nonlocal count
        program, hoisted = partition(normalize(program_of(None, mod)))
        done = legal(program.mask)
        if done is None:
            return
        count += 1
        got = as_cudnn_computes(done, scores(), operands_of(hoisted))
        assert differing(got, direct(mod)) == 0, infix(done)

    check()
    assert count >= least, f"only {count} of the generated masks are legal"


ENDS = torch.tensor([0, 1, 3, 39, 2047, 2**19, 2**20 - 2, 2**20 - 1], dtype=torch.int32)  # of an axis
DIVIDENDS = {
    "q": Q, "q - kv": Q - KV, "kv - q": KV - Q, "-q": -Q, "|q - kv|": make("abs", Q - KV), "scalar": ir.scalar(0, I32),
    "operand": ir.operand(0, I32, "q"), "max": make("max", Q - KV, ir.const(-9, I32)),
}  # fmt: skip


def test_division_rounds_as_in_torch() -> None:
    """With negative dividends, too; those that may be too large for float32 once they are raised have no legal form."""
    count = {"legal": 0, "illegal": 0}

    @settings(max_examples=600)
    @given(
        st.sampled_from(["idiv", "mod"]), st.sampled_from(list(DIVIDENDS)), st.integers(-40, 40),
        st.sampled_from([1, 2, 3, 6, 41, 47, 64, 1000, 2**18 + 1, 2**20, VALUE_LIMIT, 2**31 - 1]),
        st.sampled_from([1, 1, 2, -1, -3, 7, 2**10]),
        st.sampled_from([0, 5, -5, VALUE_LIMIT, -VALUE_LIMIT]),
    )  # fmt: skip
    def check(kind: str, name: str, shift: int, divisor: int, factor: int, given_: int) -> None:
        dividend = (DIVIDENDS[name] + ir.const(shift, I32)) * ir.const(factor, I32)
        root = make(kind, dividend, ir.const(divisor, I32))
        try:
            done = legalize(root)
        except Illegal:
            count["illegal"] += 1
            return
        count["legal"] += 1
        axes = {"q": ENDS.view(-1, 1), "k": ENDS}
        leaf = environment(torch.zeros(()), axes, {0: torch.tensor(given_)}, {0: given_}, {})
        expected = evaluate(root, leaf).expand(8, 8)
        for quotient in (int_arithmetic.quotient, int_arithmetic.greater_quotient):
            assert torch.equal(in_dialect(done, leaf, idiv=quotient).expand(8, 8), expected), infix(done)

    check()
    assert count["legal"] >= 250, count
    assert count["illegal"] >= 50, count


def test_division_of_what_is_never_negative_is_left_alone() -> None:
    for kind, divisor in (("idiv", 8), ("mod", 7)):
        root = make(kind, Q + ir.const(5, I32), ir.const(divisor, I32))
        assert legalize(root) is root
        done = legalize(make(kind, Q - KV, ir.const(7, I32)))
        assert legalize(done) is done


@pytest.mark.parametrize("divisor", [3, 5, 7, 41, 47, 55, 61, 82, 97, 1000, 4099, 65537, 300_007])
def test_quotients_of_multiples(divisor: int) -> None:
    """Every multiple of a divisor among the dividends that may come up, and the numbers beside it."""
    first = torch.arange(0, LONGEST, divisor, dtype=torch.int32)
    q = torch.cat([first, first - 1, first + 1]).clamp(0, LONGEST - 1)
    axes = {"q": q.view(-1, 1), "k": torch.tensor([0, 1, LONGEST - 1], dtype=torch.int32)}
    leaf = environment(torch.zeros(()), axes, {}, {}, {})
    for dividend in (Q, Q - KV, Q + KV, KV - Q):
        for kind in ("idiv", "mod"):
            root = make(kind, dividend, ir.const(divisor, I32))
            done, expected = legalize(root), evaluate(root, leaf)
            for quotient in (int_arithmetic.quotient, int_arithmetic.greater_quotient):
                assert torch.equal(in_dialect(done, leaf, idiv=quotient), expected), infix(done)


FAR = [2**28, 2**28 - 1, 2**24 + 1, 2**24 - 1, 1, 0, -1, -(2**24) - 1, -(2**28) + 1, -(2**28)]
EXTREMA = {
    "abs": lambda given: (make("abs", Q - given), make("abs", given - KV)),
    "min": lambda given: (make("min", Q, given), make("min", given, KV - Q), make("min", Q - given, ir.const(7, I32))),
    "max": lambda given: (make("max", Q, given), make("max", given, KV - Q), make("max", ir.const(-7, I32), Q - given)),
}  # fmt: skip


@pytest.mark.parametrize("given", [ir.scalar(0, I32), ir.operand(0, I32, "b")], ids=infix)
@pytest.mark.parametrize("kind", EXTREMA)
def test_extrema_of_captured_integers(kind: str, given: Expr) -> None:
    """Captured integers may have more digits than float32; indices have not."""
    axes = {"q": torch.arange(40, dtype=torch.int32).view(-1, 1), "k": torch.arange(50, dtype=torch.int32)}
    for root in EXTREMA[kind](given):
        done = legalize(root)
        assert_dialect(done)
        for value in FAR:
            leaf = environment(torch.zeros((1, 1)), axes, {0: torch.tensor([[value]])}, {0: value}, {})
            found, expected = in_dialect(done, leaf), evaluate(root, leaf)
            assert torch.equal(found.expand(40, 50).long(), expected.expand(40, 50).long()), (value, infix(done))
    near = make(kind, *(Q - KV, KV)[: TABLE[kind].arity])
    assert legalize(near) is near


def number(value: float) -> Expr:
    return ir.const(value, F32)


@pytest.mark.parametrize("bound", [-1e30, -1e9, -100.0, 0.0, 100.0, 1e9, 1e30, -math.inf, math.inf])
@pytest.mark.parametrize("kind", ["clamp_min", "clamp_max", "max", "min"])
def test_clamps_to_any_bound_in_float32(kind: str, bound: float) -> None:
    """A bound far from every score must not cost the score its digits."""
    clamp, score = make(kind, SCORE, number(bound)), scores()
    got = as_cudnn_computes(legalize(simplify(clamp)), score, [])
    torch.testing.assert_close(got, interpreted(clamp, score), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", [-100.0, 0.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", ["clamp_min", "clamp_max", "max", "min"])
def test_a_clamp_of_a_masked_score(kind: str, bound: float) -> None:
    clamp, score = make(kind, make("where", make("ge", Q, KV), SCORE, number(-math.inf)), number(bound)), scores()
    expected = interpreted(clamp, score)
    torch.testing.assert_close(as_cudnn_computes(legalize(simplify(clamp)), score, []), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-20, -1e-20, 3.0, -3.0])
def test_the_sign_near_zero(value: float) -> None:
    score = torch.full((PAIRS,), value)
    got = as_cudnn_computes(legalize(make("sign", SCORE)), score, [])
    torch.testing.assert_close(got, score.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "root",
    [
        make("ge", SCORE, number(0.0)),
        make("where", make("gt", SCORE, number(0.0)), SCORE, SCORE * 2.0),
        make("idiv", (Q - KV) * ir.const(2**10, I32), ir.const(2, I32)),
        make("idiv", Q + KV + Q, ir.const(3, I32)),
        make("mod", Q + ir.operand(0, I32, "k"), ir.const(3, I32)),
        make("mod", (Q - ir.const(1, I32)) * ir.const(127, I32), ir.const(VALUE_LIMIT, I32)),
        make("mod", Q - KV, ir.const(2**31 - 1, I32)),
        make("idiv", Q, ir.scalar(0, I32)),
        make("idiv", Q, ir.const(-2, I32)),
        make("eq", ir.operand(0, I64, "q"), ir.operand(1, I64, "k")),
        make("ge", ir.cast(Q, I64), ir.scalar(0, I32)),
    ],
    ids=infix,
)
def test_illegal(root: Expr) -> None:
    with pytest.raises(Illegal) as error:
        legalize(root)
    assert error.value.op in TABLE or error.value.op == "operand"
    assert error.value.why in str(error.value)


def test_unsupported_names_the_op() -> None:
    assert unsupported(make("bool", SCORE)) == "bool"
    assert unsupported(legalize(make("neg", GRAD) * 2.0)) is None


@pytest.mark.parametrize("kind", ["max", "min", "clamp_max", "clamp_min"])
def test_a_bias_of_minus_infinity_is_bounded_like_any_score(kind):
    """max(-inf, c) is c, as for a user whose bias hides pairs; nothing is NaN, nor is its gradient."""
    limit = 5.0 if kind in ("min", "clamp_max") else -5.0
    root = make(kind, SCORE + ir.operand(0, F32, "qk"), ir.const(limit, F32))
    score = torch.tensor([[-7.0, 0.5, 7.0], [1.0, 2.0, 3.0]])
    bias = torch.tensor([[0.25, 0.0, -1.0], [-math.inf, math.inf, -math.inf]])
    indices = {"q": torch.arange(2).int().view(-1, 1), "k": torch.arange(3).int()}
    leaf = environment(score, indices, {0: bias}, {}, {}, torch.ones_like(score))
    value = evaluate(legalize(root), leaf)
    torch.testing.assert_close(value, evaluate(root, leaf))
    gradient = evaluate(legalize(simplify(derive(root))), leaf)
    assert gradient.isfinite().all()


NEVER = make("ge", ir.const(-3, I32), KV)  # its negation always holds


@pytest.mark.parametrize(
    "root", [make("eq", NEVER, make("ge", Q, KV)), make("where", NEVER, ir.const(1.0, F32), SCORE)], ids=infix
)
def test_no_predicate_is_a_constant(root: Expr) -> None:
    assert not any(n.kind == "const" and n.dtype == BOOL for n in ir.walk(legalize(root)))
