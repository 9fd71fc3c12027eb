"""How the ops run on DTensors: sharded over the batch or over heads, else on whole tensors.

Importing this registers it; nothing else here imports torch.distributed. The indices b and h of a program are those
of the whole tensor, so an axis whose index is read by the program itself is not sharded; operands are, with the axis.
A list of tiles is of the whole mask, so with one nothing is sharded.
"""

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from cudnn_flex_compile.ops.schemas import attention_backward, attention_forward
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.learned import position_in
from cudnn_flex_compile.scoremod.text import parse

AXES = ("b", "h")  # of tensor dimensions 0 and 1
Sharding = tuple[list[Any], list[Any]]  # placements of the outputs, and of all tensors among the arguments, flat


def _divided(program: str, key: Any) -> list[int]:
    """The dimensions that may be sharded: evenly, so that shards of queries and keys belong together."""
    parsed = parse(program)
    read = {n.value for n in ir.walk(parsed.score, parsed.mask) if n.kind == "index"}
    return [d for d, axis in enumerate(AXES) if axis not in read and key.shape[d] % key.mesh.size() == 0]


def _rest(operands: Sequence[Any], floats: Sequence[Any], dim: int) -> list[Any]:
    """Placements of operands and floats."""
    return [*(Shard(dim) if o.shape[dim] > 1 else Replicate() for o in operands), *[Replicate()] * len(floats)]


def _whole(outputs: int, tensors: int) -> Sharding:
    return [Replicate()] * outputs, [Replicate()] * tensors


def _forward(
    query: Any, key: Any, value: Any, operands: Sequence[Any], ints: Any, floats: Sequence[Any], program: str,
    scale: float, stats: bool, guard: Any, tiles: Any = None, policy: str = "",
) -> list[Sharding]:  # fmt: skip
    guards = [Replicate()] * (guard is not None)
    found = [_whole(2, 3 + len(operands) + len(floats) + len(guards) + (tiles is not None))]
    for dim in _divided(program, key) if tiles is None else ():
        outputs = [Shard(dim), Shard(dim) if stats else Replicate()]  # without stats these are empty
        found.append((outputs, [Shard(dim)] * 3 + _rest(operands, floats, dim) + guards))
    return found


def _backward(
    grad_out: Any, grad_stats: Any, query: Any, key: Any, value: Any, out: Any, stats: Any, operands: Sequence[Any],
    ints: Any, floats: Sequence[Any], program: str, scale: float, tiles: Any = None, policy: str = "",
) -> list[Sharding]:  # fmt: skip
    count = 6 + (grad_stats is not None)
    found = [_whole(4, count + len(operands) + len(floats) + (tiles is not None))]
    for dim in _divided(program, key) if tiles is None and position_in(program) is None else ():
        outputs = [*[Shard(dim)] * 3, Replicate()]  # without a learned bias its gradient is empty
        found.append((outputs, [Shard(dim)] * count + _rest(operands, floats, dim)))
    return found


for _op, _rule in ((attention_forward, _forward), (attention_backward, _backward)):
    register_sharding(_op)(_rule)
    # DTensor keeps what a rule said by its arguments, of others than tensors by those from a position on. By itself
    # register_sharding takes none for it: the rule would be asked for the first program alone.
    _static = [argument.name for argument in _op._schema.arguments].index("ints")
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[_op] = RuntimeSchemaInfo(_static, needs_pytree=True)
