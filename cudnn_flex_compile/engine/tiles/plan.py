"""Runs a problem by the interval kernels of cudnn.flex_attention (CuTe DSL), on a list of its mask's tiles.

tiler.py makes the lists. The frontend compiles the kernels (its public FlexAttentionFwd and FlexAttentionBwd). These
check and look up everything at each launch, which takes the host longer than most of the kernels take the device. So
the compiled kernels are called directly, with the list's tensors. They are private: where one is missing, or takes
other arguments, there is no plan.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.frontend import compiled_kernel, quiet
from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.launch.replay import Replays
from cudnn_flex_compile.engine.plans.plan import Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.layout import Layout
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, NAME, Arguments, Geometry, TileList
from cudnn_flex_compile.engine.tiles.tiler import tiler_of
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import NARROW, every_endpoint, most_endpoints
from cudnn_flex_compile.scoremod.text import parse

# Whether launches are replayed, and whether the deterministic backward runs: tests/gpu/test_plain_masks.py tries both.
REPLAYED = DETERMINISTIC = False
# The memory of the backward that must be zero: sums over heads that share keys, and the deterministic one's semaphores.
ZEROS = ("dk_accum", "dv_accum", "dq_semaphore", "dk_semaphore", "dv_semaphore")


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
    refused = unusable(problem.device)
    if refused is not None:
        return refused
    if problem.deterministic and not DETERMINISTIC:
        return Reason(Code.SHAPE_REFUSED, f"{NAME}: torch.use_deterministic_algorithms is on")
    if problem.deterministic and problem.direction == BACKWARD and _has_other_tiles(problem):
        return Reason(Code.SHAPE_REFUSED, f"{NAME}: the deterministic backward of head dim 256 takes another list")
    try:
        with quiet():
            return TilePlan(problem)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Reason(Code.SHAPE_REFUSED, f"{NAME}, {problem.direction}: {type(error).__name__}: {str(error)[:200]}")


def _has_other_tiles(problem: Problem) -> bool:
    """Whether the deterministic backward has tiles of its own (the frontend's `_tile_size_bwd_sm90`)."""
    dims, heads = {problem.query.shape[3], problem.value.shape[3]}, {problem.query.shape[1], problem.key.shape[1]}
    return dims == {256} and len(heads) == 1


def _counted(problem: Problem) -> "TilePlan | Reason":
    engine.plans.count("builds")
    with phase("build"):
        return build(problem)


def geometry_of(problem: Problem, training: bool) -> Geometry:
    batch, heads, rows, dim = problem.query.shape
    by_head = problem.tiled > 1 or "h" in ir.axes_of(parse(problem.program).mask)
    return Geometry(
        batch=batch, heads=heads, kv_heads=problem.key.shape[1], rows=rows, columns=problem.key.shape[2], dim=dim,
        value_dim=problem.value.shape[3], mask_heads=heads if by_head else 1, training=training,
        dtype=problem.query.dtype,
    )  # fmt: skip


class TilePlan(Plan):
    """Runs one problem by a list of its mask's tiles."""

    KIND = "tiles"
    __slots__ = ("_forward", "_kernels", "_mask", "_replays", "_tiler")

    def __init__(self, problem: Problem) -> None:
        """Compiles the kernels on the current device, which must be the problem's. Raises the frontend's errors."""
        super().__init__(problem, NAME)
        forward = self._forward = problem.direction == FORWARD
        self._mask = parse(problem.program).mask
        self._tiler = tiler_of(geometry_of(problem, training=not forward), problem.device)
        self._kernels = _Forward(problem) if forward else _Backward(problem)
        enqueue = functools.partial(_enqueue, self._kernels, problem.device)
        self._replays = Replays(enqueue, problem.device, engine.graph_pool) if problem.replay and REPLAYED else None

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
        """Runs by a list for the problem's geometry, in training where this is a backward. Certification gives none."""
        if tiles is None:
            tiles = self._list(operands, ints, floats)
        parts = tiles.forward if self._forward else tiles.backward
        work = empty((self._kernels.work.size,), (1,), torch.int32)
        if self._replays is None:
            self._kernels(tensors, parts, work)
            return
        addresses = [tensor.data_ptr() for tensor in (*tensors, *parts) if tensor is not None]
        self._replays.run(addresses, work.data_ptr(), (tensors, parts, work))

    def _list(self, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor]) -> TileList:
        sizes, heads = self._tiler.geometry.sizes, self._tiler.geometry.mask_heads

        def rows() -> Any:
            return visible_rows(self._mask, operands, ints, floats, sizes, 1, self.device)

        most = max(int(most_endpoints(visible)) for _, visible in rows())
        return self._tiler.exact(every_endpoint(rows(), sizes, heads, most))


def _enqueue(kernels: "_Forward | _Backward", device: int, given: tuple[Any, ...], _: int, stream: int) -> None:
    """Launches the kernels on a stream that may be another than the current one, as while a launch is recorded."""
    if stream == torch_private.current_stream(device):
        kernels(*given)
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=torch.device("cuda", device))):
        kernels(*given)


