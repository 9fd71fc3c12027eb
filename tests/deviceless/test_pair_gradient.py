"""The gradient of each pair as an output of a score_mod's backward: the real cuDNN accepts it, on every architecture.

It says nothing of numbers. Where a test fails with another cuDNN, that one has changed its mind.
"""

from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.graph import callbacks
from cudnn_flex_compile.engine.graph.emit import output
from cudnn_flex_compile.engine.plans.pair_gradient import FORMS, PairGradientPlan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, output_specs
from tests.deviceless import matrix
from tests.deviceless.test_learned import MASKS, NATIVE, SCORES, learned

from .accepted import lowerings, operand, problem, verdict
from .harness import SMS, device_properties

PREFERRED = {"none": "chained", "causal": "chained", "prefix": "dense", "dilated": "dense"}


def pairs(program, direction=BACKWARD, dims="hqk", lengths=(512, 512), **how):
    return problem(program, direction, (operand(dims, torch.float32, lengths),), lengths=lengths, **how)


@pytest.mark.parametrize("mask", PREFERRED)
@pytest.mark.parametrize("score", [None, *SCORES])
def test_beside_score_mods_and_predicates(score, mask):
    program = learned("hqk", score and SCORES[score], MASKS[mask])
    native = score is None and mask in NATIVE
    strategy = "native" if native else PREFERRED[mask]
    assert matrix.judged(pairs(program, FORWARD), 90) == matrix.Cell(strategy, True)
    assert matrix.judged(pairs(program), 90) == matrix.Cell(strategy if native else f"{strategy}, pairs", True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sm", SMS)
def test_on_every_architecture(sm, deterministic):
    for mask in ("causal", "dilated"):
        asked = replace(pairs(learned("hqk", SCORES["soft cap"], MASKS[mask])), deterministic=deterministic)
        assert matrix.judged(asked, sm) == matrix.Cell(f"{PREFERRED[mask]}, pairs", True)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("mask", sorted(NATIVE))
def test_in_float16(mask, head_dim):
    asked = pairs(learned("hqk", None, MASKS[mask]), dtype=torch.float16, head_dim=head_dim)
    assert matrix.judged(asked, 90) == matrix.Cell("chained, pairs", True)


@pytest.mark.parametrize("lengths", [(49, 49), (500, 1000), (1000, 500), (64, 4096), (1, 640)])
@pytest.mark.parametrize("dims", ["qk", "hqk", "bqk", "bhqk"])
def test_lengths_and_what_shares_the_operand(dims, lengths):
    asked = pairs(learned(dims, SCORES["soft cap"], MASKS["causal"]), dims=dims, lengths=lengths)
    assert matrix.judged(asked, 90) == matrix.Cell("chained, pairs", True)


def test_with_a_gradient_of_the_log_sum_exp():
    asked = replace(pairs(learned("hqk", SCORES["soft cap"], MASKS["causal"])), lse_gradient=True)
    assert matrix.judged(asked, 90) == matrix.Cell("chained, pairs, folded", True)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_by_each_strategy(form):
    asked = pairs(learned("hqk", SCORES["soft cap"], MASKS["causal"]))
    inner = PairGradientPlan.inner_problem(asked, form)
    found = lowerings(inner.program)
    assert [lowering.strategy for lowering in found] == ["chained", "dense"]
    assert [verdict(inner, lowering) for lowering in found] == [None, None]


def test_a_node_has_to_stand_between(monkeypatch):
    """If a cuDNN lets the gradient itself leave the graph some day, no form is needed."""
    monkeypatch.setattr(callbacks, "_leaving", lambda graph, problem, grad: output(grad, output_specs(problem)[-1]))
    asked = PairGradientPlan.inner_problem(pairs(learned("hqk", SCORES["soft cap"], MASKS["causal"])), "identity")
    assert "isVirtual" in verdict(asked, lowerings(asked.program)[0])


def test_a_launch_takes_its_address():
    """It is written by the graph inside the graph, and has a place of its own among what a launch takes."""
    import cudnn

    from cudnn_flex_compile.engine.graph.build import assemble
    from cudnn_flex_compile.engine.plans.graph_plan import BACKWARD_ROLES, _bind

    asked = PairGradientPlan.inner_problem(pairs(learned("hqk", SCORES["soft cap"], MASKS["causal"])), "identity")
    lowering = lowerings(asked.program)[0]
    built = assemble(asked, lowering, device_property=device_properties(90), sm_version=90)
    built.graph.validate()
    built.graph.build_operation_graph()
    built.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    built.graph.check_support()
    built.callbacks.clear()
    binding, lowered = _bind(asked, lowering, built), built.graph._lowered_graph
    lowered._prepare_variant_pack_template()
    order = list(lowered._get_variant_pack_uids_sorted())
    assert len(set(binding.uids)) == len(binding.uids)
    assert set(order) <= set(binding.uids)
    assert binding.uids[len(BACKWARD_ROLES) - 1] in order, "behind dq, dk and dv, where others have dbias"
