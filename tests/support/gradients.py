"""Generated graphs of calls whose score_mods stop gradients, in grad modes of their own; judged against autograd.

Knows nothing of devices. The reference is dense attention in float32, through the very same score_mods: they take whole
tensors of scores and indices as well as 0-d ones.
"""

import functools
import math
import random
from contextlib import nullcontext

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

BATCH, HEADS, LENGTH, DIM = 1, 2, 64, 16
CALLS = 4
MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "none": nullcontext,
}


class Straight(torch.autograd.Function):
    """floor(x), with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.floor(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@torch.no_grad()
def decorated(function, x):
    return function(x)


def within(mode):
    def stop(function, x):
        with MODES[mode]():
            return function(x)

    return stop


def nested(function, x):
    with torch.no_grad():
        with torch.enable_grad():
            inner = x * 0.5
        return function(inner) + inner


STOPS = {
    **{mode: within(mode) for mode in MODES},
    "detach": lambda function, x: function(x).detach(),
    "detached": lambda function, x: function(x.detach()),
    "torch.detach": lambda function, x: torch.detach(function(x)),
    "data": lambda function, x: function(x.data),
    "decorated": decorated,
    "nested": nested,
    "straight-through": lambda function, x: x + (function(x) - x).detach(),
    "half": lambda function, x: function(x) * 0.25 + function(x).detach() * 0.75,
}
FUNCTIONS = {
    "doubled": lambda x: x * 2,
    "floor": lambda x: torch.floor(x * 4) / 4,
    "tanh": torch.tanh,
    "scaled": lambda x: x * 0.7,
    "sigmoid": torch.sigmoid,
}
TABLES = ("slopes", "relative", "plain")


def tables(dtype, device):
    """The captured tensors: two that are learned, and one that is not."""
    random = torch.Generator().manual_seed(3)
    shapes = ((LENGTH,), (HEADS, 2 * LENGTH), (HEADS, LENGTH))
    found = [(torch.randn(shape, generator=random) * 0.5).to(device, dtype) for shape in shapes]
    return [t.requires_grad_(i < 2) for i, t in enumerate(found)]


def read(kind, given, b, h, q, kv):
    match kind:
        case "slopes":
            return given[0][kv]
        case "relative":
            return given[1][h, q - kv + LENGTH]
        case _:
            return given[2][h, q]


LEAVES_NONE = ("no_grad", "set_grad_enabled", "inference_mode", "detach", "detached", "data", "decorated")


def drawn(number):
    """For each call its grad mode, and the terms of its score_mod: of the score, of captured tensors, and a factor.

    Stock flex_attention fails on the CPU where it is to differentiate a function that stops all that a captured tensor
    has. So the calls that are kept have none that is learned (the last is one with an autograd.Function: None), or read
    it once more (`again`): those that add a bias to a score that is modified, too.
    """
    draw, found = random.Random(number), []
    for _ in range(CALLS):
        mode = draw.choice(("no_grad", "enable_grad", "set_grad_enabled", "none", "none", "none"))
        kind = draw.choice(("bias", "bias", "score", "score", "both", "function"))
        of_score = [(draw.choice(list(STOPS)), draw.choice(list(FUNCTIONS))) for _ in range(draw.randint(0, 2))]
        stops = LEAVES_NONE if kind == "score" else list(STOPS)
        captured = [
            (draw.choice(TABLES), draw.choice(stops), draw.choice(list(FUNCTIONS))) for _ in range(draw.randint(1, 3))
        ]
        factor = draw.choice((None, *TABLES))
        terms = {
            "bias": ([], captured, None, True), "score": (of_score, captured, factor, False),
            "both": (of_score, captured, factor, True), "function": (None, [], None, False),
        }  # fmt: skip
        found.append((mode, *terms[kind]))
    return found


def score_mod(given, of_score, captured, factor, again):
    def mod(s, b, h, q, kv):
        if of_score is None:
            return s * 0.5 + Straight.apply(s)
        found = s
        for stop, function in of_score:
            found = found + STOPS[stop](FUNCTIONS[function], s)
        for table, stop, function in captured:
            found = found + STOPS[stop](FUNCTIONS[function], read(table, given, b, h, q, kv)) * 0.5
        if factor is not None:
            found = found + s * read(factor, given, b, h, q, kv).detach() * 0.1
        for table in TABLES[:2] if again else ():
            found = found + read(table, given, b, h, q, kv)
        return found

    return mod


def program(number, attention, device):
    """A function of (q, k, v, *tables) that gives the outputs of its calls.

    Every fifth has no BlockMask. Others get one of all pairs, since Dynamo takes long to trace how stock makes one.
    """
    calls, mask = drawn(number), every_pair(device) if number % 5 else None

    def run(query, key, value, *given):
        outputs = []
        for mode, *terms in calls:
            with MODES[mode]():
                outputs.append(attention(query, key, value, score_mod(given, *terms), mask))
        return outputs

    return run


@functools.cache
def every_pair(device):
    return create_block_mask(noop_mask, None, None, LENGTH, LENGTH, device=device)


def dense(query, key, value, score_mod, _):
    places = [torch.arange(n, device=query.device) for n in (BATCH, HEADS, LENGTH, LENGTH)]
    b, h, q, kv = (place.view([-1 if i == j else 1 for j in range(4)]) for i, place in enumerate(places))
    scores = score_mod(query.float() @ key.float().mT / math.sqrt(DIM), b, h, q, kv)
    return torch.softmax(scores, -1).to(value.dtype) @ value


def inputs(dtype, device):
    random = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, LENGTH, DIM)
    qkv = [torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for _ in range(3)]
    return [*qkv, *tables(torch.float32, device)]


def results(run, given):
    """Outputs, and the gradients of all inputs."""
    outputs = run(*given)
    random, total = torch.Generator().manual_seed(5), 0.0
    for out in outputs:
        grad = torch.randn(out.shape, generator=random).to(out.device)
        total = total + (out.float() * grad).sum() if out.requires_grad else total
    learned = [t for t in given if t.requires_grad]
    nothing = not isinstance(total, torch.Tensor)
    return outputs, [None] * len(learned) if nothing else torch.autograd.grad(total, learned, allow_unused=True)


def raised_by_stock(number, low):
    """What Inductor's own kernels raise: on torch 2.11, they can't compute some gradients of captured tensors."""
    torch._dynamo.reset()
    try:
        results(torch.compile(program(number, flex_attention, low[0].device), fullgraph=True), low)
    except Exception as error:
        return error
    return None


def differences(number, device, **options):
    """What is wrong with a program that is compiled by the backend, in words: nothing where stock raises, too."""
    low = inputs(torch.bfloat16, device)
    exact = [t.detach().float().requires_grad_(t.requires_grad) for t in low]
    wanted, stock = (results(program(number, dense, device), given) for given in (exact, low))
    run = program(number, flex_attention, device)
    compiled = torch.compile(run, backend="cudnn_flex", options=options, fullgraph=True)
    try:
        found = results(compiled, low)
    except Exception as error:
        return [] if type(raised_by_stock(number, low)) is type(error) else [str(error)]
    names = [*(f"out {i}" for i in range(CALLS)), "dQ", "dK", "dV", "dSlopes", "dRelative"]
    wrong = []
    for name, want, near, got in zip(names, *([*outs, *grads] for outs, grads in (wanted, stock, found)), strict=True):
        if want is None or got is None:
            nothing = all(x is None or not bool(x.any()) for x in (want, got))
            wrong += [] if nothing else [f"{name} is {'missing' if got is None else 'there'}"]
            continue
        want, size = want.detach(), float(want.detach().norm())
        off, of_stock = (float((x.detach().float() - want).norm()) for x in (got, near))
        wrong += [f"{name} is off by {off:.3f} of {size:.3f}"] if not off <= max(0.03 * size, 2 * of_stock) else []
    return wrong
