"""The host's way of a call on a machine without a GPU: real functions from ops/ to the launch, which does nothing.

Tensors are on the CPU. What only a GPU has is replaced by functions of C that give a constant, so that no Python is
added or taken away. Plans are `GraphPlan`s of a graph that computes nothing.
"""

import ctypes
import functools
import sys
from collections import Counter
from types import SimpleNamespace

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.key import backward_key, forward_key, problem_of
from cudnn_flex_compile.engine.launch import replay
from cudnn_flex_compile.engine.launch.cuda_graph import Graph
from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import Binding
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.kernels import bound_calls, cuda
from cudnn_flex_compile.kernels.arguments import ANSWER
from cudnn_flex_compile.kernels.block_mask_contract import Answer, agrees
from cudnn_flex_compile.ops import undispatched
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

MASK = make("ge", ir.index("q"), ir.index("k"))
PROGRAMS = {  # and the shape of an operand, if there is one; and whether there is a BlockMask
    "no mask": (ir.program(), (), False),
    "causal, a BlockMask": (ir.program(mask=MASK), (), True),
    "slopes, causal, a BlockMask": (ir.program(ir.SCORE + ir.operand(0, F32, "h"), MASK), (1, 4, 1, 1), True),
}
SHAPE, SCALE, WORKSPACE = (1, 4, 64, 64), 0.125, 4096
NO_DEVICE, NO_STREAM, NO_CAPTURE = functools.partial(int, -1), {None: 7, -1: 7}.get, functools.partial(bool, 0)
NO_LAUNCH, NO_HANDLE = slice, {}.get  # of three arguments, and of two


class _Recorded(Graph):
    """A recording whose launch is a call of C, as that of the driver is."""

    def __init__(self, enqueue, device):
        library = ctypes.CDLL(None)
        library.labs.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._executable, self._launch, self._free = ctypes.c_void_p(), library.labs, None


def _on_the_cpu(function):
    """The function, which asks whether a tensor is on the CPU where it asks whether it is on a GPU."""
    code = function.__code__
    names = tuple("is_cpu" if name == "is_cuda" else name for name in code.co_names)
    return code.replace(co_names=names)


def install(patch):
    """In place of the device, for as long as the `pytest.MonkeyPatch` lasts; and without any plan."""
    for module in (torch_private, cuda, bound_calls):
        for name, value in {
            "current_device": NO_DEVICE, "current_stream": NO_STREAM, "capturing": NO_CAPTURE,
            "empty": torch._C._dynamo.guards._empty_strided_cpu,
        }.items():  # fmt: skip
            if hasattr(module, name):
                patch.setattr(module, name, value)
    patch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", NO_CAPTURE)
    patch.setattr(graph_plan, "empty", torch._C._dynamo.guards._empty_strided_cpu)
    patch.setattr(graph_plan, "launcher", lambda graph, uids: NO_LAUNCH)
    patch.setattr(graph_plan, "handle_on", NO_HANDLE)
    patch.setattr(graph_plan, "current_handle", {}.get)
    patch.setattr(replay, "Graph", _Recorded)
    for name in ("_dispatched", "forward", "backward"):
        function = getattr(undispatched, name, None)
        if function is not None:
            patch.setattr(function, "__code__", _on_the_cpu(function))
    engine.reset()


def plan(key):
    """A plan for the key of a call, which is found from now on."""
    problem = problem_of(key)
    roles = graph_plan.FORWARD_ROLES[: 4 + problem.stats] if problem.grad is None else graph_plan.BACKWARD_ROLES[:-1]
    operands = tuple(range(len(problem.operands)))
    binding = Binding("stand-in", tuple(range(len(roles) + len(operands))), operands)
    graph = SimpleNamespace(get_workspace_size=lambda: WORKSPACE)
    return engine.plans.put(key, CachedPlan(graph_plan.GraphPlan(problem, graph, binding), (False,) * 4))


def calls(name):
    """By direction: a call of a program, as Inductor's code makes it. Its plans are there."""
    program, of_operand, masked = PROGRAMS[name]
    batch, heads, length, dim = SHAPE
    query, key, value, grad, out = (
        torch.zeros(batch, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(5)
    )
    stats, operands = torch.zeros(SHAPE[:3]), [torch.zeros(of_operand)] if of_operand else []
    written = text(program)
    forward = forward_key(written, query, key, value, operands, SCALE, True)
    plan(forward)
    plan(backward_key(forward, grad))
    inference = forward_key(written, query, key, value, operands, SCALE, False)
    plan(inference)
    rest, stock, layout = (written, SCALE), [], []
    if masked:
        stock, layout = [torch.zeros(0, dtype=torch.int32) for _ in range(9)], [8, 0, 128, 128]
        setattr(stock[0], ANSWER, Answer(lambda: True))
    of_forward, of_backward = undispatched.forward, undispatched.backward
    return {
        "inference": lambda: of_forward(query, key, value, operands, [], [], *rest, False, stock, layout, "", None, ""),
        "forward": lambda: of_forward(query, key, value, operands, [], [], *rest, True, stock, layout, "", None, ""),
        "backward": lambda: of_backward(
            grad, None, query, key, value, out, stats, operands, [], [], *rest, stock, layout, "", None, ""
        ),
    }  # fmt: skip


def parts():
    """By name: the parts of a look-up, and of a bound call, as a plain forward has them."""
    query, key, value = (torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(3))
    made, tensors = forward_key("a program", query, key, value, [], SCALE, True), (query, key, value)
    engine.plans.put(made, cuda.DISAGREE)
    guard = torch.zeros(0, dtype=torch.int32)
    setattr(guard, ANSWER, Answer(lambda: True))
    given, layout = ([guard], [8, 0, 128, 128], ""), (SHAPE, query.stride(), query.dtype)
    alike = torch_private.tensor_guards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[]).check
    replays = replay.Replays(NO_LAUNCH, None, engine.graph_pool)
    replays.graphs[0, 1, 2, 3, 4, 5] = [_Recorded(None, 0), 0]
    return {
        "nothing": lambda: None,
        "key": lambda: forward_key("a program", query, key, value, [], SCALE, True),
        "look-up": lambda: engine.plans.get(made),
        "comparison in place of both": lambda: alike(query, key, value),
        "agreement of a BlockMask": lambda: agrees(given, query, key, [], []),
        "allocation of an output": lambda: bound_calls.empty(*layout),
        "alignment": lambda: cuda._aligned(tensors),
        "replay, without CUDA's part": lambda: replays.run([1, 2, 3, 4, 5], 0, None, False),
    }


def python_calls(call):
    """How often each function of Python is called within, the call itself left out; and the number of calls of C."""
    found, in_c = Counter(), Counter()

    def notice(frame, event, argument):
        if event == "call":
            found[f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            in_c[getattr(argument, "__qualname__", str(argument))] += 1

    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(None)
    found.pop(f"{__name__}.{call.__code__.co_qualname}", None)
    in_c.pop("setprofile", None)
    return found, in_c
