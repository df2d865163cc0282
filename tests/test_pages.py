"""The pages: links lead somewhere, the index has every page, commands are understood by the programs that they name,
error lines are those that the code says."""

import ast
import re
from pathlib import Path

import pytest
from page_commands import LAUNCH, check, commands, commented, inline, program

from zeda_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("kernels/*.md"),
    )
)
GUIDES = [
    page for page in PAGES if page.parent == ROOT / "docs" and page.name not in ("index.md", "pitfalls.md")
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)).strip().lower() for line in headings
    )
    return {line.replace(" ", "-") for line in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
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
    assert {page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"} <= linked


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_every_guide_says_first_who_needs_it(page):
    assert re.match(r"# .*\n\nYou need this if ", page.read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_is_understood(page, monkeypatch):
    """Files are there, and subcommands and flags are those of the programs: in blocks of bash and within sentences."""
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    for words in commands(text, False):
        check(words)
    for words in inline(text):
        check(words, whole=False)


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_a_guide_marks_the_commands_that_need_a_gpu(page):
    """Training, fitting and serving of the large models: `# GPU` behind the command or in the line above it."""
    for words, comment in commented(page.read_text(), False):
        file = (program(words) or ("", ()))[0]
        large = any(re.match(r"examples/(qwen3_30b|glm_4_7)", word) for word in words)
        if (file == LAUNCH and large) or words[:2] == ["vllm", "serve"] or "--nproc-per-node" in words:
            assert "# GPU" in comment, " ".join(words)


@pytest.mark.parametrize(
    "line",
    [
        "zeda fit --no-such-flag",
        "zeda evaluate walk --runs a",
        "zeda train --pretrained-checkpont x",
        f"torchrun --nproc-per-node 8 {LAUNCH} --config examples/none.yaml",
        f"bash {LAUNCH} --config FILE.yaml --no-such-flag",
        "python tools/none.py",
        "python tools/quantize.py --hf a --bits 4",
        "python tools/checkpoint_convert.py verify --mtp",
        "python -m tools.measure.serving --shares 0 --batch 8",
        "python -m zeda_megatron plan flops --gpu-momory 8",
        "bash launch/slurm/submit_chain.sh my_cluster.sh --only stage1",
        "bash examples/quickstart/run.sh --models glm",
        "sbatch --nodes=2 launch/slurm/stage3.sbatch my_cluster.sh",
        "pytest tests/none.py",
    ],
)
def test_this_check_sees_a_wrong_command(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = commands(f"```bash\n{line}   # a comment\n```", False)
    with pytest.raises((AssertionError, UserError)):
        check(words)


def test_every_pitfall_names_a_test_that_is_there():
    rows = re.findall(
        r"^\| .* \| `(tests/\S+\.py)::(\w+)` \|$", (ROOT / "docs" / "pitfalls.md").read_text(), re.M
    )
    assert len(rows) >= 15
    for file, test in rows:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"
    assert len(rows) == (ROOT / "docs" / "pitfalls.md").read_text().count("\n| ") - 1


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
