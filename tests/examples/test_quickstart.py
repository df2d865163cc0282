"""The quickstart: its teachers have really learned, and the walk gives a report with either."""

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
TEACHERS = {"qwen3": QUICKSTART / "teacher", "glm": QUICKSTART / "glm" / "teacher"}
MODELS = pytest.mark.parametrize("name", TEACHERS)


def held_out() -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / "data" / "heldout.jsonl").read_text().splitlines()]


@functools.cache
def teacher(name):
    """The committed model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TEACHERS[name], dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TEACHERS[name])


@MODELS
def test_the_committed_teacher_is_the_one_the_readme_describes(name):
    folder = TEACHERS[name]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6


def test_both_teachers_read_text_alike():
    first, second = (folder / "tokenizer.json" for folder in TEACHERS.values())
    assert first.read_bytes() == second.read_bytes()


@MODELS
@torch.no_grad()
def test_the_teacher_answers_held_out_questions_as_its_readme_says(name):
    model, tokenizer = teacher(name)
    right, asked = defaultdict(int), defaultdict(int)
    for line in held_out():
        kind = line["kind"]
        if kind in ("prose", "code") or asked[kind] >= 20:
            continue
        asked[kind] += 1
        prompt = tokenizer.apply_chat_template(
            line["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**prompt, max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right[kind] += text.strip() == line["label"].strip()
    table = dict(
        re.findall(
            r"^\| (\w+) \| [\d.]+ \| (\d+)% \|$", (TEACHERS[name] / "README.md").read_text(), re.MULTILINE
        )
    )
    assert table.keys() == asked.keys()
    assert (
        sum(int(percent) >= 80 for percent in table.values()) >= 3
    )  # else a loss of quality could not be seen
    for kind, percent in table.items():  # 20 of the 100 questions: three standard errors of that sample
        p = int(percent) / 100
        assert abs(right[kind] / asked[kind] - p) <= 3 * (max(p * (1 - p), 0.01) / 20) ** 0.5, (
            kind,
            right[kind],
        )


@MODELS
@torch.no_grad()
def test_megatron_gives_the_logits_of_transformers_on_the_trained_teacher(name, one_process, tmp_path):
    from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
    from zeda_megatron.models.load import load_model

    model, tokenizer = teacher(name)
    hf_to_megatron(TEACHERS[name], tmp_path / "static", dtype="fp32")
    ours = load_model(str(tmp_path / "static")).chunk
    for line in held_out()[:6]:
        tokens = tokenizer.apply_chat_template(line["messages"], return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        positions = torch.arange(tokens.shape[1])[None]
        assert tiny.gap(ours(tokens, positions, None), model(tokens).logits) < 1e-4


def test_the_page_of_results_shows_the_tables_of_the_committed_report():
    sys.path.insert(0, str(QUICKSTART))
    from readme_table import ablations, budgets, frontier, markdown, rates

    report = json.loads((QUICKSTART / "results" / "report.json").read_text())
    page = (ROOT / "docs" / "evidence" / "results.md").read_text()
    assert markdown(report) in page and frontier(report) in page
    paired = (ROOT / "docs" / "evidence" / "paired_zero_experts.md").read_text()
    assert all(table(report) in paired for table in (ablations, budgets, rates))


def test_the_page_of_few_gpus_shows_the_tables_of_its_committed_report():
    sys.path.insert(0, str(QUICKSTART))
    from arms import FEW_TRAIN, RIVALS
    from few_gpus_table import rivals, what_trains

    text = (QUICKSTART / "results" / "few_gpus.json").read_text()
    report = json.loads(text)
    page = (ROOT / "docs" / "evidence" / "few_gpus.md").read_text()
    assert what_trains(report) in page and rivals(report) in page
    assert {arm.name for arm in (*FEW_TRAIN, *RIVALS)} <= report["arms"].keys()
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work)/", text)


def test_the_page_of_glm_shows_the_tables_of_its_committed_report():
    sys.path.insert(0, str(QUICKSTART))
    from arms_glm import DEFAULT, STAGE2
    from on_policy_table import stages
    from readme_table import markdown

    text = (QUICKSTART / "results" / "glm" / "report.json").read_text()
    report = json.loads(text)
    page = (ROOT / "docs" / "evidence" / "glm.md").read_text()
    assert markdown(report) in page and stages(report) in page
    assert {arm.name for arm in (*DEFAULT, *STAGE2)} <= report["arms"].keys()
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work)/", text)


@pytest.mark.parametrize("name", ["qwen3", "glm", "wide"])
def test_all_arms_are_read_by_the_training_and_start_from_one_another(name):
    sys.path.insert(0, str(QUICKSTART))
    from models import MODELS

    from zeda_megatron.config.arguments import parse
    from zeda_megatron.config.options import GROUPS, Options

    model = MODELS[name]
    assert model.full[: len(model.arms)] == model.arms
    assert len({arm.name for arm in model.full}) == len(model.full)
    assert {"net_kl", "low_rank_untrained", "low_rank_matched_kl"} <= {arm.name for arm in model.arms}
    if name == "glm":
        assert {"static_topk_half", "zeda_stage1_kl"} <= {arm.name for arm in model.arms}
        assert {"net_stage2", "zeda_stage2"} <= {arm.name for arm in model.full}
    for arm in model.full:
        flags = [part for flag, value in arm.train.items() for part in (flag, *value.split())]
        config = ["--config", str(QUICKSTART / f"stage{arm.stage}.yaml"), "--data-path", "x.jsonl"]
        options = Options(**parse([*config, *flags], GROUPS))
        options.validate()
        if arm.waits:
            assert arm.start.removeprefix("arms/") in {other.name for other in model.full}


@pytest.mark.parametrize(
    ("name", "rank", "shares"), [("qwen3", 4, (0.5, 0.502, 0.531, 0.516, 0.548)), ("wide", 12, None)]
)
def test_woken_zero_experts_are_compared_at_equal_multiply_adds(name, rank, shares):
    """By hand: of F*3*H multiply-adds of an expert, a constant takes H, rank r (2r + 1)*H; 32 units 32*(H + N)."""
    sys.path.insert(0, str(QUICKSTART))
    from arms import SHAPE
    from models import WIDE

    shape = {"qwen3": SHAPE, "wide": WIDE}[name]
    starts = ("paired", "constant", "sharp", "low_rank", "awake")
    found = [shape.share(start, 0.5) for start in starts]
    assert shares is None or found == [*shares]
    one = 3 * shape.hidden * shape.width
    for start, share in zip(starts, found):
        each = {"constant": 1, "low_rank": 2 * rank + 1, "awake": 2 * rank + 1}.get(start, 0)
        units = 32 if start in ("sharp", "awake") else 0
        cost = shape.picks * ((1 - share) * one + share * each * shape.hidden)
        cost += units * (shape.hidden + shape.experts)
        assert cost == pytest.approx(shape.picks * 0.5 * one, rel=2e-3)


@torch.no_grad()
def test_the_first_weights_of_glm_pick_the_experts_that_the_other_teacher_picks(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(QUICKSTART / "glm"))
    import first_weights

    paths = {
        "--qwen": TEACHERS["qwen3"],
        "--config": TEACHERS["glm"] / "config.json",
        "--out": tmp_path / "first",
    }
    words = [str(part) for pair in paths.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["first_weights.py", *words, "--number", "10"])
    assert first_weights.main() == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32).eval()
    qwen, _ = teacher("qwen3")
    inputs_TH = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    for old, new in zip(qwen.model.layers, made.model.layers[1:], strict=True):
        picks = [(inputs_TH @ layer.mlp.gate.weight.t()).topk(4).indices for layer in (old, new)]
        assert torch.equal(*picks)
    # The dense layer in front begins with no effect.
    hidden = made.model(torch.arange(20)[None], output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], hidden[1])


@torch.no_grad()
def test_a_wide_expert_begins_as_the_narrow_ones_that_it_joins(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(QUICKSTART / "wide"))
    sys.modules.pop("first_weights", None)
    import first_weights

    paths = {"--qwen": TEACHERS["qwen3"], "--config": QUICKSTART / "wide" / "config.json", "--out": tmp_path}
    words = [str(part) for pair in paths.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["first_weights.py", *words])
    assert first_weights.main() == 0
    sys.modules.pop("first_weights")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[2].mlp
    narrow = teacher("qwen3")[0].model.layers[2].mlp
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))

    def expert(block, number):
        gate, up = (x @ block.experts.gate_up_proj[number].t()).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[number].t()

    for number in range(8):
        together = expert(narrow, 2 * number) + expert(narrow, 2 * number + 1)
        # Two of 8 picks have twice the weight of four of 16.
        torch.testing.assert_close(expert(wide, number), together / 2, rtol=1e-4, atol=1e-5)


def test_the_page_of_stage_2_shows_the_tables_of_the_committed_report():
    sys.path.insert(0, str(QUICKSTART))
    from on_policy_table import stages
    from readme_table import token_table

    report = json.loads((QUICKSTART / "results" / "report.json").read_text())
    page = (ROOT / "docs" / "evidence" / "on_policy.md").read_text()
    assert stages(report) in page and token_table(report) in page and len(token_table(report)) > 500


def test_seeds_of_an_arm_become_a_mean_and_a_spread():
    sys.path.insert(0, str(QUICKSTART))
    from figures import add_spread

    def run(kl):
        return {"kl_to_teacher": kl, "ce": 2.0, "exact_match": 0.5, "zero_share": 0.5}

    arms = {"a": run(1.0), "a_75": run(9.0), "a_seed2": run(2.0), "a_seed3": run(6.0), "b": run(0.0)}
    add_spread(arms)
    assert list(arms) == ["a", "a_75", "b"]
    assert arms["a"]["kl_to_teacher_mean"] == 3.0 and arms["a"]["seeds"] == 3
    assert arms["a"]["kl_to_teacher_std"] == pytest.approx(7**0.5)
    assert [one["kl_to_teacher"] for one in arms["a"]["runs"]] == [1.0, 2.0, 6.0]
    assert "seeds" not in arms["a_75"] and "seeds" not in arms["b"]


def test_the_picture_of_the_readme_shows_the_committed_report():
    sys.path.insert(0, str(QUICKSTART))
    from picture import LINES, POINTS, picture, where
    from readme_table import FRONTIER

    report = json.loads((QUICKSTART / "results" / "report.json").read_text())
    text = (ROOT / "docs" / "frontier.svg").read_text()
    assert "docs/frontier.svg" in (ROOT / "README.md").read_text()
    names = [*POINTS, *(name for line in LINES for name in FRONTIER[line].values())]
    told = {name: where(report["arms"][name]) for name in names}
    shown = {f"{name}: {skipped:.1%} skipped, KL {kl:.4f}" for name, (skipped, kl) in told.items()}
    for drawing in (text, picture(report)):
        assert set(re.findall("<title>(.*?)</title>", drawing)) == shown
        assert "prefers-color-scheme:dark" in drawing and not re.search(
            r"url\((?!#)|<script|href=\"http", drawing
        )


def test_a_walk_whose_steps_are_done_writes_report_and_page(tmp_path):
    """Everything that the steps make is there, with the figures of the committed report: what is left is the report."""
    report = json.loads((QUICKSTART / "results" / "report.json").read_text())
    arms = ("low_rank_untrained", "net_kl", "low_rank_matched_kl")
    for name in ("static", "dynamic", "low_rank", "rollouts.done", "hf"):
        (tmp_path / name).touch()
    (tmp_path / "measured").mkdir()
    check = report["environment"]["export_check"]
    measured = {
        "teacher": report["teacher"],
        "export_check": check,
        **{arm: report["arms"][arm] for arm in arms},
    }
    for name, figures in measured.items():
        (tmp_path / "measured" / f"{name}.json").write_text(json.dumps(figures))
    lines = [
        {"step": i, "consumed_tokens": 10 * i, "seconds": 0.5, "kd_loss": 1 / i, "zero_share": 0.5}
        | {"trained_parameters": 7, "peak_memory_gib": 0.25}
        for i in (1, 2, 3)
    ]
    for name in ("net_kl", "low_rank_matched_kl"):
        folder = tmp_path / "arms" / name
        folder.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("3")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        sys.executable,
        str(QUICKSTART / "quickstart.py"),
        "--out",
        str(tmp_path),
        "--arms",
        ",".join(arms),
    ]
    from report.report import METRICS

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "report.json").read_text())
    assert (
        list(made) == ["environment", "teacher", "arms", "commands"]
        and made["teacher"] == dict.fromkeys(METRICS) | report["teacher"]
    )
    assert made["environment"]["export_check"] == check
    for arm in arms:
        cost = {"adapt_tokens": 0, "adapt_seconds": 0} if arm == "low_rank_untrained" else {}
        took = {"trained_parameters": 7, "step_seconds": 0.5, "peak_memory_gib": 0.25}
        cost = cost or {"adapt_tokens": 30, "adapt_seconds": 1.5, **took}
        assert made["arms"][arm] == {**dict.fromkeys(METRICS), **report["arms"][arm], **cost}
    assert "net_kl" in done.stdout and str(tmp_path / "report.html") in done.stdout
    assert '"loss per token over step"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("workers", [1, 3])
def test_what_others_start_from_is_trained_first_and_everything_is_measured_once(workers):
    sys.path.insert(0, str(QUICKSTART))
    from arm import Arm
    from quickstart import EXPORTED, MEASURED_TOGETHER, Work

    arms = [
        Arm("untrained", "static"),
        Arm("long", "static", {"--lr": "1"}),
        Arm("dialled", "arms/long"),
        Arm("further", "arms/begun", {"--lr": "1"}, stage="2"),
        Arm("begun", "dynamic", {"--lr": "1"}),
        Arm(EXPORTED, "low_rank", {"--lr": "1"}),
    ]
    trained, measured, exported, needs = [], [], [], {arm.name: arm for arm in arms}

    def train(arm):
        assert not arm.waits or arm.start.removeprefix("arms/") in trained
        trained.append(arm.name)

    def measure(some):
        assert 0 < len(some) <= MEASURED_TOGETHER
        for arm in some:
            source = arm and (arm.name if arm.train else arm.start.removeprefix("arms/"))
            assert source not in needs or not needs[source].train or source in trained
        measured.extend(arm and arm.name for arm in some)

    def export():
        assert EXPORTED in trained
        exported.append(True)

    Work(arms, train, export, measure).run(workers)
    assert sorted(trained) == sorted(arm.name for arm in arms if arm.train) and exported == [True]
    assert sorted(measured, key=str) == sorted([None, *needs], key=str)
    if workers == 1:
        assert trained == ["long", "begun", "further", EXPORTED]
        assert measured == [None, "untrained", "long", "dialled", "further", "begun", EXPORTED]


def test_a_job_that_fails_ends_the_walk():
    sys.path.insert(0, str(QUICKSTART))
    from arm import Arm
    from quickstart import Work

    def fail(arm):
        raise SystemExit("error: train a failed")

    with pytest.raises(SystemExit, match="train a failed"):
        Work([Arm("a", "static", {"--lr": "1"})], fail, lambda: None, lambda some: None).run(2)


ARMS = {"static_topk_half", "net_kl", "zeda_stage1_kl", "low_rank_matched_kl", "zeda_stage2"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@MODELS
def test_the_walk_ends_with_a_report_and_an_export_that_transformers_reads(name, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join((QUICKSTART / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)[:64])
    )
    few = tmp_path / "heldout.jsonl"
    few.write_text("".join(json.dumps(line) + "\n" for line in held_out()[::20]))
    command = [
        sys.executable,
        str(QUICKSTART / "quickstart.py"),
        "--model",
        name,
        "--out",
        str(tmp_path / "out"),
        "--train-iters",
        "4",
    ]
    command += [
        "--arms",
        ",".join(sorted(ARMS)),
        "--prompts",
        str(prompts),
        "--heldout",
        str(few),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["teacher"]["kl_to_teacher"] == 0
    assert set(report["arms"]) == ARMS
    arms = report["arms"]
    assert arms["zeda_stage2"]["adapt_seconds"] > arms["zeda_stage1_kl"]["adapt_seconds"]
    assert arms["zeda_stage2"]["own_answers"]["reverse_kl"] > 0
    assert report["arms"]["net_kl"]["zero_share"] == pytest.approx(0.5)
    check = report["environment"]["export_check"]
    assert check["equal_answers"] == check["prompts"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
