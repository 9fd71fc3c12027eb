"""HuggingFace models on a GPU, beside Inductor: `python3 -m tests.measure.models --out DIR [--cases llama:right ...]`.

Writes DIR/models.md, the table, and DIR/<case>.json and .log for each case. A process for each case compiles and
compares, several at once; then each in turn, with nothing else running, measures what it has compiled. What is known is
written at once, whatever ends the run; `--resume` runs the cases that were not measured.

Errors are relative, in L2, over all gradients or over the logits of visible tokens, to the same weights in float32 with
transformers' own "eager" attention. Times are medians of interleaved runs; a step is a forward and a backward.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.measure.measuring_lock import compiling, measuring

CASES = (  # one of each family first
    "llama:right", "mistral:right", "gemma2:right", "qwen3:right", "gpt_oss:right", "gpt_neox:right", "opt:right",
    "bert:right", "modernbert:right", "vit:none", "t5:full",
    "llama:none", "llama:full", "llama:left", "llama:middle", "mistral:full", "gemma2:full", "gemma2:middle",
    "qwen3:left", "gpt_oss:full", "gpt_neox:full", "bert:full", "bert:middle", "modernbert:full",
)  # fmt: skip
BACKENDS = ("inductor", "cudnn_flex")
OTHER = {"right": "left", "left": "middle", "middle": "right"}  # the padding of the second step
WARM_UP, ROUNDS, IN_A_ROW, SLOWEST = 2, 7, 3, 0.98
HEAD = (
    "model", "padding", "lowered / kept", "why kept", "loss: Inductor, ours - Inductor",
    "gradient error: Inductor, ours", "logit error: Inductor, ours", "graph breaks", "recompiles",
    "step: Inductor / ours", "forward: Inductor / ours", "verdict",
)  # fmt: skip


# ---- in the process of one case


@contextmanager
def alone(folder):
    """One process at a time: a float32 model with all its scores takes much memory."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Compiled:
    """A model compiled by one backend; counts what compiling did.

    Attributes:
        compiles: the id of the compiled piece of code, once for each time.
        breaks: graph breaks.
    """

    def __init__(self, model, backend):
        import torch
        from torch._dynamo.utils import counters
        from torch._guards import CompileContext

        self.model, self.compiles, self.breaks, self._counters = model, [], 0, counters
        inner = torch._dynamo.lookup_backend(backend)

        def counted(graph_module, inputs):
            self.compiles.append(CompileContext.current_compile_id().frame_id)
            return inner(graph_module, inputs)

        self.run = torch.compile(model, backend=counted)

    @property
    def recompiles(self):
        return len(self.compiles) - len(set(self.compiles))

    def forward(self, inputs):
        import torch

        before = sum(self._counters["graph_break"].values())
        self.model.eval()
        with torch.no_grad():
            logits = self.run(**inputs).logits
        self.breaks += sum(self._counters["graph_break"].values()) - before
        return logits

    def step(self, inputs):
        before = sum(self._counters["graph_break"].values())
        self.model.train()
        self.model.zero_grad()
        loss = self.run(**inputs).loss
        loss.backward()
        self.breaks += sum(self._counters["graph_break"].values()) - before
        return loss


def visible(logits, inputs):
    mask = inputs.get("attention_mask")
    matches = mask is not None and mask.shape == logits.shape[:2]
    return logits[mask.bool()] if matches else logits


def observed(model, loss, logits, inputs):
    """The loss, all gradients and the logits, on the CPU."""
    import torch

    gradients = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return {"loss": loss.item(), "gradient": gradients, "logits": visible(logits, inputs).float().cpu()}


def exact(name, inputs, folder):
    """The same in float32, with attention written out."""
    import torch

    from examples.huggingface import make_model

    with alone(folder):
        model = make_model(name, "large", "cuda", attention="eager").float()
        model.gradient_checkpointing_enable()  # the scores of one layer at a time
        model.train()
        result = model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
        result.loss.backward()
        found = observed(model, result.loss.detach(), result.logits.detach(), inputs)
        del model, result
        torch.cuda.empty_cache()
    return found


