"""The class of a plan. Once a plan was certified in full, another shape of its class takes fewer regimes.

A plan is built for one shape, and is always certified at this shape before it runs data. A new shape of a known class
(Engine.coverage) is spared the regimes that test the program's arithmetic (large scores, outliers, ties), which its
strategy computes at every shape alike. It is not spared those that have shown faults of single shapes
(regimes.Regime.shapes).

Two plans are of one class if they have the same program, are written as the same graph, have the same direction,
dtypes, head dims, head counts, order of strides, scale and operands, and were compared with the same functions. Their
lengths must also be alike in all that faults have depended on: the remainder (a multiple of 128, an odd multiple of 64,
another), which of the two is larger, and the size to a factor of two, by which cuDNN's heuristics choose kernels.
Several plans for one call, whose boxes have lengths of their own, are of no class.
"""

from collections.abc import Hashable

from cudnn_flex_compile.engine.problem import Problem, TensorSpec


def class_of(problem: Problem, variant: Hashable, fingerprint: str | None) -> Hashable:
    """A key that is equal for two plans if a fault in the arithmetic of one is a fault of the other.

    Args:
        variant: how the graph is written: the strategy, and its guards and expansions (engine/candidates.py).
        fingerprint: the text of the reference with which the plan is compared.
    """
    query, key = problem.query.shape, problem.key.shape
    tensors = (problem.query, problem.key, problem.value, problem.out, problem.grad)
    lengths = problem.lengths
    return (
        problem.program, fingerprint, problem.direction, variant, problem.device, problem.scale,
        problem.stats, problem.deterministic, problem.lse_gradient, query[1], query[3], key[1], problem.value.shape[3],
        tuple(map(_layout, tensors)), tuple(map(_layout, problem.operands)),
        query[0].bit_length(), tuple(map(_length, lengths)), (lengths[0] > lengths[1]) - (lengths[0] < lengths[1]),
    )  # fmt: skip


def _layout(spec: TensorSpec | None) -> Hashable:
    """The dtype, the order of strides, and which dimensions are single or broadcast."""
    if spec is None:
        return None
    order = sorted(range(len(spec.stride)), key=lambda axis: (spec.stride[axis], axis))
    shape = [(size == 1, stride == 0) for size, stride in zip(spec.shape, spec.stride, strict=True)]
    large = sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True)) >= 2**31
    return spec.dtype, tuple(order), tuple(shape), large


def _length(length: int) -> Hashable:
    return length.bit_length(), {0: 0, 64: 64}.get(length % 128)
