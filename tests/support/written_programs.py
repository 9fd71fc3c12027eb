"""Generated programs: calls of flex_attention that share captured tensors, with pure and writing steps between them.

Knows nothing of the compiler. A program is the text of a function, so that what fails can be read and run again.
"""

import operator  # noqa: F401  (programs use what is imported and not used here)
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401
from torch.nn.attention.flex_attention import BlockMask, flex_attention  # noqa: F401
from torch.utils.checkpoint import checkpoint  # noqa: F401

COUNT = 300
BATCH, HEADS, LENGTH, DIM, BLOCK = 2, 2, 32, 16, 16

LIBRARY = torch.library.Library("flex_writes", "DEF")
OPS = {
    "scale_(Tensor(a!) x, float by) -> ()": lambda x, by: x.mul_(by),
    "scale_all_(Tensor(a!)[] xs, float by) -> ()": lambda xs, by: [x.mul_(by) for x in xs],
    "scale_if_(Tensor(a!)? x, Tensor y) -> ()": lambda x, y: None if x is None else x.mul_(2),
    "double_into(Tensor y, *, Tensor(a!) result) -> ()": lambda y, result: result.copy_(y * 2),
    "advance(Tensor(a!) x, int by) -> ()": lambda x, by: x.add_(by),
    "flip(Tensor(a!) x) -> ()": lambda x: x.logical_not_(),
    "doubled(Tensor x) -> Tensor": lambda x: x * 2,
}


def _silent(function):
    def run(*args, **kwargs):
        function(*args, **kwargs)

    return run


for schema, function in OPS.items():
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, function if name == "doubled" else _silent(function), "CompositeExplicitAutograd")
    fake = torch.empty_like if name == "doubled" else lambda *_, **__: None
    torch.library.register_fake(f"flex_writes::{name}", fake)


@torch.library.custom_op("flex_writes::shift_", mutates_args=("x",))
def shift_(x: torch.Tensor, by: float) -> None:
    x.add_(by)


@torch._dynamo.allow_in_graph
def allowed_write(x):
    return x.mul_(2)


@torch._dynamo.allow_in_graph
def allowed(x):
    return x * 2


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(0.5)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


