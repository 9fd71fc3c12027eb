"""Measures the work of a graph besides attention: its matrix products, or that it has none.

cost_model.py decides by it whether the host's time counts.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.decide.cost_inputs import Workload
from cudnn_flex_compile.passes.read.call import Call
from cudnn_flex_compile.passes.read.views import is_view

# The argument whose last dimension is summed over, by function or name of a method.
PRODUCTS = {
    torch.nn.functional.linear: 0, torch.matmul: 0, operator.matmul: 0, torch.mm: 0, torch.bmm: 0, torch.addmm: 1,
    torch.baddbmm: 1, "matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1,
}  # fmt: skip


def workload_of(graph_module: GraphModule, calls: int) -> Workload:
    """The workload of a graph and of the graphs within, such as those of checkpointed regions."""
    graphs = [module.graph for module in graph_module.modules() if isinstance(module, GraphModule)]
    products = [node for graph in graphs for node in graph.nodes if node.target in PRODUCTS]
    return Workload(len(products), sum(map(_tflop, products)), calls)


def _tflop(product: Node) -> float:
    """The TFLOP of a product, 0 where sizes depend on data."""
    read, place = product.all_input_nodes, PRODUCTS[product.target]
    if place >= len(read):
        return 0.0
    out, factor = (torch_private.example_of(node, None) for node in (product, read[place]))
    if not (isinstance(out, torch.Tensor) and isinstance(factor, torch.Tensor)):
        return 0.0
    return 2 * math.prod(map(_known, (*out.shape, factor.shape[-1]))) / 1e12


def _known(size: Any) -> int:
    return size if isinstance(size, int) else torch_private.hint_of(size) or 0


def is_alone(graph_module: GraphModule, calls: Sequence[Call]) -> bool:
    """Whether the graph is nothing but attention, views, and the making of a BlockMask, which plans do not need."""
    by_node = {call.node: call for call in calls}
    left = list(graph_module.graph.find_nodes(op="output"))
    seen = set(left)
    while left:
        node = left.pop()
        call = by_node.get(node)
        if call is None and not _is_light(node):
            return False
        read = node.all_input_nodes if call is None else [call.query, call.key, call.value, *call.captured]
        left += [n for n in read if n not in seen]
        seen.update(read)
    return True


def _is_light(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr", "output") or node.target is operator.getitem or is_view(node)
