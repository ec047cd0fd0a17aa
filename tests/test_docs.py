"""The documentation's Python runs as printed, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
        ROOT / "recipes" / "README.md",
        ROOT / "results" / "README.md",
        ROOT / "model_cards" / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)


def test_snippets_run():
    """All pages in one process, each with names of its own; the README's needs a trained repository and runs with the
    recipes.
    """
    blocks = [
        block
        for page in PAGES
        if page.parent.name == "docs"
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    ]
    assert len(blocks) >= 3
    code = "\n".join(f"exec(compile({block!r}, 'docs', 'exec'), {{}})" for block in blocks)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            places = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert place in places, f"{page.name} links to {target}#{place}: the headings are {sorted(places)}"
