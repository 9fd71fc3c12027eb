"""The key of a stored verdict: a text of the problem, the user's functions, our code, the libraries and the device.

Equal texts mean that a verdict on one is a verdict on the other. A new dependence of verdicts is a field of `Problem`,
or a line of `environment`.
"""

import contextlib
import ctypes
import functools
import hashlib
from importlib import metadata
from pathlib import Path

import torch

from cudnn_flex_compile import __version__
from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.problem import Problem, problem_text
from cudnn_flex_compile.engine.versions import versions

PACKAGE = Path(__file__).parents[2]
CODE = ("engine", "passes", "scoremod")  # these make programs of functions and plans of programs, and judge plans
DRIVER = Path("/proc/driver/nvidia/version")


def key_of(problem: Problem, fingerprint: str, policy: Policy) -> str:
    """The key of a verdict on plans of this problem.

    Args:
        fingerprint: the text of the functions that the plans were compared with.
        policy: the rule by which one of them was kept: the first that was right, or the fastest by measurement.
    """
    rule = ["the fastest"] if policy.autotune else []
    rule += [f"only {policy.strategy}"] if policy.strategy else []
    return "\n".join([*environment(problem.device), *rule, f"reference {fingerprint}", problem_text(problem)])


@functools.cache
def environment(device: int) -> tuple[str, ...]:
    """Our code, the versions of libraries and driver, and the device, a line each."""
    torch_version, frontend, cudnn = versions()
    properties = torch.cuda.get_device_properties(device)
    return (
        f"cudnn_flex_compile {__version__} {code_digest()}",
        f"torch {torch_version} CUDA {torch.version.cuda}",
        f"cudnn {cudnn} frontend {frontend} and its compiler {compiler()}",
        f"driver {driver()}",
        f"device {properties.name} {properties.major}.{properties.minor} {properties.multi_processor_count} "
        f"multiprocessors {properties.total_memory} bytes",
    )


def compiler() -> str:
    """The version of the compiler of the interval kernels, if it is there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("nvidia-cutlass-dsl")
    return "none"


def driver() -> str:
    """The CUDA version of the driver, and the driver's own version where the system tells it."""
    number = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    lines = DRIVER.read_text(errors="replace").splitlines() if DRIVER.exists() else []
    return f"{number.value} {lines[:1]}"


@functools.cache
def code_digest() -> str:
    """A digest of the source files that make plans and judge them, whatever version they claim to be."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for folder in CODE for p in (PACKAGE / folder).rglob("*") if p.suffix in (".py", ".json")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()
