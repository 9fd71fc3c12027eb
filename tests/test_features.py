"""README's table of features: each row names a test that is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "README.md").read_text().split("<!-- features -->")[1].split("<!-- /features -->")[0]
ROWS = TABLE.strip().splitlines()[2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_names_a_test(row):
    file, name = re.fullmatch(r".*\| (tests/\S+\.py) `(test_\w+)` \|", row).groups()
    functions = [n for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)]
    assert name in {function.name for function in functions}


def test_there_are_rows():
    assert len(ROWS) >= 10
