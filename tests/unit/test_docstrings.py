"""Docstrings and comments of the package are sentences: they begin with a subject or a verb, and not in the middle."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cudnn_flex_compile"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FRAGMENT = re.compile(r"(Of|What|Which|Whose|That of|As|Knows nothing of)\b")


def documented(text):
    """The docstrings of a file, and the comments that have a line of their own and begin a paragraph."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED):
            yield from (ast.get_docstring(node) or "").split("\n\n")
    above = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            if above != token.start[0] - 1:
                yield token.string.removeprefix("#").strip()
            above = token.start[0]


@pytest.mark.parametrize("name", FILES)
def test_sentences_begin_with_a_subject_or_a_verb(name):
    found = [text.splitlines()[0] for text in documented(FILES[name].read_text()) if FRAGMENT.match(text)]
    assert not found, "\n".join(found)
