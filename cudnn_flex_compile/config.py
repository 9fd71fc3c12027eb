"""Options of the backend, from `torch.compile(..., options={...})` and from environment variables.

Knows nothing of graphs.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

PACKAGE = "cudnn_flex_compile"
PREFIX = "CUDNN_FLEX_"


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can set.

    Attributes:
        inner_backend: the backend for everything but attention: any name that torch._dynamo knows.
        inner_options: `options` of the inner backend.
        mode: `mode` of the inner backend; `torch.compile(mode=...)` cannot be combined with options, so it is
            also an option of its own.
        certify: when plans are checked before they run user data. "once" trusts a verdict that is stored for this
            machine, driver and versions; "always" checks in each process anew; "off" is for debugging only. Holds for
            the whole process.
        lower: "when_faster" keeps calls that measurements say are slower on cuDNN; "always" lowers all it can.
        autotune: which calls are lowered, and how, is measured when they are compiled (passes/autotune.py), in place of
            the rules. How plans are chosen holds for the whole process.
        intervals: masks of few runs of keys for each row, such as packed documents, may run on kernels of
            cudnn.flex_attention.
        replay: launches of plans on addresses that come back are replayed as CUDA graphs (engine/replay.py). Holds for
            the whole process.
        plan_cache_size: how many plans are kept (least recently used first out); each holds some host memory.
        cache: whether plans and verdicts are kept beyond the process, in the cache folder. Like the next two, it holds
            for the whole process.
        cache_dir: that folder; empty for the user's own (platformdirs). Whoever may write to it decides what runs.
        cache_mb: MiB that it may take (least recently used first out).
        bias_budget_mb: MiB that one bias over (q, kv) pairs, or one list of tiles, may take; a call that needs more is
            kept. The default holds a float32 bias of 16 heads at length 2048, or a mask for one head at length 11585;
            calls share biases and lists.
        verbose: log every call, not only one line a graph.
    """

    inner_backend: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mode: str | None = None
    certify: str = "once"
    lower: str = "when_faster"
    autotune: bool = False
    intervals: bool = True
    replay: bool = True
    plan_cache_size: int = 256
    cache: bool = True
    cache_dir: str = ""
    cache_mb: int = 256
    bias_budget_mb: int = 256
    verbose: bool = False

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"option {name}={getattr(self, name)!r}; valid values: {', '.join(map(repr, valid))}")
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise TypeError(f"option {name}={value!r} is a {type(value).__name__}, expected {kind.__name__}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"option {name}={getattr(self, name)!r}; valid values: {least} and more")

    @property
    def cache_folder(self) -> Path | None:
        """Where plans and verdicts are kept, if anywhere."""
        if not self.cache:
            return None
        return Path(self.cache_dir).expanduser() if self.cache_dir else platformdirs.user_cache_path(PACKAGE, False)

    @property
    def captures_graphs(self) -> bool:
        """Whether the inner backend captures CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool(self.inner_options.get("triton.cudagraphs"))


LEAST = {"plan_cache_size": 1, "cache_mb": 1, "bias_budget_mb": 0}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "certify": ("once", "always", "off"),
    "lower": ("when_faster", "always"),
}
SWITCH = {
    "": False,
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
KINDS: dict[str, type] = {
    "inner_backend": str, "plan_cache_size": int, "bias_budget_mb": int, "verbose": bool, "inner_options": Mapping,
    "autotune": bool, "intervals": bool, "replay": bool, "cache": bool, "cache_dir": str, "cache_mb": int,
}  # fmt: skip


def options_from(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Options from what torch.compile passes on, over those of the environment.

    Raises:
        ValueError, TypeError: unknown key (the valid ones are listed), wrong type or value.
    """
    names = [f.name for f in dataclasses.fields(Options)]
    given = dict(given or {})
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; valid options: {', '.join(names)}")
    if mode is not None:
        given.setdefault("mode", mode)
    return Options(**{**_from_environment(), **given})


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(Options):
        text = os.environ.get(PREFIX + f.name.upper())
        if text is None or f.name == "inner_options":
            continue
        kind = KINDS.get(f.name, str)
        try:
            found[f.name] = SWITCH[text.lower()] if kind is bool else kind(text)
        except KeyError:
            valid = ", ".join(filter(None, SWITCH))
            raise ValueError(f"environment variable {PREFIX}{f.name.upper()}={text!r}; valid: {valid}") from None
        except ValueError as error:
            raise ValueError(f"environment variable {PREFIX}{f.name.upper()}={text!r}: {error}") from error
    return found
