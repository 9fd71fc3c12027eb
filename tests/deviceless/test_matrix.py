"""The support matrix is that of the installed cuDNN, or no worse than the last recorded one; docs/support.md shows it.

Knows nothing of what the cells should be: they are generated.
"""

from dataclasses import replace

import pytest

from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.versions import cudnn_version
from tests.deviceless import matrix
from tests.deviceless.harness import SMS
from tests.deviceless.matrix import recorded
from tests.support.docs_tables import shown

ONE_OF_EACH = (80, 90, 100, 120)  # kinds of engines
DETERMINISTIC_ROW_VECTORS = 92800  # 9.19 takes none on SM100, 9.28 does; those between were not asked
STALE = "tests/deviceless/matrices is out of date; regenerate it: python3 -m tests.deviceless.matrix --write"


def numbers(version):
    return tuple(map(int, version.split(".")))


def rows(table):
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}


def worse(before, now):
    """Architectures on which a direction was accepted and no longer is."""
    found = []
    for sm, old, new in zip(SMS, *(line.strip("| ").split(" | ")[1:] for line in (before, now)), strict=True):
        for i, direction in enumerate(matrix.DIRECTIONS):
            was, is_now = (cell.split("; ")[min(i, cell.count("; "))] for cell in (old, new))
            if is_now.startswith("(") and not was.startswith("("):
                found.append(f"SM{sm} {direction}: {was} has become {is_now}")
    return found


@pytest.mark.parametrize("name", matrix.CASES)
def test_row(name):
    generated = matrix.row(name)
    if matrix.file().exists():
        assert rows(matrix.file().read_text()).get(name) == generated, STALE
        return
    older = [v for v in recorded() if numbers(v) < numbers(matrix.minor())] or recorded()[:1]
    before = rows(matrix.file(older[-1]).read_text())[name]
    assert not worse(before, generated), f"cuDNN {matrix.minor()} refuses what {older[-1]} accepts"


@pytest.mark.parametrize("name", matrix.CASES)
def test_deterministic_backwards_are_accepted_where_others_are(name):
    """As torch.use_deterministic_algorithms asks for them."""
    plain = {sm: matrix.cell(name, sm, BACKWARD) for sm in ONE_OF_EACH}
    deterministic = replace(matrix.problem(name), deterministic=True).backward()
    found = {sm: matrix.judged(deterministic, sm) for sm in ONE_OF_EACH}
    if cudnn_version() < DETERMINISTIC_ROW_VECTORS and plain[80].text == "row vectors":
        del plain[100], found[100]
    assert found == plain


@pytest.mark.parametrize("version", recorded())
def test_every_file_has_one_row_for_each_case(version):
    table = matrix.file(version).read_text()
    assert list(rows(table)) == list(matrix.CASES), STALE
    head = table.splitlines()[0].strip("| ").split(" | ")
    assert head[0].startswith(f"cuDNN {version}."), STALE
    assert head[1:] == [f"SM{sm}" for sm in SMS], STALE


def test_every_strategy_is_in_the_matrix():
    from cudnn_flex_compile.engine.graph.strategies import STRATEGIES

    table = matrix.file(recorded()[-1]).read_text()
    assert [s.name for s in STRATEGIES if f"| {s.name} |" not in table] == []
    assert "2 parts" in table


def test_the_page_shows_the_newest():
    assert shown(*matrix.PAGE) == matrix.file(recorded()[-1]).read_text(), STALE


def test_a_refusal_is_worse():
    before = "| a | native | chained; 2 parts | chained; (row vectors) | (no engine) | dense | dense | dense |"
    assert not worse(before, before)
    now = "| a | chained | chained; (row vectors) | (row vectors) | (no engine) | (X) | dense | chained |"
    assert worse(before, now) == [
        "SM86 backward: 2 parts has become (row vectors)", "SM89 forward: chained has become (row vectors)",
        "SM100 forward: dense has become (X)", "SM100 backward: dense has become (X)",
    ]  # fmt: skip
