"""Options of one compile, from `torch.compile(..., options={...})` and from environment variables.

The backend and `install` read options here; the pass has them as `context.options`. Settings that all compiles of a
process share are in settings.py.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "CUDNN_FLEX_"
CERTIFY = ("once", "always", "off")
GRAPHS = ("native", "chained", "dense", "parts")  # how a graph of cuDNN's is written
LISTS = {  # the directions that a forced list of tiles runs; the others run by graphs
    "tile_lists": ("forward", "backward"), "tile_lists_forward": ("forward",), "tile_lists_backward": ("backward",),
}  # fmt: skip
FORCED = ("inductor", *LISTS, "graphs", *GRAPHS)


@dataclass(frozen=True, slots=True)
class Policy:
    """The options by which the plans of a compile are found, also those that are found when its graph runs.

    Its text is an argument of the ops, so that a graph carries it wherever it goes, and part of each plan's key, so
    that no compile runs a plan that was made by another one's rules.

    Attributes:
        certify, autotune, replay: see Options.
        strategy: the one of GRAPHS that is forced, or nothing.
    """

    certify: str = "once"
    autotune: bool = False
    replay: bool = True
    strategy: str = ""

    @property
    def text(self) -> str:
        """The fields without the defaults, as "certify=always replay=False". Equal policies have equal texts."""
        values = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return " ".join(f"{name}={value}" for name, value, default in values if value != default)


@functools.lru_cache(64)
def policy_from(text: str) -> Policy:
    """The policy whose text this is. Raises ValueError for any other text."""
    words = text.split(" ")
    certify = next((rule for rule in CERTIFY if f"certify={rule}" in words), "once")
    strategy = next((name for name in GRAPHS if f"strategy={name}" in words), "")
    policy = Policy(certify, "autotune=True" in words, "replay=False" not in words, strategy)
    if policy.text != text:
        raise ValueError(f"policy={text!r} is not what config.Policy(...).text gives, such as '' or 'certify=always'")
    return policy


@dataclass(frozen=True, slots=True)
class Options:
    """The options that a user can set for one compile. They change no other compile.

    Attributes:
        inner_backend: the backend for everything but attention: any name that torch._dynamo knows.
        inner_options: `options` of the inner backend.
        mode: `mode` of the inner backend; `torch.compile(mode=...)` cannot be combined with options, so it is
            also an option of its own.
        certify: when plans are checked before they run user data. "once" trusts a verdict that is stored for this
            machine, driver and versions; "always" checks in each process anew; "off" is for debugging only.
        lower: "when_faster" keeps calls that measurements say are slower on cuDNN; "always" lowers all it can.
        strategy: the one way in which calls run, be it the fastest or not, for experiments; calls that can't are kept.
        autotune: all contenders for a call are measured when it is compiled, also where predictions tell them apart,
            and so are all graphs that are right.
        tune_seconds: the seconds that one compile may spend on measuring; 0 has predictions decide.
        tile_lists: masks of few runs of keys for each row, such as packed documents, may run on kernels of
            cudnn.flex_attention. `intervals` is its former name, which is taken, too.
        replay: launches of plans on addresses that come back are replayed as CUDA graphs (engine/launch/replay.py).
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
    strategy: str | None = None
    autotune: bool = False
    tune_seconds: int = 15
    tile_lists: bool = True
    replay: bool = True
    bias_budget_mb: int = 256
    verbose: bool = False

    def __post_init__(self) -> None:
        check(self, "option")

    @property
    def policy(self) -> Policy:
        """The part of the options by which plans are found."""
        graph = self.strategy if self.strategy in GRAPHS else ""
        return Policy(self.certify, self.autotune, self.replay, graph or "")

    @property
    def lists_tiles(self) -> bool:
        """Whether calls may run by tile lists."""
        return self.tile_lists or self.strategy in LISTS

    @property
    def captures_graphs(self) -> bool:
        """Whether the inner backend captures CUDA graphs."""
        return self.mode in ("reduce-overhead", "max-autotune") or bool(self.inner_options.get("triton.cudagraphs"))


FORMER = {"intervals": "tile_lists"}  # names that options once had
# The tables below are by the name of a field, of Options or of settings.Settings.
LEAST = {"plan_cache_size": 1, "cache_mb": 1, "bias_budget_mb": 0, "tune_seconds": 0}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "certify": CERTIFY,
    "lower": ("when_faster", "always"),
    "strategy": (None, *FORCED),
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
    "autotune": bool, "tune_seconds": int, "tile_lists": bool, "replay": bool, "cache": bool, "cache_dir": str,
    "cache_mb": int,
}  # fmt: skip


def check(given: Any, what: str) -> None:
    """Checks all fields of a dataclass by the tables above. `what` names the fields in messages.

    Raises:
        ValueError, TypeError: a wrong value (the valid ones are listed) or type.
    """
    for name, value in ((f.name, getattr(given, f.name)) for f in dataclasses.fields(given)):
        kind = KINDS.get(name, object)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{what} {name}={value!r} is a {type(value).__name__}, expected {kind.__name__}")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{what} {name}={value!r}; valid values: {LEAST[name]} and more")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{what} {name}={value!r}; valid values: {', '.join(map(repr, CHOICES[name]))}")


def options_from(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Options from the arguments of torch.compile, over those of the environment.

    Raises:
        ValueError, TypeError: unknown key (the valid ones are listed), wrong type or value.
    """
    names = [f.name for f in dataclasses.fields(Options)]
    given = _by_present_names(given or {})
    shared = sorted(set(given) & KINDS.keys() - set(names))  # those of settings.Settings
    if shared:
        asked = ", ".join(f"{name}={given[name]!r}" for name in shared)
        raise ValueError(
            f"{', '.join(shared)}: set for the whole process, not for one compile. Call "
            f"cudnn_flex_compile.configure({asked}) once, or set {', '.join(PREFIX + name.upper() for name in shared)}"
        )
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; valid options: {', '.join(names)}")
    if mode is not None:
        given.setdefault("mode", mode)
    return Options(**{**from_environment(Options), **given})


def _by_present_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each by the name of its field. Raises ValueError for an option that is given by two names."""
    twice = sorted(name for name in given if FORMER.get(name) in given)
    if twice:
        raise ValueError(f"option {twice[0]!r} is now {FORMER[twice[0]]!r}, and both are given; give the latter alone")
    return {FORMER.get(name, name): value for name, value in given.items()}


def from_environment(kind: type) -> dict[str, Any]:
    """The fields of a dataclass that environment variables set. Raises ValueError for a text that stands for no value.
    """
    found: dict[str, Any] = {}
    former = {name: before for before, name in FORMER.items()}
    for f in dataclasses.fields(kind):
        text = os.environ.get(_variable(f.name), os.environ.get(_variable(former.get(f.name, f.name))))
        if text is None or f.name == "inner_options":
            continue
        expected = KINDS.get(f.name, str)
        try:
            found[f.name] = SWITCH[text.lower()] if expected is bool else expected(text)
        except KeyError:
            valid = ", ".join(filter(None, SWITCH))
            raise ValueError(f"environment variable {_variable(f.name)}={text!r}; valid: {valid}") from None
        except ValueError as error:
            raise ValueError(f"environment variable {_variable(f.name)}={text!r}: {error}") from error
    return found


def _variable(name: str) -> str:
    return PREFIX + name.upper()
