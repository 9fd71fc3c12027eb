"""Host time of one op call beside torch's own cuDNN SDPA op: enqueue only, interleaved, microseconds.

python3 -m tests.gpu.host_time
"""

import statistics
import time

import torch

from cudnn_flex_compile import ops
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text


def main():
    q, k, v = (torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    causal = text(ir.program(mask=make("ge", ir.index("q"), ir.index("k"))))
    capped = text(ir.program(make("tanh", ir.SCORE / 20.0) * 20.0, make("ge", ir.index("q"), ir.index("k"))))
    out, _, stats = ops.attention(q, k, v, [], [], [], capped, 0.125, False, True, None)
    sdpa = torch.ops.aten._scaled_dot_product_cudnn_attention
    calls = {
        "torch cuDNN SDPA": lambda: sdpa(q, k, v, None, True, 0.0, True, False, scale=0.125),
        "native causal": lambda: ops.attention(q, k, v, [], [], [], causal, 0.125, False, True, None),
        "soft cap + causal": lambda: ops.attention(q, k, v, [], [], [], capped, 0.125, False, True, None),
        "soft cap + causal, backward": lambda: ops.attention_backward(
            out, None, q, k, v, out, stats, [], [], [], capped, 0.125
        ),
    }
    times = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(300):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e6)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values[50:]):.1f} us")


if __name__ == "__main__":
    main()
