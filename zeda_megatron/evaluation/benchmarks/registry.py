"""All benchmarks by name."""

from __future__ import annotations

import difflib
from importlib.util import find_spec

from ...errors import UserError
from .benchmark import Benchmark, Question
from .checkable import GYM, TASKS, gym_benchmark
from .human_eval import CODE
from .instruction_following import INSTRUCTION_FOLLOWING
from .livecodebench import LIVECODEBENCH
from .mathematics import MATHEMATICS
from .multiple_choice import MULTIPLE_CHOICE
from .rows import read_rows

BENCHMARKS = {
    one.name: one
    for one in (*MATHEMATICS, *LIVECODEBENCH, *CODE, *INSTRUCTION_FOLLOWING, *MULTIPLE_CHOICE, TASKS)
}
PAPER = (
    "aime-2024 aime-2025 aime-2026 gsm8k math-500 livecodebench-v5 livecodebench-v6 "
    "humanevalplus mbppplus ifbench ifeval"
).split()
"""The eleven of the paper's Table 1."""
OUT_OF_DOMAIN = ("mmlu-redux-2.0", "gpqa-diamond")
GROUPS = {"paper": PAPER, "out-of-domain": list(OUT_OF_DOMAIN)}


def find(names: list[str], settings: dict[str, dict] | None = None) -> list[Benchmark]:
    """Benchmarks by name; `paper` and `out-of-domain` stand for their groups. Raises `UserError` for unknown ones."""
    found: dict[str, Benchmark] = {}
    for name in (one for given in names for one in GROUPS.get(given, [given])):
        if name == GYM or name.startswith(f"{GYM}:"):
            found[name] = gym_benchmark(name, settings)
        elif name in BENCHMARKS:
            found[name] = BENCHMARKS[name]
        else:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"--benchmarks {name} is unknown{hint} (known: {', '.join(BENCHMARKS)}, {GYM}:FAMILY, "
                f"{', '.join(GROUPS)})"
            )
    return list(found.values())


def load(benchmark: Benchmark, data: str | None, limit: int | None, seed: int) -> list[Question]:
    """The questions of a benchmark, at most `limit`, in the order of its file.

    Raises:
        UserError: a package of the verifier, the data, or something else that the verifier needs is missing; two
            questions of one name.
    """
    for module in benchmark.packages:
        if find_spec(module) is None:
            raise UserError(f"{benchmark.name}: the verifier needs {module}: pip install -e '.[evaluation]'")
    if benchmark.generate is not None:
        questions = benchmark.generate(limit or 100, seed)
    else:
        questions = benchmark.questions(read_rows(benchmark, data))[:limit]
    seen: set[str] = set()
    for question in questions:
        if question.uid in seen:
            raise UserError(f"{benchmark.name}: two questions are called {question.uid}")
        seen.add(question.uid)
    if not questions:
        raise UserError(f"{benchmark.name}: its data hold no questions")
    if benchmark.check is not None:
        benchmark.check(questions)
    return questions
