"""Runs a problem by the interval kernels of cudnn.flex_attention (CuTe DSL), on a list of its mask's tiles.

tiler.py makes the lists, and kernels.py compiles and calls the kernels.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.frontend import quiet
from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.launch.replay import Replays
from cudnn_flex_compile.engine.plans.plan import Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import FORWARD, Problem
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles import ahead, ordered
from cudnn_flex_compile.engine.tiles.edge_mask import EDGE_MASK, EDGE_PROGRAM
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.kernels import Backward, Forward
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, NAME, TileList, geometry_of
from cudnn_flex_compile.engine.tiles.tiler import tiler_of
from cudnn_flex_compile.engine.tiles.units import readers
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import every_endpoint, most_endpoints

MOST_PAIRS = 2**30  # for which a list is made of a mask that is there for certification alone


def unusable(device: int) -> Reason | None:
    """Why the kernels cannot run on a CUDA device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor != ARCHITECTURE:
        return Reason(Code.SHAPE_REFUSED, f"{NAME}: compute capability {major}.{minor}, not 9.0")
    missing = kernels_missing()
    return None if missing is None else Reason(Code.TILE_LISTS, missing)


def build(problem: Problem) -> "TilePlan | Reason":
    """The plan, on the current device, which must be the problem's; or why there is none.

    Raises torch.OutOfMemoryError; whatever else the frontend raises is a refusal.
    """
    try:
        refused = unusable(problem.device) or ordered.refused(problem)
        if refused is not None:
            return refused
        with ahead.awaited(readers(problem)), quiet():
            return TilePlan(problem)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Reason(Code.SHAPE_REFUSED, f"{NAME}, {problem.direction}: {type(error).__name__}: {str(error)[:200]}")


def _counted(problem: Problem) -> "TilePlan | Reason":
    engine.plans.count("builds")
    with phase("build"):
        return build(problem)


class TilePlan(Plan):
    """Runs one problem by a list of its mask's tiles."""

    KIND = "tiles"
    __slots__ = ("_forward", "_kernels", "_listed", "_mask", "_replays", "_tiler")

    def __init__(self, problem: Problem) -> None:
        """Compiles the kernels on the current device, which must be the problem's. Raises the frontend's errors."""
        super().__init__(problem, NAME)
        forward = self._forward = problem.direction == FORWARD
        self._mask = problem.program.mask
        self._listed: TileList | None = None  # where all runs have one mask
        self._tiler = tiler_of(geometry_of(problem, training=not forward), problem.device)
        self._kernels = Forward(problem) if forward else Backward(problem)
        enqueue = functools.partial(_enqueue, self._kernels, problem.device)
        self._replays = Replays(enqueue, problem.device, engine.graph_pool) if problem.replay else None

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        return [Attempt(functools.partial(_counted, problem))] if problem.tiled else []

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        """Builds the plan again: the frontend keeps compiled kernels (engine/tiles/frontend.py)."""
        plan = build(problem)
        if isinstance(plan, Reason):
            raise ValueError(str(plan))
        return plan

    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        """Runs by a list for the problem's geometry, in training where this is a backward, or by its own."""
        tiles = tiles or self._listed
        if tiles is None:
            raise ValueError("a plan by tile lists was given none: give `tiles`, or run the plan that `prepared` gives")
        parts = tiles.forward if self._forward else tiles.backward
        work = empty((self._kernels.work.size,), (1,), torch.int32)
        if self._replays is None:
            self._kernels(tensors, parts, work)
            return
        addresses = [tensor.data_ptr() for tensor in (*tensors, *parts) if tensor is not None]
        addresses.append(tiles.numbers.numel())  # lists of one geometry have several sizes
        self._replays.run(addresses, work.data_ptr(), (tensors, parts, work))

    def prepared(
        self, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], room: int | None = None
    ) -> Plan | None:  # fmt: skip
        if self._listed is not None:
            return self
        other = copy.copy(self)
        other._listed = other._list(operands, ints, floats, room)
        return None if other._listed is None else other

    def on_harder_mask(self) -> Plan | None:
        """The same kernels on a list of EDGE_MASK, which is made as those of its own mask are; None at lengths where
        that takes long, for all pairs are looked at.
        """
        rows, columns = self.problem.lengths
        if rows * columns > MOST_PAIRS:
            return None
        other = copy.copy(self)
        other.problem, other._mask = replace(self.problem, program=EDGE_PROGRAM, operands=()), EDGE_MASK
        return other.prepared((), (), ())

    def _list(
        self, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], room: int | None
    ) -> TileList | None:  # fmt: skip
        """The list of the mask for some values, made by a look at all pairs; None where it, or the table of its rows'
        endpoints, has more numbers than there is room for.
        """
        sizes, heads = self._tiler.geometry.sizes, self._tiler.geometry.mask_heads

        def rows() -> Any:
            return visible_rows(self._mask, operands, ints, floats, sizes, 1, self.device)

        most = max(int(most_endpoints(visible)) for _, visible in rows())
        if room is not None and most * sizes[0] * heads * sizes[2] > room:
            return None
        return self._tiler.exact(every_endpoint(rows(), sizes, heads, most), room)


def _enqueue(kernels: "Forward | Backward", device: int, given: tuple[Any, ...], _: int, stream: int) -> None:
    """Launches the kernels on a stream that may be another than the current one, as while a launch is recorded."""
    if stream == torch_private.current_stream(device):
        kernels(*given)
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=torch.device("cuda", device))):
        kernels(*given)