def numbers(name, padding, folder):
    """What is right and what is lowered, and the compiled models with the inputs that they saw."""
    import torch
    import torch._dynamo
    from torch._dynamo.pgo import reset_code_state

    from cudnn_flex_compile import collect
    from examples.huggingface import MODELS, make_inputs, make_model

    torch._dynamo.config.recompile_limit = 64  # both backends will compile the same code
    family, row, models = MODELS[name], {}, {}
    model = make_model(name, "large", "cuda")
    kinds = (padding, OTHER.get(padding, padding))
    first, second = (make_inputs(model, kind, family.batch, family.length, seed) for seed, kind in enumerate(kinds))
    reference, found = exact(name, first, folder), {}
    for backend in BACKENDS:
        reset_code_state()  # what the first backend saw change is symbolic at once for the other
        models[backend] = Compiled(model, backend)
        with collect() as training:
            loss = models[backend].step(first).detach()
        kept_gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with collect() as inference:
            logits = models[backend].forward(first)
        for parameter, gradient in zip(model.parameters(), kept_gradients, strict=True):
            parameter.grad = gradient
        found[backend] = observed(model, loss, logits, first)
        for inputs in (first, second):  # what is only compiled when it is called again is compiled now
            models[backend].step(inputs)
            models[backend].forward(inputs)
        again = models[backend].step(second).detach()
        found[backend]["again"] = observed(model, again, models[backend].forward(second), second)
        torch.cuda.empty_cache()
    stock, ours = (found[b] for b in BACKENDS)
    row["loss"] = [stock["loss"], ours["loss"], reference["loss"]]
    row["second loss"] = [stock["again"]["loss"], ours["again"]["loss"]]
    for what in ("gradient", "logits"):
        row[what] = [relative(found[b][what], reference[what]) for b in BACKENDS]
        row[f"second {what}"] = relative(ours["again"][what], stock["again"][what])
    row["breaks"], row["recompiles"] = ([getattr(m, a) for m in models.values()] for a in ("breaks", "recompiles"))
    row["training"], row["inference"] = outcome(training), outcome(inference)
    return row, models, first


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def outcome(report):
    reasons = sorted({str(c.reason) for c in report.kept})
    strategies = sorted({" + ".join(c.strategies) for c in report.lowered})
    return {"lowered": len(report.lowered), "kept": len(report.kept), "reasons": reasons, "strategies": strategies}


def times(models, inputs):
    """Median milliseconds by what is run and backend; of some in a row, as in training nobody waits for a step."""
    import torch

    found = {}
    for what in ("step", "forward"):
        samples = {backend: [] for backend in models}
        for round_ in range(WARM_UP + ROUNDS):
            for backend, model in models.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(IN_A_ROW):
                    getattr(model, what)(inputs)
                end.record()
                end.synchronize()
                if round_ >= WARM_UP:
                    samples[backend].append(start.elapsed_time(end) / IN_A_ROW)
        found[what] = [statistics.median(samples[b]) for b in BACKENDS]
    return found


def run_case(case, folder):
    """Says "ready" once compiled, and measures when it is told to, if it is."""
    row = {}
    try:
        with compiling():
            row, models, inputs = numbers(*case.split(":"), folder)
        save(case, folder, row)
        print("ready", flush=True)
        if sys.stdin.readline():
            row["times"] = times(models, inputs)
            save(case, folder, row)
            print("timed", flush=True)
    except BrokenPipeError:  # who would say when to measure has ended; the numbers are saved
        return
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    save(case, folder, row)


# ---- what is known of a case


def path_of(case, folder, ending):
    return folder / f"{case.replace(':', '-')}.{ending}"


def save(case, folder, row):
    """Whole or not at all, whenever this process ends."""
    new = path_of(case, folder, "new")
    new.write_text(json.dumps(row))
    new.replace(path_of(case, folder, "json"))


def load(case, folder):
    path = path_of(case, folder, "json")
    return json.loads(path.read_text()) if path.exists() else {}


# ---- the process that starts the others


