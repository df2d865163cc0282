"""What a report's figures say, in one sentence, whoever wins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .legend import legend

BAND = (0.44, 0.56)
"""Zero shares that count as "about half"."""
TIE = 0.10
"""Relative KL difference below which two arms tie: single runs of one arm spread by about as much."""


@dataclass(frozen=True)
class Finding:
    """The comparison at about half of the expert FLOPs."""

    sentence: str
    """The headline."""
    caveat: str = ""
    """A second sentence where another figure contradicts the first."""
    verdict: str = "none"
    """`win`, `tie` or `loss` of our best arm against the best baseline; `alone` if either is missing; `none`
    without data."""
    best: str | None = None
    """The arm with the lowest KL."""
    baseline: str | None = None
    ours: str | None = None


def finding(report: dict) -> Finding:
    """Compare our best arm with the best baseline among those that skip about half of their picks."""
    arms = {
        name: m for name, m in report["arms"].items() if _known(m.get("kl_to_teacher"), m.get("zero_share"))
    }
    half = {name: m for name, m in arms.items() if BAND[0] <= m["zero_share"] <= BAND[1]}
    if not half:
        if not arms:
            return Finding("No arm has both a KL to the teacher and a zero share yet.")
        name = min(arms, key=lambda n: abs(arms[n]["zero_share"] - 0.5))
        return Finding(
            f"No arm skips about half of its picks; the closest, {name}, skips {_share(arms[name])}."
        )
    known = legend(list(half))
    order = sorted(half, key=lambda name: half[name]["kl_to_teacher"])
    ours = next((name for name in order if not known[name].baseline), None)
    baseline = next((name for name in order if known[name].baseline), None)
    best = order[0]
    if ours is None or baseline is None:
        missing = "no baseline" if baseline is None else "only baselines"
        sentence = (
            f"Skipping {_share(half[best])} of its picks, {best} has KL {_kl(half[best])} to the teacher; "
            f"{missing} ran at this share."
        )
        return Finding(sentence, "", "alone", best, baseline, ours)
    mine, theirs = half[ours], half[baseline]
    gap = 1.0 - mine["kl_to_teacher"] / theirs["kl_to_teacher"] if theirs["kl_to_teacher"] > 0 else 0.0
    if _tied(mine, theirs):
        verdict = "tie"
        sentence = (
            f"At about half of the expert FLOPs {ours} and the baseline {baseline} tie: "
            f"KL {_kl(mine)} and {_kl(theirs)} to the teacher."
        )
    elif mine["kl_to_teacher"] < theirs["kl_to_teacher"]:
        verdict = "win"
        sentence = (
            f"At about half of the expert FLOPs {ours} stays closest to the teacher: "
            f"KL {_kl(mine)}, {gap:.0%} below the best baseline, {baseline} ({_kl(theirs)})."
        )
    else:
        verdict = "loss"
        sentence = (
            f"At about half of the expert FLOPs the baseline {baseline} wins: "
            f"KL {_kl(theirs)} to the teacher, against {_kl(mine)} for {ours}, the best of ours."
        )
    pair = (baseline, theirs, ours, mine) if verdict == "loss" else (ours, mine, baseline, theirs)
    return Finding(sentence, _caveat(*pair, both_ways=verdict == "tie"), verdict, best, baseline, ours)


def _caveat(a: str, mine: dict, b: str, theirs: dict, both_ways: bool) -> str:
    said = _worse(a, mine, theirs) + (_worse(b, theirs, mine) if both_ways else [])
    return f"But {'; '.join(said)}." if said else ""


def _worse(name: str, m: dict, other: dict) -> list[str]:
    """Where `name` is behind in something else than KL."""
    said = []
    points = 100 * (other["zero_share"] - m["zero_share"])
    if points >= 1:
        said.append(f"{name} skips {points:.1f} points less")
    if _known(m.get("ce"), other.get("ce")) and m["ce"] > 1.001 * other["ce"]:
        said.append(f"{name} has the higher cross-entropy, {m['ce']:.4f} against {other['ce']:.4f}")
    right, theirs = m.get("exact_match"), other.get("exact_match")
    if _known(right, theirs) and right < theirs - 0.005:
        said.append(f"{name} answers fewer prompts exactly, {right:.1%} against {theirs:.1%}")
    return said


def _tied(a: dict, b: dict) -> bool:
    low, high = sorted((a["kl_to_teacher"], b["kl_to_teacher"]))
    spread = [m.get("kl_to_teacher_std") for m in (a, b)]
    if _known(*spread):
        return high - low <= 2 * math.hypot(*spread)
    return high - low <= TIE * high


def _known(*values: float | None) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def _share(metrics: dict) -> str:
    return f"{metrics['zero_share']:.1%}"


def _kl(metrics: dict) -> str:
    return f"{metrics['kl_to_teacher']:.4f}"
