"""What would I choose? A rule, applied to the figures; docs/evaluation.md states it in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

MARGIN = 0.02
"""Loss of accuracy that counts as none, averaged over the benchmarks."""
SAVES = 0.05
"""Expert FLOPs (or weights) that an arm must save to be worth anything."""
ALIKE = 0.03
"""Arms whose expert FLOPs differ by less save the same."""


@dataclass(frozen=True)
class Choice:
    """The answer, and why."""

    verdict: str
    """`arm`: one of ours; `simpler`: a baseline does as well; `weights`: only an arm that saves memory is good;
    `undecided`: too few questions; `teacher`: every arm loses; `nothing`: no comparison."""
    arm: str | None
    sentence: str


def choose(figures: dict, margin: float = MARGIN) -> Choice:
    """Apply the rule to `figures.compare`'s result. What an arm is, its model's files tell and never its name: where
    nobody does, it counts as trained for longer than all that tell, and as one with zero experts."""
    teacher = figures["teacher"]
    known = {
        name: arm
        for name, arm in figures["arms"].items()
        if name != teacher and arm["difference"] is not None and arm["expert_flops"] is not None
    }
    if teacher not in figures["arms"] or not known:
        missing = "no run of the teacher (--teacher names it)"
        if teacher in figures["arms"]:
            missing = "no arm that has answered the teacher's questions and whose zero share is known"
        return Choice("nothing", None, f"Nothing to choose yet: there is {missing}.")
    good = {name: arm for name, arm in known.items() if arm["difference"]["low"] >= -margin}
    savers = {name: arm for name, arm in good.items() if 1.0 - arm["expert_flops"] >= SAVES}
    if savers:
        return _pick(savers, known, margin)
    lighter = {name: arm for name, arm in good.items() if _weights(arm) <= 1.0 - SAVES}
    if lighter:
        name = min(lighter, key=lambda one: (_weights(lighter[one]), one))
        return Choice(
            "weights",
            name,
            f"I would choose {name} for its memory: {_gap(lighter[name])}, with {_weights(lighter[name]):.0%} of the "
            f"expert weights and {lighter[name]['expert_flops']:.0%} of the expert FLOPs. No arm that saves FLOPs is "
            f"known to lose less than {_points(margin)}.",
        )
    open_arms = {name: arm for name, arm in known.items() if arm["difference"]["high"] >= -margin}
    if open_arms:
        return _undecided(open_arms, margin)
    name = max(known, key=lambda one: (known[one]["difference"]["value"], one))
    return Choice(
        "teacher",
        teacher,
        f"I would keep the teacher: every arm loses more than {_points(margin)}; the closest is {name} "
        f"({_gap(known[name])}).",
    )


def _pick(savers: dict, known: dict, margin: float) -> Choice:
    least = min(arm["expert_flops"] for arm in savers.values())
    alike = {name: arm for name, arm in savers.items() if arm["expert_flops"] <= least + ALIKE}
    efforts = {name: _effort(arm) for name, arm in alike.items()}
    name = min(alike, key=lambda one: (efforts[one], -alike[one]["difference"]["value"], one))
    arm, baseline = alike[name], is_baseline(alike[name])
    sentence = (
        f"I would choose {name}: {_gap(arm)}, at {arm['expert_flops']:.0%} of the expert FLOPs; a loss of more than "
        f"{_points(margin)} is ruled out."
    )
    others = [other for other in alike if other != name]
    if others:
        first = max(others, key=lambda one: (alike[one]["difference"]["value"], one))
        why = "takes more work" if efforts[first] > efforts[name] else "is no better"
        sentence += f" {first} saves as much and {why} ({_gap(alike[first])})."
    if baseline and not all(map(is_baseline, known.values())):
        sentence += " Something simpler than zero experts does."
    return Choice("simpler" if baseline else "arm", name, sentence)


def _undecided(arms: dict, margin: float) -> Choice:
    name = max(arms, key=lambda one: (arms[one]["difference"]["low"], one))
    gap = arms[name]["difference"]
    room, half = gap["value"] + margin, (gap["high"] - gap["low"]) / 2
    text = f"I cannot choose yet: the best guess is {name} ({_gap(arms[name])}), "
    text += f"but a loss of {_points(margin)} is not ruled out"
    if room > 0:
        text += f"; about {math.ceil((half / room) ** 2)} times as many questions could decide it"
    return Choice("undecided", None, f"{text}.")


def is_baseline(arm: dict) -> bool:
    """Whether it does without zero experts."""
    return arm["zero_experts"] is False


def is_untrained(arm: dict) -> bool:
    """Whether nothing was trained for it."""
    return arm["adapted_steps"] == 0


def _effort(arm: dict) -> float:
    return math.inf if arm["adapted_steps"] is None else arm["adapted_steps"]


def _weights(arm: dict) -> float:
    return 1.0 if arm["expert_weights"] is None else arm["expert_weights"]


def _gap(arm: dict) -> str:
    gap = arm["difference"]
    value, low, high = (f"{100 * gap[part]:+.1f}" for part in ("value", "low", "high"))
    return f"{value} points to the teacher, 95% from {low} to {high}"


def _points(share: float) -> str:
    number = f"{100 * share:g}"
    return f"{number} point" + ("" if number == "1" else "s")
