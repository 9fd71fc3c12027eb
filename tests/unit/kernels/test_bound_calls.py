"""Bound calls run the plans that their keys have, whatever comes between; and a call takes few calls of Python.

Knows nothing of a GPU: tensors are on the CPU, and launches note their addresses (tests/support/host_path.py).
"""

import copy
import functools
import gc
import os
import random
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine import find_plan
from cudnn_flex_compile.engine.key import Call, backward_key, forward_key, problem_of
from cudnn_flex_compile.engine.launch import replay
from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import BACKWARD, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.kernels import bound_calls, cuda
from cudnn_flex_compile.kernels.arguments import ANSWER, HANDLE
from cudnn_flex_compile.kernels.block_mask_contract import Answer
from cudnn_flex_compile.ops import undispatched
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.text import text
from tests.support.host_path import MASK, PROGRAMS, calls, install, python_calls

# Calls of Python, once launches are replayed. A step of a model makes one or two of each layer, in cold code.
MOST_CALLS = {"inference": 6, "forward": 6, "backward": 6}


@pytest.fixture(autouse=True)
def host(monkeypatch):
    install(monkeypatch)
    yield monkeypatch
    engine.reset()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("direction", MOST_CALLS)
def test_a_call_takes_few_calls_of_python(name, direction, host):
    for module in (bound_calls, graph_plan, cuda):
        host.setattr(module, "empty", functools.cache(module.empty))  # addresses that come back; it is written in C
    call = calls(name)[direction]
    for _ in range(2 * replay.RECORD_AFTER):
        call()
    found, in_c = python_calls(call)
    assert sum(found.values()) <= MOST_CALLS[direction], found
    assert found["cudnn_flex_compile.engine.launch.cuda_graph.Graph.launch"] == 1
    assert in_c["Tensor.stride"] == 0, in_c


