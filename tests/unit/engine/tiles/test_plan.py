"""How the kernels by tile lists are launched: their arguments, and the memory that they work in.

The kernels are stand-ins that note what they are given.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.engine.tiles import kernels as kernels_module
from cudnn_flex_compile.engine.tiles import plan
from cudnn_flex_compile.engine.tiles.edge_mask import EDGE_MASK, EDGE_PROGRAM
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import every_endpoint

CPU, STREAM = torch.device("cpu"), 5
PROGRAM = ir.program()
BATCH, HEADS, ROWS, COLUMNS, DIM = 2, 4, 70, 90, 16


def problem(kv_heads=2, backward=True, dim=DIM, **more):
    def spec(heads, length):
        return dense(TensorSpec((BATCH, heads, length, dim), (), torch.bfloat16))

    query, key = spec(HEADS, ROWS), spec(kv_heads, COLUMNS)
    rest = (query, key, key, out_spec(query, key), ())
    found = Problem(PROGRAM, FORWARD, *rest, scale=0.25, device=0, tiled=True, **more)
    return found.backward() if backward else found


class Kernels:
    """Of a backward, with the frontend's specs of what it works in (its `_CompiledBwd`)."""

    def __init__(self, shared, deterministic):
        self.calls, self.shared = [], shared
        shapes = {
            "dq_accum": (BATCH, HEADS, 128 * DIM), "dpsum": (BATCH, HEADS, 128), "lse_log2": (BATCH, HEADS, 128),
            "dk_accum": (BATCH, 2, 128 * DIM) if shared else None,
            "dv_accum": (BATCH, 2, 128 * DIM) if shared else None,
            "dq_semaphore": (BATCH, HEADS, 1, 1) if deterministic else None,
            "dk_semaphore": (BATCH, 2, 1, 2) if deterministic and shared else None,
            "dv_semaphore": (BATCH, 2, 1, 2) if deterministic and shared else None,
        }  # fmt: skip
        self.workspace_specs = tuple(
            (name, shape, torch.int32 if "semaphore" in name else torch.float32) for name, shape in shapes.items()
        )
        self.post_dk = self.post_dv = self._named("post") if shared else None

    def _named(self, name):
        return lambda *arguments: self.calls.append((name, arguments))

    def __getattr__(self, name):
        return self._named(name)


