"""Tables of docs/ that are generated: each stands between the lines <!-- name --> and <!-- /name --> of its page.

It must not know what is in them.
"""

import re
from pathlib import Path

DOCS = next(folder for folder in Path(__file__).parents if (folder / "mkdocs.yml").exists()) / "docs"


def shown(page: str, name: str) -> str:
    """The table as the page has it. Raises ValueError where it has none, or several."""
    found = re.findall(_pattern(name), (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"docs/{page} has {len(found)} tables between <!-- {name} --> and <!-- /{name} -->, not one")
    return found[0]


def show(page: str, name: str, table: str) -> None:
    """Writes the table into the page, in place of the one that is there."""
    text, old = (DOCS / page).read_text(), shown(page, name)
    lines = f"<!-- {name} -->\n{{}}<!-- /{name} -->\n"
    (DOCS / page).write_text(text.replace(lines.format(old), lines.format(table)))


def _pattern(name: str) -> str:
    return rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$"