def test_calls_that_take_a_tensor_twice_are_bound(noting):
    """One of the same shape that takes two is another call, and so is one that takes another tensor twice."""
    one, other = (torch.zeros(1, 16, HEADS, DIM, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    written = text(GENERATED["causal"][0])
    for query, key, value in [(one, one, one), (one, other, other), (other, one, other), (one, one, other)]:
        for bound in (False, True):
            noted.launches.clear(), ran_bound.clear()
            undispatched.forward(query, key, value, [], [], [], written, 0.125, False, [], [], "", None, "")
            assert any(ran_bound) == bound
            ((_, addresses, _),) = noted.launches
            assert addresses[:3] == [t.data_ptr() for t in (query, key, value)]


# Generated calls

SLOPES = ir.program(ir.SCORE + ir.operand(0, F32, "h"), MASK)
GENERATED = {
    "plain": (ir.program(), ""), "causal": (ir.program(mask=MASK), ""), "slopes": (SLOPES, "h"),
    "learned": (ir.program(with_bias(ir.SCORE, ir.operand(0, F32, "hqk"))), "hqk"),
}  # fmt: skip
POLICIES = ["", Policy(replay=False).text]
HEADS, DIM = 2, 8
noted = threading.local()  # the launches of this thread: the graph, the addresses, the list of tiles
ran_bound = []


class Graph:
    """Notes what it is launched on."""

    def __init__(self, key):
        self.key = key

    def get_workspace_size(self):
        return 16 * Call(*self.key).query_shape[2]

    def launch(self, addresses, workspace, handle):
        noted.launches.append((self.key, list(addresses), None))


class TiledPlan(graph_plan.GraphPlan):
    """Takes tensors, as plans of other kinds do, and a list of tiles."""

    def launcher(self, operands):
        return None

    def run(self, tensors, operands, ints, floats, tiles=None):
        noted.launches.append((self._graph.key, [t.data_ptr() for t in (*tensors, *operands)], tiles))


class Again:
    """A recorded launch, which is made again."""

    def __init__(self, enqueue, device):
        self.enqueue = enqueue

    def launch(self, stream):
        self.enqueue(stream)
        return True


def made(key):
    """A plan of a key, put into the cache."""
    problem, call = problem_of(key), Call(*key)
    binding = graph_plan.Binding("noted", (1, 2, 3, 4), tuple(range(len(call.operands))))
    kind = TiledPlan if call.tiled or call.lse_gradient else graph_plan.GraphPlan
    plan = kind(problem, Graph(key), binding)
    return engine.plans.put(key, cuda.CachedPlan(plan, find_plan._copies(key, problem)))


@pytest.fixture
def noting(host):
    host.setenv("CUDNN_FLEX_PLAN_CACHE_SIZE", "40")
    host.setattr(graph_plan, "launcher", lambda graph, uids: graph.launch)
    host.setattr(replay, "Graph", Again)
    host.setattr(cuda, "find_plan", made)
    ran_bound.clear()
    real = bound_calls.run

    def run(*arguments):
        found = real(*arguments)
        ran_bound.append(bool(found))
        return found

    host.setattr(undispatched, "_run", run)
    host.setattr(cuda, "_fallback_forward", lambda *_: "fallback")
    host.setattr(cuda, "_fallback_backward", lambda *_: "fallback")
    engine.reset()
    noted.launches = []
    return host


def tensor(chance, shape, dtype):
    """In one of some layouts: dense or not, of a parameter or not; one that cuDNN can't read, or that isn't aligned."""
    batch, heads, length, dim = shape
    layout = chance.choice([*["bshd"] * 30, "bhsd", "gapped", "parameter", "unaligned", "odd"])
    if layout == "bshd":
        return torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
    if layout == "gapped":
        return torch.zeros(batch, heads, length, 2 * dim, dtype=dtype)[..., :dim]
    if layout == "odd":
        return torch.zeros(batch, heads, dim, length, dtype=dtype).transpose(2, 3)
    if layout == "unaligned":
        return torch.zeros(batch * heads * length * dim + 1, dtype=dtype)[1:].view(shape)
    found = torch.zeros(shape, dtype=dtype)
    return torch.nn.Parameter(found) if layout == "parameter" else found


def block_mask(chance):
    """The tensors of a BlockMask, and whether plans may run its calls."""
    guard, agrees = torch.zeros(0, dtype=torch.int32), chance.random() < 0.9
    setattr(guard, ANSWER, Answer(lambda: agrees))
    return [guard, *(torch.zeros(1, dtype=torch.int32) for _ in range(2))], agrees


def tile_list(chance):
    handle, heads = torch.zeros(0, dtype=torch.int32), chance.choice([1, HEADS])
    there = chance.random() < 0.9
    found = object.__new__(TileList) if there else Reason(Code.LIST_BUDGET, "too large")
    setattr(handle, HANDLE, SimpleNamespace(found=found, tiles=found if there else None, mask_heads=heads))
    return handle, heads if there else None


class Layer:
    """A call that is made again and again, as one of a compiled graph is."""

    def __init__(self, seed):
        chance = random.Random(seed)
        self.program, self.dims = GENERATED[chance.choice(list(GENERATED))]
        self.sizes = chance.choice((1, 2)), chance.choice((16, 32)), chance.choice((16, 32))
        self.dtype, self.operands = chance.choice((torch.bfloat16, torch.float16)), []
        for change in self.CHANGES:
            getattr(self, f"_draw_{change}")(chance)

    def sibling(self, chance):
        """A layer that differs in one thing, at most."""
        found = copy.copy(self)
        getattr(found, f"_draw_{chance.choice(self.CHANGES)}")(chance)
        return found

    CHANGES = ("query", "key", "value", "bias", "scale", "policy", "stats", "tiles", "blocks", "lse_gradient")

    def _draw_query(self, chance):
        batch, rows, _ = self.sizes
        self.query = tensor(chance, (batch, HEADS, rows, DIM), self.dtype)
        self.of_lse = torch.zeros(batch, HEADS, rows, dtype=chance.choice((torch.float32, torch.bfloat16)))

    def _draw_key(self, chance):
        batch, _, columns = self.sizes
        self.key = tensor(chance, (batch, HEADS, columns, DIM), self.dtype)

    def _draw_value(self, chance):
        batch, _, columns = self.sizes
        self.value = self.key if chance.random() < 0.2 else tensor(chance, (batch, HEADS, columns, DIM), self.dtype)

    def _draw_bias(self, chance):
        _, rows, columns = self.sizes
        sizes = {"h": (1, HEADS, 1, 1), "hqk": (1, HEADS, rows, columns)}
        if self.dims:
            self.operands = [tensor(chance, sizes[self.dims], chance.choice((torch.float32, torch.bfloat16)))]

    def _draw_scale(self, chance):
        self.scale = chance.choice((0.125, 0.25))

    def _draw_policy(self, chance):
        self.policy = chance.choice(POLICIES)

    def _draw_stats(self, chance):
        self.stats = chance.random() < 0.7

    def _draw_tiles(self, chance):
        self.tiles, self.heads = tile_list(chance) if chance.random() < 0.3 else (None, 0)

    def _draw_blocks(self, chance):
        self.stock, self.agrees = block_mask(chance) if chance.random() < 0.5 else ([], True)

    def _draw_lse_gradient(self, chance):
        self.lse_gradient = chance.random() < 0.5 and not self.dims

    def forward(self):
        """Runs it, and returns the key by which its plan is found; None where no plan runs."""
        self.found: object = undispatched.forward(
            self.query, self.key, self.value, self.operands, [], [], text(self.program), self.scale, self.stats,
            self.stock, [2, 0, 128, 128] if self.stock else [], "", self.tiles, self.policy,
        )  # fmt: skip
        return self._key(self.stats)

    def backward(self):
        out, stats = torch.zeros_like(self.query), torch.zeros(self.query.shape[:3])
        of_lse = self.of_lse if self.lse_gradient else None
        self.found = undispatched.backward(
            out, of_lse, self.query, self.key, self.value, out.clone(), stats, self.operands, [], [],
            text(self.program), self.scale, self.stock, [2, 0, 128, 128] if self.stock else [], "", self.tiles,
            self.policy,
        )  # fmt: skip
        key = self._key(True)
        return None if key is None else backward_key(key, out, self.lse_gradient)

    def _key(self, stats):
        if self.heads is None or (self.tiles is None and not self.agrees):
            return None
        return forward_key(
            text(self.program), self.query, self.key, self.value, self.operands, self.scale, stats, self.heads,
            self.policy,
        )  # fmt: skip

    def check(self, key):
        """The plan of the key ran, once, on these tensors, and its outputs were returned."""
        launches, noted.launches = noted.launches, []
        if key is None:
            assert (self.found, launches) == ("fallback", [])
            return
        ((ran, addresses, tiles),) = launches
        assert ran == key
        assert (tiles is not None) == bool(Call(*key).tiled)
        copied = find_plan._copies(key, problem_of(key))
        for tensor, address, copies in zip((self.query, self.key, self.value), addresses, copied, strict=False):
            assert copies or tensor.data_ptr() % 16 or tensor.data_ptr() == address
        assert all(address % 16 == 0 for address in addresses[: -len(self.operands) if tiles else None])
        plan = SimpleNamespace(problem=problem_of(key), outputs=output_specs(problem_of(key)))
        found = [(t.shape, t.stride(), t.dtype) for t in self.found]
        assert [each for each in found if each[0] != (0,)] == [
            each for each in cuda.CachedPlan(plan, copied).layouts if each[0] != (0,)
        ]
        assert len(found) == (4 if Call(*key).direction == BACKWARD else 2)


class Between:
    """What happens between calls, by chance."""

    def __init__(self, chance, host):
        self.chance, self.host = chance, host

    def __call__(self):
        now = self.chance.random()
        if now < 0.01:
            find_plan.cache_clear()
        elif now < 0.012:
            engine.reset()
        elif now < 0.017:  # others' plans take the place of some
            for number in range(self.chance.randrange(45)):
                engine.plans.put(("another", self.chance.random(), number), cuda.DISAGREE)
        elif now < 0.025:
            torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
        elif now < 0.06:
            capturing = functools.partial(bool, self.chance.random() < 0.15)
            self.host.setattr(bound_calls, "capturing", capturing)
            self.host.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", capturing)


@pytest.fixture
def deterministic_or_not():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_of_the_key_runs(seed, noting, deterministic_or_not):
    """Layers of one model, in any order, that differ from others in one thing or in all; and plans are dropped."""
    chance, layers = random.Random(seed), []
    for number in range(6):
        layers += [layer := Layer(f"{seed} {number}"), *(layer.sibling(chance) for _ in range(5))]
    between = Between(chance, noting)
    for _ in range(1500):
        start = chance.randrange(len(layers))
        layer = chance.choice(layers[start : start + 6])
        between()
        layer.check(chance.choice((layer.forward, layer.backward))())
    assert ran_bound.count(True) > 1500 / 5, ran_bound.count(True)


def test_lengths_that_change_are_looked_up(noting):
    """A program of many shapes has no bound calls, and so none that are compared in vain."""
    for length in range(16, 16 * (bound_calls.MOST + 3), 16):
        query = torch.zeros(1, HEADS, length, DIM, dtype=torch.bfloat16)
        for _ in range(2):
            given = (query, query.clone(), query.clone(), [], [], [], text(ir.program()))
            undispatched.forward(*given, 0.125, True, [], [], "")
    assert list(bound_calls.forwards.values()) == [None]


def runs_bound(layer):
    layer.forward(), layer.forward()
    return ran_bound[-1:] == [True]


def test_a_plan_that_runs_bound_is_in_use(noting):
    """It is not evicted for others that were used before it, and its calls are counted."""
    layer = next(layer for layer in map(Layer, range(100)) if runs_bound(layer))
    key, before = layer.forward(), engine.plans.info().hits
    for number in range(80):
        layer.forward()
        made(forward_key(text(layer.program), layer.query, layer.key, layer.value, layer.operands, 2.0 + number, True))
    assert engine.plans.peek(key) is not None
    assert engine.plans.info().evictions >= 40
    assert engine.plans.info().hits == before + 80


def test_calls_that_look_alike_are_bound_once(noting):
    """Also where both ran before one was bound, in two threads."""
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]
    for _ in range(2 * bound_calls.MOST):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(undispatched, "_forwards", {})
            undispatched.forward(*query, [], [], [], text(ir.program()), 0.125, True, [], [], "")
    assert bound_calls.forwards[text(ir.program())].next is None


OBSTACLES = {
    "capturing": True, "profiling": True, "dispatch_modes": 1, "current_device": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stands_in_the_way(name, noting):
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]

    def call():
        return undispatched.forward(*query, [], [], [], text(ir.program()), 0.125, True, [], [], "")

    call(), call()
    assert ran_bound == [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_calls, name, lambda: OBSTACLES[name])
        call()
    call()
    assert ran_bound == [True, False, True]
    only = bound_calls.forwards[text(ir.program())]
    assert only.next is None  # nothing is bound again meanwhile


def test_without_memory_the_call_is_looked_up(noting):
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]

    def call():
        return undispatched.forward(*query, [], [], [], text(ir.program()), 0.125, True, [], [], "")

    call()

    def none(*_):
        raise torch.OutOfMemoryError("no 3 GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_plan, "empty", none)
        assert call() == "fallback"
    assert ran_bound == [False]


def test_threads(noting):
    """Calls of several threads at once, while plans are dropped."""
    failures = []

    def work(seed):
        noted.launches, chance = [], random.Random(seed)
        layers = [Layer(f"threads {number}") for number in range(3)]
        layers += [layer.sibling(random.Random(number)) for number, layer in enumerate(layers)]
        try:
            for _ in range(300):
                layer = chance.choice(layers)
                layer.check(chance.choice((layer.forward, layer.backward))())
                if chance.random() < 0.02:
                    find_plan.cache_clear()
        except BaseException as error:  # raised again below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if failures:
        raise failures[0]
    assert ran_bound.count(True) > 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_child_of_a_fork_has_none(noting):
    for seed in range(5):
        layer = Layer(seed)
        layer.forward(), layer.forward()
    assert bound_calls.forwards
    child = os.fork()
    if child == 0:
        os._exit(len(bound_calls.forwards) + len(bound_calls.backwards))
    assert os.waitpid(child, 0)[1] == 0
    assert bound_calls.forwards


def test_plans_go_with_the_cache(noting):
    """A bound call keeps none alive that the cache has dropped."""
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]
    for _ in range(2):
        undispatched.forward(*query, [], [], [], text(ir.program()), 0.125, True, [], [], "")
    plan = weakref.ref(engine.plans.values()[0].plan._replays)
    find_plan.cache_clear()
    gc.collect()
    assert plan() is None


