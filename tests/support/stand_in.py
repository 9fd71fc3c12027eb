"""Plans that compute nothing, for tests of what becomes of plans on a machine without a GPU.

They are built, judged, serialised and restored as real ones are, and count it. What a plan of a strategy does, a test
says in `Backend`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cudnn_flex_compile.engine import find_plan
from cudnn_flex_compile.engine.certify import certify
from cudnn_flex_compile.engine.key import Meta, backward_key, forward_key
from cudnn_flex_compile.engine.plans import graph_plan as plan
from cudnn_flex_compile.engine.problem import Binding, Error, Problem, TensorSpec, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store import identity
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

CUDA = torch.device("cuda", 0)
Q, KV = ir.index("q"), ir.index("k")
ENVIRONMENT = ("code 1", "torch 2", "cudnn 3", "driver 4", "device 5")


ERRORS = (Error("out", 2e-3, 1.5e-3),)


class StandIn(plan.GraphPlan):
    """A plan that writes nothing."""

    device = torch.device("cpu")
    errors = ()

    def __init__(self, problem: Problem, binding: Binding, data: bytes) -> None:
        self.problem, self.binding, self.strategy, self.data = problem, binding, binding.strategy, data
        self.outputs, self.workspace = output_specs(problem), json.loads(data)["workspace"]

    def serialized(self) -> bytes:
        return self.data

    def run(self, *_: object) -> None:
        pass


@dataclass
class Backend:
    """What stands in for cuDNN and for certification.

    Attributes:
        built, restored, certified: strategies, in order.
        regimes: how many each was certified on.
        refuses: strategies that cuDNN has no engine for, and why.
        wrong: strategies whose plans fail certification.
        short: whether memory is short when a plan is built.
        unreadable: whether cuDNN cannot use any stored plan.
        drift: bytes of workspace by which a restored plan differs.
        asked: what a test notes of what was asked for.
        policy: by which a test asks for plans at run time, where the kernel that stands for CUDA's is not told.
    """

    built: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    certified: list[str] = field(default_factory=list)
    regimes: list[int] = field(default_factory=list)
    refuses: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    short: bool = False
    unreadable: bool = False
    drift: int = 0
    asked: list = field(default_factory=list)
    policy: str = ""

    def build(self, problem, lowering):
        self.built.append(lowering.strategy)
        if self.short or lowering.strategy in self.refuses:
            detail = "CUDNN_STATUS_ALLOC_FAILED" if self.short else self.refuses[lowering.strategy]
            return Reason(Code.SHAPE_REFUSED, detail, lasting=not self.short)
        binding = Binding(lowering.strategy, (1, 2, 3, 4), hosts=(-float("inf"), 7, -0.0))
        data = {"lengths": problem.lengths, "direction": problem.direction, "workspace": 16 * problem.lengths[0]}
        return StandIn(problem, binding, json.dumps(data).encode() + b" " * 2000)

    def restore(self, problem, binding, data):
        if self.unreadable:
            raise ValueError("a later format")
        self.restored.append(binding.strategy)
        found = StandIn(problem, binding, data)
        found.workspace += self.drift
        return found

    def certify(self, plan, forward, reference, regimes):
        self.certified.append(plan.strategy)
        plan.errors = ERRORS
        self.regimes.append(len(regimes))
        return Reason(Code.CERTIFICATION, "dQ is off by 0.3") if plan.strategy in self.wrong else None


def install(patch: pytest.MonkeyPatch, folder: Path | None = None, **how: object) -> Backend:
    """In place of cuDNN, certification and the device; as in a new process that keeps verdicts in a folder, or not."""
    backend = Backend(**how)  # pyright: ignore
    patch.setattr(plan, "build", backend.build)
    patch.setattr(plan, "restored", backend.restore)
    patch.setattr(certify, "certify", backend.certify)
    patch.setattr(find_plan, "unusable_device", lambda device: None)
    patch.setattr(find_plan, "run_clean", lambda function, device: function())
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(identity, "environment", lambda device: ENVIRONMENT)
    patch.setenv("CUDNN_FLEX_CACHE", str(int(folder is not None)))
    patch.setenv("CUDNN_FLEX_CACHE_DIR", str(folder or ""))
    engine.reset()
    return backend


def tensor(heads: int, length: int, dim: int = 64) -> Meta:
    return Meta(TensorSpec((2, heads, length, dim), (length * heads * dim, dim, heads * dim, 1), torch.bfloat16), CUDA)


def call(
    cap: float = 20.0, length: int = 256, mask: ir.Expr | None = None, backward: bool = False,
    lse_gradient: bool = False, policy: str = "",
):  # fmt: skip
    """The key of a call with a soft cap under a mask, causal if not given."""
    mask = make("ge", Q, KV) if mask is None else mask
    program = text(ir.program(make("tanh", ir.SCORE / cap) * cap, mask))
    query, key = tensor(4, length), tensor(2, length)
    found = forward_key(program, query, key, key, [], 0.125, backward, policy=policy)
    return backward_key(found, query, lse_gradient) if backward else found
