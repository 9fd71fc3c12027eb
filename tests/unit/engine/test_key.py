"""Call keys: equal for equal calls, different for calls that differ in anything, and enough to make the problem."""

import itertools
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.key import Meta, backward_key, by_list, forward_key, forward_of, problem_of
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import text

CUDA = torch.device("cuda", 0)


def tensor(*shape: int, order: str = "bhsd", dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA) -> Meta:
    letters = dict(zip("bhsd", shape, strict=True))
    strides, step = {}, 1
    for letter in reversed(order):
        strides[letter], step = step, step * letters[letter]
    return Meta(TensorSpec(shape, tuple(strides[x] for x in "bhsd"), dtype), device)


BASE = {
    "program": text(ir.program()),
    "query": tensor(2, 4, 16, 64), "key": tensor(2, 2, 24, 64), "value": tensor(2, 2, 24, 32),
    "operands": (tensor(1, 4, 1, 1, dtype=torch.float32),), "scale": 0.125, "stats": True,
}  # fmt: skip
CHANGES = [
    {"program": text(ir.program(ir.SCORE * 2.0))},
    {"query": tensor(3, 4, 16, 64)}, {"query": tensor(2, 4, 16, 64, order="bshd")},
    {"query": tensor(2, 4, 16, 64, dtype=torch.float16)},
    {"query": tensor(2, 4, 16, 64, device=torch.device("cuda", 1))},
    {"key": tensor(2, 2, 25, 64)}, {"key": tensor(2, 2, 24, 64, order="bshd")},
    {"key": tensor(2, 2, 24, 64, dtype=torch.float16)},
    {"value": tensor(2, 2, 24, 64)}, {"value": tensor(2, 2, 24, 32, order="bshd")},
    {"value": tensor(2, 2, 24, 32, dtype=torch.float16)},
    {"operands": ()}, {"operands": BASE["operands"] * 2}, {"operands": (tensor(2, 4, 1, 1, dtype=torch.float32),)},
    {"operands": (tensor(1, 4, 1, 1, dtype=torch.int32),)},
    {"operands": (tensor(1, 4, 1, 1, dtype=torch.float32, order="dshb"),)},
    {"scale": 0.25}, {"stats": False},
]  # fmt: skip


def key(**changes: object):
    return forward_key(**{**BASE, **changes})


def test_equal_calls_have_equal_keys() -> None:
    again = {name: tensor(*BASE[name].shape) for name in ("query", "key", "value")}
    assert key(**again) == key()
    assert hash(key(**again)) == hash(key())


def test_calls_that_differ_have_different_keys() -> None:
    keys = [key(), *(key(**change) for change in CHANGES)]
    grads = [tensor(2, 4, 16, 32), tensor(2, 4, 16, 32, order="bshd"), tensor(2, 4, 16, 32, order="sbhd")]
    keys += [backward_key(k, grad, lse) for k in keys for grad in grads for lse in (False, True)]
    for (i, a), (j, b) in itertools.combinations(enumerate(keys), 2):
        assert a != b, f"{i} and {j}"
    assert len(set(keys)) == len(keys)


def test_deterministic_algorithms_are_another_call() -> None:
    before = key()
    torch.use_deterministic_algorithms(True)
    try:
        inside = key()
    finally:
        torch.use_deterministic_algorithms(False)
    assert inside != before == key()
    assert problem_of(inside).deterministic
    assert not problem_of(before).deterministic


def test_keys_of_tensors_and_of_their_layouts_are_the_same() -> None:
    shapes = {"query": (2, 4, 16, 64), "key": (2, 2, 24, 64), "value": (2, 2, 24, 32)}
    real = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    metas = {name: Meta(TensorSpec.of(t), t.device) for name, t in real.items()}
    assert key(**real) == key(**metas)
    assert hash(key(**real)) == hash(key(**metas))


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("lse_gradient", [True, False])
def test_the_forward_of_a_backward(stats: bool, lse_gradient: bool) -> None:
    forward = key(stats=stats)
    backward = backward_key(forward, tensor(2, 4, 16, 32), lse_gradient)
    assert problem_of(backward).lse_gradient == lse_gradient
    assert forward_of(backward) == key(stats=True)
    assert (forward[0], backward[0]) == (FORWARD, BACKWARD)
    assert problem_of(forward_of(backward)) == problem_of(backward).forward()


@pytest.mark.parametrize("change", CHANGES[:-1], ids=[f"{next(iter(c))}{i}" for i, c in enumerate(CHANGES[:-1])])
def test_the_forward_of_any_backward(change: dict[str, object]) -> None:
    assert forward_of(backward_key(key(**change), tensor(2, 4, 16, 32))) == key(**change)


def test_a_call_by_a_list_differs_in_that_alone() -> None:
    for given in (key(), backward_key(key(), tensor(2, 4, 16, 32), True)):
        tiled = by_list(given, True)
        assert tiled != given
        assert by_list(tiled, False) == given
        assert problem_of(tiled) == replace(problem_of(given), tiled=True)


def test_the_problem_is_the_call() -> None:
    problem = problem_of(key())
    assert problem.program is ir.program()
    assert problem.direction == FORWARD
    assert (problem.query.shape, problem.key.shape, problem.value.shape) == (
        (2, 4, 16, 64),
        (2, 2, 24, 64),
        (2, 2, 24, 32),
    )
    assert problem.out == TensorSpec((2, 4, 16, 32), (2048, 512, 32, 1), torch.bfloat16)
    assert problem.operands == (TensorSpec((1, 4, 1, 1), (4, 1, 1, 1), torch.float32),)
    assert (problem.scale, problem.device, problem.stats, problem.grad) == (0.125, 0, True, None)


def test_unreadable_layouts_become_dense_but_the_output_follows_the_query() -> None:
    wrong = tensor(2, 4, 16, 64, order="bhds")
    problem = problem_of(key(query=wrong))
    assert problem.query == TensorSpec((2, 4, 16, 64), (4096, 1024, 64, 1), torch.bfloat16)
    assert problem.out.shape == (2, 4, 16, 32)
    assert problem_of(key(query=tensor(2, 4, 16, 64, order="bshd"))).out.stride == (2048, 32, 128, 1)


def test_unreadable_gradients_take_the_layout_of_the_output() -> None:
    for order, kept in (("bhsd", True), ("bshd", True), ("bhds", False)):
        grad = tensor(2, 4, 16, 32, order=order)
        problem = problem_of(backward_key(key(), grad))
        expected = TensorSpec((2, 4, 16, 32), grad.stride(), torch.bfloat16) if kept else problem.out
        assert problem.grad == expected


def test_every_difference_of_calls_is_one_of_problems() -> None:
    problems = [problem_of(key()), *(problem_of(key(**change)) for change in CHANGES)]
    assert len(set(problems)) == len(problems)
