"""The cases that the regret of the chooser is measured on, by sets. A new case is one row here."""

import dataclasses
import itertools
from typing import Any

import torch

from cudnn_flex_compile.bench.case import Case, Shape
from cudnn_flex_compile.bench.mods import EIGHT, FIVE, MASKS, MODS

USUAL = "2,16,16,4096,128"
README = (  # the masks that README.md says gains of
    "sliding window", "symmetric window", "prefix-LM", "shifted causal", "sink tokens + window",
    "sink tokens + small window", "padded lengths", "causal + padding, right", "causal + padding, left",
    "causal + padding, scattered", "frames", "documents",
)  # fmt: skip
# A few queries beside many keys, without gradients; and short sequences in training, by themselves and in a model.
DECODING = itertools.product(
    ("8,32,8,1/8192,128", "1,32,8,4/32768,128", "4,16,16,16/4096,64"),
    ("full", "last keys", "padded lengths", "soft cap"),
)
SHORT = ("8,12,12,128,64", "8,16,4,256,128", "4,16,16,512,64", "2,16,8,1024,128")
Described = tuple[str, str, dict[str, Any]]  # the mod, the shape, and fields of Case that are not as usual
BY_ITSELF: dict[str, Any] = {}
DECODES: dict[str, Any] = {"training": False}
INSIDE: dict[str, Any] = {"inside": True}
SETS: dict[str, tuple[Described, ...]] = {
    "named": tuple((mod, USUAL, BY_ITSELF) for mod in (*MODS, *MASKS) if mod not in README),
    "forty": tuple((mod, shape, BY_ITSELF) for shape, mod in itertools.product(EIGHT, FIVE)),
    "masks": tuple((mod, USUAL, BY_ITSELF) for mod in README),
    "small": (
        *((mod, shape, DECODES) for shape, mod in DECODING),
        *((mod, shape, BY_ITSELF) for shape, mod in itertools.product(SHORT, ("causal", "soft cap + causal"))),
        *(("causal", shape, INSIDE) for shape in SHORT),
    ),
}


def chosen(names: list[str], dtype: torch.dtype, tiny: bool) -> dict[str, Case]:
    """The cases of these sets, or of these names, each once, by name; those of all sets for no name.

    Args:
        tiny: whether they are for a CPU: small, and without gradients.

    Raises:
        ValueError: for a name that is neither, with those of the sets.
    """
    by_name = {str(case): case for of_set in SETS.values() for case in map(_case, of_set)}
    wrong = [name for name in names if name not in SETS and name not in by_name]
    if wrong:
        raise ValueError(
            f"no set of cases is named {', '.join(map(repr, wrong))}; there are {', '.join(SETS)}, and single cases "
            f"such as {next(iter(by_name))!r}"
        )
    wanted = [key for name in names or SETS for key in (map(str, map(_case, SETS[name])) if name in SETS else (name,))]
    found = {key: dataclasses.replace(by_name[key], dtype=dtype) for key in wanted}
    return {key: _tiny(case) for key, case in found.items()} if tiny else found


def _case(described: Described) -> Case:
    mod, shape, how = described
    return Case(mod, Shape.parse(shape), renewed=True, **how)


def _tiny(case: Case) -> Case:
    shape = case.shape
    group = min(shape.heads // shape.kv_heads, 2)
    sizes: dict[str, Any] = {"batch": min(shape.batch, 2), "heads": 2 * group, "kv_heads": 2, "head_dim": 16}
    lengths = {"length": min(shape.length, 128), "kv_length": min(shape.kv_length, 128)}
    small = dataclasses.replace(shape, **sizes, **lengths)
    return dataclasses.replace(
        case, shape=small, device="cpu", training=False, options={"inner_backend": "aot_eager"}
    )  # fmt: skip
