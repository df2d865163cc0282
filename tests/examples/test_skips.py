"""The section on which tokens skip: only dynamic arms, only what the figures say."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_report import FULL, metrics, page, report

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
from report.skips import VARIABLES, correlations, signed, skip_note, skip_tables, span

from zeda_megatron.evaluation.quality.scored_tokens import ScoredTokens
from zeda_megatron.evaluation.quality.token_skips import token_skips

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def block(slope: float, other: float | None = None) -> dict:
    """Tokens of which a share `slope` skips in the order of the entropy and the rest at random; `other`: the slope
    of a second kind of text."""
    by_kind = {}
    for i, (kind, part) in enumerate({"prose": slope, "code": slope if other is None else other}.items()):
        draw = torch.Generator().manual_seed(i)
        entropy_T = torch.rand(400, generator=draw).double()
        noise_T = torch.rand(400, generator=draw).double()
        skipped_T = 0.5 + part * (entropy_T - 0.5) + (1 - abs(part)) * (noise_T - 0.5)
        rest = torch.rand(400, generator=draw).double(), torch.arange(400), torch.arange(400) % 6
        by_kind[kind] = ScoredTokens(skipped_T, entropy_T, *rest)
    return token_skips(by_kind)


def constant() -> dict:
    tokens = ScoredTokens(
        *(torch.full((9,), 0.5).double() for _ in range(3)), torch.arange(9), torch.arange(9) % 6
    )
    return token_skips({"prose": tokens})


def with_tokens(**blocks) -> dict:
    return report(**{name: metrics(0.01, 0.5, tokens=b) for name, b in blocks.items()})


def test_dynamic_arms_get_a_row_in_every_table_and_others_in_none(tmp_path):
    what = with_tokens(paired_kl=block(0.8), top_p=block(-0.4), static_topk_half=constant())
    text = page(tmp_path, what, {})
    section = re.search(r"<h2>Which tokens skip</h2>.*?</section>", text, re.S)[0]
    assert section.count("<table") == 4
    for name, rows in (("paired_<wbr>kl", 4), ("top_<wbr>p", 4), ("static_", 0)):
        assert section.count(f"<th>{name}") == rows
    heads = [re.findall(r"<th>(.*?)</th>", head)[1:] for head in re.findall("<thead>.*?</thead>", section)]
    assert heads[:2] == [["q1", "q2", "q3", "q4", "q5"], ["0-3", "4-15", "16-63", "64+"]]
    assert len(heads[2]) == 6 and len(heads[3]) == 6


def test_figures_on_the_page_are_those_of_the_report():
    what = with_tokens(paired_kl=block(0.8, -0.3))
    tokens = what["arms"]["paired_kl"]["tokens"]
    shown = [cell[0] for table in skip_tables(what, ["paired_kl"]) for cell in table.rows["paired_kl"]]
    shares = [b["skipped"] for t in ("by_entropy", "by_position", "by_class") for b in tokens[t].values()]
    assert shown == [f"{share:.2f}" for share in shares]
    found = tokens["correlations"]
    assert list(VARIABLES) == ["teacher_entropy", "log_prob_gap", "position"]
    assert correlations(what, ["paired_kl"])["paired_kl"] == [
        cell
        for name in VARIABLES
        for cell in (signed(found[name]["all"]), span(list(found[name]["by_kind"].values())))
    ]


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (
            0.9,
            "a strong rank correlation with the teacher's entropy: it skips more where the teacher is less sure",
        ),
        (
            -0.9,
            "a strong rank correlation with the teacher's entropy: it skips less where the teacher is less sure",
        ),
        (0.3, "a moderate rank correlation with the teacher's entropy: it skips more"),
        (-0.15, "a weak rank correlation with the teacher's entropy: it skips less"),
        (0.0, "hardly any rank correlation with the teacher's entropy (Spearman"),
    ],
)
def test_the_sentence_says_sign_and_strength_of_what_was_found(slope, words):
    what = with_tokens(paired_kl=block(slope), top_p=block(-slope))
    text = skip_note(what, ["top_p", "paired_kl"], "paired_kl")
    tokens = what["arms"]["paired_kl"]["tokens"]
    assert f"in paired_kl has {words}" in text
    assert f"Spearman {signed(tokens['correlations']['teacher_entropy']['all'])}, " in text
    low, high = (tokens["by_entropy"][q]["skipped"] for q in ("q1", "q5"))
    assert f"it is {low:.1%} in the lowest fifth of entropy and {high:.1%} in the highest" in text


def test_kinds_that_disagree_are_told():
    assert "of either sign" in skip_note(with_tokens(top_p=block(0.9, -0.9)), ["top_p"], None)
    assert "of either sign" not in skip_note(with_tokens(top_p=block(0.9, 0.8)), ["top_p"], None)


def test_the_first_dynamic_arm_speaks_where_the_main_one_has_no_figures():
    what = with_tokens(static_topk_half=constant(), top_p=block(0.5), paired_kl=None)
    assert " in top_p has " in skip_note(what, ["static_topk_half", "top_p", "paired_kl"], "paired_kl")


def test_a_report_without_such_figures_has_no_section(tmp_path):
    for what in (FULL, with_tokens(static_topk_half=constant())):
        assert "Which tokens skip" not in page(tmp_path, what, {})
        assert skip_note(what, list(what["arms"]), "paired_kl") == ""


def test_correlations_have_two_decimals_and_a_sign():
    assert [signed(r) for r in (0.1651, -0.004, 0.0, -0.5, None)] == ["+0.17", "0.00", "0.00", "−0.50", "–"]
    assert span([0.3, None, -0.12]) == "−0.12 to +0.30" and span([None]) == "–"


def test_the_markdown_table_has_the_dynamic_arms_and_is_empty_without_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    from readme_table import token_table

    what = with_tokens(paired_kl=block(0.8, -0.2), top_p=constant(), net_kl=block(0.5), odd=block(0.5))
    lines = token_table(what).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    tokens = what["arms"]["paired_kl"]["tokens"]
    found, fifths = tokens["correlations"], tokens["by_entropy"]
    kinds = sorted(found["teacher_entropy"]["by_kind"].values())
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "paired zero experts",
        f"{found['teacher_entropy']['all']:+.2f}",
        f"{kinds[0]:+.2f} to {kinds[1]:+.2f}",
        f"{found['log_prob_gap']['all']:+.2f}",
        f"{found['position']['all']:+.2f}",
        f"{fifths['q1']['skipped']:.1%}",
        f"{fifths['q5']['skipped']:.1%}",
    ]
    assert token_table(FULL) == "" and token_table(with_tokens(top_p=constant())) == ""
