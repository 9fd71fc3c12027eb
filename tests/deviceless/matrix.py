"""The strategy that the real cuDNN accepts of each mod, by architecture: `python3 -m tests.deviceless.matrix --write`.

Knows nothing of numbers: cuDNN accepts graphs that it computes wrongly, and certification judges those on a GPU. One
file in tests/deviceless/matrices for each minor version of cuDNN; docs/support.md shows the newest.
"""

import argparse
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import ALL, BY_BATCH
from cudnn_flex_compile.config import Options, Policy
from cudnn_flex_compile.engine import choose
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, output_specs
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.engine.versions import cudnn_version
from cudnn_flex_compile.passes import contenders, lower_graph
from cudnn_flex_compile.passes.decide import candidate
from cudnn_flex_compile.reasons import Code, Reason
from tests.deviceless.accepted import verdict
from tests.deviceless.harness import SMS, load_libraries
from tests.support.docs_tables import show

FOLDER = Path(__file__).with_name("matrices")
PAGE = ("support.md", "matrix")
BATCH, HEADS, LENGTH, DIM = 2, 4, 4096, 128
DIRECTIONS = (FORWARD, BACKWARD)
# What cuDNN's log says where it refuses, and what the table says.
REFUSALS = {
    "sq broadcasted vectors": "row vectors",
    "Backward activations are not supported": "activation",
    "no engine of cuDNN": "no engine",
}


def more_mods() -> dict[str, Any]:
    """Forms of masks and captured tensors that cudnn_flex_compile/bench/mods.py has not, by the same signature."""

    def row_limits(heads: int, length: int, device: str) -> tuple[None, Any]:
        ends = torch.arange(1, length + 1, device=device).repeat(2, 1)
        return None, lambda b, h, q, kv: kv < ends[b, q]

    def residual(b, h, q, kv):
        return (q + kv) % 3 != 0

    return {
        "ReLU": lambda heads, length, device: (lambda score, b, h, q, kv: torch.relu(score), None),
        "GELU + causal": lambda heads, length, device: (
            lambda score, b, h, q, kv: torch.nn.functional.gelu(score), ALL["causal"](heads, length, device)[1]),
        "limits of rows": row_limits,
        "any predicate": lambda heads, length, device: (None, residual),
        "soft cap, any predicate": lambda heads, length, device: (ALL["soft cap"](heads, length, device)[0], residual),
        "shifted causal + soft cap": lambda heads, length, device: (
            ALL["soft cap"](heads, length, device)[0], ALL["shifted causal"](heads, length, device)[1]),
    }  # fmt: skip


CASES = {**ALL, **more_mods()}


@functools.cache
def problem(name: str) -> Problem:
    """The forward problem, in training, of the call that the pass would have plans made for."""
    score_mod, mask_mod = CASES[name](HEADS, LENGTH, "cpu")
    entries = BATCH if name in BY_BATCH or name == "limits of rows" else None
    mask = create_block_mask(mask_mod, entries, None, LENGTH, LENGTH, device="cpu") if mask_mod else None
    found: list[Problem] = []

    def judge(wanted: candidate.Candidate) -> Reason:
        found.append(problem_of(candidate.forward_call(wanted, wanted.running, torch.device("cpu"))))
        return Reason(Code.UNSUPPORTED_CALL, "only asked for its program")

    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        lower_graph.lower_calls(graph_module, inputs, Options(lower="always", tile_lists=False))
        return lambda *_: (torch.zeros(()),)

    qkv = [torch.empty(BATCH, LENGTH, HEADS, DIM, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    torch._dynamo.reset()
    with torch.no_grad(), mock.patch.object(contenders, "plan_or_reason", judge):
        torch.compile(lambda q, k, v: flex_attention(q, k, v, score_mod, mask), backend=backend)(*qkv)
    (only,) = found
    return replace(only, device=0, stats=True)


@dataclass(frozen=True)
class Accepted:
    """A plan that cuDNN would build."""

    strategy: str
    outputs: Any
    device: None = None


@dataclass(frozen=True)
class Cell:
    """Of one mod on one architecture in one direction: the first strategy, or in short why there is none."""

    text: str
    accepted: bool


@functools.cache
def cell(name: str, sm: int, direction: str) -> Cell:
    """The first of what is tried that cuDNN accepts, in the order in which the package tries it."""
    return judged(problem(name) if direction == FORWARD else problem(name).backward(), sm)


def judged(asked: Problem, sm: int) -> Cell:
    """The cell of a problem."""
    reason = refused(asked, asked.program)
    if reason is not None:
        return Cell(reason.code.name, False)

    def build(given: Problem, lowering: Any) -> Accepted | Reason:
        refusal = verdict(given, lowering, sm)
        if refusal is not None:
            return Reason(Code.SHAPE_REFUSED, refusal)
        return Accepted(lowering.strategy, output_specs(given))

    with mock.patch.object(graph_plan, "build", build), mock.patch.object(choose, "certified", return_value=None):
        found = choose.choose(asked, None, ProgramReference(asked.program), Policy())
    return Cell(_short(found), False) if isinstance(found, Reason) else Cell(found.strategy, True)


def _short(reason: Reason) -> str:
    if reason.code is not Code.SHAPE_REFUSED:
        return reason.code.name
    return next((short for long, short in REFUSALS.items() if long in reason.detail), reason.detail.split("\n")[0])


def row(name: str) -> str:
    """Of each architecture the forward's strategy and, if it is another, the backward's."""
    texts = []
    for sm in SMS:
        forward, backward = (shown(cell(name, sm, direction)) for direction in DIRECTIONS)
        texts.append(forward if forward == backward else f"{forward}; {backward}")
    return f"| {name} | {' | '.join(texts)} |"


def shown(found: Cell) -> str:
    """Parts by their number; what is refused in parentheses."""
    parts = re.fullmatch(r"parts \((.*)\)", found.text)
    count = parts[1].count(",") + 1 if parts else 0
    text = f"{count} part{'s' * (count > 1)}" if parts else found.text
    return text if found.accepted else f"({text})"


def head() -> list[str]:
    import cudnn

    note = f"cuDNN {spelled(cudnn_version())}, nvidia-cudnn-frontend {cudnn.__version__}"
    return [f"| {note} | {' | '.join(f'SM{sm}' for sm in SMS)} |", f"| --- |{' --- |' * len(SMS)}"]


def spelled(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def generate() -> str:
    return "\n".join([*head(), *map(row, CASES)]) + "\n"


def minor() -> str:
    """E.g. 9.28."""
    return spelled(cudnn_version()).rpartition(".")[0]


def file(version: str | None = None) -> Path:
    return FOLDER / f"{version or minor()}.md"


def recorded() -> list[str]:
    """The minor versions that have a file, the oldest first."""
    return sorted((f.stem for f in FOLDER.glob("*.md")), key=lambda version: tuple(map(int, version.split("."))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it as that of the installed cuDNN, do not print it")
    write = parser.parse_args().write
    load_libraries()
    table = generate()
    if not write:
        print(table, end="")
        return
    file().write_text(table)
    show(*PAGE, file(recorded()[-1]).read_text())


if __name__ == "__main__":
    main()
