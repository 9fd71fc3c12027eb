"""Writes a failing call as a script of its own, which exits with 1 while the call fails.

Knows nothing of how the call was found.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tests.fuzzing.verdict import Verdict
from tests.support.generated import Call

SCRIPT = '''"""{summary}

{found}. Run it in the root of a checkout: PYTHONPATH=. python3 {name}
"""

import sys

import torch

from tests.fuzzing.judge import judge
from tests.support.generated import Call

# {user_code}
CASE = Call(
{arguments}
)

if __name__ == "__main__":
    verdict = judge(CASE, "cuda" if torch.cuda.is_available() else "cpu")
    print(verdict)
    sys.exit(verdict.failed)
'''


def script(case: Call, verdict: Verdict, found: str, name: str) -> str:
    """The text of the script.

    Args:
        found: where the call comes from, in words.
        name: of the file, as it is to be run.
    """
    arguments = "\n".join(f"    {field.name}={getattr(case, field.name)!r}," for field in fields(case))
    summary = " ".join(f"{verdict.kind}: {verdict.detail}".split()).replace("\\", "/").replace('"""', "'''")
    return SCRIPT.format(
        summary=summary, found=found, name=name, arguments=arguments, user_code="\n# ".join(user_code(case))
    )


def user_code(case: Call) -> list[str]:
    """The call as a user would have written it, less the captured tensors (tests/support/generate_masks.py)."""
    lines: list[str] = []
    functions = (("score_mod", "score, b, h, q, kv", case.score), ("mask_mod", "b, h, q, kv", case.mask))
    for name, given, source in functions:
        if source is not None:
            lines += [f"def {name}({given}):", f"    return {source}"]
    arguments = ["q", "k", "v"] + ["score_mod=score_mod"] * (case.score is not None)
    if case.mask is not None and case.as_block_mask:
        lines.append(f"mask = create_block_mask(mask_mod, {case.batch}, {case.heads}, {_numbers(case.lengths)})")
        arguments.append("block_mask=mask")
    elif case.mask is not None:
        arguments[3:] = ["score_mod=<score_mod, -inf where mask_mod does not hold>"]
    arguments += ["enable_gqa=True"] * (case.kv_heads < case.heads) + ["return_lse=True"] * case.lse
    return [*lines, f"flex_attention({', '.join(arguments)})"]


def _numbers(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def write(folder: Path, case: Call, verdict: Verdict, found: str, label: str) -> Path:
    """Writes the script into the folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"repro_{label}.py"
    path.write_text(script(case, verdict, f"{found}; {versions()}", str(path)))
    return path


def versions() -> str:
    """Of what a failure may depend on, without starting CUDA in this process."""
    from cudnn_flex_compile.engine.versions import cudnn_version

    found: dict[str, Any] = {"torch": torch.__version__}
    try:
        found["cuDNN"] = cudnn_version()
    except (ImportError, OSError, RuntimeError, AttributeError):
        found["cuDNN"] = "not found"
    return ", ".join(f"{name} {version}" for name, version in found.items())
