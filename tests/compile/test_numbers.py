"""Numbers that stand for "none", and indices that hold where a pair is visible, as stock flex_attention has them.

Generated programs against dense attention by eager torch, whose indices have 64 bits, on one device or the other.
"""

import math
import random
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.engine import support
from cudnn_flex_compile.engine.key import forward_key, problem_of
from cudnn_flex_compile.kernels import cpu, inductor
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, SCORE
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.compile.test_backend import close, fresh, qkv, run

__all__ = ["fresh"]

NONE = sys.maxsize
WINDOWS = (16, 2**31 - 1, NONE, 8, 2**40, 2**31, 2**28 + 1, 2**28, 2**30, NONE - 1, -1, -(2**31), -NONE, 3)
OFFSETS = (0, 5, 2**31 - 1, 2**31, 2**35, -(2**31) - 7, 2**62)
FILLS = {"float32": torch.finfo(torch.float32).min, "-1e9": -1e9, "bfloat16": torch.finfo(torch.bfloat16).min}
LENGTH = 48


def by_windows(f, device="cpu", windows=WINDOWS):
    """Calls one compiled function with one number after the other."""
    for dynamic in (None, True):
        torch._dynamo.reset()
        options = {"lower": "always", "inner_backend": "aot_eager"}
        compiled = torch.compile(f, backend="cudnn_flex", options=options, dynamic=dynamic)
        for window in windows:
            args = [t.to(device) for t in qkv(length=LENGTH)]
            close(compiled(*args, window), f(*args, window))


def test_a_window_of_any_size():
    def f(q, k, v, window):
        def score_mod(s, b, h, i, j):
            return torch.where((i >= j) & (i - j < window), s, -math.inf)

        return flex_attention(q, k, v, score_mod)

    by_windows(f)


def test_a_block_mask_with_a_window_of_any_size():
    def f(q, k, v, window):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (j + window > i), None, None, LENGTH, LENGTH, "cpu")
        return flex_attention(q, k, v, block_mask=mask)

    by_windows(f, windows=[w for w in WINDOWS if abs(w) < 2**62])  # stock's own j + window wraps


MASKS = (
    "i - j < a", "j + a >= i", "i + c >= j", "i + b - j < a", "abs(i - j) <= a", "j < lengths[n] + a",
    "(i - j < a) | (j == b)", "i * 2 + c > j", "(j < b) ^ (i > c)", "(j + c) % 3 != 0", "j != a",
    "where(i > 9, i - j < a, j < b)", "j >= starts[n] - a", "lengths[n] == a", "(j > i - a) & (j < b)",
    "i - j - b < a - b", "minimum(i, j) + c >= 4", "not_(j - i > a)", "lengths[n] - c > j", "i + b + 2**30 + 2**30 > j",
)  # fmt: skip
# A factor and what is added.
SCORES = (
    ("1", "0"), ("1 * ((i - j) % 5 < a)", "0"), ("1", "where(i - j < a, 0.5, -0.5)"), ("1", "-0.1 * ((i + d) % 7)"),
)  # fmt: skip
TORCH = {"where": torch.where, "minimum": torch.minimum, "not_": torch.logical_not}
PYTHON = {"where": lambda c, x, y: x if c else y, "minimum": min, "not_": lambda x: not x}
CAPTURED = {"lengths": [30, NONE], "starts": [0, 9]}


def numbers(chance):
    return {
        "a": chance.choice(WINDOWS), "b": chance.choice((7, 2**31, NONE, -3)),
        "c": chance.choice(OFFSETS[:-1]), "d": chance.choice((0, 3, 2**31 + 2, 2**40)),
    }  # fmt: skip


def sources(chance):
    """Of a mask, a factor and what is added."""
    mask = " & ".join(f"({m})" for m in chance.sample(MASKS, chance.choice((1, 2))))
    return mask, *chance.choice(SCORES)


def attention(mask, factor, added, device):
    """A function of query, key, value and four numbers."""
    scope = {**TORCH, **{name: torch.tensor(value, device=device) for name, value in CAPTURED.items()}}
    scope["inf"] = math.inf
    exec(f"def mod(a, b, c, d):\n  return lambda s, n, h, i, j: where({mask}, s * ({factor}) + {added}, -inf)", scope)
    return lambda q, k, v, *given: flex_attention(q, k, v, scope["mod"](*given))


