"""What the files of a run's folder say, checked as they are read: people edit, copy and cut them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ...runtime.lines_file import Parse
from ...strict_json import is_int, is_number, read_json

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
    facts = _checked(read_json(file), _RUN, f"{file}")
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
