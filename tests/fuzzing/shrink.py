"""Makes a failing call simpler, step by step, while it still fails.

Knows nothing of how calls are judged: who asks for a simpler call says whether it fails.
"""

import ast
import copy
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.support.generated import Call

ATTEMPTS = 60


def shrink(case: Call, attempts: int = ATTEMPTS) -> Generator[Call, bool, Call]:
    """Yields simpler calls, is sent whether each fails, and returns the simplest that does."""
    seen = {case}
    while (candidate := next((c for c in simpler(case) if c not in seen), None)) is not None and len(seen) <= attempts:
        seen.add(candidate)
        if (yield candidate):
            case = candidate
    return case


def simpler(case: Call) -> Iterator[Call]:
    """Calls that are simpler in one way each, the boldest first; all are calls."""
    for change in _changes(case):
        candidate = replace(case, **change)
        if candidate != case and _is_call(candidate):
            yield candidate


def _changes(case: Call) -> Iterator[dict[str, Any]]:
    if case.score is not None and case.mask is not None:
        yield from ({"mask": None}, {"score": None})
    yield from ({"training": False}, {"lse": False}, {"layout": "BSHD"}, {"grad_layout": "BSHD"})
    yield from ({"heads": 1, "kv_heads": 1}, {"heads": case.kv_heads}, {"batch": 1}, {"dims": (64, 64)})
    yield from ({"lengths": lengths} for lengths in _lengths(*case.lengths))
    yield from ({"score": source} for source in _sources(case.score))
    yield from ({"mask": source} for source in _sources(case.mask))
    yield {"as_block_mask": False}


def _lengths(q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
    least = min(q_len, kv_len)
    yield from ((64, 64), (128, 128)) if least > 128 else ()
    yield least, least
    yield max(1, q_len // 2), max(1, kv_len // 2)
    yield max(1, q_len // 2), kv_len
    yield q_len, max(1, kv_len // 2)


def _sources(source: str | None) -> Iterator[str]:
    """The source with one expression replaced by one that it holds, the shortest first."""
    if source is None:
        return
    tree = ast.parse(source, mode="eval")
    found: set[str] = set()
    for i, node in enumerate(ast.walk(tree)):
        for child in ast.walk(node):
            if isinstance(node, ast.expr) and isinstance(child, ast.expr) and child is not node:
                found.add(_replaced(tree, i, child))
    yield from sorted(found, key=lambda s: (len(s), s))


def _replaced(tree: ast.Expression, position: int, child: ast.expr) -> str:
    target = list(ast.walk(tree))[position]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return copy.deepcopy(child) if node is target else self.generic_visit(node)

    # The tree itself stays as it is: its nodes are what `position` counts.
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(tree, memo)
    target = memo[id(target)]
    return ast.unparse(Put().visit(copied))


def _is_call(case: Call) -> bool:
    """Whether flex_attention could take it, asked of one pair: a score_mod gives a float, a mask_mod a predicate."""
    score_mod, mask_mod = case.functions("cpu")
    place = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
    try:
        modified = torch.zeros(()) if score_mod is None else score_mod(torch.zeros(()), *place)
        visible = torch.tensor(True) if mask_mod is None else mask_mod(*place)
    except Exception:  # whatever a source that was cut apart may raise
        return False
    tensors = isinstance(modified, torch.Tensor) and isinstance(visible, torch.Tensor)
    return tensors and modified.dtype.is_floating_point and visible.dtype == torch.bool and modified.dim() == 0
