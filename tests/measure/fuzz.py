"""Random calls on the GPU for some minutes: `python3 -m tests.measure.fuzz --minutes 5 --seed 0 --workers 16`.

With `--generated 500` the calls of tests/gpu/test_generated.py instead, in one go. Exit code 1 if a call is wrong,
raises or kills its process; each such call is made simpler, and written as a script into the folder --out, where
calls.csv says what became of every call.
Knows nothing of how calls are made, judged (tests/fuzzing) or certified.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzzing.campaign import Campaign, Outcome, numbered
from tests.fuzzing.judge import judge
from tests.fuzzing.pool import Pool
from tests.fuzzing.verdict import KEPT, RIGHT, SKIPPED
from tests.measure.measuring_lock import compiling
from tests.support.generated import COUNT

SLOWEST = 5


def table(outcome: Outcome, seed: int | None) -> Table:
    """Programs, lowered share, kept by reason, failures, seed, minutes."""
    shown = Table(title="generated calls" if seed is None else f"fuzzing with seed {seed}", title_justify="left")
    shown.add_column("what")
    shown.add_column("count", justify="right")
    shown.add_column("share", justify="right")

    def row(what: str, count: int) -> None:
        shown.add_row(what, str(count), f"{count / max(outcome.programs, 1):.1%}")

    row("programs", outcome.programs)
    row("lowered", outcome.lowered)
    for strategies, count in outcome.strategies.most_common():
        row(f"  {strategies}", count)
    row("  of these right", outcome.kinds[RIGHT])
    row("kept", outcome.kinds[KEPT])
    for reason, count in outcome.kept.most_common():
        row(f"  {reason}", count)
    row("failures", len(outcome.failures))
    for kind in sorted({f.verdict.kind for f in outcome.failures}):
        row(f"  {kind}", sum(f.verdict.kind == kind for f in outcome.failures))
    shown.add_row("skipped", str(outcome.kinds[SKIPPED]))
    shown.add_row("workers replaced", str(outcome.replaced))
    shown.add_row("minutes", f"{outcome.elapsed / 60:.1f}")
    return shown


def show(outcome: Outcome, seed: int | None, console: Console) -> None:
    for failure in outcome.failures:
        console.rule(f"{failure.origin.label}: {failure.verdict.kind}", align="left")
        console.print(failure.path.read_text(), markup=False, highlight=False, soft_wrap=True)
    for skipped in outcome.skipped[:SLOWEST]:
        console.print(f"skipped {skipped}", markup=False, highlight=False)
    for task, (verdict, seconds) in sorted(outcome.calls.items(), key=lambda item: -item[1][1])[:SLOWEST]:
        what = f"{verdict.kind} {verdict.reason or ' + '.join(verdict.strategies)}: {verdict.detail}"
        console.print(f"slow: {task.label}, {seconds:.1f} s, {what}", markup=False, highlight=False)
    console.print(table(outcome, seed))


def write_calls(outcome: Outcome, path: Path) -> None:
    """One row for each call, to look into afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("call", "verdict", "reason", "strategies", "seconds", "detail"))
        for task, (verdict, seconds) in sorted(outcome.calls.items(), key=lambda item: item[0].number):
            how = " + ".join(verdict.strategies)
            rows.writerow((task.label, verdict.kind, verdict.reason, how, f"{seconds:.1f}", verdict.detail))


@compiling()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long calls are handed out (5; with --generated no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="hand out so many calls at most")
    parser.add_argument("--generated", type=int, metavar="N", help=f"the first N generated calls, at most {COUNT}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that one call may take")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder of calls.csv and of the scripts")
    chosen = parser.parse_args(arguments)
    if chosen.generated is not None and not 0 < chosen.generated <= COUNT:
        parser.error(f"--generated takes 1 to {COUNT}, got {chosen.generated}")
    seed, count = (chosen.seed, chosen.count) if chosen.generated is None else (None, chosen.generated)
    minutes = chosen.minutes or (5 if chosen.generated is None else float("inf"))
    pool = Pool(judge, chosen.workers, chosen.timeout)
    outcome = Campaign(pool, numbered(seed, count), minutes, chosen.out, lambda line: print(line, flush=True)).run()
    write_calls(outcome, chosen.out / "calls.csv")
    show(outcome, seed, Console(width=None if sys.stdout.isatty() else 110))
    return int(bool(outcome.failures) or not outcome.lowered)


if __name__ == "__main__":
    sys.exit(main())