def start(case, folder, seconds):
    """A process that is ready to measure; or one that ended, or was ended because it took too long."""
    command = [sys.executable, "-m", "tests.measure.models", "--out", str(folder), "--case", case]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ, **quiet}
    with path_of(case, folder, "log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    wait_for("ready", process)
    timer.cancel()
    return process


def wait_for(word, process):
    """Until it is said, or the process has ended."""
    for line in process.stdout:
        if line.strip() == word:
            break


def finish(process, seconds):
    """Has it measure; it ends by itself."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        wait_for("timed", process)
    except BrokenPipeError:  # it has ended
        pass
    timer.cancel()


def verdict(row):
    """The acceptance: no wrong numbers, no more breaks and recompiles, no slower step."""
    if "error" in row or "loss" not in row:
        return row.get("error", "no numbers in time")
    wrong = [w for w in ("gradient", "logits") if row[w][1] > 2 * row[w][0] + 1e-4]
    wrong += [f"second {w}" for w in ("gradient", "logits") if row[f"second {w}"] > 2 * sum(row[w]) + 1e-4]
    wrong += [what for what in ("breaks", "recompiles") if row[what][1] > row[what][0]]
    if "times" not in row:
        return ", ".join([*wrong, "not timed"])
    theirs, ours = row["times"]["step"]
    slow = [] if theirs / ours >= SLOWEST else ["slower"]
    return ", ".join(wrong + slow) or "ok"


def table_row(case, row):
    name, padding = case.split(":")
    if "loss" not in row:
        return [name, padding, *[""] * (len(HEAD) - 3), verdict(row)]
    training, inference = row["training"], row["inference"]
    lowered = " / ".join(str(training[w]) for w in ("lowered", "kept"))
    if (training["lowered"], training["kept"]) != (inference["lowered"], inference["kept"]):
        lowered += f" (forward: {inference['lowered']} / {inference['kept']})"
    speed = [
        f"{row['times'][w][0]:.2f} / {row['times'][w][1]:.2f} ms, **{row['times'][w][0] / row['times'][w][1]:.2f}x**"
        if "times" in row else "" for w in ("step", "forward")
    ]  # fmt: skip
    pairs = [f"{row[w][0]:.2e}, {row[w][1]:.2e}" for w in ("gradient", "logits")]
    counts = [f"{row[w][0]}, {row[w][1]}" for w in ("breaks", "recompiles")]
    loss = f"{row['loss'][0]:.4f}, {row['loss'][1] - row['loss'][0]:+.4f}"
    return [name, padding, lowered, "; ".join(training["reasons"]), loss, *pairs, *counts, *speed, verdict(row)]


def write_table(cases, folder):
    rows = [table_row(case, load(case, folder)) for case in cases]
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    (folder / "models.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def run_all(cases, folder, parallel, deadline, show):
    """Compiles several cases at once until the deadline, then measures what is ready; calls `show` after each."""

    def compiled(case):
        process = start(case, folder, max(1, deadline - time.monotonic()))
        show(f"{case}: {verdict(load(case, folder))}")
        return process

    with ThreadPoolExecutor(parallel) as pool:
        ready = list(pool.map(compiled, cases))
    with measuring():
        for case, process in zip(cases, ready, strict=True):
            finish(process, seconds=40)
            show(f"{case}: {verdict(load(case, folder))}, at the end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "models", help="folder")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--resume", action="store_true", help="run only the cases that the folder has no times of")
    parser.add_argument("--parallel", type=int, default=15, help="processes that compile at once")
    parser.add_argument("--seconds", type=float, default=330, help="for all numbers; then what is ready is measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.case:
        return run_case(args.case, args.out)
    cases = [c for c in args.cases if not (args.resume and "times" in load(c, args.out))]
    for case in [] if args.resume else cases:
        path_of(case, args.out, "json").unlink(missing_ok=True)
    begin, lock = time.monotonic(), threading.Lock()

    def show(what):
        with lock:
            print(f"{what}, {time.monotonic() - begin:.0f} s", flush=True)
            write_table(args.cases, args.out)

    run_all(cases, args.out, args.parallel, begin + args.seconds, show)
    print(write_table(args.cases, args.out))


if __name__ == "__main__":
    main()