def expected(qkv, mask, factor, added, given):
    """Dense attention, with Python's integers, which have no end."""
    code = compile(f"(({factor}), ({added})) if {mask} else (0.0, -float('inf'))", "", "eval")
    span = range(LENGTH)
    found = [
        [[eval(code, {**PYTHON, **CAPTURED, **given, "n": n, "i": i, "j": j}) for j in span] for i in span]
        for n in range(len(CAPTURED["lengths"]))
    ]
    times, plus = torch.tensor(found, dtype=torch.float64, device=qkv[0].device)[:, None].unbind(-1)
    query, key, value = (t.double() for t in qkv)
    scores = query @ key.mT / math.sqrt(query.shape[3]) * times + plus
    return torch.where((plus == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1)) @ value


def check(number, device="cpu"):
    """Compiles one generated program once, and calls it with four sets of numbers.

    Returns why it is kept, or None: what is kept is as stock has it, whose sums of captured integers wrap.
    """
    chance = random.Random(number)
    written = sources(chance)
    torch._dynamo.reset()
    options = {"lower": "always", "inner_backend": "aot_eager"}
    compiled = torch.compile(attention(*written, device), backend="cudnn_flex", options=options, dynamic=True)
    for _ in range(4):
        given, args = numbers(chance), [t.to(device) for t in qkv(length=LENGTH)]
        with collect() as report:
            found = compiled(*args, *given.values())
        if report.kept:
            return report.kept[0].reason
        off = (found - expected(args, *written, given)).abs().max()
        assert off < 0.02, (number, written, given, float(off))
    return None


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_generated_programs_of_numbers_of_any_size(first):
    for number in range(first, first + 10):
        assert check(number) is None, (number, sources(random.Random(number)))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_rows_hidden_whole_by_a_finite_number(fill, added, trainable):
    number = FILLS[fill]

    def hidden(s, b, h, i, j):
        shown = (i >= j) & (i != 5)
        return s + torch.where(shown, 0.0, number) if added else torch.where(shown, s, number)

    def f(q, k, v):
        return flex_attention(q, k, v, hidden)

    with torch.enable_grad():
        args = [t.requires_grad_() for t in qkv(length=LENGTH)]
        grad = torch.randn(args[0].shape).to(args[0].dtype)
        found, calls = run(f, *args, lower="always")
        assert calls[0].reason is None
        gradients = torch.autograd.grad(found, args, grad)
        exact = [t.detach().double().requires_grad_() for t in args]
        place = [torch.arange(LENGTH).view(-1, 1), torch.arange(LENGTH)]
        scores = exact[0] @ exact[1].mT / math.sqrt(args[0].shape[3])
        expected = hidden(scores.float(), 0, 0, *place).softmax(-1).double() @ exact[2]
        wanted = torch.autograd.grad(expected, exact, grad.double())
    for mine, right in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (mine.double() - right).abs().max() < 0.03 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize(("fill", "refused"), [(f, True) for f in FILLS.values()] + [(-65504.0, False), (-1e4, False)])
def test_plans_are_not_tried_where_a_log_sum_exp_would_lose_log_n(fill, refused):
    score = make("where", make("ge", ir.index("q"), ir.index("k")), SCORE, ir.const(fill, F32))
    problem = problem_of(forward_key(text(ir.program(score, ir.TRUE)), *qkv(length=LENGTH), [], 0.25, True))
    reason = support.refused(problem, ir.program(score, ir.TRUE))
    assert (reason is not None and reason.code is Code.FINITE_FILL) == refused


@pytest.mark.parametrize("number", range(12))
def test_stock_functions_of_a_program_have_integers_of_any_size(number, monkeypatch):
    """Inductor's kernel takes these functions where no plan takes the integers; here eager flex_attention does."""
    given_to_kernels = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *given: given_to_kernels.append(given) or forward(*given))
    monkeypatch.setattr(inductor, "_compiled", lambda program: inductor._attention)
    chance = random.Random(number)
    written = sources(chance)
    torch._dynamo.reset()
    options = {"lower": "always", "inner_backend": "aot_eager"}
    compiled = torch.compile(attention(*written, "cpu"), backend="cudnn_flex", options=options, dynamic=True)
    for _ in range(4):
        given, args = numbers(chance), qkv(length=LENGTH)
        compiled(*args, *given.values())
        query, key, value, rest, *_ = given_to_kernels[-1]
        found, _ = inductor.forward(query, key, value, rest)
        off = (found - expected(args, *written, given)).abs().max()
        assert off < 0.02, (written, given, float(off))
