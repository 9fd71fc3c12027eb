"""cuDNN's pointwise methods as it computes them, and what it refuses or is known to compute wrongly.

Knows nothing of graphs beyond one tensor and its inputs, nor of this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cudnn
import torch
from torch.nn import functional as F

from tests.support import int_arithmetic

FLOAT, INT32, BOOLEAN = cudnn.data_type.FLOAT, cudnn.data_type.INT32, cudnn.data_type.BOOLEAN
STORED = {
    FLOAT: torch.float32, INT32: torch.int32, BOOLEAN: torch.bool,
    cudnn.data_type.BFLOAT16: torch.bfloat16, cudnn.data_type.HALF: torch.float16,
}  # fmt: skip


class Refused(AssertionError):
    """cuDNN builds no plan for the graph, so that it runs nothing wrongly."""


class Slot(NamedTuple):
    """A pointwise method: its keywords, and what it computes on tensors of one type."""

    keywords: tuple[str, ...]
    compute: Callable[..., torch.Tensor]


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b) if a.is_floating_point() else int_arithmetic.quotient(a, b)


def _vjp(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def compute(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        loss, x = torch.broadcast_tensors(loss, x)
        return torch.func.vjp(function, x)[1](loss)[0]

    return compute


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


AB, PAIR, ONE, LOSS = ("a", "b"), ("input0", "input1"), ("input",), ("loss", "input")
POINTWISE: dict[str, Slot] = {
    **{name: Slot(AB, getattr(torch, name)) for name in ("add", "sub", "mul", "logical_and", "logical_or")},
    **{name: Slot(ONE, getattr(torch, name)) for name in (
        "reciprocal", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh", "sigmoid", "erf", "relu",
        "floor", "ceil", "logical_not", "neg",
    )},
    "div": Slot(AB, _quotient), "mod": Slot(PAIR, int_arithmetic.remainder), "pow": Slot(PAIR, torch.pow),
    "abs": Slot(ONE, int_arithmetic.in_float32(torch.abs)),
    "min": Slot(PAIR, int_arithmetic.in_float32(torch.minimum)),
    "max": Slot(PAIR, int_arithmetic.in_float32(torch.maximum)),
    "gelu": Slot(ONE, F.gelu), "gelu_approx_tanh": Slot(ONE, _gelu_tanh), "swish": Slot(ONE, F.silu),
    "softplus": Slot(ONE, F.softplus), "relu_backward": Slot(LOSS, _vjp(torch.relu)),
    "gelu_backward": Slot(LOSS, _vjp(F.gelu)), "gelu_approx_tanh_backward": Slot(LOSS, _vjp(_gelu_tanh)),
    "swish_backward": Slot(LOSS, _vjp(F.silu)), "tanh_backward": Slot(LOSS, _vjp(torch.tanh)),
    **{f"cmp_{name}": Slot(("input", "comparison"), getattr(torch, name.replace("neq", "ne")))
       for name in ("ge", "gt", "le", "lt", "eq", "neq")},
    "binary_select": Slot(("mask", "input0", "input1"), torch.where),
}  # fmt: skip


@dataclass(eq=False)
class Tensor:
    """A graph tensor: `method` of `inputs`, or the one that `method` names: given, score, grad, index."""

    method: str
    inputs: tuple["Tensor", ...] = ()
    compute: Any = None
    data_type: Any = None
    dim: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    by_value: bool = False
    axis: int = 0
    sources: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        inner = self.inputs if self.method != "index" else ()
        self.sources = frozenset({self.method}).union(*(t.sources for t in inner))

    def _set(self, **fields: Any) -> "Tensor":
        for name, value in fields.items():
            setattr(self, name, value)
        return self

    def set_data_type(self, data_type: Any) -> "Tensor":
        return self._set(data_type=data_type)

    def set_dim(self, dim: Any) -> "Tensor":
        return self._set(dim=tuple(dim))

    def set_stride(self, stride: Any) -> "Tensor":
        return self._set(stride=tuple(stride))

    def set_output(self, output: bool) -> "Tensor":
        return self

    def comes_from(self, *methods: str) -> bool:
        """Whether the value depends on what one of these methods gives; an index depends on no value."""
        return not self.sources.isdisjoint(methods)

    @property
    def given(self) -> bool:
        return self.method == "given"


REFUSED: dict[str, Callable[[Tensor], bool]] = {
    "a node of operands and scalars alone": lambda t: all(i.given for i in t.inputs),
    "an operand as the left side of a comparison": lambda t: t.method.startswith("cmp") and t.inputs[0].given,
    "a comparison of other than integers": lambda t: (
        t.method.startswith("cmp") and any(i.data_type != INT32 for i in t.inputs)
    ),
    "a comparison of the score": lambda t: (
        t.method.startswith("cmp") and any(i.comes_from("score", "grad") for i in t.inputs)
    ),
    "a logical op on BOOLEAN tensors": lambda t: (
        t.method.startswith("logical") and any(i.data_type != INT32 for i in (t, *t.inputs))
    ),
    "a scalar as the first choice of a select": lambda t: t.method == "binary_select" and t.inputs[1].by_value,
    "a scalar minus a tensor, or divided by one": lambda t: t.method in ("sub", "div") and t.inputs[0].by_value,
}
WRONG: dict[str, Callable[[Tensor], bool]] = {
    "a strict comparison of two index tensors": lambda t: (
        t.method in ("cmp_gt", "cmp_lt") and all(i.data_type == INT32 and i.comes_from("index") for i in t.inputs)
    ),
    "kv >= q, which is taken for causal": lambda t: (
        t.method == "cmp_ge" and [(i.method, i.axis) for i in t.inputs] == [("index", 3), ("index", 2)]
    ),
    "a type that no node has": lambda t: t.data_type not in (FLOAT, INT32, BOOLEAN),
    "floats in an integer node": lambda t: (
        t.compute == INT32 and any(i.data_type not in (INT32, BOOLEAN) for i in t.inputs)
    ),
}
# How an operand is read wrongly, by its dims, the call's dims, its type and whether it is a backward.
MISREAD: dict[str, Callable[[Tensor, tuple[int, ...], bool], bool]] = {
    "dims that do not broadcast": lambda t, full, back: any(n not in (1, m) for n, m in zip(t.dim, full, strict=True)),
    "along kv alone in the backward": lambda t, full, back: back and t.dim[3] > 1 and t.dim[2] < full[2],
    "integers of [., ., 1, 1]": lambda t, full, back: t.data_type == INT32 and t.dim[2:] == (1, 1) != full[2:],
    "[B, H, 1, 1]": lambda t, full, back: min(t.dim[:2]) > 1 and t.dim[2:] == (1, 1) != full[2:],
}
