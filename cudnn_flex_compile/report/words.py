"""A program in words: its score in infix, its mask as bounds.

Tables and records of calls have these words. The words of a mask's parts are in scoremod/masks/words.py.
"""

from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.words import words
from cudnn_flex_compile.scoremod.text import infix


def describe_score(program: Program) -> str:
    """The score in infix: `tanh(score / 20) * 20`."""
    return infix(program.score)


def describe_mask(program: Program) -> str:
    """The mask in words where it has a name ("causal", "window 256"), else its bounds and what is left, in infix."""
    return ", ".join(words(split(program.mask))) or "none"
