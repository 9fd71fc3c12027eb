"""Each class of graphs that cuDNN computes wrongly (tests/support/wrong_classes.py), on this machine's GPU and cuDNN.

The raw graph must be rejected by certification, or refused by cuDNN, on the versions where it is wrong, and pass on
others; what the package runs instead must have right numbers. `python -m tests.gpu.test_wrong_classes` shows all.
"""

import collections
import json
import math
import subprocess
import sys

import pytest
import torch

from cudnn_flex_compile.engine.candidates import attempts
from cudnn_flex_compile.engine.find_plan import cache_clear, find_plan
from cudnn_flex_compile.engine.key import backward_key, forward_key
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.engine.support import BOTH, V928, rewrites_off
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.text import text
from tests.deviceless.accepted import BATCH, DIM, HEADS, KV_HEADS, operand, problem
from tests.support import dense
from tests.support.wrong_classes import CLASSES

SCALE = 0.125
CASES = [(name, direction) for name, case in CLASSES.items() for direction in (FORWARD, BACKWARD)]
CAUGHT = ("rejected", "refused", "fatal")
NAMES = ("out", "lse", "dQ", "dK", "dV")


def running_version():
    """The row of the table that this cuDNN belongs to."""
    from cudnn_flex_compile.engine.versions import cudnn_version

    return V928 if cudnn_version() >= V928 else BOTH[0]


def problem_of(case, direction):
    operands = tuple(operand(dims, dtype, case.lengths) for dims, dtype in case.operands)
    return problem(case.program, direction, operands, case.lengths)


def candidates(case, direction):
    """What builds the raw plan: the graph by hand, else whatever is tried while the rewrites are off."""
    from cudnn_flex_compile.engine.plans.graph_plan import build

    found = problem_of(case, direction)
    if case.raw is not None:
        return [lambda: build(found, case.raw(case.program, direction == BACKWARD))]
    return attempts(found)


def first(plans, accepts):
    reasons = []
    for make in plans:
        plan = make()
        if not isinstance(plan, Reason) and accepts(plan):
            return plan
        reasons.append(plan)
    telling = [r for r in reasons if isinstance(r, Reason) and r.code is not Code.UNSUPPORTED_CALL]
    return (telling or reasons)[0]


def outcome(name, direction):
    """What becomes of the raw graph: rejected, refused or right; and why."""
    from cudnn_flex_compile.engine.worker import run_clean

    return run_clean(lambda: _outcome(CLASSES[name], direction), 0)


def _outcome(case, direction):
    from cudnn_flex_compile.engine.certify.certify import certify
    from cudnn_flex_compile.engine.certify.reference import ProgramReference

    reference = ProgramReference(case.program)
    with rewrites_off(*case.off):
        plan = first(candidates(case, direction), lambda plan: True)
    if isinstance(plan, Reason):
        return "refused", str(plan)
    forward = plan
    if direction == BACKWARD:
        forwards = [*(candidates(case, FORWARD) if case.raw else ()), *attempts(problem_of(case, FORWARD))]
        forward = first(forwards, lambda forward: certify(forward, forward, reference) is None)
        assert not isinstance(forward, Reason), forward
    verdict = certify(plan, forward, reference)
    return ("right", plan.strategy) if verdict is None else ("rejected", verdict.detail)


