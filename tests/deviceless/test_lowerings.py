"""The real cuDNN accepts every lowering: each op of the table, each mask class, the ten mods, by each strategy."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cudnn_flex_compile.engine.attention_graph import assemble
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, out_spec
from cudnn_flex_compile.engine.strategies import STRATEGIES
from cudnn_flex_compile.engine.tail import guarded
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.scoremod.trace import trace
from tests.mods import MODS, causal, softcap

from .harness import judge

SCORES = {
    "tanh": softcap(20.0),
    "clamp, abs": lambda s, b, h, q, k: s.clamp(-3, 4).abs(),
    "silu": lambda s, b, h, q, k: F.silu(s),
    "softplus": lambda s, b, h, q, k: F.softplus(s),
    "gelu": lambda s, b, h, q, k: F.gelu(s),
    "gelu tanh": lambda s, b, h, q, k: F.gelu(s, approximate="tanh"),
    "relu": lambda s, b, h, q, k: F.relu(s - 1),
    "index arithmetic": lambda s, b, h, q, k: s + (q // 3 - k % 5) * (h + 1) - (q - k).abs() * 0.1 + b,
    "reciprocal": lambda s, b, h, q, k: 1.0 / (1 + s * s),
    "powers": lambda s, b, h, q, k: s**2 + (s * s) ** 1.5,
    "roots": lambda s, b, h, q, k: torch.sqrt(s * s + 1) + torch.rsqrt(s * s + 1),
    "minimum": lambda s, b, h, q, k: torch.minimum(s, torch.zeros_like(s)),
    "maximum of two": lambda s, b, h, q, k: torch.maximum(s, s * 0.5),
    "times a predicate": lambda s, b, h, q, k: s * (q >= k),
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, s * 0.5),
    "where of constants": lambda s, b, h, q, k: s + torch.where(q >= k, 0.5, 1.5),
    "constant on the left": lambda s, b, h, q, k: 3 - s,
    "negative": lambda s, b, h, q, k: -s,
    "exp, log": lambda s, b, h, q, k: torch.exp(s * 0.1) + torch.log(s * s + 1),
    "sin, cos": lambda s, b, h, q, k: torch.sin(s) + torch.cos(s),
    "sigmoid, erf": lambda s, b, h, q, k: torch.sigmoid(s) + torch.erf(s),
    "steps": lambda s, b, h, q, k: s + torch.floor(s) + torch.ceil(s),
}
MASKS = {
    "causal": causal,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 64),
    "symmetric": lambda b, h, q, k: (q - k).abs() <= 64,
    "shifted": lambda b, h, q, k: q + 8 >= k,
    "shifted back": lambda b, h, q, k: q - 8 >= k,
    "prefix": lambda b, h, q, k: (q >= k) | (k < 100),
    "blocks": lambda b, h, q, k: q // 64 == k // 64,
    "first keys": lambda b, h, q, k: k < 300,
    "last keys": lambda b, h, q, k: (k >= 10) & (q >= k),
    "sinks and window": lambda b, h, q, k: (q >= k) & ((q - k < 64) | (k < 4)),
    "not itself": lambda b, h, q, k: q != k,
    "negated": lambda b, h, q, k: ~((q >= k) & (k < 100)),
    "some heads": lambda b, h, q, k: (q >= k) | (h == 0),
}
Q, KV = ir.index("q"), ir.index("k")
OPERANDS = {
    "slopes": (ir.program(ir.SCORE + ir.operand(0, F32, "h") * (Q - KV)), (1, 4, 1, 1), torch.float32),
    "bias": (ir.program(ir.SCORE + ir.operand(0, F32, "hqk")), (1, 4, 512, 512), torch.bfloat16),
    "column bias": (ir.program(ir.SCORE + ir.operand(0, F32, "bk")), (2, 1, 1, 512), torch.float32),
    "per batch and head": (ir.program(ir.SCORE * ir.operand(0, F32, "bh")), (2, 4, 1, 1), torch.float32),
    "lengths": (ir.program(mask=make("gt", ir.operand(0, I32, "b"), KV)), (2, 1, 1, 1), torch.int32),
    "row starts": (ir.program(mask=make("ge", KV, ir.operand(0, I32, "bq"))), (2, 1, 512, 1), torch.int32),
    "captured integer": (ir.program(mask=make("ge", ir.scalar(0, I32), Q - KV)), None, None),
    "captured float": (ir.program(make("tanh", ir.SCORE / ir.scalar(0, F32)) * ir.scalar(0, F32)), None, None),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def program_of(score_mod=None, mask_mod=None):
    device = torch.device("cpu")
    score = narrow(trace(Module(score_mod), True, [], device)) if score_mod else ir.SCORE
    mask = narrow(trace(Module(mask_mod), False, [], device)) if mask_mod else ir.TRUE
    return partition(normalize(ir.program(score, mask)))[0]


def problem(program, direction, operands=(), lengths=(512, 512)):
    def spec(heads, length):
        return TensorSpec((2, heads, length, 64), (length * heads * 64, 64, heads * 64, 1), torch.bfloat16)

    query, key = spec(4, lengths[0]), spec(2, lengths[1])
    forward = Problem(text(program), FORWARD, query, key, key, out_spec(query, key), operands, 0.125, 0)
    return forward if direction == FORWARD else forward.backward()


def assert_accepted(program, operands=(), sm=90, **how):
    tried = 0
    for strategy, direction in itertools.product(STRATEGIES, (FORWARD, BACKWARD)):
        lowering = strategy.lower(program, True)
        if isinstance(lowering, Reason):
            continue
        tried += 1
        built = []

        def build(arguments, lowering=lowering, direction=direction, built=built):
            built.append(assemble(problem(program, direction, operands, **how), lowering, **arguments))
            return built[-1].graph

        verdict = judge(build, sm)
        built[-1].callbacks.clear()
        assert verdict is None, f"{strategy.name}, {direction}: {verdict}"
    assert tried


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    assert_accepted(program_of(SCORES[name]))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    assert_accepted(program_of(mask_mod=MASKS[name]))


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name):
    program, shape, dtype = OPERANDS[name]
    operands = (TensorSpec(shape, tuple(torch.empty(shape).stride()), dtype),) if shape else ()
    assert_accepted(program, operands)


@pytest.mark.parametrize("name", ["tanh", "silu", "negative", "where", "powers"])
def test_guarded_programs(name):
    lengths = (500, 1000)
    assert_accepted(guarded(program_of(SCORES[name], causal), lengths), lengths=lengths)


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("name", [n for n in MODS if n not in ("ALiBi + causal", "head scale")])
def test_the_mods_on_every_architecture(name, sm):
    assert_accepted(program_of(*MODS[name](4, 512, "cpu")), sm=sm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims_and_dtypes(dtype, head_dim):
    program = program_of(softcap(20.0), causal)
    base = problem(program, FORWARD)

    def spec(heads):
        return TensorSpec((2, heads, 512, head_dim), (512 * heads * head_dim, head_dim, heads * head_dim, 1), dtype)

    shaped = replace(base, query=spec(4), key=spec(2), value=spec(2), out=spec(4))
    lowering = next(x for s in STRATEGIES if not isinstance(x := s.lower(program, True), Reason))
    for one in (shaped, shaped.backward()):
        assert judge(lambda arguments, one=one: assemble(one, lowering, **arguments).graph, 90) is None