# Each writes into the float tensor `{x}`, [2, 2], of which `view` was made before all calls. `y`: another one.
FLOATS = (
    "{x}.mul_(2)", "{x}.copy_(y)", "{x}.neg_()", "{x}[0] = 0.5", "{x}[:, 1] += 1", "{x} += y", "{x} *= 2",
    "{x}.__imul__(3)", "{x}.__iadd__(y)",
    "{x}.__setitem__(1, 0.25)", "operator.imul({x}, 2)", "torch.neg({x}, out={x})",
    "torch.add({x}, y, out={x})", "torch.ops.aten.mul_({x}, 2)", "torch.ops.aten.mul_.Tensor({x}, y)",
    "torch.ops.aten.add.out({x}, y, out={x})",
    "torch.ops.flex_writes.scale_({x}, 2.0)", "torch.ops.flex_writes.scale_.default({x}, by=2.0)", "shift_({x}, 0.5)",
    "torch.ops.flex_writes.scale_all_([y, {x}], 2.0)", "torch.ops.flex_writes.scale_if_({x}, y)",
    "torch.ops.flex_writes.scale_if_(y=y, x={x})",
    "torch.ops.flex_writes.double_into(y, result={x})", "{x}.data.mul_(2)", "{x}.detach().add_(1)",
    "{x}.T.mul_(2)", "{x}.mT.mul_(2)",
    "{x}.view(-1).mul_(2)", "{x}.reshape(4)[1:].add_(1)", "{x}[1:].mul_(3)", "{x}.unsqueeze(0).add_(1)",
    "{x}.flatten().mul_(2)",
    "{x}.diagonal().add_(1)", "{x}.as_strided((2,), (2,)).mul_(3)", "{x}.split(1)[1].add_(1)",
    "torch.unbind({x})[0].mul_(3)",
    "view.mul_(2)", "view[1:].add_(1)", "F.relu(view, inplace=True)", "torch.view_as_complex({x}).mul_(2)",
    "{x}.index_put_((zero,), y[0])", "{x}.index_add_(0, zero, y[:1])", "{x}.scatter_(0, zero.view(1, 1), 0.75)",
    "{x}.masked_fill_(y > 0, 0.3)",
    "torch._foreach_mul_([y, {x}], 2)", "torch._foreach_add_([{x}], [y])", "torch._foreach_copy_([{x}], [y])",
    "F.leaky_relu({x}, 0.1, True)",
    "F.relu6({x}, True)", "F.elu({x}, 1.0, True)", "F.hardtanh({x}, -0.1, 0.1, True)",
    "F.threshold({x}, 0.1, 0.7, True)",
    "F.silu({x}, inplace=True)", "F.dropout({x}, 1.0, True, True)", "F.normalize({x}, out={x})",
    "torch.relu_({x})", "torch.clamp({x}, 0.1, out={x})",
    "torch.nn.Hardswish(True)({x})", "torch.nn.LeakyReLU(0.2, True)({x})", "torch.nn.init.constant_({x}, 0.3)",
    "F.batch_norm(batch, {x}[0], var, training=True, momentum=0.5)",
    "F.batch_norm(batch, y[1], {x}[1].abs_(), training=True)",
    "torch.batch_norm(batch, None, None, {x}[0], var, True, 0.5, 1e-5, False)",
    "F.instance_norm(batch[None].mT, {x}[1], var, momentum=0.5)",
    "F.embedding(zero, {x}, max_norm=0.2)", "F.embedding_bag(zero, {x}, zero, max_norm=0.2)", "{x}.lerp_(y, 0.5)",
    "{x}.fill_(0.5)", 
    "torch.vmap(lambda row: row.mul_(2))({x})", "checkpoint(lambda t: t.mul_(2).sum(), {x}, use_reentrant=False)",
    "checkpoint(lambda t: F.leaky_relu(t.view(-1), 0.1, True).sum(), {x}, use_reentrant=False)",
    "checkpoint(lambda t: checkpoint(lambda u: u[0].add_(1).sum(), t, use_reentrant=False), {x}, use_reentrant=False)",
    "allowed_write({x})", "{x}.data = y + 1", "view.data.mul_(2); {x}.data = y.clone()",
    
)  # fmt: skip
# These break the graph.
BREAKING = ("operator.setitem({x}, 0, 0.5)", "{x}.t_().mul_(2).t_()", "Halved.apply({x})", "{x}.set_(y.clone())")
INTEGERS = (
    "{x}.add_(3)", "{x} += 2", "{x}[0] = 9", "{x}.copy_({x} + 1)", "torch.add({x}, 2, out={x})",
    "torch.ops.flex_writes.advance({x}, 5)",
    "torch.ops.flex_writes.advance.default({x}, by=4)", "torch._foreach_add_([{x}], 2)",
    "{x}.view(-1)[1:].add_(3)", "{x}.data.add_(2)",
    "{x}.__iadd__(2)", "{x}.clamp_(max=6)", "checkpoint(lambda t: t.add_(2) * 1, {x}, use_reentrant=False)",
    "allowed_write({x})",
)  # fmt: skip
BOOLEANS = (
    "{x}.logical_not_()", "{x}[:, :9] = False", "{x}.masked_fill_({x}.roll(3, 1), False)", "{x} &= {x}.roll(1, 1)",
    "{x}.__ior__({x}.roll(1, 1))",
    "torch.logical_not({x}, out={x})", "torch.ops.flex_writes.flip({x})", "{x}.data.logical_not_()",
    "{x}.view(-1)[5:20].fill_(True)",
    "torch.ops.aten.logical_not_({x})", "operator.ixor({x}, {x}.roll(2, 1))",
)  # fmt: skip
# None of these writes into a tensor that a call captures.
PURE = (
    "q = q * 0.5", "q = F.layer_norm(q, (q.shape[-1],))", "q = F.dropout(q, 0.0)", "q = F.silu(q)",
    "q = q + flex_writes.doubled(q)",
    "q = checkpoint(lambda t: F.gelu(t) + 1, q, use_reentrant=False)", "q = Doubled.apply(q)", "spare.add_(1)",
    "spare.view(-1)[0] = 2",
    "F.leaky_relu(spare, 0.1, True)", "F.batch_norm(batch, spare[0], var, training=True)",
    "torch._foreach_add_([spare], 1)",
    "flex_writes.scale_(spare, 2.0)", "checkpoint(lambda t: t.add_(1).sum(), spare, use_reentrant=False)",
    "q = q.clone().mul_(2)",
    "q = allowed(q)", "F.embedding(zero, {c})", "q = q + {c}.sum().to(q.dtype) * 0.1", "{c}.view(-1)", "{c} + 1",
    "torch.relu({c} * 1.0)",
    "F.leaky_relu({c} * 1.0, 0.1, True)", "torch.vmap(lambda row: row * 2)({c})", "flex_writes.doubled({c})",
    "allowed({c})",
    "F.silu({c} * 1.0)", "checkpoint(lambda t: t * 2, {c}, use_reentrant=False)", "{c}.clone().zero_()",
    "F.hardtanh({c} * 1.0)",
    "k = k * 2", "v.mul_(0.5)", "k.neg_()",
)  # fmt: skip
# What a call captures: the tensors, how it reads them as a score_mod or as a mask, and what may write into them.
SCORES = {
    "slopes": ("s + torch.tanh({c}[h, 0]) * (j - i)", (*FLOATS, *BREAKING)),
    "heads": ("s + {c}[h, 1] * 2", (*FLOATS, *BREAKING)),
    "table": ("s + {c}[h, (i - j) % 2] + {c}[b, 0]", (*FLOATS, *BREAKING)),
}
MASKS = {
    "lengths": ("j < {c}[b]", INTEGERS),
    "ids": ("{c}[b, i] == {c}[b, j]", ("{x}.copy_({x}.roll(3, 1))", "{x}[:, 9:] += 1", "{x}.remainder_(2)",
    "flex_writes.advance({x}[:, 7:15], 7)")),
    "columns": ("{c}[b, j]", BOOLEANS),
    "columns_causal": ("{c}[b, j] & (i >= j)", BOOLEANS),
}  # fmt: skip
TENSORS = ("slopes", "heads", "table", "lengths", "ids", "columns", "columns_causal")
ARGUMENTS = ("q", "k", "v", *TENSORS, "y", "spare", "var", "batch", "zero", "count", "index")


