"""The examples run as docs/index.md says, and docs/options.md tells the truth."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cudnn_flex_compile import Options, Settings

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, env=WITHOUT_GPU, capture_output=True, text=True, check=False)


@pytest.mark.any_torch
def test_quickstart_runs_to_the_end():
    done = run("quickstart.py")
    assert done.returncode == 0, done.stderr
    assert "4 flex_attention calls: 4 lowered to cuDNN, 0 kept" in done.stdout
    assert "max |difference| from eager flex_attention" in done.stdout


EXAMPLES = {  # what each shows of itself: calls, and those that are lowered
    ("packed_documents.py",): (2, 2),
    ("tensorrt_inside.py", "--inner", "aot_eager"): (2, 2),
    ("joint_attention.py",): (2, 2),
    ("neighbourhood.py", "--lower", "always"): (2, 2),
    ("install.py", "--lower", "always"): (1, 1),  # compiled once, for both layers
    ("video_frames.py", "--window", "1"): (2, 2),
    ("huggingface.py", "bert", "--padding", "middle"): (2, 2),
}


def long(command):
    """Its models are trained with every torch by test_huggingface.py."""
    return pytest.param(command, marks=pytest.mark.any_torch) if command[0] == "huggingface.py" else command


@pytest.mark.parametrize("command", [*map(long, EXAMPLES)], ids=" ".join)
def test_an_example_shows_what_it_lowers(command):
    if command[0] == "huggingface.py":
        pytest.importorskip("transformers")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    calls, lowered = EXAMPLES[command]
    many = "s" if calls > 1 else ""
    assert f"{calls} flex_attention call{many}: {lowered} lowered to cuDNN, {calls - lowered} kept" in done.stdout
    assert "max |difference|" in done.stdout


ELSEWHERE = ("quickstart.py", "train.py", "distributed.py", "context_parallel.py")  # here, and in tests/distributed


def test_each_example_is_short_and_run():
    scripts = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert set(scripts) == {command[0] for command in EXAMPLES} | set(ELSEWHERE)
    assert all(lines < 150 for lines in scripts.values()), scripts


def test_training_says_that_it_needs_a_gpu():
    done = run("train.py", "--steps", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no backward on the CPU" in done.stderr


def test_distributed_says_that_it_needs_gpus():
    done = run("distributed.py", "--parallel", "fsdp2")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no backward on the CPU" in done.stderr


def test_the_page_lists_the_options_and_settings():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    defaults = dataclasses.asdict(Options()) | dataclasses.asdict(Settings())
    assert {name: eval(default) for name, default in rows} == defaults  # literals of our own file
