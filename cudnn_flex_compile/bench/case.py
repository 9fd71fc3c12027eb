"""`Case` is a mod at a shape, with each contender's function, and inputs of its own for every layer.

measure.py times the contenders.
"""

import importlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from cudnn_flex_compile.bench.mods import BY_BATCH, KNOWN
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.report.report import collect

STOCK, OURS, SDPA = "inductor", "cudnn_flex", "sdpa"
# The masks that torch's scaled_dot_product_attention knows by itself; it takes other masks as a tensor.
SDPA_ARGUMENTS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"is_causal": True}}
LONGEST_MASK = 8192  # the longest mask as a tensor: a longer one, and SDPA's copy of it, take too much memory
# The number of positional arguments of a user's function: a score_mod's, a mask_mod's, and that of one that makes both.
SCORE_MOD, MASK_MOD, FACTORY = 5, 4, 3

Function = Callable[..., torch.Tensor]
Make = Callable[[int, int, str], tuple[Any, Any]]  # (heads, length, device) -> score_mod, mask_mod, or None for either


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of queries, [B, H, S, D], and of keys and values with `kv_heads` heads, [B, HKV, SKV, D]."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    kv_length: int = 0  # that of the queries, where it is not given

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_length", self.kv_length or self.length)

    @staticmethod
    def parse(text: str) -> "Shape":
        """The shape that a text "B,H,HKV,S,D" describes, or "B,H,HKV,S/SKV,D". Raises ValueError."""
        parts = text.split(",")
        lengths = parts[3].split("/") if len(parts) == 5 else []
        try:
            numbers = [int(part) for part in (*parts[:3], lengths[0], parts[4], lengths[-1])] if lengths else []
        except ValueError:
            numbers = []
        if not numbers or len(lengths) > 2 or min(numbers) < 1 or numbers[1] % numbers[2]:
            raise ValueError(
                "a shape is B,H,HKV,S,D or B,H,HKV,S/SKV,D, H a multiple of HKV, such as 2,32,8,4096,128 or "
                f"8,32,8,1/4096,128; got {text!r}"
            )
        return Shape(*numbers)

    def __str__(self) -> str:
        lengths = str(self.length) if self.kv_length == self.length else f"{self.length}/{self.kv_length}"
        return f"{self.batch},{self.heads},{self.kv_heads},{lengths},{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of one call: [B, S, H, D], as projections give them, and a gradient of the output."""

    qkv: tuple[torch.Tensor, ...]
    grad: torch.Tensor


@dataclass(slots=True)
class Case:
    """A mod at a shape.

    Attributes:
        mod: a name of mods.KNOWN, or "module:function".
        dtype: the dtype of queries, keys and values.
        device: "cuda"; tests of the measuring itself run on "cpu".
        options: the backend's.
        training: whether gradients are asked for.
        inside: whether products of matrices are around the call, as in a model.
        deterministic: whether it runs under torch.use_deterministic_algorithms.
        renewed: whether what its mask reads counts as written before each call, as in training each step has a new
            mask.
    """

    mod: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    training: bool = True
    inside: bool = False
    deterministic: bool = False
    renewed: bool = False

    @property
    def name(self) -> str:
        return f"{self.mod}, deterministic" if self.deterministic else self.mod

    def __str__(self) -> str:
        how = ("" if self.training else ", forward alone") + (", in a model" if self.inside else "")
        return f"{self.name} at {self.shape}{how}"

    def layer(self) -> Layer:
        shape = self.shape
        queries, keys = (shape.length, shape.heads), (shape.kv_length, shape.kv_heads)
        q, k, v, grad = (
            torch.randn(shape.batch, *size, shape.head_dim, device=self.device, dtype=self.dtype)
            for size in (queries, keys, keys, queries)
        )
        return Layer(tuple(t.requires_grad_(self.training) for t in (q, k, v)), grad)

    def functions(self, mode: str | None = None, with_sdpa: bool = True) -> dict[str, Function]:
        """The function of each contender, from q, k and v of a layer to the output, [B, S, H, D]."""
        found = {name: self.compiled(name, mode) for name in (STOCK, OURS)}
        arguments = self.sdpa_arguments() if with_sdpa and mode is None else None
        return found if arguments is None else {**found, SDPA: self._sdpa(arguments)}

    def compiled(self, backend: str, mode: str | None = None) -> Function:
        """The call by a backend, compiled when it first runs."""
        how: dict[str, Any] = {"options": {**self.options, "mode": mode}} if backend == OURS else {"mode": mode}
        return self.compiled_by(backend, backend, **how)

    def compiled_by(self, backend: Any, name: str, **how: Any) -> Function:
        """The call, named so, by whatever torch.compile takes as a backend, with other arguments of torch.compile."""
        call = self.call(name)
        compiled: Any = torch.compile(call, backend=backend, dynamic=False, **how)
        return _renewing(compiled, read_by_mask(call)) if self.renewed else compiled

    def call(self, name: str) -> Function:
        """The call, from q, k and v of a layer to the output. Its code is its own, with this name: torch.compile
        compiles a piece of code only a few times.
        """
        shape = self.shape
        score_mod, mask_mod = named(self.mod)(shape.heads, shape.kv_length, self.device)
        entries = shape.batch if self.mod in BY_BATCH else None
        lengths = shape.length, shape.kv_length
        mask = mask_mod and create_block_mask(mask_mod, entries, None, *lengths, device=self.device)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            gqa = shape.heads != shape.kv_heads
            return flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa).transpose(1, 2)  # pyright: ignore

        if not self.inside:
            return with_own_code(call, name)
        weight = torch.randn(shape.head_dim, shape.head_dim, device=self.device, dtype=self.dtype) / shape.head_dim**0.5

        def projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return call(q @ weight, k @ weight, v @ weight) @ weight

        return with_own_code(projected, name)

    def sdpa_arguments(self) -> dict[str, Any] | None:
        """The arguments with which torch's SDPA computes the same on a kernel of its own; None if it has none.

        Under a mask that is a tensor it has none for grouped queries.
        """
        shape, gqa = self.shape, self.shape.heads != self.shape.kv_heads
        if self.mod in SDPA_ARGUMENTS:
            return SDPA_ARGUMENTS[self.mod] | {"enable_gqa": gqa}
        score_mod, mask_mod = named(self.mod)(shape.heads, shape.kv_length, self.device)
        if score_mod is not None or mask_mod is None or gqa or shape.kv_length > LONGEST_MASK:
            return None
        entries = shape.batch if self.mod in BY_BATCH else 1
        return {"attn_mask": create_mask(mask_mod, entries, 1, shape.length, shape.kv_length, device=self.device)}

    def _sdpa(self, arguments: dict[str, Any]) -> Function:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)  # pyright: ignore

        return call


