"""Runs a graph that is attention and views alone as it is: there is nothing to compile.

Users often compile flex_attention by itself. Such a graph skips AOTAutograd and Inductor: it compiles in the time that
its plans take, and a call takes the host as long as an eager autograd.Function. `compile_inner` asks here first.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.inner import inductor
from cudnn_flex_compile.ops import attention as attention_op
from cudnn_flex_compile.ops import check_block_mask, list_tiles
from cudnn_flex_compile.ops.autograd import attention
from cudnn_flex_compile.ops.undispatched import PLAIN, check, list_without_dispatch
from cudnn_flex_compile.passes.read.views import is_view

# The modes of Inductor that ask for kernels alone, without CUDA graphs.
MODES = (None, "default", "max-autotune-no-cudagraphs")
PLAINLY = {  # the function that runs in place of an op
    attention_op: attention, check_block_mask: check, list_tiles: list_without_dispatch,
}  # fmt: skip


def suffices(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> bool:
    """Whether Inductor would have nothing to compile in the (rewritten) graph."""
    asked = options.inner_backend == inductor.NAME and options.mode in MODES and not options.inner_options
    triton: Any = torch_private.inductor_triton()
    if not asked or triton is None or triton.cudagraphs:
        return False
    nodes = [node for node in graph_module.graph.nodes if node.op != "placeholder"]
    plain = all(type(t) in PLAIN for t in example_inputs if isinstance(t, Tensor))
    return plain and any(n.target is attention_op for n in nodes) and all(map(_is_light, nodes))


def _is_light(node: Node) -> bool:
    return node.op == "output" or node.target in (*PLAINLY, operator.getitem) or is_view(node)


def compile(graph_module: GraphModule) -> Callable[..., Any]:
    """The graph as a Python function. Changes the graph."""
    for node in graph_module.graph.nodes:
        node.target = PLAINLY.get(node.target, node.target)
    graph_module.recompile()
    _ = graph_module.code  # a lazy module writes its forward only now; an earlier one would look for it at each call
    return graph_module.forward
