"""Random score_mods and mask_mods, as Python source over torch ops, and the tensors that they capture.

Knows nothing of the package under test: a generated function is what a user could have written.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

B, H, Q, K = 2, 2, 5, 7
Draw = Callable[..., Any]


def _captured() -> dict[str, torch.Tensor]:
    """Every tensor that a source may name, small enough that each index of any axis that reads it is in range."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random).to(dtype)

    return {
        "fh": normal(H), "fbk": normal(B, K), "fk": normal(K), "f0": torch.tensor(0.75), "half": normal(H).bfloat16(),
        "table": normal(H, Q + K), "ib": integers(0, K, B), "iq": integers(-2, K, Q, dtype=torch.int32),
        "ik": integers(0, 3, K), "jk": integers(-3, 9, B, K, dtype=torch.int32), "i0": torch.tensor(3),
        "u8": integers(0, 3, K, dtype=torch.uint8), "pk": integers(0, 2, K) > 0, "pbk": integers(0, 2, B, K) > 0,
    }  # fmt: skip


CAPTURED = _captured()
CAPTURE = re.compile(rf"\b({'|'.join(CAPTURED)})\b")


@dataclass(frozen=True)
class Mod:
    """source: an expression over b, h, q, kv, the names in `captured` and, for a score_mod, score."""

    source: str
    takes_score: bool

    @property
    def captured(self) -> dict[str, torch.Tensor]:
        return CAPTURED

    @property
    def names(self) -> tuple[str, ...]:
        words = set(re.findall(r"\w+", self.source))
        return tuple(name for name in self.captured if name in words)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.captured[name] for name in self.names)

    def function(self, high: bool = False) -> Callable[..., torch.Tensor]:
        """Takes ([score,] b, h, q, kv, *tensors); with `high`, its own casts are to float64."""
        arguments = ["score"] * self.takes_score + ["b", "h", "q", "kv", *self.names]
        body = self.source.replace("torch.float32", "torch.float64") if high else self.source
        scope = {"torch": torch, "F": torch.nn.functional, "inf": math.inf}
        exec(f"def mod({', '.join(arguments)}):\n    return {body}", scope)
        return scope["mod"]


@dataclass(frozen=True)
class Grammar:
    """What a source may hold.

    smooth: only finite values and gradients (wild: division by anything, logarithms, infinities and NaNs).
    predicates_of_score: comparisons of the score itself.
    pairs: reads of a captured tensor at an index that depends on q and kv.
    captures: reads of captured tensors at all.
    """

    smooth: bool = True
    predicates_of_score: bool = True
    pairs: bool = False
    captures: bool = True


FLOATS = st.one_of(st.integers(-12, 12).map(lambda n: n / 4), st.sampled_from([0.0, 0.5, 1.0, 20.0, 1e-3, -7.0]))
INTEGERS = st.one_of(st.integers(-4, 9), st.sampled_from([0, 1, 2, 3]))
COMPARISONS = (">=", ">", "<=", "<", "==", "!=")
TORCH_COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")

