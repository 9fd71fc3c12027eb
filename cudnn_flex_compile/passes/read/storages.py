"""Says which storages the tensors of a Dynamo graph have: views of one tensor share its storage.

Dynamo recorded fake tensors, which share storages as the real ones do. effects.py says which nodes write into them.
"""

from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile import torch_private

Storages = frozenset[int]
NOTHING: Storages = frozenset()
UNKNOWN = -1  # a storage that may be any
EVERYTHING: Storages = frozenset({UNKNOWN})
NUMBERS = (str, int, float, bool, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


def storages(value: Any, missing: Storages = NOTHING) -> Storages:
    """The storages of all tensors in a nested structure. A node's tensors are those that Dynamo recorded for it.

    Args:
        missing: the storages of a node for which nothing was recorded: no tensor, or an input of a region.
    """
    if isinstance(value, torch.Tensor):
        return _storages_of(value)
    if isinstance(value, Node):
        known = torch_private.example_of(value, value.meta.get("val"))
        absent = EVERYTHING if value.op == "placeholder" else missing
        return absent if known is None else storages(known)
    if isinstance(value, NUMBERS):
        return NOTHING
    if isinstance(value, (tuple, list)):
        return NOTHING.union(*(storages(v, missing) for v in value))
    if isinstance(value, dict):
        return NOTHING.union(*(storages(v, missing) for v in value.values()))
    return EVERYTHING if isinstance(value, torch.ScriptObject) or "ScriptObject" in type(value).__name__ else NOTHING


def _storages_of(tensor: torch.Tensor) -> Storages:
    while torch_private.is_wrapped(tensor):  # inside vmap, as create_block_mask is
        tensor = torch_private.unwrapped(tensor)
    if torch_private.wraps_tensors(tensor):
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore
        parts = (getattr(tensor, name) for name in names)  # not all are tensors: a DTensor's mesh is one of them
        return NOTHING.union(*(_storages_of(part) for part in parts if isinstance(part, torch.Tensor)))
    try:
        return frozenset({torch_private.storage_of(tensor)})
    except (NotImplementedError, RuntimeError):  # a sparse tensor, for one
        return EVERYTHING


def meet(written: Storages, shared: Storages) -> bool:
    """Whether a write into some storages may change tensors that have others."""
    return bool(written) and (UNKNOWN in written or UNKNOWN in shared or not written.isdisjoint(shared))
