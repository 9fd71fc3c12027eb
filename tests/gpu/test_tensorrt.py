"""A GPT of four layers whose attention runs on cuDNN between TensorRT engines: numbers, engines, latency.

Prints a table of what takes how long, beside Inductor around the same attention, and beside torch_tensorrt alone, which
has no flex_attention. Knows nothing of how graphs are handed over (tests/compile/test_torch_tensorrt.py).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, collect
from cudnn_flex_compile.bench.mods import causal, softcap

LAYERS, WIDTH, HEADS, LENGTH, BATCH, WORDS = 4, 1024, 16, 1024, 4, 8192
ROUNDS, WARM = 30, 5
BROKEN = 4  # times eager's error: no rounding does that


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    try:
        import torch_tensorrt  # noqa: F401
    except Exception as error:  # without TensorRT's libraries it raises a bare Exception
        return f"torch_tensorrt cannot be imported: {type(error).__name__}: {error}"
    return None


MISSING = _missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class Block(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask, self.score_mod = mask, softcap(20.0)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        x = x + self.out(flex_attention(q, k, v, self.score_mod, self.mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens [B, LENGTH] to logits [B, LENGTH, WORDS]."""

    def __init__(self):
        super().__init__()
        mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cuda")
        self.embed, self.place = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(mask) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place)))


BACKENDS = {
    "cudnn_flex + torch_tensorrt": ("cudnn_flex", {"inner_backend": "torch_tensorrt", "lower": "always"}),
    "cudnn_flex + inductor": ("cudnn_flex", {"lower": "always"}),
    "inductor": ("inductor", {}),
    "torch_tensorrt": ("torch_tensorrt", {}),
}
OURS = "cudnn_flex + torch_tensorrt"


@dataclass
class Outcome:
    """One backend. function: None if it failed. error: of the logits, relative. engines: built. note: what it said."""

    function: Callable[[Any], Any] | None
    error: float = float("nan")
    engines: int = 0
    note: str = ""


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def engines(monkeypatch):
    """The TensorRT engines that are built, by name."""
    from torch_tensorrt.dynamo import _compiler

    built: list[str] = []
    convert = _compiler.convert_module

    def counting(*args, **kwargs):
        found = convert(*args, **kwargs)
        built.append(str(kwargs.get("name", "")))
        return found

    monkeypatch.setattr(_compiler, "convert_module", counting)
    return built


def models(dtype):
    """A model of that dtype, and the same in float32, without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = GPT().cuda().eval().to(dtype)
    exact = GPT().cuda().eval()
    exact.load_state_dict(model.state_dict())
    return model, exact


def tokens(batch=BATCH):
    return torch.randint(WORDS, (batch, LENGTH), device="cuda")


def off(found, exact):
    return float((found.float() - exact).norm() / exact.norm())


def outcome(model, name, x, exact, engines):
    """Compiles and runs; what a backend raises is an outcome, too."""
    backend, options = BACKENDS[name]
    engines.clear()
    try:
        function = torch.compile(model, backend=backend, options=options)
        error = off(function(x), exact)
        torch.cuda.synchronize()
    except Exception as raised:
        return Outcome(None, engines=len(engines), note=f"{type(raised).__name__}: {str(raised).strip()[:160]}")
    return Outcome(function, error, len(engines))


def time_of(functions, x):
    """Median milliseconds of each, which take turns."""
    times = {name: [] for name in functions}
    for round_ in range(WARM + ROUNDS):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(x)
            end.record()
            end.synchronize()
            if round_ >= WARM:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_logits_engines_and_latency(dtype, engines, capsys):
    model, exact_model = models(dtype)
    x = tokens()
    exact = exact_model(x)
    eager = off(model(x), exact)
    with collect() as report:
        ours = outcome(model, OURS, x, exact, engines)
    found = {OURS: ours, **{name: outcome(model, name, x, exact, engines) for name in BACKENDS if name != OURS}}
    with capsys.disabled():
        show(found, eager, dtype, x)
    assert ours.note == ""
    report.assert_all_lowered()
    assert ours.engines > LAYERS, "one before, between and after the layers' attention"
    assert ours.error <= allowed(eager, found["torch_tensorrt"])


def allowed(eager, alone):
    """The error that the logits may have: twice eager's, or what the engines make with stock attention, and a tenth.

    Engines by themselves round more than eager does (float16 on an H200: 1.7e-3, eager 7.2e-4), which is not for our
    attention to make good. They are no measure where they failed, or are wrong themselves.
    """
    measure = alone.function is not None and alone.error <= BROKEN * eager
    return max(2 * eager, 1.1 * alone.error) if measure else 2 * eager


def show(found, eager, dtype, x):
    times = time_of({name: result.function for name, result in found.items() if result.function is not None}, x)
    table = Table(title=f"GPT, {LAYERS} layers, B {BATCH}, S {LENGTH}, {dtype}: eager is off by {eager:.1e}")
    for header in ("backend", "ms", "engines", "off by", "note"):
        table.add_column(header, overflow="fold")
    for name, result in found.items():
        time = f"{times[name]:.3f}" if name in times else "-"
        table.add_row(name, time, str(result.engines), f"{result.error:.1e}", result.note)
    Console(width=110).print(table)


def test_a_dynamic_batch(engines):
    model, exact_model = models(torch.bfloat16)
    backend, options = BACKENDS[OURS]
    function = torch.compile(model, backend=backend, options=options)
    with collect() as report:
        for batch in (2, 3, 8):
            x = tokens(batch)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=8)
            exact = exact_model(x)
            assert off(function(x), exact) <= 2 * off(model(x), exact)
    report.assert_no_recompiles()
    assert len(engines) > LAYERS


def test_training_is_an_error():
    model, _ = models(torch.bfloat16)
    backend, options = BACKENDS[OURS]
    with torch.enable_grad(), pytest.raises(Exception, match="is for inference"):
        torch.compile(model, backend=backend, options=options)(tokens())
