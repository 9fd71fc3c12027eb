"""Plain scores by tile lists on the GPU: numbers of all kinds of masks, edges of tiles, directions apart.

Knows nothing of which calls run so by themselves (tests/compile/test_plain_masks.py), nor of speed
(tests/measure/tile_lists.py).
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.engine.launch.replay import RECORD_AFTER
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.report.report import collect
from tests.support import dense
from tests.support.fastest import make_fastest
from tests.support.plain_masks import MASKS, assert_right, attend, block_mask, inputs, window

NINETY = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no kernels by tile lists here")

BY_LISTS = ("tile_lists", "tile_lists")
DIMS = {  # heads, kv heads, head dim, value dim, dtype
    "64": (4, 2, 64, 64, torch.bfloat16), "128": (4, 1, 128, 128, torch.float16),
    "192, 128": (2, 2, 192, 128, torch.bfloat16), "256": (2, 2, 256, 256, torch.bfloat16),
}  # fmt: skip
# Lengths of tiles of rows and of columns, in the forward and the backward, of all head dims.
TILES = (64, 80, 96, 128, 192)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function=attend, **options):
    given = options or {"strategy": "tile_lists"}
    return torch.compile(function, backend="cudnn_flex", dynamic=False, options=given)


def check(make, batch, length, how, function=None):
    heads, kv_heads, dim, value_dim, dtype = DIMS[how]
    qkv, grad = inputs(batch, length, heads, kv_heads, dim, dtype, "cuda", value_dim)
    mask_mod = make(batch, length, "cuda")
    with collect() as report:
        out = (function or compiled())(*qkv, block_mask(mask_mod, batch, length, "cuda"))
        assert_right(out, qkv, grad, mask_mod)
    return report


@pytest.mark.parametrize(("how", "name"), list(itertools.product(DIMS, MASKS)))
def test_all_kinds_of_masks(how, name):
    report = check(MASKS[name], 2, 333, how)
    assert [c.strategies for c in report.calls] == [BY_LISTS], report.calls[0].reason


@pytest.mark.parametrize("size", [256, 1024])
def test_windows_of_several_tiles(size):
    assert check(window(size), 2, 1300, "128").calls[0].strategies == BY_LISTS


@pytest.mark.parametrize("name", ["causal", "sinks + window", "right padding"])
def test_without_gradients(name):
    heads, kv_heads, dim, _, dtype = DIMS["128"]
    (q, k, v), _ = inputs(2, 333, heads, kv_heads, dim, dtype, "cuda")
    mask_mod = MASKS[name](2, 333, "cuda")
    with collect() as report, torch.no_grad():
        out = compiled()(q, k, v, block_mask(mask_mod, 2, 333, "cuda"))
        exact, stock = (dense.attention(q, k, v, None, mask_mod, dim**-0.5, high)[0] for high in (True, False))
    assert report.calls[0].strategies == ("tile_lists",)
    assert (out.double() - exact).norm() <= 2 * (stock.double() - exact).norm()


def edges(length):
    """The first key and the one behind the last of each row, [S]: at the edges of tiles and beside them, and others."""
    rows = torch.arange(length)
    none, every = rows * 0, rows * 0 + length
    found = {"nothing": (none, none.clone()), "one key": (rows, rows + 1), "the last key": (every - 1, every)}
    for edge in sorted({tile + step for tile in TILES for step in (-1, 0, 1)}):
        found[f"keys before {edge}"] = none, none + edge
        found[f"keys from {edge}"] = none + edge, every
        found[f"rows before {edge}"] = none, torch.where(rows < edge, length, 0)
        found[f"rows from {edge}"] = none, torch.where(rows >= edge, length, 0)
    for tile in TILES:
        here = rows == tile - 1
        found[f"one pair, at {tile - 1}"] = torch.where(here, tile - 1, 0), torch.where(here, tile, 0)
        found[f"all but one pair, at {tile - 1}"] = torch.where(here, 1, 0), every
    return found


@pytest.mark.parametrize("length", [257, 384])
@pytest.mark.parametrize("how", DIMS)
def test_runs_at_the_edges_of_tiles(how, length):
    """One graph for all: what a row sees is captured."""
    heads, kv_heads, dim, value_dim, dtype = DIMS[how]
    qkv, grad = inputs(1, length, heads, kv_heads, dim, dtype, "cuda", value_dim)

    def call(q, k, v, first, last):
        def hiding(score, b, h, i, j):
            return torch.where((j >= first[i]) & (j < last[i]), score, -torch.inf)

        return flex_attention(q, k, v, hiding, enable_gqa=q.shape[1] != k.shape[1])

    function = compiled(call)
    wrong = []
    with collect() as report:
        for name, runs in edges(length).items():
            first, last = (run.cuda() for run in runs)
            try:
                seen = lambda b, h, i, j, first=first, last=last: (j >= first[i]) & (j < last[i])  # noqa: E731
                assert_right(function(*qkv, first, last), qkv, grad, seen)
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
    assert not wrong
    assert [c.strategies for c in report.calls] == [BY_LISTS], report.calls[0].reason


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (300, 1), (2, 2), (129, 700), (700, 129)])
def test_lengths(rows, columns):
    """The backward of one row beside one column is refused; whatever runs is right."""
    query, grad = inputs(2, rows, 4, 2, 64, torch.bfloat16, "cuda")
    (_, key, value), _ = inputs(2, columns, 4, 2, 64, torch.bfloat16, "cuda", seed=1)
    qkv = [query[0], key, value]
    for mask_mod in (None, lambda b, h, q, kv: q * columns >= kv * rows):
        def hiding(s, b, h, q, kv, mask_mod=mask_mod):
            return s if mask_mod is None else torch.where(mask_mod(b, h, q, kv), s, -torch.inf)

        torch._dynamo.reset()
        out = compiled(lambda q, k, v, mod=hiding: flex_attention(q, k, v, mod, enable_gqa=True))(*qkv)
        assert_right(out, qkv, grad, mask_mod)


@pytest.mark.parametrize("directions", [(FORWARD,), (BACKWARD,)], ids=" and ".join)
@pytest.mark.parametrize("how", DIMS)
@pytest.mark.parametrize("name", ["causal", "full"])
def test_each_direction_in_its_own_way(monkeypatch, name, how, directions):
    make_fastest(monkeypatch, directions)
    report = check(MASKS[name], 2, 333, how, compiled(lower="always"))
    found = [strategy == "tile_lists" for strategy in report.calls[0].strategies]
    assert found == [way in directions for way in (FORWARD, BACKWARD)]


def test_long_calls_run_by_lists_by_default():
    """A step of many calls, in each the directions that are faster; large heads that share keys are measured."""

    def layers(q, k, v, mask):
        for _ in range(12):
            q = q + attend(q, k, v, mask)
        return q

    for dim, expected in ((128, BY_LISTS), (256, ("tile_lists", "native"))):
        torch._dynamo.reset()
        qkv, grad = inputs(1, 8192, 4096 // dim, 2048 // dim, dim, torch.bfloat16, "cuda")
        mask = block_mask(MASKS["causal"](1, 8192, "cuda"), 1, 8192, "cuda")
        with collect() as report:
            torch.autograd.grad(compiled(layers, verbose=True, tune_seconds=120)(*qkv, mask), qkv, grad)
        assert {c.strategies for c in report.calls} == {expected}, report.calls[0].reason


@pytest.mark.parametrize("name", ["causal", "right padding"])
def test_learned_sinks_through_the_log_sum_exp(name):
    heads, kv_heads, dim, _, dtype = DIMS["64"]
    qkv, grad = inputs(2, 333, heads, kv_heads, dim, dtype, "cuda")
    sinks = torch.randn(heads, device="cuda").requires_grad_()
    mask_mod = MASKS[name](2, 333, "cuda")
    mask = block_mask(mask_mod, 2, 333, "cuda")

    def with_sinks(out, lse, sinks):
        return out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)

    def call(q, k, v, sinks, mask):
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return with_sinks(out, lse, sinks)

    with collect() as report:
        found = torch.autograd.grad(compiled(call)(*qkv, sinks, mask), (*qkv, sinks), grad)
    assert report.calls[0].strategies == BY_LISTS, report.calls[0].reason
    wanted = []
    for high in (True, False):
        leaves = [dense.leaf(t, high) for t in (*qkv, sinks)]
        result = with_sinks(*dense.attention(*leaves[:3], None, mask_mod, dim**-0.5, high), leaves[3])
        wanted.append(torch.autograd.grad(result, leaves, grad.to(result.dtype)))
    for mine, right, stock in zip(found, *wanted, strict=True):
        assert (mine.double() - right).norm() <= 2 * (stock.double() - right).norm() + 1e-3 * right.norm()


def test_launches_on_the_same_memory_are_replayed():
    """With what is in it at each step."""
    heads, kv_heads, dim, _, dtype = DIMS["128"]
    qkv, grad = inputs(2, 333, heads, kv_heads, dim, dtype, "cuda")
    mask_mod = MASKS["causal"](2, 333, "cuda")
    mask, function = block_mask(mask_mod, 2, 333, "cuda"), compiled()
    before = engine.graph_pool.replays
    for step in range(3 * RECORD_AFTER):
        out = function(*qkv, mask)
        gradients = torch.autograd.grad(out, qkv, grad)
        if step % 6 == 5:
            assert_right(function(*qkv, mask), qkv, grad, mask_mod)
            others, _ = inputs(2, 333, heads, kv_heads, dim, dtype, "cuda", seed=step)
            with torch.no_grad():
                for tensor, other in zip(qkv, others, strict=True):
                    tensor.copy_(other)
        del out, gradients
    assert engine.graph_pool.replays > before


SCRIPT = """
import logging, torch
from tests.gpu.test_plain_masks import check
from tests.support.plain_masks import MASKS
compiled = []
class Count(logging.Handler):
    def emit(self, record):
        compiled.extend([record] if record.getMessage().startswith("Compiled") else [])
log = logging.getLogger("cudnn_flex_compile")
log.setLevel(logging.DEBUG)
log.addHandler(Count())
check(MASKS["causal"], 2, 333, "128")
print(len(compiled))
"""


def test_a_second_process_compiles_no_kernels(tmp_path):
    environment = {**os.environ, "CUDNN_FLEX_CACHE": "1", "CUDNN_FLEX_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    found = [subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600) for _ in range(2)]
    assert [process.returncode for process in found] == [0, 0], found[-1].stderr
    first, second = (int(process.stdout.splitlines()[-1]) for process in found)
    assert first > 0
    assert second == 0, found[1].stdout
