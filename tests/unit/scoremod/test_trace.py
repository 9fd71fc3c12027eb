"""Tracing keeps the value: the traced expression equals the function itself, bit for bit, on every (b, h, q, kv)."""

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I64
from cudnn_flex_compile.scoremod.ranges import narrow
from tests.unit.evaluate import differing, direct, interpreted, scores, traced
from tests.unit.generate import Grammar, Mod, mask_mods, score_mods

WILD = Grammar(smooth=False, pairs=True)


@settings(max_examples=400)
@given(score_mods(WILD))
def test_score_mods_keep_their_value(mod: Mod) -> None:
    score = scores()
    expected, expression = direct(mod, score), traced(mod)
    assert differing(interpreted(expression, score), expected) == 0
    assert differing(interpreted(narrow(expression), score), expected) == 0


@settings(max_examples=400)
@given(mask_mods(Grammar(pairs=True)))
def test_mask_mods_keep_their_value(mod: Mod) -> None:
    score = scores()
    expected, expression = direct(mod), traced(mod)
    assert differing(interpreted(expression, score), expected) == 0
    assert differing(interpreted(narrow(expression), score), expected) == 0
