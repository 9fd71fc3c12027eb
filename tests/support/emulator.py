"""Runs lowerings on the CPU: a stand-in for cudnn.pygraph that computes, node by node, what cuDNN computes.

Knows nothing of programs or strategies. What cuDNN is known to compute wrongly is an AssertionError;
what it refuses is a Refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import cudnn
import torch

from cudnn_flex_compile.engine.graph import build
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.problem import Problem
from tests.support.dialect import BOOLEAN, FLOAT, INT32, MISREAD, POINTWISE, REFUSED, STORED, WRONG, Refused, Tensor

BANDS = (
    "use_causal_mask", "use_causal_mask_bottom_right", "sliding_window_length", "diagonal_alignment",
    "diagonal_band_left_bound", "diagonal_band_right_bound", "use_padding_mask", "seq_len_q", "seq_len_kv",
)  # fmt: skip
SETTINGS = ("name", "o", "dO", "stats", "attn_scale", "generate_stats", "implementation", "use_deterministic_algorithm")


class Graph:
    """What the package uses of cudnn.pygraph. Nodes are recorded; `emulated` computes them."""

    def __init__(self, **types: Any) -> None:
        self.links: list[Any] = []
        self.bands: dict[str, Any] = {}
        self.full: tuple[int, ...] = ()
        self.backward = False
        self.modified = self.gradient = Tensor("score")
        self.bias: Tensor | None = None

    def tensor(self, *, dim: Any, stride: Any, data_type: Any, is_pass_by_value: bool = False) -> Tensor:
        assert data_type in STORED, f"a tensor of {data_type}"
        where = {"dim": tuple(dim), "stride": tuple(stride), "by_value": is_pass_by_value}
        return Tensor("given", data_type=data_type, **where)

    def gen_index(self, *, input: Tensor, axis: int, compute_data_type: Any) -> Tensor:
        if not input.comes_from("score", "grad"):
            raise Refused("an index of what does not descend from the score")
        assert compute_data_type == INT32
        return Tensor("index", (input,), axis=axis, compute=INT32)

    def __getattr__(self, method: str) -> Callable[..., Tensor]:
        if method not in POINTWISE:
            raise AttributeError(method)
        slot = POINTWISE[method]

        def record(*, compute_data_type: Any, **inputs: Tensor) -> Tensor:
            assert set(inputs) == set(slot.keywords), f"{method} takes {slot.keywords}, got {tuple(inputs)}"
            return Tensor(method, tuple(inputs[k] for k in slot.keywords), compute_data_type)

        return record

    def sdpa(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        return self._attention(arguments)[:2]

    def sdpa_backward(self, **arguments: Any) -> tuple[Tensor, ...]:
        self.backward = True
        return self._attention(arguments)

    def _attention(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        query, key, _ = (arguments.pop(name) for name in "qkv")
        score_mod, bprop = (arguments.pop(name, None) for name in ("score_mod", "score_mod_bprop"))
        self.bands = {name: arguments.pop(name) for name in BANDS if name in arguments}
        assert not (self.bands and score_mod), "bands beside a score_mod"
        self.full = (*query.dim[:3], key.dim[2])
        self.bias, of_bias = arguments.pop("bias", None), arguments.pop("dBias", None)
        assert (of_bias is not None) == (self.bias is not None and self.backward)
        assert of_bias is None or of_bias.dim == self.bias.dim
        raw, grad = Tensor("score", data_type=FLOAT), Tensor("grad", data_type=FLOAT)
        self.modified = score_mod(self, raw) if score_mod else raw
        self.gradient = bprop(self, grad) if bprop else grad
        readers = _readers(self.gradient, grad)
        if of_bias is not None and readers and [r.method for r in readers] != ["mul"]:
            raise Refused("a gradient that other than one product reads, beside dBias")
        assert set(arguments) <= set(SETTINGS), f"unknown arguments {set(arguments) - set(SETTINGS)}"
        return Tensor("out"), Tensor("out"), Tensor("out")


def _readers(root: Tensor, read: Tensor) -> list[Tensor]:
    """The nodes that `root` is computed by and that read a tensor."""
    seen, ahead = [], [root]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.append(node)
            ahead += node.inputs
    return [node for node in seen if read in node.inputs]


def band(arguments: dict[str, Any], rows: torch.Tensor, columns: torch.Tensor, full: tuple[int, ...]) -> torch.Tensor:
    """What cuDNN's own mask arguments leave visible, as their documentation has it.

    kv <= q + right and q - left < kv < columns, where q counts from the bottom right corner if so aligned.

    Args:
        arguments: those of BANDS that were given.
        rows, columns: the lengths, [B, 1, 1, 1].
        full: dims of the score.
    """
    causal = bool(arguments.get("use_causal_mask"))
    from_corner = bool(arguments.get("use_causal_mask_bottom_right"))
    right = 0 if causal or from_corner else arguments.get("diagonal_band_right_bound")
    left = arguments.get("diagonal_band_left_bound", arguments.get("sliding_window_length"))
    alignment = arguments.get("diagonal_alignment", cudnn.diagonal_alignment.TOP_LEFT)
    assert not (causal and from_corner)
    assert not ({"sliding_window_length", "diagonal_band_left_bound"} <= set(arguments)), "two left bounds"
    assert not ((causal or from_corner) and "diagonal_band_right_bound" in arguments), "two right bounds"
    assert right is None or right >= 0, f"a right bound of {right}"
    assert left is None or left >= 1, f"a left bound of {left}"
    if not causal and alignment == cudnn.diagonal_alignment.BOTTOM_RIGHT:
        from_corner = True
    q, kv = torch.arange(full[2]).view(-1, 1), torch.arange(full[3])
    visible = (q < rows) & (kv < columns)
    q = q + (columns - rows if from_corner else 0)
    visible = visible & (True if right is None else kv <= q + right)
    return visible & (True if left is None else kv > q - left)


@dataclass
class Run:
    """One execution of a graph. `memory` has the tensor behind each given one; floats are computed as the score is."""

    graph: Graph
    score: torch.Tensor
    grad: torch.Tensor
    memory: dict[Tensor, torch.Tensor]
    done: dict[Tensor, torch.Tensor] = field(default_factory=dict)

    def value(self, tensor: Tensor) -> torch.Tensor:
        if tensor not in self.done:
            self.done[tensor] = self._leaf(tensor) if tensor.method not in POINTWISE else self._node(tensor)
        return self.done[tensor]

    def visible(self) -> torch.Tensor:
        """By the mask arguments alone."""
        bands, full = self.graph.bands, self.graph.full
        lengths = [torch.tensor(n) for n in full[2:]]
        if bands.get("use_padding_mask"):
            given = [bands[name] for name in ("seq_len_q", "seq_len_kv")]
            assert all(t.data_type == INT32 and t.dim == (full[0], 1, 1, 1) for t in given), "lengths of another form"
            lengths = [self.memory[t].view(t.dim) for t in given]
        return band(bands, *lengths, full)

    def _leaf(self, tensor: Tensor) -> torch.Tensor:
        if tensor.method == "index":
            assert tensor.data_type == INT32, "an index that is no INT32"
            shape = [-1 if d == tensor.axis else 1 for d in range(4)]
            return torch.arange(self.graph.full[tensor.axis], dtype=torch.int32).view(shape)
        return {"score": self.score, "grad": self.grad}[tensor.method] if not tensor.given else self._given(tensor)

    def _given(self, tensor: Tensor) -> torch.Tensor:
        memory = self.memory[tensor]
        assert memory.dtype == STORED[tensor.data_type], f"{memory.dtype} read as {tensor.data_type}"
        for name, applies in MISREAD.items():
            assert tensor.by_value or not applies(tensor, self.graph.full, self.graph.backward), f"an operand: {name}"
        read = memory.as_strided(tensor.dim, tensor.stride)
        return read.to(self.score.dtype) if memory.is_floating_point() else read

    def _node(self, tensor: Tensor) -> torch.Tensor:
        for name, applies in WRONG.items():
            assert not applies(tensor), f"{tensor.method}: {name}"
        for name, applies in REFUSED.items():
            if applies(tensor):
                raise Refused(name)
        values = [self.value(i) for i in tensor.inputs]
        if tensor.method == "binary_select":
            values = [values[0] != 0, *(self._as(v, tensor.compute) for v in values[1:])]
        elif tensor.compute != BOOLEAN:
            values = [self._as(v, tensor.compute) for v in values]
        return self._as(POINTWISE[tensor.method].compute(*values), tensor.data_type)

    def _as(self, value: torch.Tensor, data_type: Any) -> torch.Tensor:
        return value.to(self.score.dtype if data_type == FLOAT else STORED[data_type])


def emulated(
    problem: Problem,
    lowering: Lowering,
    score: torch.Tensor,
    operands: dict[int, torch.Tensor],
    ints: dict[int, int],
    floats: dict[int, float],
    grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """The modified, masked score of a forward problem; of a backward one, the gradient of the raw score.

    Args:
        problem: whose operand specs describe `operands`.
        lowering: of the problem's program.
        score: [B, H, Q, K] raw scaled scores, float32 or float64, in which all floats are computed.
        operands, ints, floats: by position.
        grad: [B, H, Q, K], with respect to the modified score.
    """
    with mock.patch.object(build.frontend, "Graph", Graph):
        built = build.assemble(problem, lowering)
    inputs, graph = built.inputs, built.graph
    built.callbacks.clear()
    memory = dict(inputs.hosts)
    batch = problem.query.shape[0]
    memory |= {t: torch.full((batch, 1, 1, 1), n, dtype=torch.int32) for t, n in inputs.filled}
    memory |= {tensor: operands[i] for i, tensor in inputs.operands.items()}
    memory |= {t: torch.full((1,) * 4, ints[i], dtype=torch.int32) for i, t in inputs.ints.items()}
    memory |= {t: torch.full((1,) * 4, floats[i], dtype=torch.float32) for i, t in inputs.floats.items()}
    if graph.modified.given or graph.gradient.given:
        raise Refused("a result that does not descend from the score")
    run = Run(graph, score, torch.zeros_like(score) if grad is None else grad, memory)
    modified = run.value(graph.modified) + (0.0 if graph.bias is None else run.value(graph.bias))
    modified = torch.where(run.visible(), modified, -math.inf)
    return (run.value(graph.gradient) if graph.backward else modified).expand(score.shape)
