"""The plan of the house: imports run downward, no circles, patching in one room, a docstring in each file."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "zeda_megatron"
FLOORS = {
    "__main__": 8,
    "training": 7,
    "evaluation": 7,
    "fit": 7,
    "convert": 6,
    "distill": 6,
    "planning": 6,
    "serving": 6,
    "models": 5,
    "checkpoint": 4,
    "moe": 4,
    "data": 3,
    "runtime": 3,
    "ops": 2,
    "config": 1,
    "durable_file": 0,
    "errors": 0,
    "regular_file": 0,
    "strict_json": 0,
    "text_table": 0,
}
"""Floor of each room (folder or single file). On one floor rooms may use each other, but not in a circle."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, ast.Module]:
    """All modules of the package under `root`, parsed."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {module_name(path, root): ast.parse(path.read_text(), str(path)) for path in files}


def imports(name: str, tree: ast.Module, modules: dict, is_package: bool) -> set[str]:
    """Modules of the package that a module imports anywhere, functions and type-checking blocks included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if is_package else name.split(".")[:-1]
                here = here[: len(here) - node.level + 1]
                base = ".".join([*here, base] if base else here)
            for alias in node.names:
                longer = f"{base}.{alias.name}"
                found.add(longer if longer in modules else base)
    return {module for module in found if module.split(".")[0] == PACKAGE and module != name}


def import_graph(root: Path) -> dict[str, set[str]]:
    modules = read_modules(root)
    packages = {module_name(path, root) for path in (root / PACKAGE).rglob("__init__.py")}
    return {name: imports(name, tree, modules, name in packages) for name, tree in modules.items()}


def room(module: str) -> str:
    """`zeda_megatron.moe.router` -> `moe`; the package itself is no room."""
    return (module.split(".") + [""])[1]


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} (floor {FLOORS.get(room(name))}) imports {target} (floor {FLOORS.get(room(target))})"
        for name, targets in graph.items()
        for target in sorted(targets)
        if room(name) and room(target) and FLOORS.get(room(target), 99) > FLOORS.get(room(name), -1)
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def rooms_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        rooms.setdefault(room(name), set()).update(
            room(t) for t in targets if room(t) not in ("", room(name))
        )
    return rooms


def patches(tree: ast.Module) -> list[str]:
    """Assignments to attributes of what was imported from other projects, and setattr or delattr on it."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {
                (a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith(PACKAGE)
            }
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and not (node.module or "").startswith(PACKAGE)
        ):
            foreign |= {a.asname or a.name for a in node.names}

    def reaches(node: ast.expr) -> bool:
        if ast.unparse(node).startswith("torch.backends."):
            return False  # PyTorch's own switches, made to be set
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in foreign

    found = []
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
            found += [
                f"line {node.lineno}: {ast.unparse(t)}"
                for t in flat
                if isinstance(t, ast.Attribute) and reaches(t)
            ]
        setter = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr")
        if setter and node.args and reaches(node.args[0]):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_every_room_has_a_floor():
    rooms = {room(name) for name in import_graph(ROOT)} - {""}
    assert rooms <= set(FLOORS), f"give these rooms a floor in the table above: {sorted(rooms - set(FLOORS))}"


def test_no_folder_has_more_than_15_files():
    folders = Counter(path.parent for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 15} == {}


def test_no_two_test_files_have_one_name():
    """pytest imports a test file by its name alone, and collects but the first of two."""
    files = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name: count for name, count in files.items() if count > 1} == {}


def test_imports_run_downward():
    assert upward_imports(import_graph(ROOT)) == []


def test_no_circles_between_files_or_rooms():
    graph = import_graph(ROOT)
    assert circle(graph) == []
    assert circle(rooms_graph(graph)) == []


SETTINGS = {
    # The driver's own process exists to run one program with these streams.
    f"{PACKAGE}.evaluation.benchmarks.answer_driver": {
        "sys.stdin",
        "sys.__stdin__",
        "sys.stdout",
        "sys.__stdout__",
    },
    # Likewise: EvalPlus runs a program in a namespace of its own, where builtins are all that it shares.
    f"{PACKAGE}.evaluation.benchmarks.check_driver": {"builtins.zeda_answer"},
    # langdetect's documented way to be deterministic.
    f"{PACKAGE}.evaluation.benchmarks.instruction_following": {"DetectorFactory.seed"},
}
"""What files outside runtime/ may set in another project's modules: settings meant to be set."""


