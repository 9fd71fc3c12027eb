"""Erases nodes that nothing reads once calls are replaced, the making of an absent BlockMask above all.

FX erases no node with an effect; here writes into dead tensors and vmap's bookkeeping are erased, too. flex_attention
makes a BlockMask by both wherever it gets none: some thirty nodes for each call, which the inner backend would trace.
"""

import operator

from torch.fx import Graph, Node

from cudnn_flex_compile.passes.read.call import ancestors
from cudnn_flex_compile.passes.read.effects import has_effect

# Calls whose results share memory with nothing else.
FACTORIES = {"arange", "empty", "full", "ones", "zeros", *(f"new_{n}" for n in ("empty", "full", "ones", "zeros"))}
# Pairs of these open and close a level of vmap: they go together, or stay together.
VMAP = {"lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting"}
BATCHED = {"_add_batch_dim", "_remove_batch_dim"}


def prune(graph: Graph, before: set[Node]) -> None:
    """Erases nodes in place that are dead now and were live before. Nodes that were dead before stay for the inner
    backend, but for those that compute within a level of vmap, if all levels go.
    """
    live = live_nodes(graph)
    dead = before - live
    if not any(_name(node) in BATCHED for node in live):
        dead |= _batched(graph) - live
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            graph.erase_node(node)


def _batched(graph: Graph) -> set[Node]:
    """The nodes that make batched tensors, and all that are computed from these."""
    found: set[Node] = set()
    for node in graph.nodes:
        if _name(node) in BATCHED or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def live_nodes(graph: Graph) -> set[Node]:
    """Inputs, the nodes from which the output is computed, and every node with an effect on these, with its arguments.
    """
    live = ancestors(node for node in graph.nodes if node.op in ("placeholder", "output"))
    grown = True
    while grown:
        effects = [node for node in graph.nodes if node not in live and has_effect(node) and not _may_go(node, live)]
        grown = bool(effects)
        live |= ancestors(effects)
    return live


def _may_go(node: Node, live: set[Node]) -> bool:
    """Whether an effect is on nothing live: vmap's bookkeeping without a batched tensor, or a write into memory that a
    dead node makes. A live view of this memory would be computed from its maker, which would be live, too.
    """
    if _name(node) in VMAP:
        return not any(_name(other) in BATCHED for other in live)
    into = node.args[0] if node.target is operator.setitem else None
    return isinstance(into, Node) and into not in live and _name(into) in FACTORIES


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
