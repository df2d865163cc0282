"""The report: its schema, its honesty, and a page that stands alone."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from zeda_megatron.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
from report.finding import finding
from report.plots import expert_plot, layer_plot, running_mean
from report.report import METRICS, complete, format_table, sorted_arms, write_report


def metrics(kl=None, share=None, ce=None, exact=None, **more) -> dict:
    return {"kl_to_teacher": kl, "zero_share": share, "ce": ce, "exact_match": exact, **more}


def report(**arms: dict) -> dict:
    teacher = metrics(0.0, 0.0, 1.79, 0.63)
    return {"environment": {"torch": "2.13"}, "teacher": teacher, "arms": arms, "commands": ["bash run.sh"]}


KINDS = {
    "prose": {"ce": 1.5, "kl": 0.01, "zero_share": 0.4, "exact_match": None},
    "code": {"zero_share": 0.6},
}
FULL = report(
    paired_kl=metrics(
        0.0094,
        0.504,
        1.80,
        0.543,
        by_kind=KINDS,
        zero_share_by_layer=[0.6, 0.4],
        skipped_by_expert=[[0.9, 0.3], [None, 0.4]],
    ),
    net_kl=metrics(0.0151, 0.5, 1.81, 0.581, zero_share_by_layer=[0.5, 0.5]),
    zeda_stage1_ce=metrics(0.0405, 0.474, 1.84),
    top_p=metrics(0.0373, 0.499, 1.83, 0.42),
)
HISTORY = {
    "paired_kl": [{"step": i, "kd_loss": 0.05 / i, "zero_share": 0.5} for i in range(1, 60)],
    "zeda_stage1_ce": [{"step": i, "kd_loss": 1.8 + 1 / i, "zero_share": 0.4} for i in range(1, 60)],
}


def page(tmp_path, what=FULL, history=HISTORY) -> str:
    return write_report(what, history, tmp_path)[1].read_text()


def test_json_has_the_four_keys_and_every_metric(tmp_path):
    path, _ = write_report(FULL, HISTORY, tmp_path / "new" / "folder")
    written = json.loads(path.read_text())
    assert list(written) == ["environment", "teacher", "arms", "commands"]
    for arm in (written["teacher"], *written["arms"].values()):
        assert set(METRICS) <= set(arm)
    assert written["arms"]["paired_kl"]["by_kind"] == KINDS
    assert written["arms"]["net_kl"]["adapt_tokens"] is None


def test_json_is_strict_even_with_nan_tensors_and_infinity(tmp_path):
    odd = report(net_kl=metrics(torch.tensor(0.25), math.nan, math.inf, torch.tensor(3)))
    text = write_report(odd, {}, tmp_path)[0].read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    arm = json.loads(text, parse_constant=refuse)["arms"]["net_kl"]
    assert (arm["kl_to_teacher"], arm["zero_share"], arm["ce"], arm["exact_match"]) == (0.25, None, None, 3)


@pytest.mark.parametrize("broken", [{"arms": {}}, {**FULL, "extra": 1}])
def test_a_report_with_other_keys_is_refused(tmp_path, broken):
    with pytest.raises(ValueError, match="exactly the keys"):
        write_report(broken, {}, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        write_report(FULL, {}, tmp_path / "file")


def test_page_needs_nothing_from_outside(tmp_path):
    text = page(tmp_path)
    assert not re.search(r"https?:|//|url\((?!#)|@import|<script|<link|<img|<iframe|src=", text)


def test_page_works_in_light_and_dark_and_on_narrow_windows(tmp_path):
    text = page(tmp_path)
    assert "prefers-color-scheme:dark" in text and "max-width:680px" in text and "width=device-width" in text
    arms = {name[1:] for name in re.findall(r'class="[^"]*\b(c\d+)\b', text)}
    used = {f"c{n}" for n in arms} | set(re.findall(r"var\(--([a-z]+\d*)\)", text)) - {"a", "c"}
    dark = "".join(re.findall(r"(?s)prefers-color-scheme:dark\)\{(.*?)\}\}", text))
    assert arms and {"ink", "soft", "grid", "card"} <= used
    for name in used:
        assert re.search(rf"--{name}:[#\d]", text) and re.search(rf"--{name}:[#\d]", dark)
    assert all(f".c{n}{{--c:var(--c{n})}}" in text for n in arms)


def test_page_is_well_formed_and_every_plot_is_there(tmp_path):
    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "wbr"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    text = page(tmp_path)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    names = sorted(drawing.get("aria-label") for drawing in drawings)
    assert names == [
        "KL to the teacher against zero share (picks skipped)",
        "KL to the teacher against zero share (picks skipped)",  # for wide and for narrow windows
        "loss per token over step",
        "loss per token over step",  # CE and KL arms apart
        "one bar per layer",
        "one bar per layer",
        "one cell per layer and expert",
        "zero share over step",
    ]
    coordinates = " ".join(value for d in drawings for e in d.iter() for value in e.attrib.values())
    assert "nan" not in coordinates and "inf" not in coordinates


def test_names_are_escaped_wherever_they_appear(tmp_path):
    evil = '<img src=x onerror="alert(1)">&'
    kinds = {evil: {"zero_share": 0.5, "kl": 0.1}}
    what = report(
        **{
            evil: metrics(0.01, 0.5, 1.8, by_kind=kinds, zero_share_by_layer=[0.5]),
            "net_kl": metrics(0.02, 0.5),
        }
    )
    what["environment"] = {evil: evil}
    what["commands"] = [evil]
    text = page(tmp_path, what, {evil: [{"step": 1, "kd_loss": 1.0}, {"step": 2, "kd_loss": 0.5}]})
    assert "<img" not in text and 'onerror="' not in text
    assert text.count("&lt;img") >= 8


def test_missing_figures_leave_gaps_and_empty_sections_vanish(tmp_path):
    text = page(tmp_path, report(paired_kl=metrics(), odd=metrics(share=0.5)), {"paired_kl": [{"step": 1}]})
    assert "Results" in text and "–" in text
    for section in (
        "Frontier",
        "Training",
        "By kind of text",
        "Zero share per layer",
        "Skipped picks per expert",
    ):
        assert f"<h2>{section}</h2>" not in text
    assert "No arm has both" in text
    assert "No arm has both" in format_table(report())


def test_a_curve_with_gaps_is_drawn_from_what_is_there(tmp_path):
    lines = [{"step": i, "kd_loss": None if i % 3 else 0.1, "zero_share": math.nan} for i in range(50)]
    text = page(tmp_path, FULL, {"paired_kl": lines})
    assert text.count('aria-label="loss per token over step"') == 1
    assert 'aria-label="zero share over step"' not in text


def test_plots_are_of_the_figures(tmp_path):
    text = page(tmp_path)
    titles = set(re.findall(r"<title>(.*?)</title>", text))
    assert {
        "paired_kl: zero share 0.504, KL 0.0094",
        "layer 0: 0.600",
        "layer 1: 0.400",
        "layer 0, expert 1: 0.300",
        "layer 1, expert 1: 0.400",
        "paired_kl: 0.5 at 59",
    } <= titles
    assert "layer 1, expert 0" not in text  # nobody picked it
    grid = next(d for d in re.findall(r"<svg.*?</svg>", text) if "one cell per" in d)
    assert [float(v) for v in re.findall(r"opacity: ([\d.]+)", grid)] == [0.9, 0.3, 0.4]


def test_bars_have_the_height_of_their_value():
    bars = re.findall(r"<title>.*?<path d=\"(.*?)\"", layer_plot([0.25, None, 0.5, 1.0], 0))
    heights = [
        max(ys) - min(ys) for ys in ([float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", d)] for d in bars)
    ]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert layer_plot([None], 0) is None


def test_a_large_grid_has_no_hover_texts_and_nothing_is_drawn_without_values():
    large = expert_plot([[0.5] * 128] * 20, 0)
    assert large.count("opacity: 0.5") == 128 * 20 and "<title>" not in large
    assert expert_plot([], 0) is None and expert_plot([[None]], 0) is None


def test_running_mean_is_the_mean_of_the_last_values():
    points = [(float(i), float(i)) for i in range(6)]
    assert running_mean(points, 3) == [(0, 0), (1, 0.5), (2, 1), (3, 2), (4, 3), (5, 4)]


def test_headline_when_ours_wins():
    found = finding(complete(FULL))
    assert (found.verdict, found.ours, found.baseline) == ("win", "paired_kl", "net_kl")
    assert "0.0094, 38% below the best baseline, net_kl (0.0151)" in found.sentence
    assert "paired_kl answers fewer prompts exactly, 54.3% against 58.1%" in found.caveat


def test_headline_when_a_baseline_wins():
    what = report(
        zeda_stage1_kl=metrics(0.0200, 0.5), net_kl=metrics(0.0150, 0.5), paired_kl=metrics(0.03, 0.5)
    )
    found = finding(complete(what))
    assert (found.verdict, found.best, found.ours) == ("loss", "net_kl", "zeda_stage1_kl")
    assert (
        "the baseline net_kl wins: KL 0.0150 to the teacher, against 0.0200 for zeda_stage1_kl"
        in found.sentence
    )


@pytest.mark.parametrize("ours", [0.0142, 0.0151, 0.0163])
def test_headline_when_they_tie(ours):
    found = finding(complete(report(zeda_stage1_kl=metrics(ours, 0.5), net_kl=metrics(0.0151, 0.5))))
    assert found.verdict == "tie" and " tie: " in found.sentence


def test_seeds_decide_between_a_tie_and_a_win_where_they_are_known():
    def verdict(spread):
        mine = metrics(0.0142, 0.5, kl_to_teacher_std=spread)
        theirs = metrics(0.0151, 0.5, kl_to_teacher_std=spread)
        return finding(complete(report(paired_kl=mine, net_kl=theirs))).verdict

    assert verdict(0.0001) == "win"
    assert verdict(0.0005) == "tie"


def test_only_arms_that_skip_about_half_compete():
    what = report(
        injected_untrained=metrics(0.001, 0.29),
        static_topk_half=metrics(0.04, 0.5),
        paired_kl=metrics(0.01, 0.51),
    )
    found = finding(complete(what))
    assert (found.best, found.baseline) == ("paired_kl", "static_topk_half")
    alone = finding(complete(report(injected_untrained=metrics(0.001, 0.29))))
    assert alone.verdict == "none" and "skips 29.0%" in alone.sentence
    assert finding(complete(report(net_kl=metrics(0.02, 0.5)))).verdict == "alone"


def test_a_win_bought_with_less_skipping_says_so():
    what = report(paired_kl=metrics(0.010, 0.46), net_kl=metrics(0.015, 0.5))
    assert "paired_kl skips 4.0 points less" in finding(complete(what)).caveat


def test_table_shows_teacher_first_then_the_closest():
    lines = format_table(FULL).splitlines()
    names = [line.split()[0] for line in lines[2:7]]
    assert names == ["teacher", "paired_kl", "net_kl", "top_p", "zeda_stage1_ce"]
    assert sorted_arms(complete(report(b=metrics(), a=metrics(0.2), c=metrics(0.1)))) == ["c", "a", "b"]
    assert len({len(line) for line in lines[:2]}) == 1


def test_exact_answers_have_an_interval_and_a_paired_test(tmp_path):
    teacher = metrics(0.0, 0.0, 1.79, 0.6, answers="1110011000", exact_match_interval=[0.31, 0.83])
    mine = metrics(0.01, 0.5, 1.8, 0.2, answers="0000011000", exact_match_interval=[0.05, 0.51])
    what = {**report(paired_kl=mine, net_kl=metrics(0.02, 0.5, 1.8, 0.3)), "teacher": teacher}
    text = page(tmp_path, what, {})
    # Three questions changed, all for the worse: McNemar's exact p is 2 * 0.5**3.
    assert "5% to 51%, p 0.25" in text and "31% to 83%" in text and text.count(", p 0.") == 1
    assert json.loads((tmp_path / "report.json").read_text())["arms"]["paired_kl"]["answers"] == "0000011000"
