"""The canonical text: it comes back as the same program, tells every two programs apart, and misspellings are named."""

import math
import re

import pytest
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, TRUE
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import infix, parse, text
from tests.support.evaluate import program_of
from tests.support.generate import Grammar, Mod, mask_mods, score_mods

WILD = Grammar(smooth=False)
GOOD = (
    "cudnn_flex 12; 0 f32 score; 1 f32 const 0x1.4000000000000p+4; 2 f32 div 0 1; 3 i32 index q; 4 i32 index k;"
    " 5 bool ge 3 4; score 2; mask 5"
)


def test_programs_and_their_texts_are_one_to_one() -> None:
    texts: dict[str, ir.Program] = {}

    @settings(max_examples=120)
    @given(score_mods(WILD), mask_mods())
    def collect(score_mod: Mod, mask_mod: Mod) -> None:
        before = program_of(score_mod, mask_mod)
        normal = normalize(before)
        for program in (before, normal, partition(normal)[0]):
            assert parse(text(program)) is program
            assert texts.setdefault(text(program), program) is program
        assert _sane(infix(before.score))

    collect()
    assert len(texts) > 200
    assert len(set(texts.values())) == len(texts)


def _sane(spelled: str) -> bool:
    return spelled.count("(") == spelled.count(")") and "{" not in spelled and "Expr" not in spelled


NUMBERS = [
    (1, I32), (1, I64), (1.0, F32), (True, BOOL), (0, I32), (0, I64), (0.0, F32), (-0.0, F32), (False, BOOL),
    (math.inf, F32), (-math.inf, F32), (math.nan, F32), (-1, I32), (0.1, F32), (1e-45, F32), (3.4e38, F32),
    (2**40, I64),
]  # fmt: skip


def holding(value: float, dtype: str) -> ir.Program:
    return ir.program(mask=make("bool", ir.const(value, dtype)) if dtype == BOOL else _compared(value, dtype))


def _compared(value: float, dtype: str) -> ir.Expr:
    return ir.intern("eq", BOOL, (ir.capture(0, dtype), ir.const(value, dtype)))


@pytest.mark.parametrize(("value", "dtype"), NUMBERS)
def test_numbers_are_exact(value: float, dtype: str) -> None:
    program = holding(value, dtype)
    back = parse(text(program))
    assert back is program
    found = next(n.value for n in ir.walk(back.mask) if n.kind == "const")
    assert type(found) is type(ir.const(value, dtype).value)
    assert math.copysign(1, found) == math.copysign(1, value) or math.isnan(value)
    assert found == ir.const(value, dtype).value or math.isnan(value)


def test_numbers_stay_distinct() -> None:
    assert len({text(holding(*number)) for number in NUMBERS}) == len(NUMBERS)
    assert len({ir.const(*number) for number in NUMBERS}) == len(NUMBERS)


def test_every_field_is_in_the_text() -> None:
    leaves = [
        ir.operand(0, I32, "q"), ir.operand(0, I32, "bq"), ir.operand(0, I32, ""), ir.operand(0, I64, "q"),
        ir.operand(1, I32, "q"), ir.scalar(0, I32), ir.scalar(1, I32), ir.capture(0, I32), ir.index("q"), ir.index("k"),
        ir.index("b"), ir.index("h"),
    ]  # fmt: skip
    assert len({text(ir.program(mask=make("ne", leaf, ir.const(0, leaf.dtype)))) for leaf in leaves}) == len(leaves)
    assert text(ir.program(SCORE * ir.scalar(0, F32))) != text(ir.program(SCORE * ir.cast(ir.scalar(0, I32), F32)))


def test_the_text_is_what_the_docstring_says() -> None:
    expected = ir.program(SCORE / 20.0, make("ge", ir.index("q"), ir.index("k")))
    assert text(expected) == GOOD
    assert parse(GOOD) is expected