def isolated(name, direction):
    """The same in a process of its own, which illegal memory accesses may end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.test_wrong_classes", name, direction],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode:
        return "fatal", done.stderr.strip().split("\n")[-1]
    return tuple(json.loads(done.stdout.strip().split("\n")[-1]))


def observed(name, direction):
    return (isolated if CLASSES[name].fatal else outcome)(name, direction)


@pytest.fixture(scope="module")
def counts():
    found = collections.Counter()
    yield found
    print(f"\nraw graphs on cuDNN {running_version()}: {dict(found)}")


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_the_raw_graph(name, direction, counts):
    """Wrong where the table says so, and right elsewhere, so that the table is kept up to date."""
    case = CLASSES[name]
    what, why = observed(name, direction)
    counts[what] += 1
    wrong = direction in case.directions and running_version() in case.versions
    assert what in (CAUGHT if wrong else ("right", "refused")), f"{what}: {why}"


def operands_of(case):
    """Made-up values: lengths of batch entries, few distinct integers along rows and columns, unit normal floats."""
    generator, found = torch.Generator("cuda").manual_seed(0), []
    for dims, dtype in case.operands:
        spec = operand(dims, dtype, case.lengths)
        if dtype == torch.int32:
            high = case.lengths[1] if dims == "b" else 8
            values = torch.randint(1, high, spec.shape, device="cuda", generator=generator, dtype=dtype)
        else:
            values = torch.randn(spec.shape, device="cuda", generator=generator).to(dtype)
        found.append(spec.empty("cuda").copy_(values))
    return found


def inputs_of(case):
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = [(case.lengths[0], HEADS), *[(case.lengths[1], KV_HEADS)] * 2, (case.lengths[0], HEADS)]
    query, key, value, grad = (
        torch.randn(BATCH, n, h, DIM, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for n, h in sizes
    )
    if case.shift:
        size = math.sqrt(abs(case.shift) / SCALE)
        query[..., 0], key[..., 0] = size, math.copysign(size, case.shift)
    return query, key, value, grad


def functions_of(case, operands):
    """score_mod and mask_mod over broadcast indices, by the interpreter."""

    def leaf_of(score, b, h, q, kv):
        return environment(score, {"b": b, "h": h, "q": q, "k": kv}, dict(enumerate(operands)), {}, {})

    def score_mod(score, *place):
        return evaluate(case.program.score, leaf_of(score, *place), score.dtype == torch.float64)

    def mask_mod(*place):
        zero = torch.zeros((), dtype=torch.float64, device="cuda")
        return evaluate(case.program.mask, leaf_of(zero, *place), True)

    return score_mod, mask_mod


@pytest.mark.parametrize("name", CLASSES)
def test_right_numbers_with_the_rewrites(name):
    """No further off than twice stock precision, emulated or of Inductor's kernel, on certified plans."""
    from cudnn_flex_compile.kernels import cuda, inductor

    case = CLASSES[name]
    cache_clear()
    query, key, value, grad = inputs_of(case)
    operands = operands_of(case)
    exact, stock = (
        dense.with_gradients(query, key, value, *functions_of(case, operands), SCALE, grad, exact=e)
        for e in (True, False)
    )
    program = case.program
    if case.right is not None:
        program, _, convert = case.right
        operands = convert(operands)
    call = forward_key(text(program), query, key, value, operands, SCALE, True)
    plans = [find_plan(call), find_plan(backward_key(call, grad))]
    assert [str(plan) for plan in plans if not isinstance(plan, CachedPlan)] == []
    out, lse = cuda.forward(query, key, value, operands, [], [], text(program), SCALE, True)
    given = Arguments(operands, [], [], text(program), SCALE)
    *gradients, _ = cuda.backward(grad, None, query, key, value, out, lse, *given)
    kernels = inductor.forward(query, key, value, given)
    kernels += inductor.backward(grad, None, query, key, value, given)
    for label, f, e, *others in zip(NAMES, (out, lse, *gradients), exact, stock, kernels, strict=True):
        if case.shift and label in ("dQ", "dK"):  # component 0 is a sum that cancels, times the shift: noise
            f, e, *others = (t[..., 1:] for t in (f, e, *others))
        hidden = e == -math.inf
        assert torch.equal(f == -math.inf, hidden), label
        f, e, *others = (torch.where(hidden, 0.0, t.double()) for t in (f, e, *others))
        assert bool(f.isfinite().all()), label
        errors = [(s - e).norm() for s in others]
        error, allowed = (f - e).norm(), 2 * max(errors) + (1e-5 * e.norm() if label == "lse" else 0)
        assert error <= allowed, f"{label}: {error / e.norm():.2e}, stock {max(errors) / e.norm():.2e}"


def main(arguments):
    if arguments:
        print(json.dumps(outcome(*arguments)))
        return
    print(f"cuDNN {running_version()}")
    for name, direction in CASES:
        what, why = observed(name, direction)
        case = CLASSES[name]
        wrong = direction in case.directions and running_version() in case.versions
        agreed = what in (CAUGHT if wrong else ("right", "refused"))
        print(f"{name:40} {direction:9} {what:9} {'' if agreed else 'NOT AS IN THE TABLE '}{why[:150]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
