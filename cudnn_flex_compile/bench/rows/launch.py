"""The ways in which projects launch flex_attention: each takes a model, and compiles the parts that its project
compiles.

rows.py names the way of each row, and measure.py runs it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cudnn_flex_compile import inductor_seam, install
from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.bench.rows.layers import Attention, Model
from cudnn_flex_compile.bench.rows.row import ALONE, BLOCKS, DISABLED, LAYERS, WHOLE, Data, Row

STOCK, OURS = SIDES = ("inductor", "cudnn_flex")
# torch.compile shares compiled code between all who compile a function with the same options. One side has this option,
# too, which changes nothing else.
APART = {"verbose_progress": False}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the contenders.

    Attributes:
        name: STOCK or OURS.
        options: the backend's, for OURS.
        speed: whether it is measured.
    """

    name: str
    options: Mapping[str, Any]
    speed: bool = True

    def compiling(self) -> AbstractContextManager[Any]:
        """The context in which the side runs, because a run may compile."""
        return install(**self.options) if self.name == OURS else nullcontext()

    def compile(self, function: Any, options: Mapping[str, Any], **how: Any) -> Any:
        """torch.compile with Inductor, and with those of the options that this torch has.

        On a CPU, where no speed is measured, no kernel is made for stock: a C++ compiler takes many times as long as
        all the rest.
        """
        if not self.speed and self.name == STOCK:
            return torch.compile(function, backend="eager", **how)
        known = inductor_seam.config().get_config_copy()
        chosen = {name: value for name, value in options.items() if name in known}
        chosen |= APART if self.name == OURS else {}
        return torch.compile(function, options=chosen, **how)


class Checkpointed(nn.Module):
    """A layer that is computed again in the backward, without the results that its policy saves."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer = layer
        self.given: dict[str, Any] = {"context_fn": contexts} if how == "selective" else {}

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        return cast(Tensor, checkpoint(self.layer, x, mask, use_reentrant=False, **self.given))


def contexts() -> Any:
    """Saves attention, and the first of each two products of matrices, as torchtitan does."""
    higher = torch.ops.higher_order
    attention = (higher.flex_attention, getattr(higher, "inductor_compiled_code", None))
    products: Counter[bool] = Counter()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products[context.is_recompute] += op == torch.ops.aten.mm.default
        saved = op in attention or (op == torch.ops.aten.mm.default and products[context.is_recompute] % 2)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


Run = Callable[[Tensor, Data], Tensor]  # a forward of the model with a step's masks
make_block_mask: Any = torch.compile(create_block_mask)  # it belongs to neither side, for it has no flex_attention


def block_masks(row: Row, x: Tensor, data: Data, make: Any = None) -> list[BlockMask]:
    """The BlockMasks of a step with queries of x, [B, S, width]. On a CPU, to compile that would take too long."""
    if make is None:
        make = make_block_mask if x.is_cuda else create_block_mask
    batch, length = x.shape[:2]
    entries, heads = batch if row.by_batch else None, row.heads if row.by_head else None
    return [make(mod, entries, heads, length, row.context + length, device=x.device) for mod in row.mods(row, data)]


def launched(row: Row, model: nn.Module, side: Side) -> Run:
    """The model as its project runs it, compiled when it is called. The model is changed."""
    if row.form == WHOLE:
        return _whole(row, model, side)
    assert isinstance(model, Model)
    if row.checkpoint:
        model.layers = nn.ModuleList(Checkpointed(layer, row.checkpoint) for layer in model.layers)
    if row.form in (ALONE, DISABLED):
        _attend_by(model, _flex(row, side))
    elif row.form in (BLOCKS, LAYERS):
        how: dict[str, Any] = {"fullgraph": True} if row.form == BLOCKS else {"dynamic": None}
        options = row.options if row.form == LAYERS else {}
        compiled = [side.compile(layer, options, **how) for layer in model.layers]
        model.layers = nn.ModuleList(compiled)
    return _with_masks(row, model)


def _flex(row: Row, side: Side) -> Any:
    compiled = side.compile(flex_attention, row.options)
    if row.form == ALONE:
        return compiled
    return torch.compiler.disable(lambda *args, **kwargs: compiled(*args, **kwargs), recursive=False)


def _attend_by(model: nn.Module, flex: Any) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.flex = flex


def _with_masks(row: Row, model: nn.Module) -> Run:
    """Makes the BlockMasks in each step, or once where they are static."""
    kept: list[BlockMask] = []

    def run(x: Tensor, data: Data) -> Tensor:
        masks = kept or block_masks(row, x, data)
        if row.static and not kept:
            kept.extend(masks)
        return model(x, masks)

    return run


def _whole(row: Row, model: nn.Module, side: Side) -> Run:
    """The model as a whole, with a backend and no installed pass. It makes its masks within the graph."""
    if isinstance(model, Model):

        def forward(x: Tensor, data: Data) -> Tensor:
            return model(x, block_masks(row, x, data, create_block_mask))
    else:

        def forward(x: Tensor, data: Data) -> Tensor:
            return model(inputs_embeds=x, attention_mask=data["padding"].long()).last_hidden_state

    if side.name == STOCK:
        return side.compile(forward, {})
    inner = {} if side.speed else {"inner_backend": "aot_eager"}
    return torch.compile(forward, backend=cudnn_flex, options={**side.options, **inner})