@dataclass(frozen=True)
class Program:
    """A generated program.

    Attributes:
        text: of a function `program(q, k, v, slopes, ...)`.
        written: for each call but the first, whether anything since the call before writes into what both capture.
    """

    number: int
    text: str
    written: tuple[bool, ...]

    @property
    def moves(self) -> bool:
        """Whether a tensor gets another storage, after which nobody can tell what is a view of what."""
        return ".data = " in self.text or ".set_(" in self.text

    @property
    def function(self) -> Any:
        return defined(self.text)


def defined(text: str) -> Any:
    scope = {**globals(), "flex_writes": torch.ops.flex_writes}
    exec(text, scope)
    return scope["program"]


def program(number: int) -> Program:
    chance = random.Random(number)
    score = chance.choice([*SCORES, None])
    mask = chance.choice([*MASKS, None] if score else list(MASKS))
    reads = [(SCORES[score][0] if score else "s", score), (MASKS[mask][0] if mask else "True", mask)]
    of_score, of_mask = (text.format(c=name) for text, name in reads)
    blocks = chance.choice(("none", "here", "shared")) if mask else "none"
    if mask and blocks == "none":
        of_score = f"torch.where({of_mask}, {of_score}, -torch.inf)"
    lines = ["view = slopes.view(-1)" if score is None else f"view = {score}.view(-1)"]
    lines += ["score_mod = lambda s, b, h, i, j: " + of_score, f"mask_mod = lambda b, h, i, j: {of_mask}"]
    how = "BLOCK_SIZE=BLOCK, seq_lengths=(LENGTH, LENGTH)"
    # Dynamo takes long to trace how stock makes a BlockMask of its own, and the lists that a backward needs.
    as_most_people_do = number % 5 == 0
    how += "" if as_most_people_do else ", compute_q_blocks=False"
    made = f"BlockMask.from_kv_blocks(count, index, mask_mod=mask_mod, {how})"
    pairs = "None" if as_most_people_do else f"BlockMask.from_kv_blocks(count, index, {how})"
    lines += [f"block_mask = {made if blocks == 'shared' else pairs}"]
    written, results = [], []
    for call in range(chance.choice((2, 2, 2, 3))):
        if call:
            steps, writes = _steps(chance, score, mask)
            lines += steps
            written.append(writes)
        again = made if blocks == "here" else "block_mask"
        lines.append(f"r{call} = flex_attention(q, k, v, score_mod, {again})")
        results.append(f"r{call}")
    lines.append(f"return {', '.join(results)},")
    return Program(number, "\n    ".join([f"def program({', '.join(ARGUMENTS)}):", *lines]), tuple(written))


def _steps(chance: random.Random, score: str | None, mask: str | None) -> tuple[list[str], bool]:
    """What is between two calls, and whether it writes into what they capture."""
    captured = [name for name in (score, mask) if name]
    floats = [name for name in captured if name in SCORES]
    steps = []
    for _ in range(chance.randint(0, 2)):
        pure = chance.choice([p for p in PURE if floats or "{c}" not in p])
        steps.append(pure.format(c=chance.choice(floats or ["spare"])))
    writes = chance.random() < 0.6
    if writes:
        name = chance.choice(captured)
        spelled = chance.choice((SCORES.get(name) or MASKS[name])[1])
        steps.insert(chance.randint(0, len(steps)), spelled.format(x=name))
    return steps, writes


def inputs(number: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    floats = [draw(2, 2) for _ in range(3)]
    lengths = torch.randint(4, LENGTH - 4, (BATCH,), generator=generator)
    ids = torch.randint(0, 4, (BATCH, LENGTH), generator=generator).sort(-1).values
    columns = [torch.rand(BATCH, LENGTH, generator=generator) > 0.4 for _ in range(2)]
    rest = [draw(2, 2), draw(2, 2), torch.ones(2), draw(8, 2), torch.zeros(1, dtype=torch.int64)]
    blocks = LENGTH // BLOCK
    index = torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()
    count = torch.full((1, 1, blocks), blocks, dtype=torch.int32)
    qkv = [draw(BATCH, HEADS, LENGTH, DIM).to(dtype) for _ in range(3)]
    return [t.to(device) for t in (*qkv, *floats, lengths, ids, *columns, *rest, count, index)]
