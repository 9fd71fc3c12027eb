"""A cuDNN graph, built or restored, and its execution.

Knows nothing of caches, strategies or certification.
"""

import functools
from collections.abc import Sequence
from typing import Any

import cudnn
import torch

from cudnn_flex_compile.engine.graph.build import AttentionGraph, assemble
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.launch.handles import current_handle, handle_on
from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.launch.raw_execute import Launch, launcher
from cudnn_flex_compile.engine.launch.replay import Replays
from cudnn_flex_compile.engine.problem import FORWARD, Binding, Error, Problem, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.reasons import Code, Reason

PYTHON_ENGINES = 20_000  # the first id of an engine of the frontend's own (cudnn.engines.engine_ids)
EXPECTED = (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError)  # of a graph that cuDNN does not support
FORWARD_ROLES = ("query", "key", "value", "out", "stats")
BACKWARD_ROLES = (
    "query", "key", "value", "out", "stats", "grad_out", "minus_lse", "grad_lse", "dq", "dk", "dv", "dbias",
)  # fmt: skip


DTYPES = {int: torch.int32, float: torch.float32}


class GraphPlan:
    """Runs one problem. Immutable once built; any thread may run it.

    Attributes:
        problem: what it is for.
        strategy: how it was lowered.
        device: where it runs.
        outputs: layouts of out and stats, or of dq, dk, dv, and dbias if an operand is learned.
        workspace: bytes that each run needs.
        errors: what certification measured, once it has.
    """

    __slots__ = (
        "_constant_addresses", "_constants", "_floats", "_graph", "_ints", "_launch", "_operands", "_replays",
        "binding", "device", "errors", "outputs", "problem", "strategy", "workspace",
    )  # fmt: skip

    def __init__(self, problem: Problem, graph: Any, binding: Binding) -> None:
        """On the current device, which must be the problem's."""
        self.problem, self.strategy, self._graph, self.binding = problem, binding.strategy, graph, binding
        self.workspace = int(graph.get_workspace_size())
        self.device = torch.device("cuda", problem.device)
        shape = (problem.query.shape[0], 1, 1, 1)
        self._constants = [torch.full((1, 1, 1, 1), n, dtype=DTYPES[type(n)]) for n in binding.hosts]
        self._constants += [torch.full(shape, n, dtype=torch.int32, device=self.device) for n in binding.filled]
        self._constant_addresses = [constant.data_ptr() for constant in self._constants]
        self._operands, self._ints, self._floats = binding.operands, binding.ints, binding.floats
        self._launch = launcher(graph, binding.uids)
        enqueue = functools.partial(_launch_on, self._launch, problem.device)
        # Scalars are not in device memory: with them, addresses do not tell launches apart.
        replayed = problem.replay and not (binding.ints or binding.floats)
        self._replays = Replays(enqueue, problem.device, engine.graph_pool) if replayed else None
        self.outputs = output_specs(problem)
        self.errors: tuple[Error, ...] = ()

    def serialized(self) -> bytes:
        """The built graph, as restore takes it. Raises ValueError if cuDNN cannot serialise it."""
        try:
            return self._graph.serialize(as_bytes=True)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise ValueError(f"{self.strategy}, {self.problem.direction}: {_first_line(error)}") from error

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        operands: Sequence[torch.Tensor],
        ints: Sequence[int],
        floats: Sequence[torch.Tensor],
    ) -> None:
        """Enqueues the graph on the current stream.

        Args:
            tensors: by FORWARD_ROLES (stats only if the problem asks for them) or BACKWARD_ROLES (what a gradient of
                the log-sum-exp adds, engine/plans/lse_rows.py, only if it takes one); stats and these are contiguous,
                [B, H, Sq] or [B, H, Sq, 1].
            operands: as in the problem.
            ints, floats: all scalars of the program; the floats are 0-d host tensors.
        """
        self.run_at([tensor.data_ptr() for tensor in tensors], operands, ints, floats)

    def run_at(
        self, tensors: list[int], operands: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[torch.Tensor]
    ) -> None:
        """As run, with the addresses of the tensors."""
        addresses = [*tensors, *[operands[i].data_ptr() for i in self._operands], *self._constant_addresses]
        workspace = empty((self.workspace,), (1,), torch.uint8) if self.workspace else None
        memory = 0 if workspace is None else workspace.data_ptr()
        if self._replays is not None:
            self._replays.run(addresses, memory)
            return
        scalars = [torch.tensor([ints[i]], dtype=torch.int32) for i in self._ints]
        scalars += [floats[i].to(torch.float32).reshape(1) for i in self._floats]
        addresses += [scalar.data_ptr() for scalar in scalars]
        self._launch(addresses, memory, current_handle(self.problem.device))


