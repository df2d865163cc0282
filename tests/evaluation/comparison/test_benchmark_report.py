"""The comparison of runs: figures from answers, and a page that stands alone."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from run_folders import write_run

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.comparison.page import render
from zeda_megatron.evaluation.comparison.report import ReportOptions, format_table, make_report, report


def runs(tmp_path) -> list[str]:
    right = {f"q{i}": [True, i % 3 > 0] for i in range(12)}
    worse = {
        uid: [False, second] if uid == "q1" else [first, second] for uid, (first, second) in right.items()
    }
    folders = [
        write_run(tmp_path / "t", "teacher", {"gsm8k": right, "math-500": right}, share=0.0),
        write_run(
            tmp_path / "z", "paired_kl", {"gsm8k": worse, "math-500": right}, share=0.5, zero_experts=True
        ),
        write_run(tmp_path / "r", "reap_50", {"gsm8k": worse, "math-500": worse}, share=0.0, experts=4),
    ]
    return [str(folder) for folder in folders]


def test_figures_are_those_of_the_answers(tmp_path):
    made = make_report(runs(tmp_path))
    assert list(made["arms"]) == ["teacher", "paired_kl", "reap_50"]
    teacher, ours, pruned = made["arms"].values()
    assert teacher["benchmarks"]["gsm8k"]["accuracy"]["value"] == pytest.approx(20 / 24)
    assert teacher["accuracy"]["value"] == pytest.approx(20 / 24) and teacher["difference"] is None
    row = ours["benchmarks"]["gsm8k"]
    assert row["difference"]["value"] == pytest.approx(-1 / 24) and row["p_value"] == 1.0
    assert ours["difference"]["value"] == pytest.approx(-1 / 48)
    # Half of the picks of all 8 experts; heads and router rows are counted in the total.
    assert ours["zero_share"] == pytest.approx(0.5) and ours["expert_flops"] == pytest.approx(0.5)
    assert 0.5 < ours["total_flops"] < 1
    assert pruned["expert_weights"] == pytest.approx(0.5) and pruned["expert_flops"] == pytest.approx(1.0)
    # 10 tokens in 0.5 s, two at a time.
    assert row["tokens_per_second"] == pytest.approx(10 / 0.5 * 2)
    assert row["answer_tokens"] == 10 and row["cut_off"] == 0 and row["samples"] == 2
    assert ours["benchmarks"]["gsm8k"]["by_kind"] == pytest.approx({"even": 5 / 6, "odd": 3 / 4})


def test_shares_are_weighted_by_tokens(tmp_path):
    folder = write_run(tmp_path / "z", "paired_kl", {"gsm8k": {"q0": [True], "q1": [True]}}, share=0.5)
    file = folder / "gsm8k" / "answers.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    second.update(zero_share=0.2, tokens=31, prompt_tokens=10)  # 40 tokens fed; the first one 19
    file.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    made = make_report([str(folder)])["arms"]["paired_kl"]["benchmarks"]["gsm8k"]
    assert made["zero_share"] == pytest.approx((0.5 * 19 + 0.2 * 40) / 59)


def test_a_servers_sums_are_the_share_where_answers_have_none(tmp_path):
    folder = write_run(tmp_path / "z", "zeda", {"gsm8k": {"q0": [True]}}, share=None)
    assert make_report([str(folder)])["arms"]["zeda"]["zero_share"] is None
    (folder / "gsm8k" / "slots.jsonl").write_text('{"zero": 10, "routed": 30}\n{"zero": 20, "routed": 30}\n')
    assert make_report([str(folder)])["arms"]["zeda"]["zero_share"] == 0.5


def test_an_unfinished_benchmark_does_not_count_in_the_mean(tmp_path):
    folders = runs(tmp_path)
    file = tmp_path / "z" / "math-500" / "answers.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    made = make_report(folders)
    assert [(one["name"], one["shared"]) for one in made["benchmarks"]] == [
        ("gsm8k", True),
        ("math-500", False),
    ]
    assert made["arms"]["paired_kl"]["difference"]["value"] == pytest.approx(-1 / 24)


def test_other_questions_are_not_compared(tmp_path):
    folders = runs(tmp_path)
    file = tmp_path / "z" / "gsm8k" / "benchmark.json"
    about = json.loads(file.read_text())
    about["identity"]["questions"] = "others"
    file.write_text(json.dumps(about))
    row = make_report(folders)["arms"]["paired_kl"]
    assert row["benchmarks"]["gsm8k"]["difference"] is None and row["difference"] is None


DARK = r"(?s)prefers-color-scheme:dark\)\{(.*?)\}\}"


def tell(folder, zero_experts, adapted_steps):
    """Write into a run what it was."""
    about = json.loads((folder / "run.json").read_text())
    about["origin"] = {"zero_experts": zero_experts, "adapted_steps": adapted_steps}
    (folder / "run.json").write_text(json.dumps(about))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        # Plots refer to shapes of their own.
        self.links += [v for name, v in attrs if name in ("src", "href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.links += [v for name, v in attrs if name in ("src", "href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_every_arm(tmp_path, capsys):
    out = tmp_path / "out"
    report(ReportOptions(",".join(runs(tmp_path)), str(out)))
    text = (out / "benchmarks.html").read_text()
    page = Page(text)
    assert page.open == [] and page.links == [] and "<script" not in text and "http" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    assert [drawing.count("<title>") for drawing in re.findall(r"<svg.*?</svg>", text)] == [3, 3]
    made = json.loads((out / "benchmarks.json").read_text())
    for name in made["arms"]:
        assert name.replace("_", "_<wbr>") in text
    assert made["choice"]["sentence"] in unescape(text)
    printed = capsys.readouterr().out
    assert made["choice"]["sentence"] in printed and "83.3 [" in printed


def test_names_of_arms_cannot_break_the_page(tmp_path):
    folder = write_run(tmp_path / "x", "<b>&arm", {"gsm8k": {"q0": [True]}}, share=0.1)
    made = make_report([str(folder)])
    text = render(made)
    assert "<b>&arm" not in text and text.count("&lt;b&gt;&amp;arm") >= 6
    assert "<b>&arm" in format_table(made)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no run.json there"):
        make_report([str(tmp_path)])
    folders = runs(tmp_path)
    with pytest.raises(UserError, match="two runs are of the arm teacher"):
        make_report([folders[0], folders[0]])
    with pytest.raises(UserError, match="--output is missing"):
        report(ReportOptions(folders[0]))
    for margin in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"--margin .* must be from 0 to 1"):
            report(ReportOptions(folders[0], str(tmp_path / "out"), margin))


def test_the_page_works_in_light_and_dark_and_on_narrow_windows(tmp_path):
    text = render(make_report(runs(tmp_path)))
    assert "prefers-color-scheme:dark" in text and "max-width:680px" in text and "width=device-width" in text
    used = set(re.findall(r"var\((--[a-z]+\d*)\)", text)) - {"--a", "--c"}
    assert {"--ink", "--card", "--c1", "--c2"} <= used
    light, dark = (
        set(re.findall(r"(--[a-z]+\d*):[#\d]", part)) for part in (text, "".join(re.findall(DARK, text)))
    )
    assert used <= light and used <= dark
    assert not re.search(r"#01[0-9a-f]{4}", text)


def test_a_run_tells_what_it_was_and_its_name_does_not(tmp_path):
    folders = runs(tmp_path)
    for place, origin in (("z", (True, 900)), ("r", (False, 0))):
        tell(tmp_path / place, *origin)
    arms = make_report(folders)["arms"]
    assert (arms["paired_kl"]["zero_experts"], arms["paired_kl"]["adapted_steps"]) == (True, 900)
    text = render(make_report(folders))
    assert "zero experts, 900 steps" in text and "no zero experts, not trained" in text


def test_flags_tell_what_no_file_does_and_contradict_none(tmp_path):
    folders = runs(tmp_path)
    tell(tmp_path / "z", None, None)
    arm = make_report(folders, untrained=["paired_kl"], static=["paired_kl"])["arms"]["paired_kl"]
    assert (arm["zero_experts"], arm["adapted_steps"]) == (False, 0)
    tell(tmp_path / "z", True, 900)
    with pytest.raises(UserError, match="--untrained paired_kl: its own files tell adapted_steps 900"):
        make_report(folders, untrained=["paired_kl"])
    with pytest.raises(UserError, match="--static paired_kl: its own files tell zero_experts True"):
        make_report(folders, static=["paired_kl"])
    with pytest.raises(
        UserError, match="--static mine: no run is of this arm; there are teacher, paired_kl, reap"
    ):
        make_report(folders, static=["mine"])


def test_any_arm_can_be_what_the_others_are_compared_to(tmp_path):
    folders = runs(tmp_path)
    made = make_report(folders, teacher="reap_50")
    assert made["teacher"] == "reap_50" and next(iter(made["arms"])) == "reap_50"
    assert made["arms"]["teacher"]["difference"]["value"] == pytest.approx(1 / 24)
    assert made["arms"]["reap_50"]["difference"] is None
    with pytest.raises(UserError, match="--teacher base: no run is of this arm"):
        make_report(folders, teacher="base")


def test_what_an_older_run_did_not_write_down_its_models_own_files_tell(tmp_path):
    folders = runs(tmp_path)
    file = tmp_path / "z" / "run.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "config": about["config"] | {"zce_adapted_steps": 7}}))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "zeda.json").write_text('{"num_zero_experts": 4, "adapted_steps": 9}')
    for name, model in (("m", checkpoint), ("gone", tmp_path / "nowhere")):
        folder = write_run(tmp_path / name, name, {"gsm8k": {"q0": [True]}}, share=0.5)
        about = json.loads((folder / "run.json").read_text())
        about["identity"]["engine"], about["model"] = "megatron", str(model)
        (folder / "run.json").write_text(json.dumps(about))
        folders.append(str(folder))
    arms = make_report(folders)["arms"]
    told = {name: (arm["zero_experts"], arm["adapted_steps"]) for name, arm in arms.items()}
    assert told == {
        "teacher": (False, 0),
        "paired_kl": (True, 7),
        "reap_50": (False, 0),
        "m": (True, 9),
        "gone": (None, None),
    }
