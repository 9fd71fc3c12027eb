"""The judge accepts hand-written graphs that are known to run, and refuses what is known to fail.

It must not know this package: the graphs are cuDNN's own calls, so a failure is the harness's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cudnn
import pytest

from .harness import SMS, device_properties, judge

BF16, FLOAT, INT, BOOL = (getattr(cudnn.data_type, name) for name in ("BFLOAT16", "FLOAT", "INT32", "BOOLEAN"))
B, H, S, D = 2, 16, 4096, 128
BSHD = {"dim": [B, H, S, D], "stride": [S * H * D, D, H * D, 1]}  # laid out as [B, S, H, D]
ROWS = {"dim": [B, H, S, 1], "stride": [H * S, S, 1, 1]}
SCALAR = {"dim": [1] * 4, "stride": [1] * 4, "is_pass_by_value": True, "data_type": FLOAT}


@dataclass
class Ops:
    """The nodes that the score_mods below need, in the graph that cuDNN hands to a callback."""

    graph: Any
    cap: Any
    fill: Any
    saved: dict[str, Any]  # what the forward part of a backward graph leaves for its bprop

    def apply(self, name: str, dtype: Any = FLOAT, **inputs: Any) -> Any:
        node = getattr(self.graph, name)(**inputs, compute_data_type=dtype)
        node.set_data_type(dtype)
        return node

    def select(self, mask: Any, score: Any) -> Any:
        node = self.graph.binary_select(input0=score, input1=self.fill, mask=mask)
        node.set_data_type(FLOAT)
        return node

    def index(self, like: Any, axis: int) -> Any:
        return self.apply("gen_index", INT, input=like, axis=axis)

    def causal(self, score: Any) -> Any:
        row, col = self.index(score, 2), self.index(score, 3)
        return self.select(self.apply("cmp_ge", BOOL, input=row, comparison=col), score)


LOWERED: list[Any] = []  # graphs that callbacks were given


@pytest.fixture(autouse=True)
def freed():
    """Frontend 1.32 wraps such a graph in a cycle through C++, which is complained about at exit unless it is cut."""
    yield
    for wrapper in LOWERED:
        for cell in wrapper._lower.__closure__:
            cell.cell_contents = None
    LOWERED.clear()


ScoreMod = Callable[[Ops, Any], Any]


def softcap_causal(ops: Ops, score: Any) -> Any:
    ops.saved["scaled"] = scaled = ops.apply("div", a=score, b=ops.cap)
    ops.saved["tanh"] = tanh = ops.apply("tanh", input=scaled)
    return ops.causal(ops.apply("mul", a=tanh, b=ops.cap))


def softcap_backward(ops: Ops, grad: Any) -> Any:
    return ops.apply("tanh_backward", loss=grad, input=ops.saved["scaled"])


def softcap_backward_by_products(ops: Ops, grad: Any) -> Any:
    tanh = ops.saved["tanh"]
    square = ops.apply("mul", a=tanh, b=tanh)
    return ops.apply("sub", a=grad, b=ops.apply("mul", a=grad, b=square))


def boolean_and(ops: Ops, score: Any) -> Any:
    row, col = ops.index(score, 2), ops.index(score, 3)
    lower = ops.apply("cmp_ge", BOOL, input=row, comparison=col)
    upper = ops.apply("cmp_ge", BOOL, input=col, comparison=row)
    return ops.select(ops.apply("logical_and", BOOL, a=lower, b=upper), score)


def entrance_node(ops: Ops, score: Any) -> Any:
    return ops.apply("add", a=score, b=ops.apply("add", a=ops.cap, b=ops.cap))


def callbacks(graph: Any, **mods: ScoreMod) -> dict[str, Callable[[Any, Any], Any]]:
    cap, fill = graph.tensor(**SCALAR), graph.tensor(**SCALAR)
    saved: dict[str, Any] = {}

    def bind(mod: ScoreMod) -> Callable[[Any, Any], Any]:
        return lambda lowered, node: LOWERED.append(lowered) or mod(Ops(lowered, cap, fill, saved), node)

    return {name: bind(mod) for name, mod in mods.items()}


def start(device: dict[str, Any], inputs: int) -> tuple[Any, list[Any]]:
    types = {"io_data_type": BF16, "intermediate_data_type": FLOAT, "compute_data_type": FLOAT}
    graph = cudnn.pygraph(**types, **device)
    return graph, [graph.tensor(**BSHD, data_type=BF16) for _ in range(inputs)]


def emit(node: Any, layout: dict[str, Any], dtype: Any) -> None:
    node.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(dtype)


def forward(score_mod: ScoreMod | None = None) -> Callable[[dict[str, Any]], Any]:
    def build(device: dict[str, Any]) -> Any:
        graph, (q, k, v) = start(device, 3)
        extra: dict[str, Any] = {"use_causal_mask": True}
        if score_mod is not None:
            composite = cudnn.attention_implementation.COMPOSITE
            extra = {**callbacks(graph, score_mod=score_mod), "implementation": composite}
        out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, attn_scale=0.1, **extra)
        emit(out, BSHD, BF16)
        emit(stats, ROWS, FLOAT)
        return graph

    return build


def backward(**mods: ScoreMod) -> Callable[[dict[str, Any]], Any]:
    def build(device: dict[str, Any]) -> Any:
        graph, (q, k, v, out, grad) = start(device, 5)
        stats = graph.tensor(**ROWS, data_type=FLOAT)
        extra: dict[str, Any] = callbacks(graph, **mods) if mods else {"use_causal_mask": True}
        grads = graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=grad, stats=stats, attn_scale=0.1, **extra)
        for node in grads:
            emit(node, BSHD, BF16)
        return graph

    return build


RUNS = {  # known to run, and to be right, on an H200
    "causal forward": forward(),
    "causal backward": backward(),
    "softcap causal forward": forward(softcap_causal),
    "softcap causal backward": backward(score_mod=softcap_causal, score_mod_bprop=softcap_backward),
    "softcap causal backward by products": backward(
        score_mod=softcap_causal, score_mod_bprop=softcap_backward_by_products
    ),
}
FAILS = {  # known to be refused on an H200: the graph and what cuDNN says
    "logical_and of BOOLEAN tensors": (forward(boolean_and), "NOT_SUPPORTED_DATA_TYPE"),
    "a node fed by operands alone": (forward(entrance_node), "NOT_SUPPORTED_GRAPH_PATTERN"),
}
NEEDS_ACTIVATION_BACKWARD = "softcap causal backward"
LACKS_ACTIVATION_BACKWARD = (80, 86, 89, 120)  # so say cuDNN 9.19, 9.26 and 9.28
ACCEPTED = [
    (name, sm)
    for name in RUNS
    for sm in SMS
    if name != NEEDS_ACTIVATION_BACKWARD or sm not in LACKS_ACTIVATION_BACKWARD
]


@pytest.mark.parametrize(("name", "sm"), ACCEPTED)
def test_accepts_what_runs(name: str, sm: int):
    assert judge(RUNS[name], sm) is None


@pytest.mark.parametrize("sm", LACKS_ACTIVATION_BACKWARD)
def test_says_what_an_architecture_lacks(sm: int):
    refusal = judge(RUNS[NEEDS_ACTIVATION_BACKWARD], sm)
    assert refusal is not None
    assert "Backward activations are not supported" in refusal.splitlines()[0]


@pytest.mark.parametrize("name", FAILS)
@pytest.mark.parametrize("sm", SMS)
def test_refuses_what_fails(name: str, sm: int):
    build, status = FAILS[name]
    refusal = judge(build, sm)
    assert refusal is not None
    assert status in refusal.splitlines()[0]


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(ValueError, match="sm=70"):
        device_properties(70)
