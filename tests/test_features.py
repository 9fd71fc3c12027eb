"""The table of features in docs/training.md: each row names a test that is there, or a file of tests."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.docs_tables import shown

ROOT = Path(__file__).parents[1]
ROWS = shown("training.md", "features").strip().splitlines()[2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_names_a_test(row):
    file, name = re.fullmatch(r".*\| (tests/\S+\.py)(?: `(test_\w+)`)? \|", row).groups()
    body = ast.parse((ROOT / file).read_text()).body
    names = {n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    assert name in names if name else names


def test_there_are_rows():
    assert len(ROWS) >= 25
