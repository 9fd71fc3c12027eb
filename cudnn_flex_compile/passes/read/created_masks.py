"""Recognises a BlockMask that the graph itself makes, by create_block_mask, of the very mask_mod of a call.

Dynamo inlines create_block_mask: its nodes, a tensor over all pairs among them, are part of the graph. Such blocks
agree with the mask_mod by construction, at every step, so that nothing has to be compared and nothing has to be made.
The proof does not go by names: the nodes that make the blocks are traced to ATen ops, and so is torch's own
create_block_mask on the subgraph of the mask_mod. Both must be the same ops on the same inputs.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn.attention.flex_attention import create_block_mask

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.read.call import Call, example
from cudnn_flex_compile.passes.read.effects import Writers, aside
from cudnn_flex_compile.passes.read.schemas import marks_of
from cudnn_flex_compile.scoremod.fingerprint import graph_text

log = logging.getLogger("cudnn_flex_compile")
# Python may turn a comparison around, if one of its sides is a tensor of another kind.
TURNED = {
    torch.ops.aten.gt.Tensor: torch.ops.aten.lt.Tensor,
    torch.ops.aten.ge.Tensor: torch.ops.aten.le.Tensor,
}
OPENS, CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def may_be_made(call: Call, writers: Writers) -> bool:
    """Whether a graph makes the blocks of a call: its own, or one that runs it."""
    made = (block is not None and block.op.startswith("call_") for block in call.blocks)
    return any(made) or bool(writers.callers(call.node.graph))


def created_here(call: Call, by_batch: bool, by_head: bool, writers: Writers) -> bool:
    """Whether the blocks of a call are surely those of its mask_mod, whatever data it reads.

    Args:
        by_batch, by_head: whether the mask_mod depends on the batch entry, and on the head.
    """
    if len(call.blocks) != 8 or None in call.blocks:
        return False
    try:
        seen = _where_made(call, writers) if _for_all(call, by_batch, by_head) else []
        return bool(seen) and all(_same(one, writers) for one in seen)
    except Exception:  # whatever cannot be traced is compared at each step
        log.info("cudnn_flex: the making of a BlockMask could not be read", exc_info=True)
        return False


def _for_all(call: Call, by_batch: bool, by_head: bool) -> bool:
    """Whether the blocks are for all batch entries and heads of the call."""
    batch, heads = example(call.query).shape[:2]
    made = example(call.blocks[0]).shape
    sizes = [*example(call.query).shape, *example(call.key).shape, *call.block_sizes, *made]
    static = all(isinstance(n, int) for n in sizes)
    return static and made[0] in (batch, 1 - by_batch) and made[1] in (heads, 1 - by_head)


def _where_made(call: Call, writers: Writers) -> list[Call]:
    """The call with its blocks and captured values as nodes of the graph that makes the blocks; several times, if it is
    in a region, such as a checkpointed layer, that is run several times; none where no graph makes them.
    """
    blocks = [block for block in call.blocks if block is not None]
    if all(block.op.startswith("call_") for block in blocks):
        return [call]
    inputs = [node for node in call.node.graph.nodes if node.op == "placeholder"]
    callers, found = writers.callers(call.node.graph), list[Call]()
    read = [*blocks, *(node for node in call.mask_captured if isinstance(node, Node))]
    if not set(read) <= set(inputs) or writers.above(read, call.node):
        return []
    for caller in callers:
        if len(caller.args) != len(inputs) + 1:  # the region, then its inputs
            return []
        given: Any = dict(zip(inputs, caller.args[1:], strict=True))
        captured = tuple(given.get(node, node) for node in call.mask_captured)
        outside = replace(call, node=caller, blocks=tuple(given[block] for block in blocks), mask_captured=captured)
        around = _where_made(outside, writers)
        if not around:
            return []
        found += around
    return found


def _same(call: Call, writers: Writers) -> bool:
    """Whether the blocks are made by the ops by which create_block_mask makes them of the mask_mod."""
    captured = [n for n in call.mask_captured if isinstance(n, Node)]
    making = _making(call, captured, writers)
    if making is None:
        return False
    inputs = list(dict.fromkeys([*captured, *(n for node in making for n in node.all_input_nodes if n not in making)]))
    values = [example(n) for n in inputs]
    if any(isinstance(v, torch.Tensor) and v.dtype.itemsize == 2 and v.is_floating_point() for v in values):
        return False  # autocast, which may end between the two, computes with these in another precision
    mode = example(call.query).fake_mode
    with aside(mode), torch.no_grad():
        found = _text(_made_by(call, making, inputs), values)
        return found is not None and found == _text(_created(call, inputs), values)


def _making(call: Call, captured: Sequence[Node], writers: Writers) -> set[Node] | None:
    """The nodes that make the blocks out of captured values and inputs of the graph, with those that write into what
    they make; None if a captured value, or a block, may be written to meanwhile.
    """
    places = {node: place for place, node in enumerate(call.node.graph.nodes)}
    given, making = set(captured), set[Node]()
    ahead = [block for block in call.blocks if block is not None]
    while ahead:
        node = ahead.pop()
        if node in making or node in given or not node.op.startswith("call_"):
            continue
        making.add(node)
        ahead += node.all_input_nodes
        if torch_private.example_of(node, None) is not None:
            ahead += writers.above([node], call.node)
        elif node.target is not operator.setitem and _name(node) != OPENS:  # whatever memory it has is not known
            return None
    if writers.above(call.blocks, call.node):
        return None
    first = min(places[node] for node in making)
    late = any(places[node] > first for node in writers.above(captured, call.node))
    return None if late else making


def _text(function: Callable[..., Any], values: Sequence[Any]) -> str | None:
    """The canonical text of a function as ATen ops; None where it has none."""
    traced = make_fx(function)(*values)
    traced.graph.eliminate_dead_code(_stays)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            _write_out(node, getattr(traced, str(node.target)))
        elif "device" in node.kwargs:  # "cuda" is the device of this index
            node.kwargs = {**node.kwargs, "device": node.meta["val"].device}
        elif node.target in TURNED:
            node.target, node.args = TURNED[node.target], node.args[::-1]
    return graph_text(traced)


def _write_out(node: Node, constant: Any) -> None:
    """Makes a number that tracing left as a tensor part of the text: the 0 of `lengths[0]`."""
    if isinstance(constant, torch.Tensor) and constant.dim() == 0 and not torch_private.is_fake(constant):
        with torch_private.without_modes():
            number = constant.item()
        node.op, node.target = "call_function", torch.full
        node.args, node.kwargs = ((), number), {"dtype": constant.dtype}


def _stays(node: Node) -> bool:
    """Whether a node of a traced function counts even where nobody reads its result."""
    marks = marks_of(node.target) if node.op == "call_function" else None
    return marks is None or marks.random or bool(marks.written(node.args, node.kwargs))


def _created(call: Call, inputs: Sequence[Node]) -> Callable[..., Any]:
    """Makes the blocks by torch's create_block_mask."""
    sizes = (*example(call.blocks[0]).shape[:2], example(call.query).shape[2], example(call.key).shape[2])
    device = example(call.blocks[0]).device

    def create(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        captured = [known.get(n, n) for n in call.mask_captured]

        def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return call.mask_mod(b, h, q, kv, *captured)

        how: Any = {"device": device, "BLOCK_SIZE": call.block_sizes}
        return create_block_mask(mask_mod, *sizes, **how).as_tuple()[2:10]  # pyright: ignore[reportCallIssue]

    return create


def _made_by(call: Call, making: set[Node], inputs: Sequence[Node]) -> Callable[..., Any]:
    """Makes the blocks by the nodes of the graph."""
    nodes = _with_vmaps(call.node.graph.nodes, making)

    def make(*values: Any) -> Any:
        known, depth = dict(zip(inputs, values, strict=True)), 0
        leave: Any = next((node.target for node in nodes if _name(node) == CLOSES), None)
        try:
            for node in nodes:
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                target: Any = node.target
                method = node.op == "call_method"
                known[node] = getattr(args[0], target)(*args[1:], **kwargs) if method else target(*args, **kwargs)
                depth += (_name(node) == OPENS) - (_name(node) == CLOSES)
        finally:
            for _ in range(depth):  # a level that stays open would change all that follows
                leave()
        return tuple(known[block] for block in call.blocks)  # pyright: ignore[reportArgumentType]

    return make


def _with_vmaps(nodes: Iterable[Node], making: set[Node]) -> list[Node]:
    """The nodes that make something, in order, within the levels of vmap that are open around them."""
    open_: list[Node] = []
    kept: set[Node] = set(making)
    for node in nodes:
        name = _name(node)
        if name == OPENS:
            open_.append(node)
        elif name == CLOSES:
            kept.update([node] if open_.pop() in kept else [])
        elif node in making:
            kept.update(open_)
    return [node for node in nodes if node in kept]


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
