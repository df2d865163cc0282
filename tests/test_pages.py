"""The pages: links lead somewhere, the index has every page, error lines are those that the code says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/*.md"),
        *ROOT.glob("kernels/*.md"),
    )
)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)).strip().lower() for line in headings
    )
    return {line.replace(" ", "-") for line in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not heading or heading in anchors(place), target


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    linked = {
        (ROOT / "docs" / target.partition("#")[0]).resolve() for target in re.findall(r"\]\((.*?)\)", index)
    }
    assert {page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"} <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def said() -> str:
    """All texts of the package but docstrings, each on a line; what a message fills in is `…`."""
    found = []
    for file in (ROOT / "zeda_megatron").rglob("*.py"):
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.append(node.value)
    return "\n".join(found)


def test_the_lines_of_the_page_of_errors_are_said_by_the_code():
    page, everything = (ROOT / "docs" / "troubleshooting.md").read_text(), said()
    rows = re.findall(r"^\| (.*?) \| ", page, re.MULTILINE)[2:]
    assert len(rows) >= 20
    for row in rows:
        if row.startswith(("vLLM", "transformers")):
            continue
        for line in re.findall(r"`(.*?)`", row):
            for part in re.split(r"\s*…[;:]?\s*", line):
                assert len(part) < 8 or part.strip(" ;:") in everything, part
