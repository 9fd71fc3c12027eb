"""Judges one call: runs it through torch.compile with poisoned memory, and compares it with a float64 reference.

Knows nothing of where calls come from, nor of other processes.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from cudnn_flex_compile import cache_clear, configure
from cudnn_flex_compile.kernels import cuda
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import Report, collect
from tests.fuzzing.verdict import DIED, ERROR, KEPT, RIGHT, SKIPPED, WRONG, Verdict
from tests.support.generated import Call, too_far

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
AT_RUN_TIME = "kept at run time"  # a backward for a gradient of another layout than the output's has a plan of its own
RUNS_ALL_THE_SAME = "It runs as "  # what certification's warning says of another strategy that was found
LARGE = 4 * 2**30  # bytes of the allocator that are given back to the other processes
POISONED = (2**24, *[2**17] * 32, *[2**12] * 32)


def judge(case: Call, device: str = "cuda") -> Verdict:
    torch._dynamo.reset()
    configure(cache=False)  # a verdict of another run is none here
    cache_clear()
    with _fallbacks() as fallbacks:
        verdict = _guarded(case, device, fallbacks)
    if device == "cuda" and not _device_lives():
        return Verdict(DIED, f"the CUDA context is lost: {verdict.detail}", strategies=verdict.strategies, fatal=True)
    if verdict.kind == RIGHT and fallbacks:
        return Verdict(KEPT, fallbacks[0], AT_RUN_TIME, verdict.strategies)
    return verdict


def poison(device: str = "cuda") -> None:
    """Leaves NaN in the allocator's free memory, of large and of small blocks, so that an unwritten output shows."""
    blocks = [torch.full((n,), math.nan, device=device) for n in (POISONED if device == "cuda" else ())]
    del blocks


def _guarded(case: Call, device: str, fallbacks: list[str]) -> Verdict:
    try:
        *qkv, grad = case.inputs(device)
        attention = case.attention(device)
    except torch.OutOfMemoryError as error:
        return Verdict(SKIPPED, f"out of memory: {_first_line(error)}")
    except Exception as error:
        return Verdict(SKIPPED, f"no such call: {_first_line(error)}")
    leaves = [t.detach().requires_grad_(case.training) for t in qkv]
    try:
        return _judged(case, attention, leaves, grad, device, fallbacks)
    except torch.OutOfMemoryError as error:
        return Verdict(SKIPPED, f"out of memory: {_first_line(error)}")
    except Exception as error:
        return Verdict(ERROR, f"{type(error).__name__}: {_first_line(error)}")


def _judged(
    case: Call, attention: Callable[..., Any], leaves: list[torch.Tensor], grad: torch.Tensor, device: str,
    fallbacks: list[str],
) -> Verdict:  # fmt: skip
    compiled = torch.compile(attention, backend="cudnn_flex", options=OPTIONS)
    poison(device)
    gradients: tuple[torch.Tensor, ...] = ()
    with collect() as report:
        try:
            result = compiled(*leaves)
            out, lse = result if case.lse else (result, None)
            if case.training and not report.kept:
                poison(device)
                gradients = torch.autograd.grad(out, leaves, grad)
        except Exception:
            if (report.kept or fallbacks) and _stocks(attention, leaves, grad, case, device) is None:
                note = ", and stock flex_attention raises"
                return _kept(report, note) if report.kept else Verdict(KEPT, fallbacks[0] + note, AT_RUN_TIME)
            raise
    if report.kept:
        return _kept(report)
    plain = [t.detach() for t in leaves]
    wrong = too_far(case, (out.detach(), *gradients), plain, grad, lse)
    if wrong and device == "cuda" and all("off by" in how for how in wrong.values()):
        rival = _stocks(attention, leaves, grad, case, device)
        wrong = too_far(case, (out.detach(), *gradients), plain, grad, lse, rival)
    strategies = report.lowered[0].strategies if report.lowered else ()
    what = "; ".join(f"{name}: {how}" for name, how in wrong.items())
    return Verdict(WRONG if wrong else RIGHT, what, strategies=strategies)


def _stocks(
    attention: Callable[..., Any], leaves: list[torch.Tensor], grad: torch.Tensor, case: Call, device: str
) -> tuple[torch.Tensor, ...] | None:
    """What stock flex_attention gives: out, dQ, dK and dV, or the first of them (it has no backward on the CPU). None
    where it raises: on GPUs it needs more shared memory than there is for some calls of head dim 256.
    """
    torch._dynamo.reset()
    on_gpu = device == "cuda"
    try:
        stock = torch.compile(attention, backend="inductor" if on_gpu else "aot_eager", dynamic=False)
        result = stock(*leaves)
        out = result[0] if case.lse else result
        gradients = torch.autograd.grad(out, leaves, grad) if case.training and on_gpu else ()
    except Exception:
        return None
    return (out.detach(), *gradients)


def _kept(report: Report, note: str = "") -> Verdict:
    reason = report.kept[0].reason
    assert reason is not None
    kind = ERROR if reason.code is Code.INTERNAL else KEPT
    return Verdict(kind, reason.detail + note, reason.code.name)


@contextmanager
def _fallbacks() -> Generator[list[str]]:
    """Why calls ran on Inductor's kernel, for want of a plan."""
    seen: list[str] = []
    with mock.patch.object(cuda, "_explain", lambda program, found: seen.append(str(found))):
        yield seen


def _device_lives() -> bool:
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > LARGE:
            torch.cuda.empty_cache()
    except RuntimeError:  # torch.AcceleratorError: an illegal memory access stays with the process
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
