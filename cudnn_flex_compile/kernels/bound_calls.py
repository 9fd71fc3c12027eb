"""Runs a call that looks like one that ran before by the plan of that one, without making a key.

In a model code and data are cold: a call takes the host as long as it touches memory, and a key, its hash and its
look-up touch the most. So a call that ran is bound to its plan: the next one is found by its program, and its tensors
are compared in one call of C. Whatever does not look alike in everything goes the way of kernels/cuda.py, which looks
plans up, and binds. This file knows no calls that take more than a plan and its outputs: copies, numbers in host
memory, a CUDA graph that is being captured. Compiled graphs import it, so it imports little.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.key import Call, Key
from cudnn_flex_compile.engine.launch.memory import Layout, empty
from cudnn_flex_compile.engine.problem import FORWARD
from cudnn_flex_compile.kernels.arguments import ANSWER, HANDLE
from cudnn_flex_compile.torch_private import capturing, current_device, deterministic, dispatch_modes, profiling

MOST = 8  # calls of a program that are bound; where more come, as with lengths that change, none is


class BoundCall:
    """A call that ran, and its plan.

    Attributes:
        key: its key (engine/key.py), of which `scale`, `policy`, `tiled`, `deterministic` and `device` are parts.
        flag: `stats` of a forward, `lse_gradient` of a backward.
        alike: whether tensors have the types, devices, dtypes, sizes and strides of its own, of which there are
            `number`, and the same ones are there twice.
        plan: the plan; `launch` runs it on addresses, if it can.
        layouts: the outputs of the plan. The others are empty, in `rest`.
        uses: counts the runs.
        next: another call of the same program, or None.
    """

    __slots__ = (
        "alike", "deterministic", "device", "flag", "key", "launch", "layouts", "next", "number", "plan", "policy",
        "rest", "scale", "tiled", "uses",
    )  # fmt: skip

    def __init__(
        self, key: Key, tensors: Sequence[Tensor], operands: Sequence[Tensor], plan: Any, layouts: Sequence[Layout],
        uses: Any,
    ) -> None:  # fmt: skip
        call, given = Call(*key), (*tensors, *operands)
        forward = call.direction == FORWARD
        self.scale, self.policy, self.tiled = call.scale, call.policy, call.tiled
        self.deterministic, self.device = call.deterministic, given[0].get_device()
        self.flag = call.stats if forward else call.lse_gradient
        self.alike = _alike(given)
        self.key, self.number = key, len(given)
        self.plan, self.launch, self.uses = plan, plan.launcher(len(operands)), uses
        self.layouts = tuple(layout for layout in layouts if layout[0] != (0,))
        all_outputs = 2 if forward else 4
        dtype = torch.float32 if forward else call.query_dtype
        self.rest = (_nothing(dtype, self.device),) * (all_outputs - len(self.layouts))
        self.next: BoundCall | None = None

    def run(
        self, tensors: tuple[Tensor, ...], operands: Sequence[Tensor], given: tuple[Tensor, ...], tiles: Any
    ) -> tuple[Tensor, ...] | bool:  # fmt: skip
        """The outputs; False where a tensor must be copied first, because cuDNN reads 16 bytes at a time.

        Args:
            given: tensors and operands.
            tiles: the list of tiles, if the plan runs by one.
        """
        bits = 0
        addresses: list[int] = []
        for tensor in given:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
        if bits & 15:
            return False
        outputs: list[Tensor] = []
        for shape, stride, dtype in self.layouts:
            outputs.append(empty(shape, stride, dtype))
        if self.launch is None:
            self.plan.run((*tensors, *outputs), operands, (), (), tiles)
        else:
            at = len(tensors)
            for output in outputs:
                addresses.insert(at, output.data_ptr())
                at += 1
            self.launch(addresses)
        self.uses.count += 1
        return *outputs, *self.rest


Calls = dict[str, BoundCall | None]  # by program; None where too many came
forwards: Calls = {}
backwards: Calls = {}
_looks: Any = torch_private.tensor_guards


def _alike(given: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors look like the ones given. Dynamo's guards compare tensors of which none is there twice."""
    places = [next(i for i, other in enumerate(given) if other is tensor) for tensor in given]
    first = sorted(set(places))
    check = _looks(*[given[i] for i in first], dynamic_dims_sizes=[], dynamic_dims_strides=[]).check
    if len(first) == len(given):
        return check
    again = [(place, i) for i, place in enumerate(places) if place != i]

    def alike(*tensors: Tensor) -> bool:
        return all(tensors[i] is tensors[j] for i, j in again) and check(*[tensors[i] for i in first])

    return alike


@functools.cache
def _nothing(dtype: torch.dtype, device: int) -> Tensor:
    """An empty tensor on the current device, which must be the one given. All calls return the same."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return empty((0,), (1,), dtype)


def has_room(calls: Calls, program: str) -> bool:
    """Whether another call of the program can be bound."""
    return _looks is not None and calls.get(program, _nothing) is not None


def bind(
    calls: Calls, program: str, key: Key, tensors: Sequence[Tensor], operands: Sequence[Tensor], plan: Any,
    layouts: Sequence[Layout], uses: Any,
) -> None:  # fmt: skip
    """Binds a call on the current device to the plan of its key.

    Args:
        tensors: as the plan takes them, without its outputs; `layouts` are those.
        uses: has a `count` of runs (engine/store/lru.py).
    """
    given = (*tensors, *operands)
    other, number = calls.get(program), 1
    while other is not None:
        if other.key == key and other.number == len(given) and other.alike(*given):
            return  # another thread was first
        other, number = other.next, number + 1
    call = BoundCall(key, tensors, operands, plan, layouts, uses)
    call.next = calls.get(program)
    calls[program] = call if number <= MOST else None


def run(
    call: BoundCall | None, tensors: tuple[Tensor, ...], operands: Sequence[Tensor], scale: float, flag: bool,
    policy: str, tiles: Tensor | None, stock: Sequence[Tensor],
) -> Any:  # fmt: skip
    """All outputs of a call, by the one among `call` and those after it that looks alike; None if there is none, and
    False if something stands in the way.

    Args:
        tensors: as the plan takes them, without its outputs.
        flag: as in BoundCall.
        scale, policy, operands, tiles, stock: as the ops take them.
    """
    listed, tiled = None, 0
    if tiles is not None:
        listed = getattr(tiles, HANDLE, None)
        if listed is None or listed.tiles is None:
            return False
        tiled = listed.mask_heads
    elif stock and not getattr(getattr(stock[0], ANSWER, None), "known", False):
        return False
    given = (*tensors, *operands) if operands else tensors
    number, exact = len(given), deterministic()
    while call is not None and not (
        call.number == number and call.flag == flag and call.scale == scale and call.policy == policy
        and call.tiled == tiled and call.deterministic == exact and call.alike(*given)
    ):  # fmt: skip
        call = call.next
    if call is None:
        return None
    if dispatch_modes() or profiling() or capturing() or current_device() != call.device:
        return False
    try:
        return call.run(tensors, operands, given, listed and listed.tiles)
    except torch.OutOfMemoryError:
        return False
