"""The arguments of `cudnn-flex bench`. This file imports neither torch nor the rest of the bench, which take long."""

import argparse
from pathlib import Path

DTYPES = ("bf16", "fp16")
DESCRIPTION = """
flex_attention through torch.compile: cuDNN beside Inductor's kernel, and torch's SDPA where it computes the same;
forward, backward and both, interleaved in one run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    mods = (
        "what is measured: names (an unknown one lists all), or module:function, a score_mod, a mask_mod, or a "
        "function of (heads, length, device) that gives both (ten of them)"
    )
    parser.add_argument("--mods", nargs="+", metavar="MOD", help=mods)
    parser.add_argument("--shapes", nargs="+", default=["2,16,16,4096,128"], metavar="B,H,HKV,S,D")
    parser.add_argument("--forty", action="store_true", help="five mods at the eight shapes of docs/benchmarks.md")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20, help="samples that count, of each contender (20)")
    parser.add_argument("--mode", choices=("reduce-overhead",), help="CUDA graphs, for both; forward + backward only")
    parser.add_argument("--lower", default="when_faster", choices=("when_faster", "always"))
    both = "measure each case under torch.use_deterministic_algorithms, too: how many times as long our calls take then"
    parser.add_argument("--deterministic", action="store_true", help=both)
    parser.add_argument("--no-sdpa", action="store_true", help="leave torch's SDPA out")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="processes that fill compile caches before")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG; needs matplotlib")
    rows = parser.add_argument_group("rows", "layers of real training configurations, launched as their projects do")
    names = (
        "numbers or names of rows, such as 1 or 3b (all of them). Those that --csv FILE has already are not measured "
        "again"
    )
    rows.add_argument("--rows", nargs="*", metavar="N", help=names)
    rows.add_argument("--layers", type=int, default=4, help="of a row's model (4; BERT base has its 12)")
    rows.add_argument("--steps", type=int, default=10, help="samples of each side, of two steps each (10)")
    rows.add_argument("--kernels", action="store_true", help="list the longest kernels of each side, too")
    regret = (
        "the time of the chosen way / that of the best, each way forced in turn: sets of cases (forty, masks, named, "
        "small; all of them), or single cases. Those that --csv FILE has already are not measured again"
    )
    parser.add_argument("--regret", nargs="*", metavar="SET", help=regret)
    both = parser.add_argument_group("rows and regret")
    at_once = (
        "processes that compile at once (1 for rows, else one for each core but one); one measures, alone. Kernels "
        "that are tuned then are tuned less well"
    )
    both.add_argument("--at-once", type=int, metavar="N", help=at_once)
    both.add_argument("--tiny", action="store_true", help="on the CPU, small and forward only: numbers, no speed")
    both.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in this process, the results into a file
    parser.add_argument("--only-compile", help=argparse.SUPPRESS)  # I/N: every N-th case from the I-th on
