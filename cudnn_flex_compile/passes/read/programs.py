"""Makes a program of the functions of a call, once for all calls whose functions compute the same.

Calls share a program if they agree in the canonical text of their functions (scoremod/fingerprint.py), in the layouts
of their captured tensors, in which of these are the same tensor, and in torch's defaults. Functions without such a text
share nothing. Tracing itself is in scoremod/trace.py.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.passes.read.captures import Captures
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.phases import count, phase
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import OwnGradient
from cudnn_flex_compile.scoremod.aten_table import Untraceable
from cudnn_flex_compile.scoremod.dots import Dot, NotAdded, split_dots
from cudnn_flex_compile.scoremod.fingerprint import graph_text
from cudnn_flex_compile.scoremod.ir import SCORE, Expr, Program
from cudnn_flex_compile.scoremod.learned import NotAdditive
from cudnn_flex_compile.scoremod.partition import Hoisted, ScoreGather, pairwise, partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.trace import Captured, trace

KEPT = 256
LONGEST, MOST = 200, 2**15  # the longest chain of ops of a function, and their number, as limits for recursion
_known: "OrderedDict[Hashable, Traced | Reason]" = OrderedDict()
_lock = new_lock()


@dataclass(frozen=True, slots=True)
class Traced:
    """The program of a call's functions, and related ones.

    Attributes:
        program: the program of both functions.
        hoisted: its operands.
        mask: the program of the mask_mod alone, with which a BlockMask is compared; its operands; and the masks of
            mask_mod and score_mod, over captures. None without a BlockMask.
        noop: whether the mask_mod is a constant, as BlockMask.from_kv_blocks makes it unless it is given one.
        pairwise: the same program with the mask as one predicate of rows and columns, and its operands
            (scoremod/partition.py); None where the score is modified, or the mask reads a captured tensor at pairs.
        whole: the mask of both functions, over captures.
        fingerprint: the functions' text, for verdicts on plans that were compared with them; None if they have none.
        dots: the dots of captured rows that are part of the program's score: those of longer queries and keys.
    """

    program: Program
    hoisted: tuple[Hoisted, ...]
    mask: tuple[Program, tuple[Hoisted, ...], Expr, Expr] | None
    pairwise: tuple[Program, tuple[Hoisted, ...]] | None
    whole: Expr
    noop: bool = False
    fingerprint: str | None = None
    dots: tuple[Dot, ...] = ()

    def shown(self, captures: Captures) -> MaskProgram:
        """The mask from which a list of tiles is made, with the captured inputs of one call."""
        checked = self.checked(captures)
        if checked is not None:
            return checked
        nodes = captures.nodes, captures.ints, captures.floats
        return MaskProgram(ir.program(mask=self.whole), (), self.whole, ir.TRUE, *nodes, noop=False)

    def checked(self, captures: Captures) -> MaskProgram | None:
        """The program of the mask_mod, with the captured inputs of one call."""
        if self.mask is None:
            return None
        return MaskProgram(*self.mask, captures.nodes, captures.ints, captures.floats, self.noop)


def traced_of(call: Call, captures: Captures) -> Traced | Reason:
    """The programs of a call, or the reason why there are none."""
    key = _key(call, captures)
    with _lock:
        found = None if key is None else _known.get(key)
        if found is not None:
            _known.move_to_end(key)
    if found is not None:
        count("programs shared")
        return found
    made = _trace(call, captures, None if key is None else _digest(key))
    if key is not None:
        with _lock:
            _known[key] = made
            while len(_known) > KEPT:
                _known.popitem(last=False)
    return made


def clear() -> None:
    """Forgets all programs, so that calls are traced again."""
    with _lock:
        _known.clear()


def _key(call: Call, captures: Captures) -> tuple[Hashable, ...] | None:
    score, mask = graph_text(call.score_mod), graph_text(call.mask_mod)
    if score is None or mask is None:
        return None
    device = example(call.query).device
    defaults = torch.get_default_dtype(), torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    captured = tuple(tuple(_layout(c, captures) for c in given) for given in (captures.of_score, captures.of_mask))
    return score, mask, captured, defaults, bool(call.blocks), call.differentiated, device


def _layout(captured: Captured, captures: Captures) -> Hashable:
    """The properties of a captured value that tracing reads; equal leaves stand for the same value."""
    leaf, tensor = captured.leaf, captured.tensor
    sizes = () if tensor is None else tuple((hint(n), type(n) is int) for n in tensor.shape)
    layout = None if tensor is None else (sizes, tensor.dtype, tensor.device)
    return leaf.kind, leaf.dtype, leaf.value, layout, leaf in captures.learned


def _digest(key: tuple[Hashable, ...]) -> str:
    """A digest that is the same in every process, and on all devices of a kind."""
    return hashlib.blake2b(repr((*key[:-1], key[-1].type)).encode(), digest_size=20).hexdigest()  # pyright: ignore


def _too_large(name: str, root: Expr) -> Reason | None:
    longest, count = ir.extent(root)
    if longest > LONGEST:
        return Reason(Code.TOO_LARGE, f"the {name} has {longest} ops one after another, more than {LONGEST}")
    if count > MOST:
        return Reason(Code.TOO_LARGE, f"the {name} has more than {MOST} ops, shared ones counted for each use")
    return None


def _trace(call: Call, captures: Captures, fingerprint: str | None) -> Traced | Reason:
    device = example(call.query).device
    try:
        with phase("trace"):
            score = trace(call.score_mod, True, captures.of_score, device, call.differentiated)
            mask = trace(call.mask_mod, False, captures.of_mask, device)
        large = _too_large("score_mod", score) or _too_large("mask_mod", mask)
        if large is not None:
            return large
        with phase("solve"):
            score, dots = split_dots(score)
            whole = normalize(ir.program(narrow(score), narrow(mask)))
            program, hoisted = partition(whole, captures.stored, captures.learned)
            pairs = pairwise(whole) if whole.score is SCORE else None
            own, of_score = (normalize(ir.program(*p)).mask for p in ((SCORE, narrow(mask)), (narrow(score),)))
            alone = partition(ir.program(mask=own)) if call.blocks else None
        count("programs traced")
    except OwnGradient as error:
        return Reason(Code.NO_BACKWARD, f"score_mod has {error}")
    except Untraceable as error:
        return Reason(Code.UNKNOWN_OP, str(error))
    except NotAdded as error:
        return Reason(Code.VECTORS, str(error))
    except NotAdditive as error:
        return Reason(Code.CAPTURED_GRADIENT, f"a captured tensor that requires grad takes part in {error}")
    except ScoreGather:
        return Reason(Code.UNKNOWN_OP, "a captured tensor read at an index that depends on the score")
    by_pairs = None if pairs is None else (pairs[0], tuple(pairs[1]))
    only_mask = None if alone is None else (alone[0], tuple(alone[1]), own, of_score)
    return Traced(program, tuple(hoisted), only_mask, by_pairs, whole.mask, mask is ir.TRUE, fingerprint, dots)
