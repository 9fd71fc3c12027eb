"""The interpreter: evaluates expressions with torch ops on tensors that broadcast.

It gives every expression its meaning, and may import the op table alone. The CPU kernel, constant folding,
certification and the tests call it; hoisting runs it on FX proxies, where it writes graph nodes instead of computing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, Expr
from cudnn_flex_compile.scoremod.optable import TABLE
from cudnn_flex_compile.scoremod.saturate import exact

CHUNK = 2**25  # pairs of visible_rows
TORCH_DTYPE = {F32: torch.float32, I32: torch.int32, I64: torch.int64, BOOL: torch.bool}


# In place of comparisons: Inductor orders the bounds of what is compared, and truth values have none that it can order.
OF_TRUTHS = {"ne": torch.logical_xor, "eq": lambda a, b: torch.logical_xor(a, b).logical_not()}


def in_range(source: Any, indices: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A captured tensor and indices into its dimensions that are all in range.

    A negative index counts from the end, as in torch; one beyond either end becomes the index of the entry there. An
    empty tensor gets one entry, zero.

    Stock attention reads a captured tensor at visible pairs alone, so that an index may be anything at hidden pairs.
    Outside the kernel the index is evaluated there, too, and must not fail for an entry that nobody sees.
    """
    if any(isinstance(n, int) and n == 0 for n in sizes):
        return source.new_zeros([1] * len(sizes)), [index * 0 for index in indices]
    near = zip(indices, sizes, strict=True)
    return source, [torch.where(index < 0, index + n, index).clamp(0, n - 1) for index, n in near]


def _gathered(source: Any, indices: Sequence[Any], size: Callable[[Any, int], Any]) -> Any:
    tensor, near = in_range(source, indices, [size(source, dim) for dim in range(len(indices))])
    return tensor[tuple(near)]


def evaluate(
    root: Expr, leaf: Callable[[Expr], Any], high: bool = False,
    size: Callable[[Any, int], Any] = lambda tensor, dim: tensor.shape[dim],
) -> Any:  # fmt: skip
    """The value of `root`.

    Args:
        root: the expression.
        leaf: gives the value of each leaf (score, grad, index, const, capture, operand, scalar), already of
            the leaf's dtype (a capture may have its own) and in a shape that broadcasts with the others.
        high: compute F32 in float64; leaves of F32 must then be float64 too.
        size: gives the size of a dimension of a captured tensor, or of a proxy that stands for one.
    """
    values: dict[Expr, Any] = {}
    for node in ir.walk(root):
        if not node.args:
            values[node] = leaf(node)
        elif node.kind == "gather":
            source, *indices = (values[a] for a in node.args)
            values[node] = _gathered(source, indices, size)
        elif high and node.kind == "f32":
            values[node] = values[node.args[0]].to(torch.float64)
        else:
            of_truths = OF_TRUTHS.get(node.kind) if node.args[0].dtype == BOOL else None
            values[node] = (of_truths or TABLE[node.kind].evaluate)(*(values[a] for a in node.args))
        if node.kind == "gather":  # from a tensor of any dtype: float16 is computed with as F32, uint8 as I32
            values[node] = values[node].to(torch.float64 if high and node.dtype == F32 else TORCH_DTYPE[node.dtype])
    return values[root]


def const_tensor(node: Expr, device: torch.device | str = "cpu", high: bool = False) -> torch.Tensor:
    """A constant as a 0-d tensor of its dtype, or of float64 in place of F32."""
    dtype = torch.float64 if high and node.dtype == F32 else TORCH_DTYPE[node.dtype]
    return torch.full((), node.value, dtype=dtype, device=device)  # pyright: ignore


def fold(node: Expr) -> Expr:
    """The constant that an op on constants computes."""
    value = evaluate(node, const_tensor)
    return ir.const(value.item(), node.dtype)


def environment(
    score: torch.Tensor,
    indices: Mapping[str, torch.Tensor],
    operands: Mapping[int, torch.Tensor],
    ints: Mapping[int, int | torch.Tensor],
    floats: Mapping[int, float | torch.Tensor],
    grad: torch.Tensor | None = None,
    captured: Sequence[torch.Tensor] = (),
) -> Callable[[Expr], torch.Tensor]:
    """A leaf function for `evaluate` on the device and in the float type of `score`.

    Args:
        score: [B, H, Q, K] scaled scores, float32 or float64 (or any shape that the rest broadcasts with).
        indices: int32 per axis, shaped to broadcast with the score.
        operands: by position, shaped to broadcast with the score.
        ints, floats: the scalars, by position, numbers or 0-d tensors on the device of the score. Integers may be
            beyond 32 bits, and sums with them have 64. Those that stand for "none", such as the largest integer,
            should have been brought back (saturate.py), so that no sum wraps.
        grad: like the score; needed where the expression has a `grad` leaf.
        captured: the tensors that are read by `gather`, by position.
    """
    high = score.dtype == torch.float64

    def leaf(node: Expr) -> torch.Tensor:
        match node.kind:
            case "score":
                return score
            case "grad" if grad is not None:
                return grad
            case "index":
                return indices[str(node.value)]
            case "const":
                return const_tensor(node, score.device, high)
            case "operand":
                dtype = score.dtype if node.dtype == F32 else TORCH_DTYPE[node.dtype]
                return operands[int(node.value)].to(dtype)  # pyright: ignore[reportArgumentType]
            case "scalar":
                source = floats if node.dtype == F32 else ints
                number = source[int(node.value)]  # pyright: ignore[reportArgumentType]
                # Integers have dimensions: beside a tensor that has some, one without would become 32 bits.
                dtype, shape = (score.dtype, []) if node.dtype == F32 else (torch.int64, [1] * score.dim())
                if isinstance(number, torch.Tensor):
                    return number.to(dtype).view(shape)
                return torch.full(shape, number, dtype=dtype, device=score.device)
            case "capture" if captured:
                return captured[int(node.value)]  # pyright: ignore[reportArgumentType]
            case kind:
                raise ValueError(f"no value for a {kind} here")

    return leaf


def visible_rows(
    mask: Expr, operands: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[Any], sizes: Sequence[int],
    block: int, device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """Yields the mask block by block of rows: the first row, and the mask [B or 1, H or 1, R, Skv] of R rows.

    Args:
        operands: broadcastable to [B, H, Sq, Skv]; ints, floats: the scalars, by position.
        sizes: the sizes of the axes b, h, q and k.
        block: rows that stay together.
    """
    axes = ir.axes_of(mask)
    batch, heads = (size if axis in axes else 1 for axis, size in zip("bh", sizes, strict=False))
    step = max(1, CHUNK // max(1, batch * heads * sizes[3] * block)) * block
    span = {a: torch.arange(n, dtype=torch.int32, device=device) for a, n in zip(ir.AXES, sizes, strict=True)}
    numbers = dict(enumerate(exact((mask,), ints))), {i: float(f) for i, f in enumerate(floats)}
    for start in range(0, sizes[2], step):
        rows = slice(start, start + step)
        near = {i: t[:, :, rows] if t.shape[2] > 1 else t for i, t in enumerate(operands)}
        indices = {
            "b": span["b"].view(-1, 1, 1, 1), "h": span["h"].view(-1, 1, 1), "q": span["q"][rows].view(-1, 1),
            "k": span["k"],
        }  # fmt: skip
        leaf = environment(torch.zeros((1, 1, 1, 1), device=device), indices, near, *numbers)
        shape = (batch, heads, len(range(sizes[2])[rows]), sizes[3])
        yield start, evaluate(mask, leaf).expand(shape)