def _renewing(function: Function, tensors: list[torch.Tensor]) -> Function:
    """The function, before each call of which these tensors count as written."""

    def call(*given: torch.Tensor) -> torch.Tensor:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
        return function(*given)

    return call


def read_by_mask(function: Function) -> list[torch.Tensor]:
    """The tensors that the mask_mods of a function's BlockMasks read."""
    found = inspect.getclosurevars(function).nonlocals.values()
    masks = [value.mask_mod for value in found if isinstance(value, BlockMask)]
    inner = [value for value in found if isinstance(value, types.FunctionType)]
    read = [value for mask_mod in masks for value in inspect.getclosurevars(mask_mod).nonlocals.values()]
    return [t for t in read if isinstance(t, torch.Tensor)] + [t for each in inner for t in read_by_mask(each)]


def with_own_code(function: Function, name: str) -> Function:
    """The same function of another piece of code."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def first_calls(case: Case, functions: dict[str, Function], step: Callable[[Function, list[Layer]], Any]) -> CallReport:
    """Compiles all functions, by a step each, and returns the report of the flex_attention call with cuDNN.

    Torch's SDPA, which is there for comparison, is taken out of `functions` if it fails.
    """
    torch.compiler.reset()  # once: it would drop what was compiled for a contender before
    layers, calls = [case.layer()], []
    for name, function in list(functions.items()):
        with collect() as report:
            try:
                step(function, layers)
            except RuntimeError:
                if name != SDPA:
                    raise
                del functions[SDPA]
        calls = report.calls if name == OURS else calls
    if len(calls) != 1:
        raise RuntimeError(f"{case.mod} at {case.shape}: {len(calls)} flex_attention calls were compiled, expected one")
    return calls[0]


def named(mod: str) -> Make:
    """The score_mod and mask_mod of a name.

    Args:
        mod: a name of mods.KNOWN, or "module:function": a score_mod (score, b, h, q, kv), a mask_mod (b, h, q, kv), or
            a function of (heads, length, device) that gives both, either of them None.

    Raises:
        ValueError: for a name that is none of these; the message lists the names.
    """
    if mod in KNOWN:
        return KNOWN[mod]
    if ":" not in mod:
        raise ValueError(f"no mod is named {mod!r}; there are {', '.join(map(repr, KNOWN))}, or module:function")
    module, _, attribute = mod.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{mod!r} cannot be imported: {error}") from error
    count = len(inspect.signature(function).parameters)
    kinds: dict[int, Make] = {
        SCORE_MOD: lambda heads, length, device: (function, None),
        MASK_MOD: lambda heads, length, device: (None, function),
        FACTORY: function,
    }
    if count not in kinds:
        raise ValueError(
            f"{mod!r} takes {count} arguments; a score_mod takes {SCORE_MOD}, a mask_mod {MASK_MOD}, and what makes "
            f"both {FACTORY}: heads, length, device"
        )
    return kinds[count]
