"""Host time of a call, microseconds: the op beside torch's own cuDNN SDPA op, and both backends through torch.compile.

    python3 -m tests.measure.host_time

The problem is so small that the GPU never keeps the host waiting; each figure is the mean over calls in a row.
"""

import itertools
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.ops.undispatched import backward, forward
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.measure.measuring_lock import measuring

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
    out, _, stats = ops.attention(q, k, v, [], [], [], capped, 0.125, False, True, [], [], "")
    sdpa = torch.ops.aten._scaled_dot_product_cudnn_attention
    sdpa_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    saved = sdpa(q, k, v, None, True, 0.0, True, False, scale=0.125)
    state = (saved[0], saved[1], saved[6], saved[7], None, saved[2], saved[3], LENGTH, LENGTH, 0.0, True)
    plain, capped = ([], [], [], plain, 0.125), ([], [], [], capped, 0.125)
    return {
        "torch's cuDNN SDPA op, causal": lambda: sdpa(q, k, v, None, True, 0.0, True, False, scale=0.125),
        "ours, causal": lambda: forward(q, k, v, *plain, True, [], [], ""),
        "ours, soft cap + causal": lambda: forward(q, k, v, *capped, True, [], [], ""),
        "ours, by the dispatcher, causal": lambda: ops.attention_forward(q, k, v, *plain, True, [], [], ""),
        "torch's cuDNN SDPA op, causal, backward": lambda: sdpa_backward(out, q, k, v, *state, scale=0.125),
        "ours, causal, backward": lambda: backward(out, None, q, k, v, out, stats, *plain, [], [], ""),
        "ours, soft cap + causal, backward": lambda: backward(out, None, q, k, v, out, stats, *capped, [], [], ""),
    }


def compiled_calls(q, k, v):
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cuda")
    grad = torch.randn_like(q)

    def alone(a, b, c):
        return flex_attention(a, b, c, block_mask=mask)

    def among_others(a, b, c):  # Inductor compiles what is around the call
        return flex_attention(a * 2, b, c, block_mask=mask) + 1

    functions = {}
    for backend, called in itertools.product(("inductor", "cudnn_flex"), (alone, among_others)):
        function = torch.compile(called, backend=backend)

        def both(f=function):
            return torch.autograd.grad(f(q, k, v), (q, k, v), grad)

        both()
        name = f"{backend}, causal {called.__name__.replace('_', ' ')}"
        functions[f"{name}, recording gradients"] = lambda f=function: f(q, k, v)
        functions[f"{name}, forward + backward"] = both
    return functions


@measuring()
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
