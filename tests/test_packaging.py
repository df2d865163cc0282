"""What is installed is what the repository holds, and the metadata keeps its promises."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from zeda_megatron.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "zeda_megatron"
TOP = {
    *(PACKAGE, "examples", "launch", "kernels", "tools", "tests", "docs", ".ci"),
    *(
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        ".gitignore",
    ),
}
"""Everything at the top of the repository."""


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def tracked() -> list[Path]:
    """Files that git knows; without git (a downloaded archive) everything that is not ignored by name."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    skipped = re.compile(
        r"(^|/)(\.git|\.venv|\.\w+_cache|__pycache__|[^/]*\.egg-info|build|dist|runs|out|shared)/"
    )
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path for path in files if not skipped.search(str(path))]


def test_the_top_level_holds_what_the_plan_names_and_nothing_else():
    found = {path.parts[0] for path in tracked()}
    assert found - TOP == set(), "not in the plan"
    # docs/ and README.md come with their first content.
    assert TOP - found <= {"docs", "README.md"}, "missing"


def test_every_requirement_is_valid_and_every_extra_is_there(setup_cfg):
    needed = {requirement.name for requirement in requirements(setup_cfg["options"]["install_requires"])}
    assert {"torch", "transformers", "psutil"} <= needed
    core = [r for r in requirements(setup_cfg["options"]["install_requires"]) if r.name == "megatron-core"]
    (versions,) = [r.specifier for r in core]  # those that the CPU runtime knows
    assert list(versions.filter(["0.15.3", "0.16.1", "0.17.0", "0.18.1", "0.19.2", "0.20.0"])) == [
        "0.16.1",
        "0.19.2",
    ]
    extras = setup_cfg["options.extras_require"]
    assert {"te", "apex", "modelopt", "serve", "quickstart", "test"} <= set(extras)
    for name in extras:
        assert requirements(extras[name]) or name == "apex", name


def test_no_extra_installs_the_unrelated_apex_of_pypi(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    named = [r.name for name in extras for r in requirements(extras[name])]
    assert "apex" not in named
    assert requirements(extras["apex"]) == []


def test_tools_of_the_tests_are_pinned(setup_cfg):
    pins = {r.name: str(r.specifier) for r in requirements(setup_cfg["options.extras_require"]["test"])}
    for tool in ("pytest", "pytest-timeout", "ruff", "matplotlib", "scipy"):
        assert pins[tool].startswith("=="), tool


def test_what_makes_reports_comes_with_the_extras_that_make_them(setup_cfg):
    for extra in ("quickstart", "evaluation"):
        named = {r.name for r in requirements(setup_cfg["options.extras_require"][extra])}
        assert {"matplotlib", "scipy"} <= named


def install(source: Path, site: Path) -> None:
    """What `pip install` makes of a folder, without the network."""
    line = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    line += ["--disable-pip-version-check", "--no-compile", "--target", str(site), str(source)]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull}
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Both distributions in one folder, as pip installs them."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in tracked():  # a build leaves folders behind: not in the checkout
        if path.parts[0] in (PACKAGE, "kernels", "launch", "examples") or len(path.parts) == 1:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    (source / "README.md").touch()
    install(source, site)
    install(source / "kernels", site)
    return site


def test_an_installation_holds_every_file_of_both_packages(installed):
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    mine, kernels = ({path for path in found if path.parts[0] == name} for name in (PACKAGE, "zeda_kernels"))
    assert mine == {path for path in tracked() if path.parts[0] == PACKAGE}
    assert Path(PACKAGE, "serving", "transformers", "modeling_qwen3_moe_zero.py") in mine
    assert Path(PACKAGE, "evaluation", "comparison", "templates", "page.html") in mine
    inside = (path.relative_to("kernels") for path in tracked() if path.parts[0] == "kernels")
    assert kernels == {path for path in inside if path.parts[0] == "zeda_kernels"}
    assert Path("zeda_kernels", "csrc", "api.cu") in kernels


def test_an_installed_package_finds_the_installed_kernels(installed, tmp_path):
    code = "from zeda_megatron.ops.expert_kernels import find; print(find().mlp.__code__.co_filename)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.stdout.strip() == str(installed / "zeda_kernels" / "experts.py"), done.stderr


def zeda(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`zeda` as installed, in a folder that has nothing to do with the checkout."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "SLURM_PROCID")}
    return subprocess.run(
        [sys.executable, installed / "bin" / "zeda", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env | {"PYTHONPATH": str(installed)},
    )


def test_every_command_of_an_installed_zeda_is_told(installed, tmp_path):
    done = zeda(installed, tmp_path)
    assert done.returncode == 0 and len(re.findall(r"^  zeda \w", done.stdout, re.M)) == len(COMMANDS)
    for words in (["nothing"], ["evaluate"], ["train", "--no-such-flag"]):
        done = zeda(installed, tmp_path, *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_installed_recipes_are_planned_and_an_installed_launcher_trains(installed, tmp_path):
    recipe = "examples/qwen3_30b_a3b"
    copied = zeda(installed, tmp_path, "recipes", "--out", ".")
    assert (
        copied.returncode == 0 and (tmp_path / copied.stdout.split("next: ")[1].split(" says ")[0]).is_file()
    )
    assert (tmp_path / "launch" / "slurm" / "submit_chain.sh").is_file()
    sheet = ["--hf", recipe, "--config", f"{recipe}/stage1.yaml", "--gpus", "8", "--gpu-memory", "80"]
    planned = zeda(installed, tmp_path, "plan", "memory", *sheet)
    assert planned.returncode == 0 and "GiB" in planned.stdout, planned.stderr
    flags = ["--pretrained-checkpoint", "none", "--data-path", "none.jsonl"]
    done = zeda(installed, tmp_path, "train", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none" in done.stderr, done.stderr
    again = zeda(installed, tmp_path, "recipes", "--out", ".")
    assert again.returncode == 2 and "has launch already" in again.stderr
