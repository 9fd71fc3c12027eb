"""What is compiled after how many calls, and that it stays right."""

import pytest
import torch

from cudnn_flex_compile.kernels import hot_function
from cudnn_flex_compile.kernels.hot_function import EAGER, HotFunction


def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[: len(b)] > b).all()


@pytest.fixture
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_function, "_pays", lambda tensor: True)


@pytest.fixture
def calls() -> list[int]:
    return []


def counted(calls):
    def function(a, b):
        calls.append(1)
        return total(a, b)

    return HotFunction(function)


def test_on_the_cpu_it_is_never_compiled(calls) -> None:
    function = counted(calls)
    for _ in range(EAGER + 3):
        assert function(torch.ones(3), torch.zeros(3))
    assert len(calls) == EAGER + 3


@pytest.mark.usefixtures("_on_any_device")
def test_it_is_compiled_once_for_each_layout(calls) -> None:
    function = counted(calls)
    for high in range(EAGER + 4):
        assert bool(function(torch.full((3,), float(high)), torch.full((2,), 2.5))) == (high > 2)
    assert len(calls) == EAGER + 1  # the last one was traced
    for high in range(4):
        assert bool(function(torch.full((6,), float(high))[::2], torch.full((3,), 2.5))) == (high > 2)
    assert len(calls) == EAGER + 2


@pytest.mark.usefixtures("_on_any_device")
def test_tensors_of_inference_mode_and_of_autograd() -> None:
    function = HotFunction(total)
    with torch.inference_mode():
        there = torch.ones(3)
    for _ in range(EAGER + 2):
        assert not function(there, torch.ones(3, requires_grad=True))


@pytest.mark.usefixtures("_on_any_device")
def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    function = HotFunction(lambda a, b: torch.ones(()) if a.sum().item() > b.sum().item() else torch.zeros(()))
    for high in range(EAGER + 3):
        assert bool(function(torch.tensor([float(high)]), torch.tensor([2.5]))) == (high > 2)


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.float32, torch.bfloat16)], ids=str)
def test_each_dtype_has_code_of_its_own(monkeypatch, dtypes):
    """A program does not tell the dtypes of what it reads, and compiled code does not check them."""
    monkeypatch.setattr(hot_function, "_pays", lambda tensor: True)
    function = HotFunction(lambda t: t.double().cumsum(0))
    for _ in range(EAGER + 1):
        for dtype in dtypes:
            given = torch.arange(1, 9).to(dtype)
            assert torch.equal(function(given), given.double().cumsum(0))
    assert len(function._compiled) == 2
