"""All that needs two GPUs, unattended, in some six minutes: rows as they come, all logs in a folder.

    python3 -m tests.measure.distributed --out DIR [--steps 100] [--layers 4] [--length 2048] [cases] [devices]
    [training]

The cases of tests/distributed/cases.py with nccl, tests/gpu/test_devices.py, and the training of
examples/distributed.py: the loss of each way to train on two GPUs beside that of one, and the median time of a step
beside Inductor's, there and on a GPU alone (tests/measure/distributed_steps.py; some minutes). Exit code 1 if a case is
not ok, a run fails, or a loss is further from one GPU's than `LIMIT`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.distributed.cases import CASES
from tests.distributed.launch import ROOT, run, verdicts

BACKENDS = ("inductor", "cudnn_flex")
STEPS = "tests.measure.distributed_steps"
WAYS = ("ddp", "fsdp2", "tensor")
SECONDS = {"cases": 150, "alone": 60, "devices": 90, "training": 200}
LIMIT = 0.05  # mean relative distance of two loss curves: bfloat16 rounds, and steps diverge
MISSING = "did not come to an end"


def cases(out, sizes):
    """A line for each: "ok" or what went wrong. Those that one that hangs took along run once more, alone."""
    names = list(CASES)
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


def train(out, way, sizes, log=None):
    """What tests/measure/distributed_steps.py says of a way; None if it failed."""
    file = out / f"{way}.json"
    file.unlink(missing_ok=True)
    run(out / f"{log or way}.log", SECONDS["training"], "-m", STEPS, "--parallel", way, "--out", str(file), *sizes)
    return json.loads(file.read_text()) if file.exists() else None


def compile_all(out, sizes):
    """First steps of all ways at once, so that kernels and plans come from their folders afterwards."""
    first = [*sizes, "--steps", "1"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda way: train(out, way, first, f"{way}_first"), ("none", *WAYS)))


def distance(found, expected):
    return sum(abs(f - e) / e for f, e in zip(found, expected, strict=True)) / len(expected)


def ratio(found, name):
    """Inductor's median step over ours, with what the hosts take of it."""
    theirs, ours = (next(c for c in found["contenders"] if (c["name"], c["backend"]) == (name, b)) for b in BACKENDS)
    times = f"{theirs['step']:.2f} / {ours['step']:.2f} ms (host {theirs['host']:.2f} / {ours['host']:.2f})"
    return f"{times}, {theirs['step'] / ours['step']:.2f}x"


def curve(found):
    """Our losses."""
    return next(c["losses"] for c in found["contenders"] if c["backend"] == "cudnn_flex" and c["name"] != "alone")


def training(out, sizes):
    """A line for each way, and whether its losses are one GPU's."""
    compile_all(out, sizes)
    one = train(out, "none", sizes)
    yield "one GPU, whole batch", told(out, "none", one) if one else "FAILED", one is not None
    for way in WAYS:
        found = train(out, way, sizes)
        if found is None or one is None:
            yield way, told(out, way, found) if found else "FAILED", False
            continue
        off = distance(curve(found), curve(one))
        yield way, f"{told(out, way, found)}; losses {off:.2%} from one GPU's", off <= LIMIT
        if any(c["name"] == "alone" for c in found["contenders"]):
            yield "  each GPU alone", ratio(found, "alone"), True


def told(out, way, found):
    """Also what went another way than it was compiled to."""
    others = set(re.findall(r"cudnn_flex: (a call runs on Inductor.*)", (out / f"{way}.log").read_text()))
    late = [f"{found['late']} plans looked for after the first steps"] if found["late"] else []
    return "; ".join([ratio(found, way), found["calls"], *found["kept"], *late, *sorted(others)])


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
    well = True
    for part in given.parts or PARTS:
        for name, said, fine in PARTS[part](given.out, [*sizes, "--batch", "2"]):
            print(f"{name:28} {'' if fine else 'NOT OK: '}{said}", flush=True)
            well &= fine
    print(f"{torch.cuda.get_device_name()} x2, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
