"""How trainers launch flex_attention, with heads of real size: calls are lowered, gradients as exact as stock's."""

import pytest

from cudnn_flex_compile import uninstall
from tests.support.launch_forms import FORMS, check_form, check_huggingface


@pytest.fixture(autouse=True)
def nothing_installed():
    yield
    uninstall()


@pytest.mark.parametrize("form", FORMS)
def test_a_form(form):
    check_form(form, "cuda")


def test_huggingface_compiles_flex_attention_alone():
    pytest.importorskip("transformers")
    check_huggingface("cuda")
