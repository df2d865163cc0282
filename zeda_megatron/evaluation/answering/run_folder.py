"""The folder of a run: who answers, what is asked, the answers, the verdicts.

What its files say is checked as they are read: people edit, copy and cut them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config.generate import SamplingConfig
from ...durable_file import write_result
from ...errors import UserError, cut_short, shown
from ...regular_file import is_regular
from ...runtime.lines_file import Parse
from ...strict_json import is_int, is_number, read_json
from ..benchmarks.benchmark import Benchmark, Question
from .engine import Engine

Check = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""
_MOST = 1 << 40
_DEEPEST = 20


def is_deep(value: Any, left: int = _DEEPEST) -> bool:
    """Whether lists and objects lie in one another more than so many times."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return left == 0 or any(is_deep(item, left - 1) for item in items)


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and least <= value <= most


def _whole(least: int) -> Check:
    return f"a whole number from {least}", lambda value: is_int(value) and least <= value < _MOST


_TEXT: Check = ("text", lambda value: isinstance(value, str))
_TEXTS: Check = (
    "an object of texts",
    lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
)
_OBJECT: Check = ("an object", lambda value: isinstance(value, dict))
_RUN: dict[str, Check] = {
    "identity": _OBJECT,
    "model": _TEXT,
    "head_flops": ("a number from 0", _number(0.0, 1e6)),
    "stand_in_flops": ("a number from 0", _number(0.0, 1e6)),
    "parallel": _whole(1),
    "environment": _TEXTS,
    "config": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
_ORIGIN: dict[str, Check] = {
    "zero_experts": ("true, false or null", lambda value: value is None or isinstance(value, bool)),
    "adapted_steps": (
        "null or a whole number from 0",
        lambda value: value is None or (is_int(value) and 0 <= value < _MOST),
    ),
}
_RUN_IDENTITY: dict[str, Check] = {
    "engine": _TEXT,
    "arm": _TEXT,
    "fingerprint": _TEXT,
    "settings": ("an object", lambda value: isinstance(value, dict) and not is_deep(value)),
    "seed": ("a whole number", is_int),
}
_BENCHMARK: dict[str, Check] = {
    "identity": _OBJECT,
    "title": _TEXT,
    "uids": (
        "a list of different texts",
        lambda value: isinstance(value, list)
        and all(isinstance(uid, str) for uid in value)
        and len(set(value)) == len(value) > 0,
    ),
    "kinds": _TEXTS,
}
_BENCHMARK_IDENTITY: dict[str, Check] = {
    "benchmark": _TEXT,
    "questions": _TEXT,
    "count": _whole(1),
    "samples": _whole(1),
}
_WHICH: dict[str, Check] = {"uid": _TEXT, "sample": _whole(0)}
_ANSWER: dict[str, Check] = _WHICH | {
    "text": _TEXT,
    "tokens": _whole(0),
    "prompt_tokens": _whole(0),
    "finish": ("stop or length", lambda value: value in ("stop", "length")),
    "zero_share": ("null or a share", lambda value: value is None or _number(0.0, 1.0)(value)),
    "seconds": ("a number from 0", _number(0.0, 1e9)),
}
_VERDICT: dict[str, Check] = _WHICH | {
    "right": ("true or false", lambda value: isinstance(value, bool)),
    "note": _TEXT,
}
_SLOTS: dict[str, Check] = {"zero": _whole(0), "routed": _whole(1)}


def read_run_facts(file: Path) -> dict[str, Any]:
    """run.json. Raises `UserError` naming file and key, as all of these do."""
    facts = read_json(file)
    if isinstance(facts, dict):
        facts.setdefault("stand_in_flops", 0.0)  # runs of older versions have none
    _checked(facts, _RUN, f"{file}")
    _checked(facts["identity"], _RUN_IDENTITY, f"{file}: identity")
    if "origin" in facts:  # runs of older versions have none
        _checked(facts["origin"], _ORIGIN, f"{file}: origin")
    return facts


def read_benchmark_facts(file: Path) -> dict[str, Any]:
    """benchmark.json."""
    facts = _checked(read_json(file), _BENCHMARK, f"{file}")
    identity = _checked(facts["identity"], _BENCHMARK_IDENTITY, f"{file}: identity")
    if identity["count"] != len(facts["uids"]):
        raise UserError(f"{file}: names {len(facts['uids'])} uids, but its count is {identity['count']}")
    return facts


def answers_of(uids: Collection[str], samples: int) -> Parse:
    """Reads lines of answers.jsonl, of these questions and so many answers to each; every answer comes once."""
    return _lines_of(_ANSWER, uids, samples)


def verdicts_of(uids: Collection[str], samples: int) -> Parse:
    """The same for verdicts.jsonl."""
    return _lines_of(_VERDICT, uids, samples)


def slots_line(line: Any, where: str) -> dict[str, Any]:
    """A line of slots.jsonl."""
    counted = _checked(line, _SLOTS, where)
    if counted["zero"] > counted["routed"]:
        raise UserError(f"{where}: zero {counted['zero']} is more than routed {counted['routed']}")
    return counted


def _lines_of(keys: dict[str, Check], uids: Collection[str], samples: int) -> Parse:
    known, seen = set(uids), set()

    def parse(line: Any, where: str) -> dict[str, Any]:
        which = _checked(line, keys, where)["uid"], line["sample"]
        if which[0] not in known:
            raise UserError(f"{where}: uid {shown(which[0])} is no question of this benchmark")
        if which[1] >= samples:
            raise UserError(f"{where}: sample {which[1]} is one too many, each question has {samples}")
        if which in seen:
            raise UserError(
                f"{where}: sample {which[1]} of {shown(which[0])} comes twice; delete one of the lines"
            )
        seen.add(which)
        return line

    return parse


def _checked(value: Any, keys: dict[str, Check], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    for key, (what, right) in keys.items():
        if key not in value:
            raise UserError(f"{where}: has no key {key}; restore it, or run again into another --output")
        if not right(value[key]):
            raise UserError(f"{where}: {key} must be {what}, found {shown(value[key])}")
    return value


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
        "stand_in_flops": engine.about.stand_in_flops,
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
