"""The canonical text of a program, its parser, and a readable infix form for people.

The custom op takes the text as its `program` argument, and every cache key holds it, so equal text must mean equal
computation: it has every field of every node, numbers exactly (floats in hexadecimal), and one item for each node,
numbered in the order of `ir.walk`, which depends on structure alone.

    cudnn_flex 12; 0 f32 score; 1 f32 const 0x1.4000000000000p+4; 2 f32 div 0 1; 3 bool const true; score 2; mask 3
"""

import copyreg
import functools
from itertools import zip_longest

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, DTYPES, F32, Expr, Program
from cudnn_flex_compile.scoremod.optable import TABLE, well_typed

# Torch's compile caches keep graphs that hold programs: the number goes up with each change of this text or of the
# ops' schemas, so that no cached graph calls an op that has become another.
HEADER, SEPARATOR = "cudnn_flex 12", "; "
LEAVES = ("score", "grad", "index", "const", "capture", "operand", "scalar")


def _value(node: Expr) -> str:
    value = node.value
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.hex() if isinstance(value, float) else str(value)


def _line(node: Expr, number: dict[Expr, int]) -> str:
    fields = [str(number[node]), node.dtype, node.kind]
    if node.value is not None:
        fields.append(_value(node))
    if node.kind == "operand":
        fields.append(node.dims or "-")
    return " ".join(fields + [str(number[a]) for a in node.args])


def text(program: Program) -> str:
    """The canonical text: equal for equal programs, different for different ones."""
    nodes = list(ir.walk(program.score, program.mask))
    number = {node: i for i, node in enumerate(nodes)}
    lines = [HEADER, *(_line(node, number) for node in nodes)]
    return SEPARATOR.join([*lines, f"score {number[program.score]}", f"mask {number[program.mask]}"])


def _number(dtype: str, word: str) -> int | float | bool:
    if dtype == BOOL:
        return {"true": True, "false": False}[word]
    return float.fromhex(word) if dtype == F32 else int(word)


def _node(dtype: str, kind: str, rest: list[str], nodes: list[Expr]) -> Expr:
    if kind == "const":
        return ir.const(_number(dtype, *rest), dtype)
    if kind == "index":
        return ir.index(*rest)
    if kind == "operand":
        position, dims = rest
        return ir.operand(int(position), dtype, dims.replace("-", ""))
    if kind in ("capture", "scalar"):
        return ir.intern(kind, dtype, value=int(rest[0]))
    if kind in ("score", "grad"):
        return ir.intern(kind, F32)
    args = tuple(nodes[int(i)] for i in rest)
    if not well_typed(kind, dtype, args):
        raise ValueError(f"no {dtype} {kind} of {', '.join(a.dtype for a in args) or 'nothing'}")
    return ir.intern(kind, dtype, args)


def parse(source: str) -> Program:
    """The program whose canonical text is `source`; ValueError says which item is wrong."""
    return _parsed(source)


@functools.lru_cache(1024)
def _parsed(source: str) -> Program:
    header, *lines = source.split(SEPARATOR)
    if header != HEADER:
        raise ValueError(f"a program starts with {HEADER!r}, got {header!r}")
    nodes: list[Expr] = []
    roots: dict[str, Expr] = {}
    for line in lines:
        words = line.split(" ")
        try:
            if words[0] in ("score", "mask"):
                roots[words[0]] = nodes[int(words[1])]
                continue
            number, dtype, kind, *rest = words
            if int(number) != len(nodes) or dtype not in DTYPES:
                raise ValueError("out of order, or an unknown dtype")
            nodes.append(_node(dtype, kind, rest, nodes))
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"bad program item {line!r}: {error}") from error
    if roots.keys() != {"score", "mask"}:
        raise ValueError("a program ends with its score and its mask")
    try:
        program = ir.program(roots["score"], roots["mask"])
    except TypeError as error:
        raise ValueError(f"bad program item {lines[-1]!r}: {error}") from error
    for given, canonical in zip_longest(lines, text(program).split(SEPARATOR)[1:]):
        if given != canonical:  # a second spelling would be a second key for the same computation
            raise ValueError(f"bad program item {given!r}: expected {canonical!r}")
    return program


# A program in another process, or a copy of one, is made of its text: expressions stay interned.
copyreg.pickle(Program, lambda program: (parse, (text(program),)))  # pyright: ignore[reportUnknownMemberType]


def infix(root: Expr) -> str:
    """The expression as a person would write it: `tanh(score / 20) * 20`. Shared parts are repeated."""
    done: dict[Expr, str] = {}
    for node in ir.walk(root):
        done[node] = _infix(node, [done[a] for a in node.args])
    return _bare(done[root])


def _bare(spelled: str) -> str:
    outer = spelled.startswith("(") and spelled.endswith(")") and _closes_at_end(spelled)
    return spelled[1:-1] if outer else spelled


def _closes_at_end(spelled: str) -> bool:
    depth = 0
    for i, c in enumerate(spelled):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(spelled) - 1
    return False


def _infix(node: Expr, args: list[str]) -> str:
    if node.kind == "index":
        return {"b": "b", "h": "h", "q": "q", "k": "kv"}[str(node.value)]
    if node.kind == "const":
        value = node.value
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.7g}" if isinstance(value, float) else str(value).lower()
    if node.kind == "operand":
        axes = ", ".join("kv" if d == "k" else d for d in node.dims)
        return f"operand{node.value}[{axes}]" if axes else f"operand{node.value}"
    if node.kind in LEAVES:
        return node.kind if node.value is None else f"{node.kind}{node.value}"
    if node.kind in ("f32", "i32", "i64"):
        return args[0]
    spelling = TABLE[node.kind].infix
    return spelling.format(*args) if spelling else f"{node.kind}({', '.join(map(_bare, args))})"
