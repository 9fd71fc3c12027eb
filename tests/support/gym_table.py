"""What becomes of each mask and mod of attn-gym, as docs/models.md shows it: `python3 -m tests.support.gym_table
--write`.

Knows nothing of why: verdicts are those of the reports.
"""

import argparse
import warnings

import torch

from cudnn_flex_compile.report.report import CallReport, collect
from tests.support.docs_tables import show
from tests.support.gym import CASES, call_of, inputs

PAGE = ("models.md", "gym")
HEAD = ["| mask or mod | lowered as |", "| --- | --- |"]
LENGTH = 320  # two and a half tiles
OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


def compiled(name: str) -> tuple[torch.Tensor, CallReport]:
    """The output on the CPU, without gradients, and what was done with the call."""
    torch._dynamo.reset()
    case = CASES[name](LENGTH, "cpu")
    call = torch.compile(call_of(case, "cpu"), backend="cudnn_flex", options=OPTIONS, fullgraph=True)
    with torch.no_grad(), collect() as report:
        out = call(*inputs(case, "cpu")[:3])
    (only,) = report.calls
    return out, only


def row(name: str, call: CallReport) -> str:
    kept = f"kept: `{call.reason.code.name}`, {call.reason.detail}" if call.reason else None
    verdict = kept or ", backward ".join(f"`{s}`" for s in dict.fromkeys(call.strategies))
    return f"| {name} | {verdict.replace('|', chr(92) + '|')} |"


def generate() -> str:
    return "\n".join([*HEAD, *(row(name, compiled(name)[1]) for name in CASES)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into docs/models.md instead of printing it")
    write = parser.parse_args().write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = generate()
    _ = show(*PAGE, table) if write else print(table, end="")


if __name__ == "__main__":
    main()
