"""The real cuDNN accepts every lowering: each op of the table, each mask class, the ten mods, by each strategy."""

import pytest
import torch
from torch.nn import functional as F

from cudnn_flex_compile.bench.mods import MODS, causal, softcap
from cudnn_flex_compile.engine.guards import guarded
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.optable import make

from .accepted import assert_accepted, assert_accepted_everywhere, operand, operands_of, partitioned, program_of
from .harness import SMS

SCORES = {
    "tanh": softcap(20.0),
    "tan": lambda s, b, h, q, k: torch.tan(s),
    "clamp, abs": lambda s, b, h, q, k: s.clamp(-3, 4).abs(),
    "silu": lambda s, b, h, q, k: F.silu(s),
    "softplus": lambda s, b, h, q, k: F.softplus(s),
    "gelu": lambda s, b, h, q, k: F.gelu(s),
    "gelu tanh": lambda s, b, h, q, k: F.gelu(s, approximate="tanh"),
    "relu": lambda s, b, h, q, k: F.relu(s - 1),
    "quotient of a distance": lambda s, b, h, q, k: s + (q - k) // 3 + (k - q) // 64,
    "remainder of a distance": lambda s, b, h, q, k: s + (q - k) % 3 * 0.5 + (q - 9) % 64,
    "exp2": lambda s, b, h, q, k: torch.exp2(s.clamp(max=3.0)),
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
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
    "dilated causal": lambda b, h, q, k: (q >= k) & ((q - k) % 3 == 0),
    "quotients of distances": lambda b, h, q, k: ((q - k) // 5 != 3) & ((k - q) // 7 != 2),
    "itself": lambda b, h, q, k: q == k,
    "pyramid": lambda b, h, q, k: k <= q // 2,
    "some rows": lambda b, h, q, k: (q >= k) & (q != 7),
    "some heads": lambda b, h, q, k: (q >= k) | (h == 0),
}
Q, KV = ir.index("q"), ir.index("k")
OPERANDS = {
    "slopes": (ir.program(ir.SCORE + ir.operand(0, F32, "h") * (Q - KV)), ("h", torch.float32)),
    "bias": (ir.program(ir.SCORE + ir.operand(0, F32, "hqk")), ("hqk", torch.bfloat16)),
    "column bias": (ir.program(ir.SCORE + ir.operand(0, F32, "bk")), ("bk", torch.float32)),
    "per batch and head": (ir.program(ir.SCORE * ir.operand(0, F32, "bh")), ("bh", torch.float32)),
    "lengths": (ir.program(mask=make("gt", ir.operand(0, I32, "b"), KV)), ("b", torch.int32)),
    "row starts": (ir.program(mask=make("ge", KV, ir.operand(0, I32, "bq"))), ("bq", torch.int32)),
    "distance to a captured integer": (
        ir.program(ir.SCORE - make("abs", Q - ir.operand(0, I32, "b")) * 0.1), ("b", torch.int32)),
    "the least of captured integers": (
        ir.program(mask=make("ne", make("min", Q + ir.operand(0, I32, "bq"), KV), ir.const(3, I32))),
        ("bq", torch.int32)),
    "the largest of captured integers": (
        ir.program(ir.SCORE + make("max", KV - Q, ir.scalar(0, I32)) * 0.1), None),
    "captured integer": (ir.program(mask=make("ge", ir.scalar(0, I32), Q - KV)), None),
    "captured float": (ir.program(make("tanh", ir.SCORE / ir.scalar(0, F32)) * ir.scalar(0, F32)), None),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    assert_accepted_everywhere(program_of(SCORES[name]))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    program, hoisted = partitioned(mask_mod=MASKS[name])
    assert_accepted_everywhere(program, operands_of(hoisted))


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name):
    program, given = OPERANDS[name]
    assert_accepted_everywhere(program, (operand(*given),) if given else ())


@pytest.mark.parametrize("name", ["tanh", "silu", "negative", "where", "powers"])
def test_guarded_programs(name):
    lengths = (500, 1000)
    assert_accepted(guarded(program_of(SCORES[name], causal), lengths), lengths=lengths)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("name", [n for n in MODS if n not in ("ALiBi + causal", "head scale")])
def test_the_mods_on_every_architecture(name, sm):
    assert_accepted(program_of(*MODS[name](4, 512, "cpu")), sm=sm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims_and_dtypes(dtype, head_dim):
    assert_accepted(program_of(softcap(20.0), causal), dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(72, 64), (80, 64), (192, 64), (144, 128), (192, 128), (256, 128)])
def test_heads_with_vectors_appended(head_dim, value_dim):
    assert_accepted(program_of(softcap(20.0), causal), head_dim=head_dim, value_dim=value_dim)
    assert_accepted(program_of(None, causal), head_dim=head_dim, value_dim=value_dim)