@pytest.fixture
def launched(monkeypatch):
    """Makes kernels of a problem, which are stand-ins."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=7))
    for name in ("compiled_forward", "compiled_backward"):
        monkeypatch.setattr(kernels_module, name, lambda _: made)
    made = None

    def make(wanted):
        nonlocal made
        forward = wanted.direction == FORWARD
        made = Kernels(wanted.key.shape[1] < HEADS, wanted.deterministic)
        made = made._named("forward") if forward else made
        return (kernels_module.Forward if forward else kernels_module.Backward)(wanted), made

    return make


def tensors(wanted):
    specs = [wanted.query, wanted.key, wanted.value, wanted.out]
    stats = [torch.empty(wanted.lse_shape)]
    backward = [wanted.out, wanted.query, wanted.key, wanted.value] if wanted.direction != FORWARD else []
    found = [torch.empty(s.shape, dtype=s.dtype) for s in (*specs, *backward)]
    return [*found[:4], *stats, *found[4:]]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv_heads", [2, HEADS])
def test_what_the_backward_works_in(launched, kv_heads, deterministic):
    wanted = problem(kv_heads, deterministic=deterministic)
    kernels, made = launched(wanted)
    given, work = tensors(wanted), torch.full((kernels.work.size,), 7, dtype=torch.int32)
    kernels(given, (), work)
    names = [name for name, _ in made.calls]
    shared = kv_heads < HEADS
    assert names == ["preprocess", "main", "post_dq"] + ["post"] * (2 * shared)
    main = made.calls[1][1]
    sums, dk, dv, semaphores = main[6], main[7], main[8], main[12:15]
    parts = [t for t in (main[4], main[5], sums, *([dk, dv] if shared else []), *semaphores) if t is not None]
    places = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in parts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "none overlaps"
    assert all(start % 128 == work.data_ptr() % 128 for start, _ in places), "as the frontend aligns them"
    assert [t is not None for t in semaphores] == [deterministic, deterministic and shared, deterministic and shared]
    zeros = [*([dk, dv] if shared else []), *(t for t in semaphores if t is not None)]
    assert all(not t.any() for t in zeros)
    if not shared:
        assert (dk.data_ptr(), dv.data_ptr()) == (given[-2].data_ptr(), given[-1].data_ptr())


def test_the_forwards_counter_is_zero(launched):
    kernels, _ = launched(problem(backward=False, stats=True))
    calls = []
    kernels._kernel = lambda *arguments: calls.append(arguments)
    kernels(tensors(problem(backward=False)), (), torch.full((kernels.work.size,), 7, dtype=torch.int32))
    assert (calls[0][-2].tolist(), calls[0][-1]) == ([0], 7)


def test_a_deterministic_backward_that_is_refused_is_never_made(monkeypatch):
    monkeypatch.setattr(plan, "unusable", lambda device: None)
    monkeypatch.setattr(plan, "TilePlan", lambda wanted: "a plan")
    monkeypatch.setattr(plan.ordered, "_unending", lambda kind: Reason(Code.CERTIFICATION, " ".join(kind)))
    refused = plan.build(problem(deterministic=True))
    assert refused == Reason(Code.CERTIFICATION, f"{HEADS // 2} {DIM} {DIM} bfloat16 0")
    for other in (problem(), problem(deterministic=True, backward=False)):
        assert plan.build(other) == "a plan"
    refused = plan.build(problem(HEADS, dim=256, deterministic=True))
    assert refused.code is Code.SHAPE_REFUSED
    assert "head dim 256" in refused.detail
    assert plan.build(problem(HEADS, dim=256)) == "a plan"


def test_a_launch_on_another_stream(monkeypatch):
    """As while it is recorded; elsewhere no stream is set, which takes time."""
    entered, ran = [], []
    monkeypatch.setattr(torch_private, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: (stream, device.index))

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            entered.append(self.stream)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "stream", Stream)
    for stream in (STREAM, 77):
        plan._enqueue(lambda *given: ran.append(given), 3, ("a", "b"), 0, stream)
    assert entered == [(77, 3)]
    assert ran == [("a", "b")] * 2


@pytest.mark.parametrize("mask_heads", [1, HEADS])
def test_the_same_kernels_are_certified_on_another_mask(monkeypatch, mask_heads):
    """By lists that are made as those of the user's mask are."""
    monkeypatch.setattr(torch, "device", lambda *_: CPU)
    monkeypatch.setattr(plan, "empty", lambda shape, stride, dtype: torch.empty(shape, dtype=dtype))
    wanted, launched, tables = problem(backward=False), [], []
    made = object.__new__(plan.TilePlan)
    Plan.__init__(made, wanted, "tile_lists")
    made._forward, made._mask, made._replays, made.device = True, PROGRAM.mask, None, CPU
    made._listed = None
    launch = {"work": SimpleNamespace(size=1), "__call__": lambda self, *given: launched.append(given)}
    made._kernels = type("Kernels", (), launch)()
    geometry = SimpleNamespace(sizes=(BATCH, HEADS, ROWS, COLUMNS), mask_heads=mask_heads)
    listed = SimpleNamespace(forward=("the list",))
    made._tiler = SimpleNamespace(geometry=geometry, exact=lambda table, most: tables.append((table, most)) or listed)
    other = made.on_harder_mask()
    assert (other.problem.program, other.problem.operands) == (EDGE_PROGRAM, ())
    assert (other._kernels, other._tiler, made.problem) == (made._kernels, made._tiler, wanted)
    ready = made.prepared((), (), ())
    assert other.prepared((), (), ()) is other
    for one in (ready, other, other):
        one.run(("tensors",), (), (), ())
    with pytest.raises(ValueError, match="was given none"):
        made.run(("tensors",), (), (), ())
    assert [given[:2] for given in launched] == [(("tensors",), ("the list",))] * 3
    for (table, most), mask in zip(tables, (EDGE_MASK, ir.TRUE), strict=True):  # one list of it, whatever its runs
        assert most is None
        assert table.shape == (mask_heads, table.shape[1], BATCH * ROWS)
        rows = [shown for _, shown in visible_rows(mask, [], [], [], geometry.sizes, 1, CPU)]
        right = every_endpoint(iter([(0, torch.cat(rows, 2))]), geometry.sizes, mask_heads, table.shape[1])
        assert torch.equal(table, right)
    assert {63, 64, 65, 79, 80, 81} <= set(tables[0][0].unique().tolist())
    monkeypatch.setattr(plan, "MOST_PAIRS", ROWS * COLUMNS - 1)
    assert made.on_harder_mask() is None
    assert made.prepared((), (), (), room=-1) is None
    assert len(tables) == 2, "no list is made where its table has no room"
    made.prepared((), (), (), room=2**25)
    assert tables[2][1] == 2**25
