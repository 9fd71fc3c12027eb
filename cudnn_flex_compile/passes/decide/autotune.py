"""Measures whether a call is faster on cuDNN than on Inductor's kernel, on made-up data at its shape.

lower_call.py asks it where the option `autotune` is on; the choice among plans is engine/choose.py's. Both sides are
device time, of the forward, and in training of the backward. Ours is at least the host's time for a call, Inductor's is
not, so that a call whose time the host decides is kept. Times are kept beyond the process, by everything that they
depend on.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.choose import run_of
from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.problem import problem_text
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.identity import environment
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.engine.store.verdicts import keep_text, recall_text
from cudnn_flex_compile.engine.worker import run_clean
from cudnn_flex_compile.kernels.inductor_timer import Contest, milliseconds
from cudnn_flex_compile.passes.decide.candidate import Candidate, backward_call, forward_call
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Code, Reason

# The host's time for a forward and a backward, in milliseconds. (python3 -m tests.measure.host_time)
HOST = (0.032, 0.043)


@dataclass(frozen=True, slots=True)
class Times:
    """The milliseconds of the forward, and in training of the backward, for both sides."""

    ours: tuple[float, ...]
    stock: tuple[float, ...]

    @property
    def reason(self) -> Reason | None:
        """The reason to keep the call, or None. One side runs both directions, because each saves tensors for its own
        backward.
        """
        ours = sum(max(pair) for pair in zip(self.ours, HOST, strict=False))
        if ours <= sum(self.stock):
            return None
        detail = f"measured here: {ours:.3f} ms on cuDNN, {sum(self.stock):.3f} ms on Inductor's kernel (autotune)"
        return Reason(Code.SLOWER, detail)


def measurable(candidate: Candidate) -> bool:
    """Whether the call can be measured: on a GPU, with its BlockMask at hand, where keys are not permuted in the graph,
    and without a loss of the log-sum-exp.
    """
    blocks = [candidate.real.get(block) for block in candidate.call.blocks[:4] if block is not None]
    there = all(isinstance(block, torch.Tensor) for block in blocks)
    on_gpu = example(candidate.call.query).device.type == "cuda"
    return there and on_gpu and candidate.compact is None and not candidate.lse_gradient


def times_of(candidate: Candidate) -> Times | None:
    """The times of a call whose plans were found, measured now or before; None if measuring fails."""
    device = example(candidate.call.query).device
    call = forward_call(candidate, candidate.running, device)
    ready = [engine.plans.peek(key) for key in (call, *([backward_call(call)] if candidate.training else []))]
    found = [r for r in ready if isinstance(r, CachedPlan)]
    if len(found) < len(ready):
        return None
    contest = Contest(
        problem_of(forward_call(candidate, (candidate.program, candidate.hoisted), device)), candidate.training,
        _blocks(candidate),
        (hint(candidate.call.block_sizes[0]), hint(candidate.call.block_sizes[1])),
    )  # fmt: skip
    key = _key(found, contest, candidate.fingerprint)
    with phase("autotune"):
        return _recalled(key) or _compared(key, found, contest)


def _blocks(candidate: Candidate) -> tuple[Any, ...]:
    return tuple(None if block is None else candidate.real[block].cpu() for block in candidate.call.blocks[:4])


def _compared(key: str, found: list[CachedPlan], contest: Contest) -> Times | None:
    stock = milliseconds(contest)
    if stock is None:
        return None
    try:
        ours = run_clean(lambda: _ours(found), contest.problem.device)
    except torch.OutOfMemoryError:
        return None
    keep_text(key, json.dumps([ours, stock]))
    return engine.times.put(key, Times(ours, stock))


def _ours(found: list[CachedPlan]) -> tuple[float, ...]:
    reference = ProgramReference(found[0].plan.problem.program)
    return tuple(timing.milliseconds([run_of(ready.plan, found[0].plan, reference) for ready in found]))


def _key(found: list[CachedPlan], contest: Contest, fingerprint: str | None) -> str:
    """A text of everything that the times depend on."""
    blocks = hashlib.blake2b(digest_size=16)
    for block in contest.blocks:
        blocks.update(b"none" if block is None else str(tuple(block.shape)).encode() + block.numpy().tobytes())
    lines = [
        "times of cuDNN and of Inductor", *environment(contest.problem.device), f"triton {_triton()}",
        f"reference {fingerprint}", f"blocks of {contest.block_sizes} {blocks.hexdigest()}",
        *(f"{ready.plan.strategy} of {problem_text(ready.plan.problem)}" for ready in found),
        problem_text(contest.problem),
    ]  # fmt: skip
    return "\n".join(lines)


@functools.cache
def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _recalled(key: str) -> Times | None:
    known = engine.times.get(key)
    stored = recall_text(key) if known is None else None
    if stored is None:
        return known
    ours, stock = json.loads(stored)
    return engine.times.put(key, Times(tuple(ours), tuple(stock)))
