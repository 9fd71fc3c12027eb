"""The interval kernels of cudnn.flex_attention for one problem: how they are compiled, and called.

tiler.py makes the lists. The frontend compiles the kernels (its public FlexAttentionFwd and FlexAttentionBwd). These
check and look up everything at each launch, which takes the host longer than most of the kernels take the device. So
the compiled kernels are called directly, with the list's tensors. They are private: where one is missing, or takes
other arguments, there is no plan.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.frontend import compiled_kernel, without_stages
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, output_specs
from cudnn_flex_compile.engine.tiles.layout import Layout, dense
from cudnn_flex_compile.engine.tiles.tile_list import Arguments, geometry_of
from cudnn_flex_compile.scoremod.masks.intervals import NARROW

# The memory of the backward that must be zero: sums over heads that share keys, and the deterministic one's semaphores.
ZEROS = ("dk_accum", "dv_accum", "dq_semaphore", "dk_semaphore", "dv_semaphore")


def _turned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[B, H, S, D] as [B, S, H, D]."""
    return [t.transpose(1, 2) for t in tensors]


def _samples(problem: Problem) -> tuple[list[Tensor], Tensor, Any]:
    """q, k, v and out as the frontend takes them, the log-sum-exp, and a plan of any mask; all without data."""
    from cudnn.flex_attention import create_mask_plan

    device = torch.device("cuda", problem.device)
    specs = (problem.query, problem.key, problem.value, problem.out)
    query, key, value, out = _turned([spec.empty(device) for spec in specs])
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    g = geometry_of(problem, problem.direction == BACKWARD)
    table = torch.empty((g.mask_heads, NARROW, g.batch * g.rows), dtype=torch.int32, device=device)
    with without_stages():
        plan = create_mask_plan(table, query, key, value, build_backward=g.training)
    return [query, key, value, out], lse, plan


def _compiled(compiler: Any) -> Any:
    compiler.check_support()
    compiler.compile()
    return compiled_kernel(compiler)


def compiled_forward(problem: Problem) -> Any:
    """The kernel of a forward, compiled without a device. Only one thread may do so at a time (`quiet`)."""
    from cudnn.flex_attention import FlexAttentionFwd

    with torch_private.fake_tensors():
        (query, key, value, out), lse, plan = _samples(problem)
        return _compiled(FlexAttentionFwd(query, key, value, out, plan, lse if problem.stats else None))


def compiled_backward(problem: Problem) -> Any:
    """The kernels of a backward, compiled as that of a forward is."""
    from cudnn.flex_attention import FlexAttentionBwd

    with torch_private.fake_tensors():
        (query, key, value, out), lse, plan = _samples(problem)
        (grad,) = _turned([(problem.grad or problem.out).empty(out.device)])
        dq, dk, dv = _turned([spec.empty(out.device) for spec in output_specs(problem)])
        grad_lse = torch.empty_like(lse) if problem.lse_gradient else None
        tensors = query, key, value, out, grad, lse, dq, dk, dv
        return _compiled(FlexAttentionBwd(*tensors, plan, grad_lse, deterministic=problem.deterministic))


class Forward:
    """The forward's kernel, on (query, key, value, out[, stats]).

    Attributes:
        work: the memory to work in.
    """

    __slots__ = ("_kernel", "_lse_shape", "_processors", "_scale", "work")

    def __init__(self, problem: Problem) -> None:
        self._kernel, self._scale = compiled_forward(problem), problem.scale
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


class Backward:
    """The backward's kernels, on (query, key, value, out, stats, grad_out[, grad_lse], dq, dk, dv).

    Attributes:
        work: the memory to work in; the part that must be zero comes first.
    """

    __slots__ = ("_kernels", "_lengths", "_lse_gradient", "_lse_shape", "_scale", "_zeros", "work")

    def __init__(self, problem: Problem) -> None:
        self._kernels: Any = compiled_backward(problem)
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
        grad_lse = dense(tensors[6]).view(self._lse_shape) if self._lse_gradient else None
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
