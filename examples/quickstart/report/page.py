"""The report as one HTML page: no scripts, no external files, plots as inline SVG."""

from __future__ import annotations

import re
from html import escape

from .finding import BAND, TIE, Finding, finding
from .legend import Arm, legend
from .page_plots import expert_plots, frontier_plot, layer_plots, training_plots
from .page_skips import skip_note, skip_tables
from .page_style import stylesheet
from .page_tables import count, duration, heat_table, results_table


def render(report: dict, history: dict[str, list[dict]], order: list[str]) -> str:
    """HTML of a completed report (see `report.py`).

    Args:
        report: with every METRICS key present.
        history: training lines per arm.
        order: arm names in the order of the tables.
    """
    arms = legend([*order, *(name for name in history if name not in order)])
    found = finding(report)
    half = f"{BAND[0]:.0%} to {BAND[1]:.0%}"
    kinds = [
        heat_table(report, order, "zero_share", "Zero share", "{:.2f}"),
        heat_table(report, order, "kl", "KL to the teacher", "{:.4f}"),
        heat_table(report, order, "exact_match", "Exact answers", "{:.1%}"),
    ]
    parts = [
        _head(report, arms, found),
        _section(
            "Results",
            "Closest to the teacher first. Bold: best of the arms that skip about half of their picks "
            f"({half}); the others are not comparable. Square signs are baselines, hollow ones untrained. Under exact "
            "answers: 95% interval, p of a paired test against the teacher.",
            results_table(report, order, arms, found),
        ),
        _section(
            "Frontier",
            "Further right skips more, further down stays closer to the teacher.",
            frontier_plot(report, order, arms),
        ),
        _section(
            "Training",
            "Thin lines are single steps, thick ones running means; dashed is one half.",
            training_plots(history, arms),
        ),
        _section(
            "By kind of text",
            "Darker is more. The zero share shows where a model finds experts it can do without.",
            f'<div class="panels one">{"".join(kinds)}</div>' if any(kinds) else "",
        ),
        _section(
            "Which tokens skip",
            f"{escape(skip_note(report, order, found.ours))} Over the tokens whose next one belongs to a response; "
            "arms in which every token skips the same are left out.",
            skip_tables(report, order),
        ),
        _section("Zero share per layer", "Dashed: the arm's mean.", layer_plots(report, order, arms)),
        _section(
            "Skipped picks per expert",
            "Of the picks that the router gave an expert, the share that was skipped; darker is more. Only arms whose "
            "skipped picks belong to an expert: rules and paired zero experts.",
            expert_plots(report, order, arms),
        ),
        _section(
            "How to get these figures",
            f"Two arms tie when their KL differs by less than {TIE:.0%}; where several seeds were run, by "
            "less than two standard deviations.",
            _origin(report),
        ),
        "<footer>KL and CE in nats per token on held-out text. Zero share: routed picks that chose a zero "
        "expert, of all routed picks. Hover over a plot for exact values.</footer>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>ZEDA report</title><style>{stylesheet(arms)}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(report: dict, arms: dict[str, Arm], found: Finding) -> str:
    names = [n for n in {found.ours, found.baseline, found.best} if n]
    sentence = escape(found.sentence)
    if names:
        # One pass over the text, longest names first: no name is marked inside another or inside a tag.
        pattern = "|".join(re.escape(escape(n)) for n in sorted(names, key=len, reverse=True))
        style = {escape(n): list(arms).index(n) for n in names}
        sentence = re.sub(pattern, lambda m: f'<b class="c{style[m[0]]}">{m[0]}</b>', sentence)
    caveat = f'<p class="caveat">{escape(found.caveat)}</p>' if found.caveat else ""
    title = "<h1>ZEDA: skipping experts, and what it costs</h1>"
    return f'{title}<p class="lead">{sentence}</p>{caveat}{_tiles(report, found)}'


def _tiles(report: dict, found: Finding) -> str:
    name = found.ours or found.best
    if name is None:
        return ""
    m, teacher = report["arms"][name], report["teacher"]
    tiles = [(f"{m['zero_share']:.1%}", f"of its routed picks {name} skips")]
    if m["top1_agreement"] is not None:
        tiles.append((f"{m['top1_agreement']:.1%}", "same next token as the teacher"))
    if m["ce"] is not None and teacher["ce"]:
        tiles.append(
            (f"{m['ce'] / teacher['ce'] - 1:+.2%}", f"cross-entropy: {teacher['ce']:.4f} to {m['ce']:.4f}")
        )
    if m["exact_match"] is not None and teacher["exact_match"] is not None:
        tiles.append((f"{m['exact_match']:.1%}", f"answered exactly; teacher {teacher['exact_match']:.1%}"))
    if m["adapt_seconds"] is not None:
        tokens = f", {count(m['adapt_tokens'])} tokens" if m["adapt_tokens"] else ""
        tiles.append((duration(m["adapt_seconds"]), f"to adapt{tokens}"))
    cells = (f'<div class="tile"><b>{figure}</b><span>{escape(text)}</span></div>' for figure, text in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _origin(report: dict) -> str:
    commands = escape("\n".join(report["commands"]))
    facts = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_fact(value))}</dd>"
        for key, value in report["environment"].items()
    )
    return (f"<pre>{commands}</pre>" if commands else "") + (f"<dl>{facts}</dl>" if facts else "")


def _fact(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_fact(v)}" for k, v in value.items())
    return str(value)


def _section(title: str, sub: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="sub">{sub}</p>{body}</section>' if body else ""