# {f} is a float expression, {i} an integer one, {p} a predicate, {c} a float constant, {n} an integer constant.
FLOAT_LEAVES = (
    "score", "score", "score", "fh[h]", "fbk[b, kv]", "fk[q]", "f0", "half[h].to(torch.float32)",
    "{i}.to(torch.float32)",
)  # fmt: skip
FLOAT_OPS = (
    "({f} + {f})", "({f} - {f})", "({f} * {f})", "({c} + {f})", "({f} + {c})", "({c} - {f})", "({f} - {c})",
    "({f} * {c})", "({c} * {f})", "({f} + {i})", "({f} * {i})", "({i} - {f})", "-{f}", "torch.abs({f})",
    "torch.tanh({f})", "torch.sigmoid({f})", "torch.sin({f})", "torch.cos({f})", "torch.relu({f})", "F.silu({f})",
    "F.gelu({f})", "F.gelu({f}, approximate='tanh')", "F.softplus({f})", "torch.maximum({f}, {f})",
    "torch.minimum({f}, {f})", "{f}.clamp({c}, {c})", "torch.clamp({f}, min={c})", "{f}.clamp(max={c})",
    "torch.clamp_min({f}, {c})", "{f}.clamp(min=fh[h])", "torch.where({p}, {f}, {f})", "torch.where({p}, {f}, {c})",
    "torch.where({p}, {c}, {f})", "torch.where({p}, {c}, {c}).to(torch.float32)", "{f}.masked_fill({p}, {c})",
    "torch.floor({f})", "torch.ceil({f})", "torch.sign({f})", "({i} / {m})", "{p}.to(torch.float32)",
    "torch.zeros_like({f})", "torch.full_like({f}, {c})", "torch.full((), {c}, dtype=torch.float32)",
)  # fmt: skip
SMOOTH_OPS = (
    "torch.square({f})", "({f} ** 2)", "({f} ** 3)", "torch.add({f}, {f}, alpha={c})",
    "({f} / (torch.abs({f}) + 0.5))", "({f} / 20)", "({c} / (1 + torch.abs({f})))", "torch.exp({f}.clamp(max=2.0))",
    "torch.exp(-torch.abs({f}))", "torch.log(torch.abs({f}) + 0.25)", "torch.sqrt(torch.abs({f}) + 0.25)",
    "torch.rsqrt(torch.square({f}) + 0.5)", "torch.reciprocal(torch.abs({f}) + 0.5)",
    "((torch.abs({f}) + 0.5) ** 1.5)",
)  # fmt: skip
WILD_OPS = (
    "({f} / {f})", "({c} / {f})", "({f} / {c})", "({f} / {i})", "torch.exp({f})", "torch.log({f})",
    "torch.sqrt({f})", "torch.rsqrt({f})", "torch.reciprocal({f})", "torch.erf({f})", "({f} * inf)",
    "torch.where({p}, {f}, -inf)",
)  # fmt: skip
INTEGER_LEAVES = (
    "q", "kv", "q", "kv", "b", "h", "(q - kv)", "(kv - q)", "iq[q]", "ik[kv]", "ik[q]", "ib[b]", "jk[b, kv]", "i0",
    "u8[kv].to(torch.int32)",
)  # fmt: skip
INTEGER_OPS = (
    "({i} + {i})", "({i} - {i})", "({i} + {n})", "({n} - {i})", "({i} - {n})", "({i} * {n})", "({n} * {i})",
    "({i} * {i})", "({i} // {m})", "({i} % {m})", "({i} // -3)", "torch.abs({i})", "{i}.abs()",
    "torch.minimum({i}, {i})", "torch.maximum({i}, {i})", "torch.clamp({i}, {n}, {n})",
    "torch.where({p}, {i}, {i})", "torch.where({p}, {i}, {n})", "torch.where({p}, {n}, {n})", "-{i}", "({p} * {i})",
    "({p} + {n})", "{p}.to(torch.int32)", "{i}.to(torch.int64)", "{i}.int()", "{p}.long()",
    "torch.div({i}, {m}, rounding_mode='floor')", "torch.sub({i}, {i}, alpha={m})", "torch.rsub({i}, {i})",
    "({i} & {i})", "({i} | {i})", "({i} ^ {i})", "({i} & {n})", "(~{i})", "({i} << {n})", "({i} >> {n})",
    "({i} >> {i})", "({m} << {i})",
)  # fmt: skip
PREDICATE_LEAVES = (
    "pk[kv]", "pbk[b, kv]", "pk[q]", "({i} {o} {i})", "({i} {o} {n})", "({n} {o} {i})", "(q {o} kv)",
    "(q - kv {o} {n})", "(kv {o} ib[b])",
)  # fmt: skip
PREDICATE_OPS = (
    "({p} & {p})", "({p} & {p})", "({p} | {p})", "(~{p})", "({p} ^ {p})", "torch.logical_and({p}, {p})",
    "torch.logical_or({p}, {p})", "torch.logical_not({p})", "({p} == {p})", "({p} != {p})",
    "torch.where({p}, {p}, {p})", "((q - kv).abs() {o} {n})", "(torch.abs({i}) {o} {i})",
    "({n} {o} torch.abs(q - kv + {n}))", "torch.{t}({i}, {i})", "({i}).bool()", "({i}).to(torch.bool)",
    "(q.new_ones((), dtype=torch.bool) & {p})", "((q // {m}) {o} (kv // {m}))", "(ik[q] {o} ik[kv])",
    "(u8[q] {o} u8[kv])", "(fbk[b, kv] {o} {c})", "((q % {m}) {o} {n})", "({i} {o} 2 ** 20)",
    "(fh[h] * (q - kv) {o} {c})", "torch.where({p}, {n}, {n}).to(torch.bool)", "torch.logical_xor({p}, {i})",
)  # fmt: skip


