"""What a run's folder holds, read for a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ...models.on_disk import read_facts
from ...regular_file import is_regular
from ...runtime.lines_file import read_whole_lines
from ..answering.engine import Origin
from ..answering.run_folder import (
    ANSWERS,
    BENCHMARK,
    RUN,
    SLOTS,
    VERDICTS,
    answers_of,
    folder_name,
    read_benchmark_facts,
    read_run_facts,
    slots_line,
    verdicts_of,
)


@dataclass(frozen=True)
class BenchmarkResult:
    """One arm's answers to one benchmark."""

    name: str
    title: str
    identity: dict[str, Any]
    """What was asked and how (see `run_folder.claim_benchmark`)."""
    answers: list[dict] = field(repr=False)
    """Lines of answers.jsonl with `right` and `note` of verdicts.jsonl, in the order of questions and samples."""
    slots: tuple[int, int] | None = None
    """(zero, routed), where only a server's sums are known."""
    kinds: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def complete(self) -> bool:
        """Every question has all its answers and verdicts."""
        return len(self.answers) == self.identity["count"] * self.identity["samples"]

    @cached_property
    def by_question(self) -> dict[str, float]:
        """Share of right answers of each question."""
        hits: dict[str, list[bool]] = {}
        for line in self.answers:
            hits.setdefault(line["uid"], []).append(line["right"])
        return {uid: sum(right) / len(right) for uid, right in hits.items()}

    @property
    def zero_share(self) -> float | None:
        """Over all slots of the benchmark; None if neither answers nor server tell."""
        if self.slots is not None:
            return self.slots[0] / self.slots[1]
        known = [line for line in self.answers if line["zero_share"] is not None]
        fed = sum(_fed(line) for line in known)
        if len(known) < len(self.answers) or not fed:
            return None
        return sum(line["zero_share"] * _fed(line) for line in known) / fed


@dataclass(frozen=True)
class RunResult:
    """All that one arm has answered."""

    arm: str
    folder: str
    engine: str
    model: str
    head_flops: float
    stand_in_flops: float
    parallel: int
    config: dict[str, Any] | None = field(repr=False)
    environment: dict[str, str] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    benchmarks: dict[str, BenchmarkResult] = field(repr=False)
    origin: Origin


def _fed(line: dict) -> int:
    """Tokens that were routed: the last one of an answer is not fed."""
    return line["prompt_tokens"] + max(line["tokens"] - 1, 0)


def read_run(folder: str | Path) -> RunResult:
    """Read a run's folder. Raises `UserError` for one that is none, or that is damaged (file and key or line)."""
    root = Path(folder)
    if not is_regular(root / RUN):
        raise UserError(f"--runs {folder}: no {RUN} there; give folders that `evaluation run` has written")
    about = read_run_facts(root / RUN)
    identity = about["identity"]
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and is_regular(path / BENCHMARK)]
    found = [_read_benchmark(path) for path in folders]
    told = about.get("origin")
    try:
        origin = Origin(told["zero_experts"], told["adapted_steps"]) if told else _origin(about)
    except UserError as error:
        raise UserError(f"{root / RUN}: {error}") from None
    return RunResult(
        arm=identity["arm"],
        folder=str(folder),
        engine=identity["engine"],
        model=about["model"],
        head_flops=about["head_flops"],
        stand_in_flops=about["stand_in_flops"],
        parallel=about["parallel"],
        config=about["config"],
        environment=about["environment"],
        settings=identity["settings"],
        benchmarks={one.name: one for one in found},
        origin=origin,
    )


def _origin(about: dict[str, Any]) -> Origin:
    """For a run of an older version, which did not write it down: zeda.json of the checkpoint, else the config."""
    if about["identity"]["engine"] != "megatron":
        return Origin.of_config(about["config"])
    facts = read_facts(about["model"])  # the checkpoint may be gone by now
    return Origin(bool(facts.num_zero_experts), facts.adapted_steps) if facts else Origin()


def _read_benchmark(folder: Path) -> BenchmarkResult:
    about = read_benchmark_facts(folder / BENCHMARK)
    identity, uids = about["identity"], about["uids"]
    if folder.name != folder_name(identity["benchmark"]):
        raise UserError(f"{folder / BENCHMARK}: is of {shown(identity['benchmark'])}, in the wrong folder")
    verdicts, _ = read_whole_lines(folder / VERDICTS, verdicts_of(uids, identity["samples"]))
    by_key = {(line["uid"], line["sample"]): line for line in verdicts}
    parse = answers_of(uids, identity["samples"])

    def without_text(line: Any, where: str) -> dict[str, Any]:
        return {key: value for key, value in parse(line, where).items() if key != "text"}

    lines = []
    for line in read_whole_lines(folder / ANSWERS, without_text)[0]:
        verdict = by_key.get((line["uid"], line["sample"]))
        if verdict is not None:
            lines.append({**line, "right": verdict["right"], "note": verdict["note"]})
    order = {uid: place for place, uid in enumerate(uids)}
    lines.sort(key=lambda line: (order[line["uid"]], line["sample"]))
    counted, _ = read_whole_lines(folder / SLOTS, slots_line)
    slots = (sum(one["zero"] for one in counted), sum(one["routed"] for one in counted)) if counted else None
    return BenchmarkResult(identity["benchmark"], about["title"], identity, lines, slots, about["kinds"])
