"""Figures of arms and benchmarks, from runs."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean, median

from ...config.zero_experts import ZeroExpertConfig
from ...planning.flops import Geometry, flops_per_token
from .results import BenchmarkResult, RunResult
from .statistics import Estimate, accuracy, average, difference, p_value_of, paired_p_value


def compare(runs: list[RunResult], teacher_name: str) -> dict:
    """`{"teacher": NAME, "benchmarks": [...], "arms": {NAME: ARM}}`, the teacher first if it is there.

    ARM has `benchmarks` (name to figures, see `_benchmark`), and over the benchmarks that all arms have answered:
    `accuracy`, `difference` to the teacher (value, low, high), `p_value`, `zero_share`, `answer_tokens`; then
    `expert_flops`, `total_flops`, `expert_weights` (shares of the teacher's), `tokens_per_second`. What the model's
    own files or the flags tell: `zero_experts` (bool), `adapted_steps`.
    Shares and accuracies lie between 0 and 1; what cannot be told is None.
    """
    runs = sorted(runs, key=lambda run: run.arm != teacher_name)
    teacher = runs[0] if runs and runs[0].arm == teacher_name else None
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    shared = [name for name in names if all(_usable(run, name) for run in runs)]
    arms = {run.arm: _arm(run, teacher, names, shared) for run in runs}
    titles = {name: run.benchmarks[name].title for run in runs for name in run.benchmarks}
    return {
        "teacher": teacher_name,
        "benchmarks": [{"name": n, "title": titles[n], "shared": n in shared} for n in names],
        "arms": arms,
    }


def _usable(run: RunResult, name: str) -> bool:
    return name in run.benchmarks and run.benchmarks[name].complete


def _arm(run: RunResult, teacher: RunResult | None, names: list[str], shared: list[str]) -> dict:
    rows = {n: _benchmark(run, teacher, run.benchmarks[n]) for n in names if n in run.benchmarks}
    good = {name: rows[name] for name in shared}
    gaps = [Estimate(**row["difference"]) for row in good.values() if row["difference"]]
    share = _mean(row["zero_share"] for row in good.values())
    made = {
        "engine": run.engine,
        "model": run.model,
        "settings": run.settings,
        **asdict(run.origin),
        "accuracy": _mean_accuracy(good.values()),
        "difference": None,
        "p_value": None,
        "zero_share": share,
        "answer_tokens": _mean(row["answer_tokens"] for row in good.values()),
        "tokens_per_second": _mean(row["tokens_per_second"] for row in good.values()),
        **_cost(run, teacher, share, _mean(row["keys"] for row in good.values())),
        "benchmarks": rows,
    }
    if gaps and len(gaps) == len(good) and run is not teacher:
        gap = average(gaps)
        only = next(iter(good.values()))
        made["difference"] = _plain(gap)
        made["p_value"] = p_value_of(gap) if len(gaps) > 1 else only["p_value"]
    return made


def _mean_accuracy(rows) -> dict | None:
    known = [Estimate(**row["accuracy"]) for row in rows]
    if not known:
        return None
    mean = average(known)
    return _plain(Estimate(mean.value, max(mean.low, 0.0), min(mean.high, 1.0)))


def _benchmark(run: RunResult, teacher: RunResult | None, result: BenchmarkResult) -> dict:
    """Figures of one arm on one benchmark; without answers most are None."""
    lines = result.answers
    seconds = sum(line["seconds"] for line in lines)
    row = {
        "questions": len(result.by_question),
        "asked": result.identity["count"],
        "samples": result.identity["samples"],
        "complete": result.complete,
        "accuracy": None,
        "difference": None,
        "p_value": None,
        "zero_share": result.zero_share,
        "answer_tokens": _mean(line["tokens"] for line in lines),
        "answer_tokens_median": median(line["tokens"] for line in lines) if lines else None,
        "cut_off": _mean(line["finish"] == "length" for line in lines),
        "keys": _mean(line["prompt_tokens"] + line["tokens"] / 2 for line in lines),
        "tokens_per_second": sum(line["tokens"] for line in lines) * run.parallel / seconds
        if seconds > 1e-9
        else None,
        "by_kind": _by_kind(result),
    }
    if not lines:
        return row
    row["accuracy"] = _plain(accuracy(list(result.by_question.values()), len(lines)))
    theirs = teacher.benchmarks.get(result.name) if teacher is not None and run is not teacher else None
    if theirs is not None and theirs.identity["questions"] == result.identity["questions"]:
        common = [uid for uid in result.by_question if uid in theirs.by_question]
        gaps = [result.by_question[uid] - theirs.by_question[uid] for uid in common]
        if gaps:
            row["difference"], row["p_value"] = _plain(difference(gaps)), paired_p_value(gaps)
    return row


def _by_kind(result: BenchmarkResult) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for uid, share in result.by_question.items():
        if result.kinds.get(uid):
            groups.setdefault(result.kinds[uid], []).append(share)
    return {kind: fmean(shares) for kind, shares in sorted(groups.items())}


def _cost(run: RunResult, teacher: RunResult | None, share: float | None, keys: float | None) -> dict:
    """FLOPs of a token and weights, as shares of the teacher's; counted by `flops.flops_per_token`."""
    cost = {"expert_flops": None, "total_flops": None, "expert_weights": None}
    extra = None if share is None else run.head_flops + share * run.stand_in_flops
    if run.config is None:
        return cost if share is None else cost | {"expert_flops": 1.0 - share + extra}
    mine = Geometry.from_config(run.config, f"{run.folder}: config")
    config = teacher.config if teacher is not None else None
    theirs = Geometry.from_config(config, f"{teacher.folder}: config") if config else mine
    cost["expert_weights"] = mine.routed_parameters / theirs.routed_parameters
    if share is None:
        return cost
    static = flops_per_token(theirs, keys or 0.0)
    now = flops_per_token(mine, keys or 0.0, share, ZeroExpertConfig(mine.zero_experts))
    heads = extra * flops_per_token(mine, 0.0).routed_experts
    cost["expert_flops"] = (now.routed_experts + heads) / static.routed_experts
    cost["total_flops"] = (now.total + heads) / static.total
    return cost


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _mean(values) -> float | None:
    values = list(values)
    return None if not values or any(v is None for v in values) else fmean(values)