def test_other_projects_are_patched_in_runtime_only():
    found = {name: patches(tree) for name, tree in read_modules(ROOT).items() if room(name) != "runtime"}
    for name, allowed in SETTINGS.items():
        found[name] = [line for line in found[name] if line.partition(": ")[2] not in allowed]
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_files_that_travel_with_checkpoints_import_one_another_alone():
    graph, prefix = import_graph(ROOT), f"{PACKAGE}.serving.transformers."
    shared = {prefix + "zero_expert_model", prefix + "zero_expert_routing"}
    travel = {n: t for n, t in graph.items() if n in shared or n.startswith(f"{prefix}modeling_")}
    assert len(travel) > len(shared)
    assert all(targets <= shared for targets in travel.values())


def test_kernels_are_known_by_their_entry_point_alone():
    for name, tree in read_modules(ROOT).items():
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        named = [getattr(node, "module", None) or node.names[0].name for node in found]
        assert not any(module.split(".")[0] == "zeda_kernels" for module in named), name


@pytest.mark.parametrize("folder", [PACKAGE, "tools", "kernels"])
def test_every_file_says_what_it_is(folder):
    silent = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def house(tmp_path: Path, **files: str) -> Path:
    """A small package with the given files (`moe__router` is `moe/router.py`)."""
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in {path.parent, tmp_path / PACKAGE}:
            (folder / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "from ..training import loop",
        "from ..training.loop import run",
        "import zeda_megatron.training.loop",
        "from zeda_megatron.training import loop",
        "def f():\n    from ..training.loop import run",
    ],
)
def test_this_check_sees_an_upward_import_in_any_spelling(tmp_path, line):
    graph = import_graph(
        house(tmp_path, moe__router=line, training__loop="from ..moe import spec", moe__spec="")
    )
    assert upward_imports(graph) == [
        "zeda_megatron.moe.router (floor 4) imports zeda_megatron.training.loop (floor 7)"
    ]


def test_this_check_sees_circles_of_files_and_of_rooms(tmp_path):
    files = import_graph(house(tmp_path / "a", moe__x="from . import y", moe__y="from .x import z"))
    assert set(circle(files)) == {"zeda_megatron.moe.x", "zeda_megatron.moe.y"}
    rooms = import_graph(
        house(
            tmp_path / "b",
            ops__a="from ..data.b import f",
            data__b="",
            data__c="from ..ops.d import g",
            ops__d="",
        )
    )
    assert circle(rooms) == [] and set(circle(rooms_graph(rooms))) == {"ops", "data"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import torch\ntorch.cuda.synchronize = None", 1),
        ("import torch\nsetattr(torch.cuda, 'x', 1)", 1),
        ("import torch as t\na, t.y = 1, 2", 1),
        ("from megatron.core import MoELayer\nMoELayer.forward = print", 1),
        ("import torch\ndel torch.x", 1),
        ("import torch\nmodel = torch.nn.Linear(1, 1)\nmodel.weight = None", 0),
        ("import torch\ntorch.backends.cuda.matmul.allow_tf32 = True", 0),
        ("from ..moe import spec\nspec.router = 1", 0),
    ],
)
def test_this_check_tells_patching_from_plain_assignment(text, count):
    assert len(patches(ast.parse(text))) == count


def test_no_command_takes_part_of_a_flag_for_the_whole():
    """`--num-zero 6` must not mean `--num-zero-experts 6` today and something else tomorrow."""
    found = []
    for folder in (PACKAGE, "tools", "examples", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                made = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
                if made in ("ArgumentParser", "add_parser", "_Parser"):
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if given.get("allow_abbrev") != "False":
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
