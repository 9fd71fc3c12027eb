"""Host time of a call, microseconds: the op beside torch's own cuDNN SDPA op, and both backends through torch.compile.

    python3 -m tests.gpu.host_time

The problem is so small that the GPU never keeps the host waiting; each figure is the mean over calls in a row.
"""

import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.mods import causal

LENGTH, CALLS, ROUNDS = 256, 300, 3


def microseconds(call):
    for _ in range(30):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def op_calls(q, k, v):
    q, k, v = (t.detach() for t in (q, k, v))
    mask = make("ge", ir.index("q"), ir.index("k"))
    plain, capped = text(ir.program(mask=mask)), text(ir.program(make("tanh", ir.SCORE / 20.0) * 20.0, mask))
    out, _, stats = ops.attention(q, k, v, [], [], [], capped, 0.125, False, True, None)
    sdpa = torch.ops.aten._scaled_dot_product_cudnn_attention
    rest = ([], [], [], capped, 0.125)
    return {
        "torch's cuDNN SDPA op": lambda: sdpa(q, k, v, None, True, 0.0, True, False, scale=0.125),
        "our op, causal": lambda: ops.attention(q, k, v, [], [], [], plain, 0.125, False, True, None),
        "our op, soft cap + causal": lambda: ops.attention(q, k, v, *rest, False, True, None),
        "our op, soft cap + causal, backward": lambda: ops.attention_backward(out, None, q, k, v, out, stats, *rest),
    }


def compiled_calls(q, k, v):
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cuda")
    functions = {}
    for backend in ("inductor", "cudnn_flex"):
        torch._dynamo.reset()
        function = torch.compile(lambda a, b, c: flex_attention(a, b, c, block_mask=mask), backend=backend)
        function(q, k, v).sum().backward()
        functions[f"{backend}, compiled causal, recording gradients"] = lambda f=function: f(q, k, v)
    return functions


def main():
    q, k, v = (torch.randn(1, LENGTH, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    calls = {**op_calls(q, k, v), **compiled_calls(q, k, v)}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], microseconds(call))
    for name, value in best.items():
        print(f"{name}: {value:.1f} us")


if __name__ == "__main__":
    main()
