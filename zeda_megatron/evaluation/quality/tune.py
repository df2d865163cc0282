"""Numbers that give an arm the zero share it is to be measured at: a pick rule's, and the compute dial's."""

from __future__ import annotations

import torch

from ...data.rows import load_rows
from ...distill.passes import forward_model
from ...errors import UserError
from ...moe import stats
from ...moe.paired import paired_modules
from ...moe.pick_rules import parse_pick_rule
from ...moe.router_dials import calibrate_threshold, set_dials, set_thresholds
from ...moe.stats import routers
from ...runtime import process_groups


def apply_rule(student, options, tokenizer) -> str | None:
    """Give the student the pick rule of `MeasureOptions`, tuned if it has no number; returns it, complete."""
    rule = options.moe_pick_rule
    if rule in ("skip", "top_p"):
        if not options.calibration:
            raise UserError(
                f"--moe-pick-rule {rule} without a number needs --calibration, a rollout file to tune it on"
            )
        rows = load_rows(options.calibration, tokenizer, options.seq_length, count=8)
        rule = f"{rule}={tune_rule(student, rule, rows, options.target_share):.6f}"
    set_dials(student, pick_rule=parse_pick_rule(rule) if rule else None)
    return rule


def turn_dial(student, options, tokenizer) -> dict:
    """Set the compute dial as asked; returns {"dial": its value}."""
    paired = paired_modules(student)
    if not paired and not any(router.num_zero for router in routers(student)):
        raise UserError(f"--zero-dial {options.zero_dial}: the student has no zero experts")
    if options.zero_dial == "auto":
        if not options.calibration:
            raise UserError("--zero-dial auto needs --calibration, a rollout file to tune it on")
        rows = load_rows(options.calibration, tokenizer, options.seq_length, count=8)
        if paired:
            by_layer = options.paired_budget == "layer"
            found = calibrate_threshold(student, rows, options.target_share, forward_model, by_layer=by_layer)
            return {"dial": found[0] if len(found) == 1 else found}
        return {"dial": tune_dial(student, rows, options.target_share)}
    try:
        value = float(options.zero_dial)
    except ValueError:
        raise UserError(f"--zero-dial {options.zero_dial!r}: give a number or auto") from None
    set_thresholds(student, [value]) if paired else set_dials(student, zero_logit_bias=value)
    return {"dial": value}


def tune_rule(student, name: str, rows, target: float, steps: int = 12) -> float:
    """Number of a `skip` or `top_p` rule that gives the target share on these rows."""

    def apply(value: float) -> None:
        set_dials(student, pick_rule=parse_pick_rule(f"{name}={value}"))

    # A larger ratio skips more, a larger p skips less.
    return _bisect(student, rows, apply, target, 0.0, 1.0, rising=name == "skip", steps=steps)


def tune_dial(student, rows, target: float, steps: int = 12) -> float:
    """Number that, added to the logits of shared zero experts, gives the target share on these rows; it is set."""

    def apply(value: float) -> None:
        set_dials(student, zero_logit_bias=value)

    value = _bisect(student, rows, apply, target, -16.0, 16.0, rising=True, steps=steps)
    apply(value)
    return value


def _bisect(student, rows, apply, target, low, high, rising: bool, steps: int) -> float:
    for _ in range(steps):
        value = (low + high) / 2
        apply(value)
        with stats.evaluating(student), torch.no_grad():
            for row in rows:
                forward_model(student, row)
            share = stats.collect(student, student.config.num_layers, process_groups.device()).zero_share
        if (share < target) == rising:
            low = value
        else:
            high = value
    return (low + high) / 2
