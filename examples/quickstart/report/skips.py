"""Which tokens skip, on the report page: shares by entropy, position and class, and the correlations in words."""

from __future__ import annotations

from zeda_megatron.evaluation.comparison.page import Heat, heat

_TABLES = (
    ("by_entropy", "By the teacher's entropy, from its lowest to its highest fifth"),
    ("by_position", "By the position in the response"),
    ("by_class", "By the text of the token"),
)
VARIABLES = {
    "teacher_entropy": "teacher's entropy",
    "log_prob_gap": "gap of log-probabilities",
    "position": "position",
}
_STRENGTHS = ((0.1, "hardly any"), (0.3, "a weak"), (0.5, "a moderate"), (1.0, "a strong"))
"""Words for |r| below a bound."""


def dynamic_blocks(report: dict, order: list[str]) -> dict[str, dict]:
    """`tokens` blocks of the arms in which not every token skips the same, in `order`."""
    blocks = {name: report["arms"][name].get("tokens") or {} for name in order}
    return {name: block for name, block in blocks.items() if block.get("correlations")}


def skip_tables(report: dict, order: list[str]) -> list[Heat]:
    """Heat tables of all arms that have them, or none."""
    made = []
    blocks = dynamic_blocks(report, order)
    for key, title in _TABLES if blocks else ():
        cells = {
            name: {bucket: v["skipped"] for bucket, v in block[key].items()} for name, block in blocks.items()
        }
        made += heat(cells, list(next(iter(cells.values()))), f"Skipped share. {title}", "{:.2f}")
    return made


def correlations(report: dict, order: list[str]) -> dict[str, list[str]]:
    """Arm to the correlations with each of `VARIABLES`: over all tokens, and from the lowest to the highest kind."""
    rows = {}
    for name, block in dynamic_blocks(report, order).items():
        found = [block["correlations"][key] for key in VARIABLES]
        rows[name] = [text for r in found for text in (signed(r["all"]), span(list(r["by_kind"].values())))]
    return rows


def skip_note(report: dict, order: list[str], main: str | None) -> str:
    """One sentence on the main arm (or the first one): does it skip where the teacher is sure? From the figures."""
    blocks = dynamic_blocks(report, order)
    if not blocks:
        return ""
    name = main if main in blocks else next(iter(blocks))
    block = blocks[name]
    found = block["correlations"]["teacher_entropy"]
    r = found["all"]
    if r is None:
        return f"The teacher is equally sure of all tokens that {name} was measured on."
    fifths = [v["skipped"] for v in block["by_entropy"].values() if v["skipped"] is not None]
    size = next((word for bound, word in _STRENGTHS if abs(r) < bound), _STRENGTHS[-1][1])
    where = ""
    if abs(r) >= _STRENGTHS[0][0]:
        where = f": it skips {'more' if r > 0 else 'less'} where the teacher is less sure"
    kinds = [v for v in found["by_kind"].values() if v is not None]
    spread = ""
    if len(kinds) > 1:
        signs = ", of either sign" if min(kinds) < 0 < max(kinds) else ""
        spread = f", {span(kinds)} by kind of text{signs}"
    return (
        f"The share that a token skips in {name} has {size} rank correlation with the teacher's entropy{where} "
        f"(Spearman {signed(r)}{spread}); it is {fifths[0]:.1%} in the lowest fifth of entropy and {fifths[-1]:.1%} in "
        "the highest."
    )


def span(values: list[float | None]) -> str:
    """-0.12 to +0.30, None left out."""
    known = [v for v in values if v is not None]
    return f"{signed(min(known))} to {signed(max(known))}" if known else "–"


def signed(r: float | None) -> str:
    """+0.16, with a minus sign as in print; a rounded zero has no sign."""
    if r is None:
        return "–"
    text = f"{r:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
