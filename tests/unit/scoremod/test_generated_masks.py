"""Every step of the compiler keeps the meaning of generated masks: partition, each strategy's graph, the text.

Knows nothing of the package's interfaces (tests/support/cases.py) nor of cuDNN's arithmetic
(tests/support/emulator.py).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import REFUSED, Case, round_trips, scores
from tests.support.emulator import Refused
from tests.support.generate_masks import SIZES, masked_scores, masks

pytestmark = pytest.mark.any_torch
MASK_CASES, SCORE_CASES = 1500, 700
# At least so many of the generated cases must take each way.
FLOORS = {
    "masks": {
        "lowered": 1200, "native": 120, "chained": 700, "dense": 900, "bounds": 300, "biases": 100, "residual": 40,
        "boxes": 150,
    },
    "scores": {
        "lowered": 500, "native": 10, "chained": 400, "gradient chained": 400, "gradient dense": 400, "boxes": 60,
    },
}  # fmt: skip


def assert_same(got: torch.Tensor, expected: torch.Tensor, step: str) -> None:
    """-inf exactly where it is expected, elsewhere close."""
    assert torch.equal(got == -math.inf, expected == -math.inf), f"{step}: another mask"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{step}: {m}")


@contextlib.contextmanager
def refusals(count: Counter[str]) -> Iterator[None]:
    """Counts what cuDNN refuses to build: the package tries the next strategy then."""
    try:
        yield
    except Refused as error:
        count[f"refused graph: {error}"] += 1


def check_scores(case: Case, count: Counter[str]) -> None:
    """The program, its text and every forward graph."""
    try:
        program, _ = case.prepared
    except REFUSED as error:
        count["refused"] += 1
        count[type(error).__name__] += 1
        return
    count[case.mask_class] += 1
    assert round_trips(program)
    score = scores(case.sizes, high=False)
    expected = case.brute_force(score)
    assert_same(case.interpreted(score), expected, "interpreter")
    lowered = 0
    for name, problem, lowering in case.lowerings(training=False):
        with refusals(count):
            assert_same(case.emulated(problem, lowering, score), expected, name)
            count[name] += 1
            lowered += 1
    for name, parts in case.parts():
        with refusals(count):
            assert_same(case.emulated_parts(parts, score), expected, name)
            count[name] += 1
    count["lowered" if lowered else "kept"] += 1


def check_gradients(case: Case, count: Counter[str]) -> None:
    """Every backward graph: as autograd gives it where visible, zero elsewhere."""
    try:
        found = list(case.lowerings(training=True))
    except REFUSED:
        return
    if not found:
        return
    score = scores(case.sizes, high=True).clone().requires_grad_()
    modified = case.brute_force(score)
    visible = modified.detach() != -math.inf
    grad = torch.linspace(-1, 1, score.numel(), dtype=score.dtype).view(score.shape) * visible
    expected = torch.zeros_like(score)
    if modified.requires_grad:
        (expected,) = torch.autograd.grad(torch.where(visible, modified, 0.0), score, grad, retain_graph=True)
    for name, problem, lowering in found:
        with refusals(count):
            got = case.emulated(problem, lowering, score.detach(), grad)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} backward: {m}")
            count[f"gradient {name}"] += 1


def test_masks() -> None:
    count: Counter[str] = Counter()

    @settings(max_examples=MASK_CASES)
    @given(masks(), st.sampled_from(SIZES))
    def check(mask, sizes) -> None:
        count["cases"] += 1
        check_scores(Case(None, mask, sizes), count)

    check()
    report("masks", count)


def test_scores_under_masks() -> None:
    count: Counter[str] = Counter()

    @settings(max_examples=SCORE_CASES)
    @given(masked_scores(), st.none() | masks(depth=1), st.sampled_from(SIZES))
    def check(score, mask, sizes) -> None:
        count["cases"] += 1
        case = Case(score, mask, sizes)
        check_scores(case, count)
        check_gradients(case, count)

    check()
    report("scores", count)


def report(name: str, count: Counter[str]) -> None:
    """Prints what became of the cases; too few of any kind would prove nothing."""
    print(name, ", ".join(f"{kind}: {n}" for kind, n in sorted(count.items())))
    for kind, floor in FLOORS[name].items():
        assert count[kind] >= floor, f"only {count[kind]} of {count['cases']}: {kind}"
