"""Problems: the layout of the output is flex_attention's own, and what cuDNN cannot read is made dense."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.engine.problem import (
    BACKWARD,
    FORWARD,
    Problem,
    TensorSpec,
    dense,
    out_spec,
    strides_like,
    usable,
)
from cudnn_flex_compile.scoremod import ir

flex = importlib.import_module("torch._higher_order_ops.flex_attention")


def by_torch(shape: tuple[int, ...], query: torch.Tensor) -> tuple[int, ...]:
    """The strides that flex_attention gives an output of this shape."""
    return flex._permute_strides(torch.empty(shape, device="meta"), query.stride()).stride()


def packed(batch: int, heads: int, length: int, dim: int) -> torch.Tensor:
    """q of a projection to [B, S, 3, H, D]."""
    return torch.empty(batch, length, 3, heads, dim, device="meta")[:, :, 0].transpose(1, 2)


LAYOUTS = {
    "BHSD": lambda b, h, s, d: torch.empty(b, h, s, d, device="meta"),
    "BSHD": lambda b, h, s, d: torch.empty(b, s, h, d, device="meta").transpose(1, 2),
    "SBHD": lambda b, h, s, d: torch.empty(s, b, h, d, device="meta").permute(1, 2, 0, 3),
    "packed": packed,
    "packed BHSD": lambda b, h, s, d: torch.empty(b, h, s, 3 * d, device="meta")[..., :d],
    "expanded batch": lambda b, h, s, d: torch.empty(1, h, s, d, device="meta").expand(b, h, s, d),
    "expanded heads": lambda b, h, s, d: torch.empty(b, 1, s, d, device="meta").expand(b, h, s, d),
    "all expanded": lambda b, h, s, d: torch.empty(1, 1, 1, d, device="meta").expand(b, h, s, d),
    "HBSD": lambda b, h, s, d: torch.empty(h, b, s, d, device="meta").transpose(0, 1),
    "transposed rows": lambda b, h, s, d: torch.empty(b, h, d, s, device="meta").transpose(2, 3),
    "sliced": lambda b, h, s, d: torch.empty(b, h, 2 * s, d, device="meta")[:, :, ::2],
}
SIZES = [(2, 4, 128, 64), (1, 4, 128, 64), (2, 1, 128, 64), (2, 4, 1, 64), (1, 1, 1, 64), (4, 4, 4, 8), (1, 1, 7, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_output_is_laid_out_as_flex_attention_does(layout: str, sizes: tuple[int, ...]) -> None:
    query = LAYOUTS[layout](*sizes)
    for value_dim in (sizes[3], 2 * sizes[3], 1):
        shape = (*sizes[:3], value_dim)
        assert strides_like(shape, query.stride()) == by_torch(shape, query)
        value = TensorSpec((sizes[0], 1, 9, value_dim), (9 * value_dim,) * 2 + (value_dim, 1), torch.bfloat16)
        spec = TensorSpec(tuple(query.shape), tuple(query.stride()), torch.bfloat16)
        assert out_spec(spec, value) == TensorSpec(shape, by_torch(shape, query), torch.bfloat16)


@settings(max_examples=300)
@given(st.permutations(range(4)), st.lists(st.sampled_from([1, 1, 2, 3, 8]), min_size=4, max_size=4))
def test_any_order_of_dimensions(order: list[int], sizes: list[int]) -> None:
    query = torch.empty([sizes[d] for d in order], device="meta").permute([order.index(d) for d in range(4)])
    assert list(query.shape) == sizes
    shape = (*sizes[:3], 5)
    assert strides_like(shape, query.stride()) == by_torch(shape, query)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([0, 1, 1, 8, 8, 64, 512]), min_size=4, max_size=4),
    st.lists(st.sampled_from([1, 2, 3, 5]), min_size=4, max_size=4),
)
def test_any_strides_ties_included(strides: list[int], sizes: list[int]) -> None:
    """Every element is at the same place; the stride of a dimension of size 1, which addresses nothing, may differ."""
    query = torch.empty(0, device="meta").new_empty_strided(sizes, strides)
    got, expected = strides_like(tuple(sizes), tuple(strides)), by_torch(tuple(sizes), query)
    assert [s for s, n in zip(got, sizes, strict=True) if n > 1] == [
        s for s, n in zip(expected, sizes, strict=True) if n > 1
    ]
    assert got[-1] == 1


@pytest.mark.parametrize(
    ("shape", "stride", "good"),
    [
        ((2, 4, 128, 64), (32768, 8192, 64, 1), True),
        ((2, 4, 128, 64), (32768, 64, 256, 1), True),
        ((2, 4, 128, 64), (98304, 64, 768, 1), True),
        ((2, 4, 128, 64), (32768, 8192, 1, 128), False),  # last stride not 1
        ((2, 4, 128, 64), (0, 8192, 64, 1), False),  # expanded
        ((1, 4, 128, 64), (0, 8192, 64, 1), True),  # the stride of one batch does not matter
        ((2, 4, 128, 64), (33792, 8448, 66, 1), False),  # rows that do not start at 16 bytes
        ((2, 4, 1, 64), (256, 64, 3, 1), True),
        ((2, 4, 128, 1), (4096, 1024, 8, 7), True),
        ((2, 4, 128, 64), (-32768, 8192, 64, 1), False),
    ],
)
def test_what_cudnn_reads(shape: tuple[int, ...], stride: tuple[int, ...], good: bool) -> None:
    assert usable(TensorSpec(shape, stride, torch.bfloat16)) == good


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (7, 1, 2, 8), (2, 3, 0, 5)])
def test_dense_is_contiguous(shape: tuple[int, ...]) -> None:
    spec = dense(TensorSpec(shape, (9, 9, 9, 9), torch.float16))
    expected = torch.empty(shape, dtype=torch.float16)
    assert spec.stride == tuple(expected.stride()) or 0 in shape
    assert (spec.shape, spec.dtype) == (shape, torch.float16)


def test_specs_describe_tensors() -> None:
    tensor = torch.empty(2, 5, 3, 8).transpose(1, 2)
    spec = TensorSpec.of(tensor)
    like = spec.empty(torch.device("cpu"))
    assert (like.shape, like.stride(), like.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def problem() -> Problem:
    query, value = (
        TensorSpec(s, t, torch.bfloat16)
        for s, t in (((2, 4, 9, 64), (2304, 64, 256, 1)), ((2, 2, 7, 32), (448, 224, 32, 1)))
    )
    key = TensorSpec((2, 2, 7, 64), (896, 448, 64, 1), torch.bfloat16)
    return Problem(ir.program(), FORWARD, query, key, value, out_spec(query, value), (), 0.125, 0, stats=False)


def test_forward_and_backward_belong_together() -> None:
    forward = problem()
    backward = forward.backward()
    assert (backward.direction, backward.grad, backward.stats) == (BACKWARD, forward.out, True)
    assert backward.forward() == Problem(**{**_fields(forward), "stats": True})
    assert (forward.lse_shape, forward.lengths) == ((2, 4, 9), (9, 7))


def _fields(spec: Problem) -> dict[str, object]:
    return {name: getattr(spec, name) for name in Problem.__dataclass_fields__}


def test_problems_that_differ_are_unequal() -> None:
    base = _fields(problem())
    other = TensorSpec((2, 4, 9, 64), (2304, 576, 64, 1), torch.bfloat16)
    changes = {
        "program": ir.program(ir.SCORE * 2.0),
        "direction": BACKWARD, "query": other, "key": other, "value": other, "out": other,
        "operands": (other,),
        "scale": 0.25, "device": 1, "stats": True, "grad": other, "deterministic": True,
        "gradients": (other, other, other), "lse_gradient": True, "tiled": True, "replay": False,
    }  # fmt: skip
    assert set(changes) == set(base)
    made = [Problem(**base), *(Problem(**{**base, name: value}) for name, value in changes.items())]
    assert len(set(made)) == len(made)
    assert all(a != b for a, b in itertools.combinations(made, 2))
    assert hash(Problem(**base)) == hash(made[0])


def test_problems_that_another_process_gets_are_equal() -> None:
    assert pickle.loads(pickle.dumps(problem())) == copy.deepcopy(problem()) == problem()
