"""`GraphPlan` is a plan of one cuDNN graph: it is built or restored here, and executed.

engine/graph writes the graph, and variants.py says which graphs are tried. Other kinds of plans run this one.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import cudnn
import torch
from torch import Tensor

from cudnn_flex_compile.engine.graph.build import AttentionGraph, assemble
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.launch.handles import current_handle, handle_on
from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.launch.raw_execute import Launch, launcher
from cudnn_flex_compile.engine.launch.replay import Replays
from cudnn_flex_compile.engine.plans.plan import AddressPlan, Attempt, Plan, Record
from cudnn_flex_compile.engine.plans.variants import Variant, variants
from cudnn_flex_compile.engine.problem import FORWARD, Binding, Problem
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Code, Reason, most_telling
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned

PYTHON_ENGINES = 20_000  # the first id of an engine of the frontend's own (cudnn.engines.engine_ids)
EXPECTED = (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError)  # errors for a graph that is not supported
FORWARD_ROLES = ("query", "key", "value", "out", "stats")
BACKWARD_ROLES = ("query", "key", "value", "out", "stats", "grad_out", "dq", "dk", "dv", "dbias")


DTYPES = {int: torch.int32, float: torch.float32}


class GraphPlan(AddressPlan):
    """Runs one graph.

    Attributes:
        binding: the tensors that it reads and writes.
        workspace: bytes that each run needs.
    """

    KIND = "graph"
    __slots__ = (
        "_constant_addresses", "_constants", "_floats", "_graph", "_ints", "_launch", "_operands", "_replays",
        "binding", "workspace",
    )  # fmt: skip

    def __init__(self, problem: Problem, graph: Any, binding: Binding) -> None:
        """Takes a built graph, on the current device, which must be the problem's."""
        super().__init__(problem, binding.strategy)
        self._graph, self.binding = graph, binding
        self.workspace = int(graph.get_workspace_size())
        shape = (problem.query.shape[0], 1, 1, 1)
        self._constants = [torch.full((1, 1, 1, 1), n, dtype=DTYPES[type(n)]) for n in binding.hosts]
        self._constants += [torch.full(shape, n, dtype=torch.int32, device=self.device) for n in binding.filled]
        self._constant_addresses = [constant.data_ptr() for constant in self._constants]
        self._operands, self._ints, self._floats = binding.operands, binding.ints, binding.floats
        self._launch = launcher(graph, binding.uids)
        enqueue = functools.partial(_launch_on, self._launch, self._constant_addresses, problem.device)
        # Scalars are not in device memory: two launches on the same addresses may differ in them.
        replayed = problem.replay and not (binding.ints or binding.floats)
        self._replays = Replays(enqueue, problem.device, engine.graph_pool) if replayed else None

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        if problem.tiled or problem.lse_gradient:
            return []
        program = pruned(problem.program, problem.lengths)
        return [
            Attempt(functools.partial(_build_variant, variant, program, problem), variant.last_resort, variant.written)
            for variant in variants(program, problem)
        ]

    def to_record(self) -> Record:
        details = {"binding": asdict(self.binding), "workspace": self.workspace}
        return replace(super().to_record(), details=details, data=self.serialized())

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        details: dict[str, Any] = record.details["binding"]
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in details.items()}
        plan, workspace = restored(problem, Binding(**given), record.data), record.details["workspace"]
        if plan.workspace != workspace:
            raise ValueError(f"it wants {plan.workspace} bytes of workspace, {workspace} when it was stored")
        return plan

    def serialized(self) -> bytes:
        """The built graph, as `restored` takes it. Raises ValueError if cuDNN cannot serialise it."""
        try:
            return self._graph.serialize(as_bytes=True)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise ValueError(f"{self.strategy}, {self.problem.direction}: {_first_line(error)}") from error

    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        self.run_at([tensor.data_ptr() for tensor in tensors], operands, ints, floats)

    def run_at(
        self, addresses: list[int], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor]
    ) -> None:
        if self._operands:
            addresses = [*addresses, *[operands[i].data_ptr() for i in self._operands]]
        self._run(addresses, ints, floats, None)

    def launcher(self, operands: int) -> Callable[[list[int]], None] | None:
        if self._ints or self._floats or self._operands != tuple(range(operands)):
            return None
        return self._run

    def _run(
        self, addresses: Sequence[int], ints: Sequence[int] = (), floats: Sequence[Tensor] = (),
        capturing: bool | None = False,
    ) -> None:  # fmt: skip
        workspace = empty((self.workspace,), (1,), torch.uint8) if self.workspace else None
        memory = 0 if workspace is None else workspace.data_ptr()
        if self._replays is not None:
            self._replays.run(addresses, memory, None, capturing)
            return
        scalars = [torch.tensor([ints[i]], dtype=torch.int32) for i in self._ints]
        scalars += [floats[i].to(torch.float32).reshape(1) for i in self._floats]
        addresses = [*addresses, *self._constant_addresses, *[scalar.data_ptr() for scalar in scalars]]
        self._launch(addresses, memory, current_handle(self.problem.device))


def _launch_on(
    launch: Launch, constants: Sequence[int], device: int, addresses: Sequence[int], workspace: int, stream: int
) -> None:  # fmt: skip
    launch([*addresses, *constants], workspace, handle_on(device, stream))


def _drop_python_engines(graph: Any) -> None:
    """Drops the kernels that the frontend compiles from Python, which takes seconds, and are slow to launch."""
    names = [graph.get_plan_name_at_index(i) for i, plan in enumerate(graph.plans) if plan.engine_id >= PYTHON_ENGINES]
    if names:
        graph.deselect_engines(names)


def first_built(program: Program, problem: Problem) -> GraphPlan | Reason:
    """The first plan of a program that cuDNN builds. The plan that it is part of is certified as a whole."""
    reasons: list[Reason] = []
    for variant in variants(program, problem):
        plan = _build_variant(variant, program, problem)
        if not isinstance(plan, Reason):
            return plan
        reasons.append(plan)
    return most_telling(reasons)


def _build_variant(variant: Variant, program: Program, problem: Problem) -> GraphPlan | Reason:
    lowering = variant.lowering(program, problem)
    if isinstance(lowering, Reason):
        return lowering
    engine.plans.count("builds")
    with phase("build"):
        return build(problem, lowering)


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


# Words in errors that are about the moment, and not about the graph.
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


def restored(problem: Problem, binding: Binding, data: bytes) -> GraphPlan:
    """The plan from the data of GraphPlan.serialized, for the same problem, without building anything.

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
