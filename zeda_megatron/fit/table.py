"""The table that a fit prints."""

from __future__ import annotations


def format_fit(report: dict) -> str:
    """Lines a layer, then what the threshold gives; `report` is what fit.json holds."""
    from ..moe.threshold import format_thresholds

    lines = []
    if report["r2_by_layer"]:
        lines.append("layer  R^2 of the head  R^2 of constants  zero share")
        for number, r2 in report["r2_by_layer"].items():
            constant = report["r2_of_constants_by_layer"][number]
            share = report["zero_share_by_layer"][int(number) - 1]
            lines.append(f"{number:>5}  {r2:>15.3f}  {constant:>16.3f}  {share:>10.3f}")
    if report["experts_without_rows"] or report["experts_with_few_rows"]:
        lines.append(
            f"{report['experts_without_rows']} experts had no row and got the mean over the others, "
            f"{report['experts_with_few_rows']} had fewer rows than channels (more --fit-rows would help)"
        )
    threshold = report["threshold"]
    told = format_thresholds(threshold if isinstance(threshold, list) else [threshold])
    lines.append(
        f"threshold {told}: zero share {report['zero_share']:.1%} "
        f"({report['rows']} rows, {report['seconds']:.0f} s)"
    )
    return "\n".join(lines)