def test_a_plan_that_was_dropped_meanwhile_is_not_bound(noting):
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]
    noting.setattr(Graph, "launch", lambda *_: find_plan.cache_clear())
    undispatched.forward(*query, [], [], [], text(ir.program()), 0.125, True, [], [], "")
    assert not bound_calls.forwards


def with_attribute(name, value):
    tensor = torch.zeros(0, dtype=torch.int32)
    setattr(tensor, name, value)
    return tensor


def listed(found, heads=1):
    tiles = found if isinstance(found, TileList) else None
    return with_attribute(HANDLE, SimpleNamespace(found=found, tiles=tiles, mask_heads=heads))


UNKNOWN = {  # a BlockMask's guard and a list's handle, by which a call does not run bound
    "not compared": (with_attribute(ANSWER, Answer(lambda: True)), None),
    "a guard that was copied": (torch.zeros(0, dtype=torch.int32), None),
    "chosen by the device": (torch.ones((), dtype=torch.bool), None),
    "not listed": (None, listed(None)),
    "no list": (None, listed(Reason(Code.LIST_BUDGET, "too large"))),
    "a handle that was copied": (None, torch.zeros(0, dtype=torch.int32)),
    "of other heads": (None, listed(object.__new__(TileList), HEADS)),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_host_does_not_know_is_looked_at(what, noting):
    agreed = with_attribute(ANSWER, Answer(lambda: True))
    listing = listed(object.__new__(TileList))
    query = [torch.zeros(1, HEADS, 16, DIM, dtype=torch.bfloat16) for _ in range(3)]

    def call(guard, handle):
        given = ([], [], [], text(ir.program()), 0.125, True, [] if guard is None else [guard] * 3, [2, 0, 128, 128])
        return undispatched.forward(*query, *given, "", handle)

    for known in (agreed, None), (None, listing):
        call(*known), call(*known)
        assert ran_bound[-1]
    noting.setattr(cuda, "forward", lambda *_: "looked at")
    assert call(*UNKNOWN[what]) == "looked at"
    assert call(agreed, None) != "looked at"
