"""Has Dynamo compile in less time, the same graphs: tests/unit/test_quick_dynamo.py compares them with stock's.

It changes functions of torch, and nothing of the package; tests/conftest.py applies it where there is no GPU.
"""

import logging

import torch
from torch._dynamo import config, guards
from torch._dynamo.variables import higher_order_ops
from torch._dynamo.variables.tensor import TensorVariable
from torch._functorch import apis
from torch._functorch.vmap import (
    _add_batch_dim,
    _remove_batch_dim,
    _unwrap_batched,
    lazy_load_decompositions,
    vmap_impl,
    vmap_increment_nesting,
)


def vmap_of_tensors(function, in_dims, out_dims, randomness, chunk_size, *args, **kwargs):
    """Do what torch's vmap_impl does, but where the arguments are tensors, without its walks through nested ones.

    Each call of flex_attention makes a BlockMask by two vmaps. Their walks are half of all instructions that Dynamo
    goes through. It names nodes after variables, so that these have stock's names.
    """
    size = None
    plain = type(in_dims) is tuple and len(in_dims) == len(args) and type(out_dims) is int and chunk_size is None
    for dim, child in zip(in_dims, args, strict=False) if plain else ():
        plain = plain and isinstance(child, torch.Tensor) and (dim is None or (dim == 0 and child.dim() > 0))
        if plain and dim == 0:
            plain, size = size is None or size == child.size(0), child.size(0)
    if not plain or size is None:
        return vmap_impl(function, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
    lazy_load_decompositions()
    with vmap_increment_nesting(size, randomness) as level:
        dims = zip(in_dims, args, strict=False)
        inputs = [child if dim is None else _add_batch_dim(child, dim, level) for dim, child in dims]
        batched_outputs = function(*inputs, **kwargs)
        if isinstance(batched_outputs, torch.Tensor):
            return _remove_batch_dim(batched_outputs, level, size, out_dims)
        return _unwrap_batched(batched_outputs, out_dims, level, size, function)


def inputs_of_subgraph(sub_args, tracer, tx, set_subgraph_inputs, description, sub_args_names=None):
    """Do what Dynamo's function does, but has no interpreter flatten arguments that are all tensors."""
    if set_subgraph_inputs != "flatten_manual" or any(type(arg) is not TensorVariable for arg in sub_args):
        return STOCK_INPUTS(sub_args, tracer, tx, set_subgraph_inputs, description, sub_args_names)
    for arg in sub_args:
        arg.set_name_hint("child")
    return STOCK_INPUTS(sub_args, tracer, tx, "manual", description)


TRACE = logging.getLogger("torch.__trace")
STOCK_INPUTS = higher_order_ops.validate_args_and_maybe_create_graph_inputs
CHANGES = (
    (apis, "vmap_impl", vmap_of_tensors),
    (higher_order_ops, "validate_args_and_maybe_create_graph_inputs", inputs_of_subgraph),
    (guards, "profile_guard_manager", lambda *_: 0.0),  # a time in a log, before which it empties the caches
    (config, "run_gc_after_compile", False),
    # pytest adds a handler to loggers that don't propagate, and to have one handle its records torch writes all graphs.
    (TRACE, "propagate", True),
    (TRACE, "handlers", []),
)
STOCK = tuple(getattr(place, name) for place, name, _ in CHANGES)


def apply():
    """Change this process's torch."""
    for place, name, value in CHANGES:
        setattr(place, name, value)
