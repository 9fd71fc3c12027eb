"""A plan binds the same data to the same tensors of its graph, whether it was built or restored.

The graphs are the frontend's own, as far as they exist without cuDNN; what they are run with is noted.
"""

import ctypes
import gc
import weakref
from dataclasses import replace

import cudnn
import pytest
import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.plans import graph_plan as module
from cudnn_flex_compile.engine.plans import kinds
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.engine.store.codec import Certified, decode, encode
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make

STEPS = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
STRATEGY = {strategy.name: strategy for strategy in STRATEGIES}
PROGRAMS = {
    "constants, an operand, scalars": (
        "chained",
        ir.program(
            make("tanh", ir.SCORE / ir.scalar(1, F32)) * 0.1 + ir.operand(1, F32, "h"),
            make("and", make("ge", Q, KV), make("ge", KV + ir.scalar(2, I32), Q)),
        ),
    ),
    "lengths": ("native", ir.program(mask=make("gt", ir.operand(0, I32, "b"), KV))),
    "nothing": ("native", ir.program()),
}


@pytest.fixture
def runs(monkeypatch):
    """What graphs were run with: {uid: address}."""
    found, full = [], torch.full
    for step in STEPS:
        monkeypatch.setattr(cudnn.pygraph, step, lambda *_: None)
    monkeypatch.setattr(cudnn.pygraph, "get_workspace_size", lambda graph: 0)
    monkeypatch.setattr(cudnn.pygraph, "serialize", lambda graph, as_bytes: b"a graph")
    monkeypatch.setattr(cudnn.pygraph, "deserialize", lambda graph, handle, data: None)
    monkeypatch.setattr(cudnn.pygraph, "execute", lambda graph, given, workspace, handle: found.append(dict(given)))
    monkeypatch.setattr(torch, "full", lambda shape, value, dtype, device=None: full(shape, value, dtype=dtype))
    for name in ("current_handle", "handle_on"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(torch_private, "current_stream", lambda device: 0)
    return found


def problem_of(program, direction):
    query = dense(TensorSpec((2, 4, 128, 64), (), torch.bfloat16))
    lengths, heads = ((2, 1, 1, 1), (1,) * 4, torch.int32), ((1, 4, 1, 1), (4, 1, 1, 1), torch.float32)
    operands = (TensorSpec(*lengths), TensorSpec(*heads))
    forward = Problem(program, FORWARD, query, query, query, out_spec(query, query), operands, 0.125, 0)
    return forward if direction == FORWARD else forward.backward()


def read(address, like):
    kind = {torch.float32: ctypes.c_float, torch.int32: ctypes.c_int32}[like.dtype]
    return [kind.from_address(address + 4 * i).value for i in range(like.numel())]


CASES = [(*case, direction) for case in PROGRAMS.values() for direction in (FORWARD, BACKWARD)]


@pytest.mark.parametrize(("strategy", "program", "direction"), CASES)
def test_a_restored_plan_is_bound_as_the_built_one(runs, strategy, program, direction):
    problem = problem_of(program, direction)
    built = module.build(problem, STRATEGY[strategy].lower(program, direction != FORWARD))
    assert not isinstance(built, Reason), built
    restored = kinds.restore(problem, decode(encode(Certified(built.to_record()))).plan)
    roles = module.FORWARD_ROLES if direction == FORWARD else module.BACKWARD_ROLES
    roles = [role for role in roles if role != "dbias"]
    tensors = [torch.empty(16) for _ in roles]
    operands = [torch.tensor([100, 128], dtype=torch.int32).view(2, 1, 1, 1), torch.rand(1, 4, 1, 1)]
    ints, floats = [7, 8, 9], [torch.tensor(n, dtype=torch.float64) for n in (1.5, 2.5)]
    for plan in (built, restored):
        plan.run(tensors, operands, ints, floats)
    first, second = runs
    assert list(first) == list(second) == list(built.binding.uids)
    given = {t.data_ptr() for t in (*tensors, *operands)}
    assert {uid: a for uid, a in first.items() if a in given} == {uid: a for uid, a in second.items() if a in given}
    for a, b in zip(built._constants, restored._constants, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert read(a.data_ptr(), a) == read(b.data_ptr(), b)
    assert (restored.strategy, restored.outputs, restored.problem) == (built.strategy, built.outputs, problem)
    assert len(first) == len(roles) + len(built.binding.operands) + len(built._constants) + len(
        built.binding.ints
    ) + len(built.binding.floats)


def test_what_programs_read_is_bound(runs):
    """The cases above have all of it."""
    bindings = []
    for strategy, program in PROGRAMS.values():
        bindings.append(module.build(problem_of(program, FORWARD), STRATEGY[strategy].lower(program, False)).binding)
    chained, native, nothing = bindings
    assert (chained.operands, chained.ints, chained.floats) == ((1,), (2,), (1,))
    assert -float("inf") in chained.hosts
    assert ir.to_f32(0.1) in chained.hosts
    assert (native.operands, native.filled, native.hosts) == ((0,), (128,), ())
    assert replace(nothing, uids=()) == type(nothing)("native", ())


@pytest.mark.parametrize(("name", "replay", "replayed"), [("nothing", True, True), ("nothing", False, False),
                         ("lengths", True, True), ("constants, an operand, scalars", True, False)])  # fmt: skip
def test_which_launches_may_be_replayed(runs, monkeypatch, name, replay, replayed):
    """Where the compile allows it, and all that is read is in device memory."""
    noted = []
    monkeypatch.setattr(module.Replays, "run", lambda replays, addresses, *_: noted.append(addresses))
    strategy, program = PROGRAMS[name]
    problem = replace(problem_of(program, FORWARD), replay=replay)
    plan = module.build(problem, STRATEGY[strategy].lower(program, False))
    operands = [torch.tensor([100, 128], dtype=torch.int32).view(2, 1, 1, 1), torch.rand(1, 4, 1, 1)]
    plan.run([torch.empty(16) for _ in range(5)], operands, [7, 8, 9], [torch.tensor(1.5), torch.tensor(2.5)])
    assert (len(noted), len(runs)) == (replayed, not replayed)


def test_a_plan_goes_at_once_with_all_that_it_holds(runs):
    """Device memory is not to wait for the collector of garbage."""
    plan = module.build(problem_of(PROGRAMS["nothing"][1], FORWARD), STRATEGY["native"].lower(ir.program(), False))
    plan.run([torch.empty(16) for _ in module.FORWARD_ROLES], [], [], [])
    replays = weakref.ref(plan._replays)
    gc.disable()
    try:
        del plan
        assert replays() is None
    finally:
        gc.enable()


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


ERRORS = [RuntimeError("a line\nanother"), cudnn.cudnnGraphNotSupportedError("a line")]


@pytest.mark.parametrize("error", ERRORS, ids=["RuntimeError", "not supported"])
@pytest.mark.parametrize("method", ["serialize", "deserialize", "get_workspace_size"])
def test_what_cudnn_raises_is_a_value_error(runs, monkeypatch, method, error):
    program = PROGRAMS["nothing"][1]
    plan = module.build(problem_of(program, FORWARD), STRATEGY["native"].lower(program, False))
    monkeypatch.setattr(cudnn.pygraph, method, raises(error))
    fails = plan.serialized if method == "serialize" else lambda: module.restored(plan.problem, plan.binding, b"")
    with pytest.raises(ValueError, match=r"native, forward: a line$"):
        fails()


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (cudnn.cudnnGraphNotSupportedError("No valid engine configs"), True),
        (RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"), True),
        (ValueError("a dimension"), True),
        (RuntimeError("CUDA out of memory"), False),
        (KeyError("what the frontend forgot"), True),
        (RuntimeError("CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"), False),
        (cudnn.cudnnGraphNotSupportedError("cuLibraryLoadData returned error at: CUDA_SUCCESS != result"), False),
    ],
    ids=str,
)
def test_reasons_that_last(runs, monkeypatch, error, lasting):
    program = PROGRAMS["nothing"][1]
    monkeypatch.setattr(cudnn.pygraph, "build_plans", raises(error))
    reason = module.build(problem_of(program, FORWARD), STRATEGY["native"].lower(program, False))
    assert (reason.code, reason.lasting) == (Code.SHAPE_REFUSED, lasting)
