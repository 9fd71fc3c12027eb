"""README.md, CONTRIBUTING.md and docs/: links, names and commands in them exist, README's code runs, and each reason
has its section.

It must not know what the pages say. `mkdocs build --strict` in .ci/run looks at the rest.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.reasons import Code

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
}
FILES = [
    str(path.relative_to(ROOT))
    for folder in ("cudnn_flex_compile", "tests", "examples")
    for path in (ROOT / folder).rglob("*.*")
]
USERS = {"script.py", "model.py"}  # files of the reader, in examples
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES)


def prose(page):
    """The text without code blocks."""
    return FENCE.sub("", PAGES[page])


def anchors(page):
    """Those of the headings, as GitHub and mkdocs both name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


def test_each_reason_has_its_section():
    found = re.findall(r"^### ([A-Z_]+)$", PAGES["docs/limits.md"], re.MULTILINE)
    assert sorted(found) == sorted(code.name for code in Code)
    for code in Code:
        page, anchor = code.page.split("#")
        assert anchor in anchors(page)


@pages
def test_headings_can_be_linked(page):
    found = anchors(page)
    assert len(set(found)) == len(found)
    assert not [anchor for anchor in found if "--" in anchor], "mkdocs and GitHub give it different names"


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), target


@pages
def test_files_that_are_named_exist(page):
    shell = "\n".join(body for _, language, body in FENCE.findall(PAGES[page]) if language == "sh")
    for name in re.findall(r"[\w./-]*\w\.(?:py|csv|md)\b", prose(page) + shell):
        known = name.lstrip("./") in USERS or (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists()
        assert known or any(file.endswith("/" + name.lstrip("./")) for file in FILES), name


@pages
def test_modules_that_commands_run_exist(page):
    for module in re.findall(r"python3? -m ((?:tests|cudnn_flex_compile)[\w.]*)", PAGES[page]):
        assert importlib.util.find_spec(module), module


@pages
def test_python_blocks_are_python(page):
    for indent, language, body in FENCE.findall(PAGES[page]):
        if language == "python":
            ast.parse(re.sub(f"^{indent}", "", body, flags=re.MULTILINE))


def test_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1200


def test_contributing_is_short():
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 200


def test_readme_starts_with_a_number_and_code():
    lines = PAGES["README.md"].splitlines()
    assert any(re.search(r"\d\.\d+x", line) for line in lines[:15])
    assert "```python" in lines[:25]


def test_readmes_code_runs(capsys):
    def model(q, k, v):
        return flex_attention(q, k, v)

    inputs = torch.randn(3, 1, 2, 64, 16, dtype=torch.bfloat16).unbind()
    names = {"model": model, "inputs": inputs}
    torch._dynamo.reset()
    with torch.no_grad():
        for _, language, body in FENCE.findall(PAGES["README.md"]):
            if language == "python":
                exec(body, names)  # our own file
        out, expected = names["attention"](*inputs), flex_attention(*inputs, score_mod=names["soft_cap"])
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    assert "1 flex_attention call: 1 lowered to cuDNN, 0 kept" in capsys.readouterr().out
