"""Two processes with gloo, on the CPU: DDP, FSDP2, tensor and context parallelism, DTensors, and the example.

The cases run once, whatever number of processes pytest has. On GPUs: `python3 -m tests.measure.distributed`.
"""

import json
import os

import pytest
from filelock import FileLock

from tests.distributed.launch import verdicts

SECONDS = 300


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """By case: "ok" or what went wrong."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    kept = folder / "distributed.json"
    with FileLock(folder / "distributed.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(verdicts(folder / "distributed.log", SECONDS, "cpu")))
    return json.loads(kept.read_text())


def assert_ok(found, *cases):
    assert {case: found.get(case, "did not come to an end") for case in cases} == dict.fromkeys(cases, "ok")


def test_ddp_splits_the_graph_and_every_part_is_lowered(found):
    assert_ok(found, "ddp", "ddp_in_one_graph")


def test_ddps_split_graph_adds_no_more_work_than_stocks(found):
    assert_ok(found, "ddp_adds_no_work")


def test_fsdp2_with_regional_and_whole_compilation(found):
    assert_ok(found, "fsdp2", "fsdp2_as_a_whole")


def test_trainers_that_compile_by_themselves(found):
    assert_ok(found, "fsdp2_installed", "ddp_installed")


def test_tensor_parallel_over_heads(found):
    assert_ok(found, "tensor_parallel")


def test_dtensors_by_local_map(found):
    assert_ok(found, "dtensor_by_local_map", "alibi_of_all_heads")


def test_context_parallel(found):
    assert_ok(found, "context_parallel", "context_parallel_balanced", "context_parallel_installed")


def test_the_example(found):
    assert_ok(found, "example")


def test_the_example_of_context_parallel(found):
    assert_ok(found, "context_parallel_example")
