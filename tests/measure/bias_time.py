"""Times biases that require grad, forward and backward: `python3 -m tests.measure.bias_time [log.txt]`.

Knows nothing of right numbers (tests/gpu/test_learned.py). Inductor's time / ours, medians, interleaved, of calls as
they are made; both with Inductor around attention. The last column is the error of the bias's gradient against float64,
as a multiple of what Inductor's kernel has, where float64 fits. LEARNED_BY_PLACE of passes/decide/cost_model.py comes
from it.
"""

import statistics
import sys
import traceback
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import configure
from cudnn_flex_compile.report.report import collect
from tests.measure.learned import FORMS
from tests.measure.measuring_lock import measuring
from tests.support import dense

# form, B, H, S, D
CASES = (
    ("T5", 8, 12, 512, 64), ("T5", 8, 8, 1024, 64), ("T5", 4, 8, 2048, 64), ("T5, bfloat16", 8, 12, 512, 64),
    ("Swin", 256, 4, 49, 32), ("relative table, causal", 2, 16, 1024, 128),
    ("relative table, causal", 2, 16, 2048, 128), ("relative table, causal", 1, 16, 4096, 128),
    ("[H, S, S]", 4, 12, 1024, 64), ("[H, S, S], bfloat16", 4, 12, 1024, 64), ("slopes", 2, 16, 2048, 128),
    ("Graphormer", 8, 8, 512, 64), ("columns", 2, 16, 2048, 128),
)  # fmt: skip
WARM_UP, REPEATS, CALLS = 3, 12, 3
PAIRS_IN_FLOAT64 = 2**25
BACKENDS = ("inductor", "cudnn_flex")


def compiled(score_mod, mask, backend):
    def attend(q, k, v):
        return flex_attention(q, k, v, score_mod, mask)

    torch._dynamo.reset()
    configure(cache=False)
    options = {"lower": "always", "bias_budget_mb": 16384}
    how = {"options": options} if backend == "cudnn_flex" else {}
    return torch.compile(attend, backend=backend, dynamic=False, **how)


def milliseconds(function, leaves, learned, grad):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        torch.autograd.grad(function(*leaves), [*leaves, *learned], grad)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def error(gradient, exact):
    return float((gradient - exact).norm() / exact.norm())


def exact_gradient(leaves, learned, make, mask_mod, grad):
    copies, own = ([dense.leaf(t, True) for t in tensors] for tensors in (leaves, learned))
    out = dense.attention(*copies, make(*own), mask_mod, leaves[0].shape[-1] ** -0.5, True)[0]
    return torch.autograd.grad(out, own, grad.double())[0]


def measure(form, batch, heads, length, dim):
    """A row of the table."""
    learned, make, mask_mod = FORMS[form](batch, heads, length)
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    draw = lambda: torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    leaves, grad = [draw().requires_grad_() for _ in range(3)], draw()
    functions, gradients, times = {}, {}, {backend: [] for backend in BACKENDS}
    with collect() as report:
        for backend in BACKENDS:
            functions[backend] = compiled(make(*learned), mask, backend)
            out = functions[backend](*leaves)
            gradients[backend] = torch.autograd.grad(out, learned, grad)[0]
    for repeat in range(WARM_UP + REPEATS):
        for backend, function in functions.items():
            taken = milliseconds(function, leaves, learned, grad)
            times[backend] += [taken] if repeat >= WARM_UP else []
    off = "-"
    if batch * heads * length * length <= PAIRS_IN_FLOAT64:
        exact = exact_gradient(leaves, learned, make, mask_mod, grad)
        theirs, ours = (error(gradients[backend], exact) for backend in BACKENDS)
        off = f"{ours:.1e} / {theirs:.1e}"
    theirs, ours = (statistics.median(times[backend]) for backend in BACKENDS)
    (call,) = report.calls
    how = str(call.reason) if call.reason else "; ".join(call.strategies)
    shape = f"{batch}, {heads}, {length}, {dim}"
    return f"| {form} | {shape} | {how} | {theirs:.3f} / {ours:.3f} ms | {theirs / ours:.2f}x | {off} |"


@measuring()
def main():
    rows, log = [], []
    for case in CASES:
        try:
            rows.append(measure(*case))
        except Exception as failure:
            log.append(traceback.format_exc())
            rows.append(f"| {case[0]} | {', '.join(map(str, case[1:]))} | {type(failure).__name__} | | | |")
        torch.cuda.empty_cache()
        print(rows[-1], file=sys.stderr, flush=True)
    heading = ["| bias | B, H, S, D | how | Inductor / ours | ratio | error, ours / Inductor's |", "| --- " * 6 + "|"]
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join([*heading, *rows, *log]))
    print("\n".join([*heading, *rows]))


if __name__ == "__main__":
    main()
