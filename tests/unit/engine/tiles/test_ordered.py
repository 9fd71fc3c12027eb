"""Which deterministic backwards by tile lists run: by their tiles, and by a process that tries whether they end.

The kernels themselves run in tests/gpu/test_deterministic.py.
"""

import sys
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.frontend import tile_builder
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles import ordered, trial
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE
from cudnn_flex_compile.passes.decide import cost_inputs
from cudnn_flex_compile.reasons import Code, Reason

KIND = ("2", "128", "128", "bfloat16", "0")
DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
PROCESSORS = 132  # of an H200


@pytest.fixture(autouse=True)
def known_device(monkeypatch):
    """A device, and processes that are stand-ins: a function of their script gives one that asks whether kernels end.
    """
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "0")
    monkeypatch.setattr(ordered, "environment", lambda device: ("an H200",))
    monkeypatch.setattr(ordered, "LIMIT", 60.0)

    def process(script):
        monkeypatch.setattr(ordered, "COMMAND", (sys.executable, "-c", script))
        return lambda: ordered._unending(KIND)

    engine.reset()
    yield process
    engine.reset()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_lists_fit_but_for_one_kind_of_call(dim, value_dim, kv_heads):
    if dim != value_dim and kv_heads != 4:
        with pytest.raises(NotImplementedError):
            ordered.has_other_tiles(4, kv_heads, dim, value_dim, torch.bfloat16)
        return
    expected = (dim, kv_heads) == (256, 4)
    assert ordered.has_other_tiles(4, kv_heads, dim, value_dim, torch.bfloat16) == expected


@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_heads_that_share_keys_take_other_kernels_where_they_are_large(dim, value_dim):
    """Their times are then not those of calls that share none."""

    def tiles(kv_heads):
        given = {"num_q_heads": 4, "num_kv_heads": kv_heads, "head_dim": dim, "head_dim_v": value_dim}
        how = {"arch": ARCHITECTURE, "dtype": torch.bfloat16, "is_varlen": False, "deterministic": False}
        found = tile_builder().resolve_sm90_bwd_consumer_config(**given, **how)
        return replace(found, num_kv_heads=4, qhead_per_kvhead=1)

    if dim == value_dim:
        assert (tiles(2) != tiles(4)) == (dim >= cost_inputs.OTHER_KERNELS_DIM)


def test_kernels_that_end_are_tried_once(known_device, monkeypatch):
    ask = known_device("")
    assert ask() is None
    monkeypatch.setattr(ordered.subprocess, "run", lambda *given, **how: pytest.fail("a second process was started"))
    assert ask() is None


def test_kernels_that_wait_for_ever_are_refused(known_device, monkeypatch):
    ask = known_device("import time; time.sleep(600)")
    monkeypatch.setattr(ordered, "LIMIT", 1.0)
    refused = ask()
    assert (refused.code, refused.lasting) == (Code.CERTIFICATION, True)
    assert "did not end within 1 s" in refused.detail
    monkeypatch.setattr(ordered.subprocess, "run", lambda *given, **how: pytest.fail("a second process was started"))
    assert ask() == refused


def test_a_process_that_fails_tells_nothing(known_device):
    refused = known_device("raise MemoryError('no room')")()
    assert (refused.code, refused.lasting) == (Code.SHAPE_REFUSED, False)
    assert refused.detail.endswith("MemoryError: no room")
    assert known_device("")() is None


@pytest.mark.parametrize("seconds", [0, 600])
def test_other_processes_are_told(known_device, monkeypatch, tmp_path, seconds):
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "1")
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path))
    engine.reset()
    monkeypatch.setattr(ordered, "LIMIT", 60.0 if seconds == 0 else 1.0)
    first = known_device(f"import time; time.sleep({seconds})")()
    engine.times.clear()
    monkeypatch.setattr(ordered.subprocess, "run", lambda *given, **how: pytest.fail("a second process was started"))
    assert known_device("")() == first
    assert (first is None) == (seconds == 0)


def test_where_there_is_no_such_device():
    """The command itself: it fails, and that is all."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu/test_deterministic.py runs the command there")
    refused = ordered._watched(KIND)
    assert isinstance(refused, Reason)
    assert not refused.lasting
    assert "trial" not in refused.detail, "the module is found"


@pytest.mark.parametrize("ratio", [1, 4])
def test_the_call_that_is_tried(monkeypatch, ratio):
    """It has more blocks of threads than run at once, so that some wait for others, and more than 32 in a row."""
    ran = []

    class TilePlan:
        def __init__(self, problem):
            self.problem = problem

        def prepared(self, *values):
            return self

    monkeypatch.setattr(trial, "TilePlan", TilePlan)
    monkeypatch.setattr(trial, "kernels_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("the end"))
    monkeypatch.setattr(trial, "run_of", lambda plan, forward, _: lambda: ran.append((plan.problem, forward.problem)))
    trial.main(str(ratio), "192", "128", "float16", "0")
    (backward, forward), second, end = ran
    assert second == (backward, forward)
    assert end == "the end"
    assert (backward.direction, forward.direction) == (BACKWARD, FORWARD)
    assert backward.deterministic
    assert backward.tiled
    batch, heads, length, dim = backward.query.shape
    blocks = length // 128
    assert blocks > 32
    assert batch * heads * blocks > PROCESSORS
    assert (heads // backward.key.shape[1], dim, backward.value.shape[3]) == (ratio, 192, 128)
