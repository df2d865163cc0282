"""The folder of a run: who answers, what is asked, the answers, the verdicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config.generate import SamplingConfig
from ...durable_file import write_result
from ...errors import UserError, cut_short
from ...regular_file import is_regular
from ..benchmarks.benchmark import Benchmark, Question
from .engine import Engine
from .saved import read_benchmark_facts, read_run_facts

RUN, BENCHMARK, ANSWERS, VERDICTS, SLOTS = (
    "run.json",
    "benchmark.json",
    "answers.jsonl",
    "verdicts.jsonl",
    "slots.jsonl",
)


_MEANS = {
    "fingerprint": " (a hash over config and weights)",
    "prompts": " (a hash over what the model is given: chat template, tokenizer, end tokens)",
    "questions": " (a hash over questions and what counts as right)",
}
"""Hashes of an identity in words."""


def folder_name(benchmark: str) -> str:
    """A benchmark's name as a folder: `reasoning_gym:chain_sum` becomes `reasoning_gym-chain_sum`."""
    return benchmark.replace(":", "-")


def claim_run(output: Path, engine: Engine, name: str, arm: str, seed: int, about: dict[str, Any]) -> None:
    """Write run.json, or check that the one that is there is of the same run.

    Raises `UserError` naming what differs: answers of two models must not mix.
    """
    identity = {
        "engine": name,
        "arm": arm,
        "fingerprint": engine.about.fingerprint,
        "settings": engine.about.settings,
        "seed": seed,
    }
    facts = {
        "identity": identity,
        "model": engine.about.model,
        "head_flops": engine.about.head_flops,
        "parallel": engine.parallel,
        "environment": about,
        "config": engine.about.config,
        "origin": asdict(engine.about.origin),
    }
    _claim(output / RUN, facts, read_run_facts)


def claim_benchmark(
    folder: Path,
    benchmark: Benchmark,
    questions: list[Question],
    sampling: SamplingConfig,
    samples: int,
    group: int,
    prompts: str,
) -> None:
    """The same for one benchmark's folder; `prompts` is the engine's hash over what it is asked."""
    identity = {
        "benchmark": benchmark.name,
        "questions": digest(questions),
        "count": len(questions),
        "samples": samples,
        "sampling": asdict(sampling),
        "group": group,
        "prompts": prompts,
    }
    facts = {
        "identity": identity,
        "title": benchmark.title,
        "uids": [question.uid for question in questions],
        "kinds": {question.uid: question.kind for question in questions if question.kind},
    }
    _claim(folder / BENCHMARK, facts, read_benchmark_facts)


def _claim(file: Path, facts: dict, read: Callable[[Path], dict]) -> None:
    facts = json.loads(json.dumps(facts))
    if not is_regular(file):
        write_result("--output", file, json.dumps(facts, indent=1) + "\n")
        return
    before, now = read(file)["identity"], facts["identity"]
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(
                f"--output {file.parent}: holds answers of another run: {key} was {_brief(before.get(key))}, now "
                f"{_brief(now[key])}{_MEANS.get(key, '')}; take another folder, or the same settings"
            )


def _brief(value: Any) -> str:
    return cut_short(value if isinstance(value, str) else json.dumps(value), 120)


def digest(questions: list[Question]) -> str:
    """Hash over what is asked and what counts as right."""
    whole = hashlib.sha256()
    for question in questions:
        whole.update(json.dumps([question.uid, question.messages, question.reference], default=str).encode())
    return whole.hexdigest()[:32]
