"""Times Inductor's kernel for a program, in a process of its own, because Dynamo is compiling the caller's graph.

passes/decide/measured_times.py starts it, has our plans built meanwhile, and asks for the times when the device is
free.
"""

import contextlib
import json
import logging
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
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
GO = b"go\n"  # the line by which the process is told that the device is free


@dataclass(frozen=True, slots=True)
class Contest:
    """The call that is timed.

    Attributes:
        problem: its forward, on the user's own keys.
        training: whether the backward is timed, too.
        lse_gradient: whether the log-sum-exp has a gradient there.
        blocks: kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices of its BlockMask, on the CPU (the latter
            two may be None); empty without one.
        block_sizes: the BlockMask's block sizes of q and kv.
    """

    problem: Problem
    training: bool
    lse_gradient: bool
    blocks: tuple[torch.Tensor | None, ...]
    block_sizes: tuple[int, int]


@contextlib.contextmanager
def compiling(contest: Contest) -> Generator[Callable[[float], tuple[float, ...]]]:
    """Starts a process that compiles the call, and ends it with the block.

    It gives a function that has the call timed, within some seconds: the time of the forward, and in training that of
    the backward. That raises RuntimeError if the process fails, and TimeoutError if it takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contest"
        path.write_bytes(pickle.dumps(contest))
        with open(Path(folder) / "errors", "w+b") as errors:
            command = [sys.executable, "-m", "cudnn_flex_compile.kernels.inductor_timer", str(path)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

            def milliseconds(seconds: float) -> tuple[float, ...]:
                try:
                    printed, _ = process.communicate(GO, seconds)
                except subprocess.TimeoutExpired as error:
                    raise TimeoutError(f"Inductor's kernel was not timed within {seconds:.0f} s") from error
                if process.returncode:
                    errors.seek(0)
                    raise RuntimeError(errors.read()[-500:].decode(errors="replace"))
                return tuple(json.loads(printed.splitlines()[-1]))

            try:
                yield milliseconds
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):  # what was not written to a process that has ended
                            pipe.close()


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

    def forward() -> Any:
        return compiled(*leaves, score_mod, mask, problem.scale, gqa, contest.lse_gradient)

    if not contest.training:
        return [forward]
    out = forward()
    if not contest.lse_gradient:
        return [forward, lambda: torch.autograd.grad(out, leaves, tensors.grad, retain_graph=True)]
    grads = [tensors.grad, torch.randn_like(out[1])]
    return [forward, lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)]


def main(path: str) -> None:
    torch_private.keep_buffers()  # the backward is called several times
    contest: Contest = pickle.loads(Path(path).read_bytes())
    device = torch.device("cuda", contest.problem.device)
    with torch.cuda.device(device):
        calls = contenders(contest, device)
        for call in calls:
            call()
        torch.cuda.synchronize()
        if sys.stdin.buffer.readline() == GO:  # or nothing, if the caller has ended
            print(json.dumps(timing.milliseconds(calls)))


if __name__ == "__main__":
    main(sys.argv[1])