def _fill(draw: Draw, form: str, grammar: Grammar, depth: int, of_score: bool) -> str:
    """`form` with every placeholder replaced by a random source of its type."""
    parts = form.split("{")
    source = parts[0]
    for part in parts[1:]:
        source += _part(draw, part[0], grammar, depth, of_score) + part[2:]
    return source


def _part(draw: Draw, kind: str, grammar: Grammar, depth: int, of_score: bool) -> str:
    if kind in "fip":
        return _expression(draw, kind, grammar, depth - 1, of_score)
    simple = {"c": FLOATS, "n": INTEGERS, "m": st.integers(1, 5)}
    simple |= {"o": st.sampled_from(COMPARISONS), "t": st.sampled_from(TORCH_COMPARISONS)}
    value = draw(simple[kind])
    return value if isinstance(value, str) else f"({value!r})" if value < 0 else repr(value)


def _expression(draw: Draw, kind: str, grammar: Grammar, depth: int, of_score: bool) -> str:
    leaves = {"f": FLOAT_LEAVES, "i": INTEGER_LEAVES, "p": PREDICATE_LEAVES}[kind]
    ops = {"f": FLOAT_OPS, "i": INTEGER_OPS, "p": PREDICATE_OPS}[kind]
    if kind == "f":
        leaves += ("table[h, q - kv + 6]",) if grammar.pairs else ()
        ops += SMOOTH_OPS if grammar.smooth else WILD_OPS
    if kind == "p" and of_score and grammar.predicates_of_score:
        ops += ("({f} {o} {c})", "({f} {o} {f})")
    if not grammar.captures:
        leaves, ops = ([form for form in forms if not CAPTURE.search(form)] for forms in (leaves, ops))
    atomic = depth <= 0 or draw(st.integers(0, 4)) == 0
    form = draw(st.sampled_from(leaves if atomic else ops))
    if atomic and depth <= -2:  # leaves may hold leaves, but not for ever
        form = {"f": "score", "i": "q", "p": "(q >= kv)"}[kind]
    return _fill(draw, form, grammar, depth, of_score)


@st.composite
def score_mods(draw: Draw, grammar: Grammar = Grammar(), depth: int = 4) -> Mod:
    source = _fill(draw, draw(st.sampled_from(("{f}", "({f} + score)", "({f} * score)"))), grammar, depth, True)
    if draw(st.booleans()):
        source = _fill(draw, draw(st.sampled_from(MASKED_SCORES)).replace("SCORE", source), grammar, 2, False)
    return Mod(source, True)


MASKED_SCORES = (
    "torch.where({p}, SCORE, -inf)", "torch.where({p}, -inf, SCORE)", "SCORE.masked_fill({p}, -inf)",
    "torch.where({p}, torch.where({p}, SCORE, float('-inf')), -inf)",
)  # fmt: skip


@st.composite
def mask_mods(draw: Draw, grammar: Grammar = Grammar(), depth: int = 3) -> Mod:
    """Half of them conjunctions, as most masks are."""
    source = _fill(draw, draw(st.sampled_from(CONJUNCTIONS)), grammar, depth, False)
    return Mod(f"({source})", False)


CONJUNCTIONS = ("{p}", "{p} & {p}", "({p}) & {p} & {p}", "(q >= kv) & {p}", "(kv <= q) & (q - kv < {n}) & {p}")