def _launch_on(launch: Launch, device: int, addresses: Sequence[int], workspace: int, stream: int) -> None:
    launch(addresses, workspace, handle_on(device, stream))


def _drop_python_engines(graph: Any) -> None:
    """The frontend also offers kernels that it compiles from Python: seconds to compile, and slow to launch."""
    names = [graph.get_plan_name_at_index(i) for i, plan in enumerate(graph.plans) if plan.engine_id >= PYTHON_ENGINES]
    if names:
        graph.deselect_engines(names)


def build(problem: Problem, lowering: Lowering) -> GraphPlan | Reason:
    """The plan, on the current device, which must be the problem's; or why cuDNN does not support it.

    Raises torch.OutOfMemoryError; whatever else the frontend raises, in Python or from C++, is a refusal.
    """
    try:
        return _build(problem, lowering)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        lasting = not any(mark in str(error) for mark in PASSING)
        detail = f"{lowering.strategy}, {problem.direction}: {what}{_first_line(error)}"
        return Reason(Code.SHAPE_REFUSED, detail, lasting)


# What an error says that is about the moment, not about the graph.
PASSING = (
    "out of memory", "ALLOC_FAILED", "LOADING_FAILED", "PREREQUISITE_MISSING", "EXECUTION_FAILED", "INTERNAL_ERROR",
    "CUDA_ERROR", "CUDA error", "CUDA_SUCCESS",
)  # fmt: skip


def _build(problem: Problem, lowering: Lowering) -> GraphPlan:
    built = assemble(problem, lowering, handle=current_handle(problem.device))
    graph = built.graph
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        _drop_python_engines(graph)
        graph.check_support()
        graph.build_plans(cudnn.build_plan_policy.HEURISTICS_CHOICE)
    finally:
        built.callbacks.clear()
    return GraphPlan(problem, graph, _bind(problem, lowering, built))


def _bind(problem: Problem, lowering: Lowering, built: AttentionGraph) -> Binding:
    inputs = built.inputs
    roles = FORWARD_ROLES if problem.direction == FORWARD else BACKWARD_ROLES
    operands, ints, floats = (tuple(sorted(bank)) for bank in (inputs.operands, inputs.ints, inputs.floats))
    tensors = [
        *(built.roles[r] for r in roles if r in built.roles),
        *(inputs.operands[i] for i in operands),
        *(tensor for tensor, _ in (*inputs.hosts, *inputs.filled)),
        *(inputs.ints[i] for i in ints),
        *(inputs.floats[i] for i in floats),
    ]
    return Binding(
        strategy=lowering.strategy,
        uids=tuple(int(tensor.get_uid()) for tensor in tensors),
        operands=operands,
        ints=ints,
        floats=floats,
        hosts=tuple(number.item() for _, number in inputs.hosts),
        filled=tuple(number for _, number in inputs.filled),
    )


def restore(problem: Problem, binding: Binding, data: bytes) -> GraphPlan:
    """A plan that Plan.serialized gave the data of, for the same problem, without building anything.

    Raises ValueError for data that cuDNN cannot use.
    """
    handle = current_handle(problem.device)
    graph: Any = cudnn.pygraph(handle=handle)
    try:
        graph.deserialize(handle, data)
        return GraphPlan(problem, graph, binding)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        raise ValueError(f"{binding.strategy}, {problem.direction}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