BAD = {
    "an unknown op": ("2 f32 div 0 1", "2 f32 divide 0 1"),
    "an unknown dtype": ("0 f32 score", "0 f16 score"),
    "a node of another number": ("2 f32 div 0 1", "7 f32 div 0 1"),
    "an argument too few": ("2 f32 div 0 1", "2 f32 div 0"),
    "an argument too many": ("2 f32 div 0 1", "2 f32 div 0 1 1"),
    "a later argument": ("2 f32 div 0 1", "2 f32 div 0 3"),
    "a negative argument": ("2 f32 div 0 1", "2 f32 div 0 -1"),
    "no number": ("0x1.4000000000000p+4", "twenty"),
    "a number in another spelling": ("0x1.4000000000000p+4", "0x14p+0"),
    "a number too large": ("0x1.4000000000000p+4", "0x1p+99999"),
    "a number that is no float32": ("0x1.4000000000000p+4", "0x1.4000000000001p+4"),
    "a constant without a number": ("1 f32 const 0x1.4000000000000p+4", "1 f32 const"),
    "a constant with two": ("0x1.4000000000000p+4", "0x1.4000000000000p+4 0x1.4000000000000p+4"),
    "an unknown axis": ("index q", "index x"),
    "an index that is no integer": ("3 i32 index q", "3 f32 index q"),
    "a score that is no float": ("0 f32 score", "0 i32 score"),
    "a score with a value": ("0 f32 score", "0 f32 score 3"),
    "an op of the wrong result": ("5 bool ge 3 4", "5 f32 ge 3 4"),
    "an op of the wrong arguments": ("2 f32 div 0 1", "2 f32 div 0 0; 3 f32 tanh 4"),
    "a comparison of unlike things": ("5 bool ge 3 4", "5 bool ge 3 0"),
    "a predicate as the score": ("score 2; mask 5", "score 5; mask 5"),
    "a score as the mask": ("score 2; mask 5", "score 2; mask 2"),
    "no mask": ("; mask 5", ""),
    "no score": ("score 2; ", ""),
    "two scores": ("score 2; ", "score 0; score 2; "),
    "a root out of range": ("score 2", "score 9"),
    "a negative root": ("score 2", "score -4"),
    "a node that nothing uses": ("score 2; mask 5", "6 i32 index b; score 2; mask 5"),
    "a trailing separator": ("mask 5", "mask 5; "),
    "an empty item": ("; 3 i32", "; ; 3 i32"),
    "another space": ("0 f32 score", "0  f32 score"),
    "an operand of unknown dims": ("3 i32 index q", "3 i32 operand 0 xy"),
    "an operand of unordered dims": ("3 i32 index q", "3 i32 operand 0 qb"),
    "an operand without dims": ("3 i32 index q", "3 i32 operand 0"),
    "a scalar predicate": ("3 i32 index q", "3 i64 scalar 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_misspelled_texts_are_refused(what: str) -> None:
    old, new = BAD[what]
    assert GOOD.count(old) == 1
    with pytest.raises(ValueError, match="program"):
        parse(GOOD.replace(old, new))


@pytest.mark.parametrize(
    "what",
    ["an unknown op", "a number too large", "an unknown axis", "a later argument", "an index that is no integer"],
)
def test_the_wrong_item_is_named(what: str) -> None:
    bad = GOOD.replace(*BAD[what])
    item = next(item for item in bad.split("; ") if item not in GOOD.split("; "))
    with pytest.raises(ValueError, match=re.escape(repr(item))):
        parse(bad)


@pytest.mark.parametrize("source", ["", "cudnn_flex 12; 0 f32 score", "score", GOOD[5:], "cudnn_flex 6"])
def test_other_texts_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="program"):
        parse(source)


@pytest.mark.parametrize(
    ("root", "spelled"),
    [
        (SCORE, "score"),
        (make("tanh", SCORE / 20.0) * 20.0, "tanh(score / 20) * 20"),
        ((SCORE + 1.0) * (SCORE - 0.5), "(score + 1) * (score - 0.5)"),
        (make("ge", ir.index("q"), ir.index("k")), "q >= kv"),
        (make("not", TRUE), "~true"),
        (make("abs", -SCORE), "|-score|"),
        (ir.cast(ir.index("h"), F32) * ir.operand(2, F32, "bk"), "h * operand2[b, kv]"),
        (ir.const(math.inf, F32), "inf"),
        (ir.const(math.nan, F32), "nan"),
        (ir.operand(0, I32, "") * ir.scalar(1, I32), "operand0 * scalar1"),
    ],
)
def test_infix(root: ir.Expr, spelled: str) -> None:
    assert infix(root) == spelled
