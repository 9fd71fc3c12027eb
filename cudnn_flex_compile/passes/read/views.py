"""Functions that an eager call runs as well as a compiled one: views, and single copies."""

import torch
from torch.fx import Node

VIEWS = {
    "chunk", "contiguous", "detach", "expand", "flatten", "movedim", "narrow", "permute", "reshape", "select", "size",
    "split", "squeeze", "swapaxes", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


def is_view(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in VIEWS
    named = getattr(node.target, "__name__", "")
    return named in VIEWS and node.target is getattr(torch, named, None)
