"""What was made of tensors is found again for the very tensors, as they were, and for as long as they live."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cudnn_flex_compile.kernels.remembered import Remembered


@pytest.fixture
def known():
    return Remembered[str](4)


def test_it_is_found_for_the_same_question_and_tensors(known):
    a, b = torch.zeros(3), torch.zeros(3)
    known.put("how", (a, b), "so")
    assert known.get("how", (a, b)) == "so"
    others = (("why", (a, b)), ("how", (b, a)), ("how", (a,)), ("how", (a, b.clone())), ("how", ()))
    assert [known.get(*other) for other in others] == [None] * 5


CHANGES = {
    "a write": lambda t: t.fill_(1), "a write to a view": lambda t: t[:1].fill_(1),
    "other memory": lambda t: setattr(t, "data", torch.ones(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, known):
    a, b = torch.zeros(3), torch.zeros(3)
    known.put("how", (a, b), "so")
    CHANGES[name](b)
    assert known.get("how", (a, b)) is None
    known.put("how", (a, b), "otherwise")
    assert known.get("how", (a, b)) == "otherwise"
    assert len(known) == 1


def test_what_is_of_a_dead_tensor_goes_with_it(known):
    a, b = torch.zeros(3), torch.zeros(3)
    known.put("how", (a, b), "so")
    known.put("how", (a,), "so")
    known.put("how", (), "so")
    del b
    gc.collect()
    assert len(known) == 2
    del a
    gc.collect()
    assert len(known) == 1


def test_a_tensor_that_died_takes_nothing_of_later_ones(known):
    """Its address, and so its place, may be another's by then."""
    a, b = torch.zeros(3), torch.zeros(3)
    known.put("how", (a, b), "so")
    a.fill_(1)
    known.put("how", (a, b), "otherwise")
    gc.collect()
    assert known.get("how", (a, b)) == "otherwise"


def test_the_oldest_goes_first(known):
    tensors = [torch.zeros(1) for _ in range(6)]
    for i, tensor in enumerate(tensors):
        known.put("how", (tensor,), str(i))
    assert [known.get("how", (t,)) for t in tensors] == [None, None, "2", "3", "4", "5"]


def test_nothing_is_kept_of_tensors_that_changed_before_it_was_made(known):
    a = torch.zeros(3)
    noted = known.noted("how", (a,))
    a.fill_(1)
    known.keep(noted, "so")
    assert known.get("how", (a,)) is None
    noted, dead = known.noted("how", (b := torch.zeros(3),)), id(b)
    del b
    gc.collect()
    known.keep(noted, "so")
    assert all(dead not in key for key in known._entries)


def test_inference_tensors_are_forgotten(known):
    with torch.inference_mode():
        a = torch.zeros(3)
    known.put("how", (a,), "so")
    assert known.get("how", (a,)) is None


def test_threads_add_values_at_once(known):
    """More than are kept, while others are dropped: no thread trips over another one's change."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def add(thread):
        for number in range(20000):
            known.put((thread, number), (), "so")

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(known) <= 4 + 7, "as many as are kept, and one that each other thread adds meanwhile"