def _turned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[B, H, S, D] as [B, S, H, D]."""
    return [t.transpose(1, 2) for t in tensors]


def _samples(problem: Problem) -> tuple[list[Tensor], Tensor, Any]:
    """q, k, v and out as the frontend takes them, the log-sum-exp, and a plan of a mask that shows everything."""
    from cudnn.flex_attention import create_mask_plan

    device = torch.device("cuda", problem.device)
    specs = (problem.query, problem.key, problem.value, problem.out)
    query, key, value, out = _turned([spec.empty(device) for spec in specs])
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    g = geometry_of(problem, problem.direction == BACKWARD)
    table = torch.full((g.mask_heads, NARROW, g.batch * g.rows), g.columns, dtype=torch.int32, device=device)
    plan = create_mask_plan(table, query, key, value, build_backward=g.training)
    return [query, key, value, out], lse, plan


class _Forward:
    """The forward's kernel, on (query, key, value, out[, stats]).

    Attributes:
        work: the memory to work in.
    """

    __slots__ = ("_kernel", "_lse_shape", "_processors", "_scale", "work")

    def __init__(self, problem: Problem) -> None:
        from cudnn.flex_attention import FlexAttentionFwd

        tensors, lse, plan = _samples(problem)
        query, key, value, out = tensors
        compiler: Any = FlexAttentionFwd(query, key, value, out, plan, lse if problem.stats else None)
        compiler.check_support()
        compiler.compile()
        self._kernel, self._scale = compiled_kernel(compiler), problem.scale
        self._lse_shape = problem.lse_shape if problem.stats else None
        self._processors = torch.cuda.get_device_properties(problem.device).multi_processor_count
        self.work = Layout()
        self.work.put("counter", (1,))

    def __call__(self, tensors: Sequence[Tensor], tiles: Arguments, work: Tensor) -> None:
        query, key, value, out = _turned(tensors[:4])
        lse = None if self._lse_shape is None else tensors[4].view(self._lse_shape)
        self._kernel(
            query, key, value, out, lse, None, self._scale, None, None, tiles, work.zero_(), self._processors
        )  # fmt: skip


class _Backward:
    """The backward's kernels, on (query, key, value, out, stats, grad_out[, minus_lse, grad_lse], dq, dk, dv).

    Attributes:
        work: the memory to work in; the part that must be zero comes first.
    """

    __slots__ = ("_kernels", "_lengths", "_lse_gradient", "_lse_shape", "_scale", "_zeros", "work")

    def __init__(self, problem: Problem) -> None:
        from cudnn.flex_attention import FlexAttentionBwd

        (query, key, value, out), lse, plan = _samples(problem)
        device = out.device
        (grad,) = _turned([(problem.grad or problem.out).empty(device)])
        dq, dk, dv = _turned([spec.empty(device) for spec in output_specs(problem)])
        grad_lse = torch.empty_like(lse) if problem.lse_gradient else None
        compiler: Any = FlexAttentionBwd(
            query, key, value, out, grad, lse, dq, dk, dv, plan, grad_lse, deterministic=problem.deterministic
        )
        compiler.check_support()
        compiler.compile()
        self._kernels: Any = compiled_kernel(compiler)
        specs = [spec for spec in self._kernels.workspace_specs if spec[1] is not None]
        self.work = Layout()
        for name, shape, dtype in sorted(specs, key=lambda spec: spec[0] not in ZEROS):
            self.work.put(name, tuple(shape), dtype)
        self._zeros = max((part.end for name, part in self.work.parts.items() if name in ZEROS), default=0)
        self._scale, self._lengths = problem.scale, problem.lengths
        self._lse_shape, self._lse_gradient = problem.lse_shape, problem.lse_gradient

    def __call__(self, tensors: Sequence[Tensor], tiles: Arguments, work: Tensor) -> None:
        query, key, value, out, grad, dq, dk, dv = _turned((*tensors[:4], tensors[5], *tensors[-3:]))
        lse = tensors[4].view(self._lse_shape)
        grad_lse = tensors[7].view(self._lse_shape) if self._lse_gradient else None
        (rows, columns), kernels, scale = self._lengths, self._kernels, self._scale
        if self._zeros:
            work[: self._zeros].zero_()
        within = self.work.views(work).get
        sums, deltas, lse_log2 = within("dq_accum"), within("dpsum"), within("lse_log2")
        kernels.preprocess(out, grad, deltas, lse, lse_log2, sums, None, grad_lse, rows)
        shared = kernels.post_dk is not None  # heads that share keys and values add up in float32
        dk_sums, dv_sums = (within("dk_accum"), within("dv_accum")) if shared else (dk, dv)
        semaphores = within("dq_semaphore"), within("dk_semaphore"), within("dv_semaphore")
        kernels.main(
            query, key, value, grad, lse_log2, deltas, sums, dk_sums, dv_sums, scale, None, None, *semaphores, tiles,
            rows, columns,
        )  # fmt: skip
        kernels.post_dq(sums, dq, scale, None, rows)
        if shared:
            kernels.post_dk(dk_sums, dk, scale, None, columns)
            kernels.post_dv(dv_sums, dv, 1.0, None, columns)
