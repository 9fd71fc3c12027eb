"""Times Inductor's kernel for a program, in a process of its own, because Dynamo is compiling the caller's graph.

passes/decide/autotune.py compares the times with those of plans.
"""

import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cudnn_flex_compile import inductor_seam, torch_private
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.certify.regimes import drawn
from cudnn_flex_compile.engine.certify.samples import SEED
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.kernels.inductor import mods_of, score_mod_of

log = logging.getLogger("cudnn_flex_compile")
PATIENCE = 300.0  # seconds that a process may take


@dataclass(frozen=True, slots=True)
class Contest:
    """The call that is timed.

    Attributes:
        problem: its forward, on the user's own keys.
        training: whether the backward is timed, too.
        blocks: kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices of its BlockMask, on the CPU (the latter
            two may be None); empty without one.
        block_sizes: the BlockMask's block sizes of q and kv.
    """

    problem: Problem
    training: bool
    blocks: tuple[torch.Tensor | None, ...]
    block_sizes: tuple[int, int]


def milliseconds(contest: Contest) -> tuple[float, ...] | None:
    """The time of the forward, and in training that of the backward; None if they cannot be measured."""
    command = [sys.executable, "-m", "cudnn_flex_compile.kernels.inductor_timer"]
    try:
        done = subprocess.run(command, input=pickle.dumps(contest), capture_output=True, timeout=PATIENCE, check=True)
        return tuple(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        what = error.stderr.decode(errors="replace")[-500:]
        log.warning("cudnn_flex: Inductor's kernel could not be timed: %s", what)
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        log.warning("cudnn_flex: Inductor's kernel could not be timed: %s: %s", type(error).__name__, error)
    return None


def contenders(contest: Contest, device: torch.device) -> list[Callable[[], Any]]:
    """Functions that run the forward, and in training the backward, on made-up data."""
    problem = contest.problem
    generator = torch.Generator(device).manual_seed(SEED)
    tensors, program = drawn(problem, generator), problem.program
    sample = ProgramReference(program).sample(problem, generator)
    captured = (program, sample.operands, sample.ints, [float(f) for f in sample.floats])
    if contest.blocks:
        score_mod, mask_mod = mods_of(*captured)
        blocks: Any = [None if block is None else block.to(device) for block in contest.blocks]
        how: Any = {"BLOCK_SIZE": contest.block_sizes, "mask_mod": mask_mod, "seq_lengths": problem.lengths}
        mask = BlockMask.from_kv_blocks(*blocks, **how)
    else:
        score_mod, mask = score_mod_of(*captured), None
    gqa = problem.query.shape[1] != problem.key.shape[1]
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True, options=inductor_seam.STOCK)
    leaves = [t.detach().requires_grad_(contest.training) for t in (tensors.query, tensors.key, tensors.value)]

    def forward() -> torch.Tensor:
        return compiled(*leaves, score_mod, mask, problem.scale, gqa)

    if not contest.training:
        return [forward]
    out = forward()
    return [forward, lambda: torch.autograd.grad(out, leaves, tensors.grad, retain_graph=True)]


def main() -> None:
    torch_private.keep_buffers()  # the backward is called several times
    contest: Contest = pickle.load(sys.stdin.buffer)
    device = torch.device("cuda", contest.problem.device)
    with torch.cuda.device(device):
        print(json.dumps(timing.milliseconds(contenders(contest, device))))


if __name__ == "__main__":
    main()
