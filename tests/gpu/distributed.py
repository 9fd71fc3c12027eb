"""All that needs two GPUs, unattended, in less than six minutes: a short table last, all logs in a folder.

    python3 -m tests.gpu.distributed --out DIR [--steps 100] [--layers 4] [--length 2048] [cases] [devices] [training]

The cases of tests/distributed/cases.py with nccl, tests/gpu/test_devices.py, and examples/distributed.py: the loss of
each way to train on two GPUs beside that of one, and the time of a step beside Inductor's. Exit code 1 if a case is not
ok, a run fails, or a loss is further from one GPU's than `LIMIT`.
"""

import argparse
import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.distributed.cases import cases_on
from tests.distributed.launch import ROOT, run, verdicts

BACKENDS = ("inductor", "cudnn_flex")
WAYS = ("ddp", "fsdp2", "tensor")
SECONDS = {"cases": 150, "alone": 60, "devices": 90, "training": 75}
LIMIT = 0.05  # mean relative distance of two loss curves: bfloat16 rounds, and steps diverge
MISSING = "did not come to an end"


def cases(out, sizes):
    """A line for each: "ok" or what went wrong. Those that one that hangs took along run once more, alone."""
    names = cases_on("cuda")
    found = verdicts(out / "cases.log", SECONDS["cases"], "cuda", *names)
    missing = [name for name in names if name not in found]
    for name in missing:
        found |= verdicts(out / f"case_{name}.log", SECONDS["alone"], "cuda", name)
    for name in names:
        said = found.get(name, MISSING)
        yield f"case {name}", said, said == "ok"


def devices(out, sizes):
    """One line, of tests/gpu/test_devices.py."""
    said = pytest_of_devices(out)
    yield "devices", said, said == "ok"


def pytest_of_devices(out):
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_devices.py"]
    with (out / "devices.log").open("w") as file:
        try:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=SECONDS["devices"])
        except subprocess.TimeoutExpired:
            return MISSING
    last = (out / "devices.log").read_text().strip().splitlines()[-1]
    return "ok" if re.search(r"\d+ passed", last) and "failed" not in last and "skipped" not in last else last


def train(out, way, backend, sizes):
    """Losses and milliseconds of a step; None for a run that failed."""
    name = f"{way}_{backend}"
    curve = out / f"{name}.csv"
    command = ["examples/distributed.py", "--parallel", way, "--backend", backend, "--csv", str(curve), *sizes]
    run(out / f"{name}.log", SECONDS["training"], *command)
    step = re.search(r"step ([\d.]+) ms", (out / f"{name}.log").read_text())
    if step is None or not curve.exists():
        return None
    with curve.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], float(step.group(1))


def distance(found, expected):
    return sum(abs(f - e) / e for f, e in zip(found, expected, strict=True)) / len(expected)


def training(out, sizes):
    """A line for each way, and whether its losses are one GPU's."""
    one = train(out, "none", "cudnn_flex", sizes)
    ends = f"loss {one[0][0]:.3f} -> {one[0][-1]:.3f}, step {one[1]:.2f} ms" if one else "FAILED"
    yield "one GPU", ends, one is not None
    for way in WAYS:
        stock, ours = (train(out, way, backend, sizes) for backend in BACKENDS)
        if ours is None:
            yield way, f"FAILED (Inductor: {'FAILED' if stock is None else 'ok'})", False
            continue
        lowered = re.search(r"(\d+) flex_attention calls: .*", (out / f"{way}_cudnn_flex.log").read_text())
        told = [lowered.group(0) if lowered else "no report"]
        ratio = f"{stock[1]:.2f} / {ours[1]:.2f} ms, {stock[1] / ours[1]:.2f}x" if stock else "Inductor FAILED"
        told.append(ratio)
        well = one is not None and distance(ours[0], one[0]) <= LIMIT
        told.append(f"losses {distance(ours[0], one[0]):.2%} from one GPU's" if one else "no losses to compare with")
        yield way, "; ".join(told), well


PARTS = {part.__name__: part for part in (cases, devices, training)}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, default in {"steps": 100, "layers": 4, "length": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    given = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("distributed: needs two NVIDIA GPUs")
    given.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    sizes = [word for n in ("steps", "layers", "length") for word in (f"--{n}", str(getattr(given, n)))]
    rows = [row for part in given.parts or PARTS for row in PARTS[part](given.out, [*sizes, "--batch", "2"])]
    print(f"{torch.cuda.get_device_name()} x2, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    for name, said, well in rows:
        print(f"{name:28} {'' if well else 'NOT OK: '}{said}")
    return int(not all(well for *_, well in rows))


if __name__ == "__main__":
    sys.exit(main())
