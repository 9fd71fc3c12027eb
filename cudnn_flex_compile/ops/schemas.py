"""The schemas of the ops, and the ops themselves. The other files of this folder implement them."""

import torch
from torch import Tensor

# stock, layout, by_blocks: the call as stock flex_attention runs it, by the blocks of a BlockMask (kernels/stock.py);
# empty without one. tiles: the list by which a direction runs, if it does; `attention` takes one for each direction.
SCHEMAS = {
    "attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] ints, Tensor[] floats, str program,"
        " float scale, bool return_lse, bool stats, Tensor[] stock, SymInt[] layout, str by_blocks, Tensor? tiles=None,"
        " Tensor? backward_tiles=None, str policy='') -> (Tensor out, Tensor lse, Tensor stats)"
    ),
    "attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] ints, Tensor[] floats, str program,"
        " float scale, bool stats, Tensor[] stock, SymInt[] layout, str by_blocks, Tensor? tiles=None, str policy='')"
        " -> (Tensor out, Tensor stats)"
    ),
    "attention_backward": (
        "(Tensor grad_out, Tensor? grad_stats, Tensor query, Tensor key, Tensor value, Tensor out, Tensor stats,"
        " Tensor[] operands, SymInt[] ints, Tensor[] floats, str program, float scale, Tensor[] stock, SymInt[] layout,"
        " str by_blocks, Tensor? tiles=None, str policy='')"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
    ),
    "permute_keys": "(Tensor keys, Tensor order, Tensor slots) -> Tensor",
    "check_block_mask": (
        "(Tensor[] blocks, Tensor[] captured, SymInt[] ints, Tensor[] floats, str program, SymInt[] sizes,"
        " SymInt[] block_sizes) -> Tensor"
    ),
    "list_tiles": (
        "(Tensor[] blocks, Tensor[] captured, SymInt[] ints, Tensor[] floats, str program, SymInt[] block_sizes,"
        " SymInt[] geometry, ScalarType dtype, Device device, int budget) -> Tensor"
    ),
}

library = torch.library.Library("cudnn_flex", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

namespace = torch.ops.cudnn_flex
attention = namespace.attention.default
attention_forward = namespace.attention_forward.default
attention_backward = namespace.attention_backward.default
permute_keys = namespace.permute_keys.default
check_block_mask = namespace.check_block_mask.default
list_tiles = namespace.list_tiles.default

# dq, dk, dv; and in the query's dtype the gradient of the program's learned operand, empty if it has none.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
