"""How trainers launch flex_attention, small: all calls are lowered under install(), and torch does what it did."""

import dataclasses

import pytest
import torch

from cudnn_flex_compile import uninstall
from cudnn_flex_compile.bench.rows.launch import OURS
from cudnn_flex_compile.bench.rows.measure import Bench
from tests.support.launch_forms import FORMS, STEPS, check_form, check_huggingface, row_of, run

WRAP = "wrap_inductor_compiled_regions"
LAYERS = {"layers": 1}  # Inductor compiles whole ones with a C++ compiler


@pytest.fixture(autouse=True)
def nothing_installed(trainable):
    yield
    uninstall()


@pytest.mark.parametrize("form", FORMS)
def test_a_form(form):
    check_form(form, "cpu", LAYERS.get(form, 2))


@pytest.mark.parametrize(("how", "again"), [("full", 2), ("selective", 1)])
@pytest.mark.parametrize("form", ["alone", "blocks"])
def test_attention_is_computed_again_where_stocks_is(form, how, again, kernel_calls):
    """A policy saves attention by the op, in a graph of a whole block, or the compiled region that attention is."""
    row = dataclasses.replace(row_of(form, "cpu"), checkpoint=how)
    if form == "alone" and how == "selective" and not hasattr(torch._inductor.config, WRAP):
        pytest.skip(f"this torch has no {WRAP}")
    found = run(Bench(row, 2, "cpu", {"lower": "always"}, trains=True), OURS)
    assert found.report.kept == []
    assert kernel_calls == {"forward": 2 * again * STEPS, "backward": 2 * STEPS}


def test_huggingface_compiles_flex_attention_alone():
    pytest.importorskip("transformers")
    check_huggingface("cpu")
