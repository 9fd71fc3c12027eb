"""The functions of a call as the user wrote them: their source text, for reports.

Dynamo records for each node of a traced function the line that it came from.
"""

import ast
import functools
import linecache
import re
import textwrap

from torch.fx import GraphModule

FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
FLEX_ATTENTION = "torch/nn/attention/flex_attention.py"
LINES = 12  # lines of one function, at most


def source_of(module: GraphModule) -> str:
    """The functions that a subgraph was traced from, in the order of their use; empty if that is not known."""
    found: dict[str, None] = {}
    for node in module.graph.nodes:
        trace = "" if node.op == "placeholder" else str(node.meta.get("stack_trace") or "")
        for path, line, name in _frames(trace):
            found.setdefault(_function(path, line, name))
    return "\n".join(filter(None, found))


def _frames(trace: str) -> list[tuple[str, int, str]]:
    """The frames below flex_attention's, without those of torch's own helpers such as and_masks."""
    frames = [(path, int(line), name) for path, line, name in FRAME.findall(trace)]
    inside = [i for i, (path, _, name) in enumerate(frames) if (path[-len(FLEX_ATTENTION) :], name) == FLEX_CALL]
    below = frames[inside[-1] + 1 :] if inside else []
    return [frame for frame in below if not frame[0].endswith(FLEX_ATTENTION)]


FLEX_CALL = (FLEX_ATTENTION, "flex_attention")


@functools.lru_cache(256)
def _function(path: str, line: int, name: str) -> str:
    """The innermost function of this name around a line; the line itself if several lambdas are in it."""
    lines = linecache.getlines(path)
    if not lines:
        return ""
    kind = ast.Lambda if name == "<lambda>" else ast.FunctionDef
    nodes = [node for node in ast.walk(_tree(path)) if isinstance(node, kind) and _holds(node, line)]
    named = [node for node in nodes if isinstance(node, ast.Lambda) or node.name == name]
    innermost = [node for node in named if node.lineno == max(n.lineno for n in named)]
    if len(innermost) != 1:
        return lines[line - 1].strip()
    if isinstance(innermost[0], ast.Lambda):
        return ast.get_source_segment("".join(lines), innermost[0]) or ""
    text = textwrap.dedent("".join(lines[innermost[0].lineno - 1 : innermost[0].end_lineno])).rstrip().split("\n")
    return "\n".join(text if len(text) <= LINES else [*text[: LINES - 1], "    ..."])


@functools.lru_cache(16)
def _tree(path: str) -> ast.Module:
    return ast.parse("".join(linecache.getlines(path)))


def _holds(node: ast.Lambda | ast.FunctionDef, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)
