"""Serving speed compares the right computations, on every family."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools.measure.serving import arms, main, parse, table
from tools.measure.serving_arms import Contest
from zeda_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"qwen3_moe": tiny.TINY, "glm4_moe_lite": tiny.GLM, "mixtral": tiny.MIXTRAL}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    config = FAMILIES[request.param] | {"model_type": request.param}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def contest(folder):
    torch.manual_seed(0)
    made = Contest(folder, 2, torch.float32, "cpu", vocabulary=96)
    for parameter in made.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.model.set_experts_implementation("grouped_mm")
    return made


@torch.no_grad()
def test_both_ways_compute_the_same_and_the_static_way_is_the_stock_model(contest):
    tokens = torch.randint(0, 96, (1, 20))

    def logits(way, share):
        with contest.arm(way, share) as model:
            return model(tokens).logits

    static = logits("static", 0.0)
    for share in (0.25, 0.5, 1.0):
        skip, weightless = logits("skip", share), logits("weight 0", share)
        tiny.close(skip, weightless, rtol=0, atol=1e-4)
        assert (skip - static).abs().max() > 1e-2
    tiny.close(logits("skip", 0.0), static, rtol=0, atol=1e-4)
    assert torch.equal(static, logits("static", 0.0))


@torch.no_grad()
def test_only_skipping_saves_expert_flops(contest):
    contest.model.set_experts_implementation("eager")
    hidden = torch.randn(1, 40, 32)

    def flops(way, share):
        with contest.arm(way, share) as model, FlopCounterMode(display=False) as counter:
            model.moe_blocks()[0](hidden)
        return counter.get_total_flops()

    static = flops("static", 0.0)
    assert flops("weight 0", 0.5) == static
    assert flops("skip", 0.5) < flops("stand-ins", 0.5) < static
    quarter = static - flops("skip", 0.25)
    assert quarter > 0.1 * static
    assert static - flops("skip", 0.5) == 2 * quarter and static - flops("skip", 0.75) == 3 * quarter


def test_the_command_prints_a_line_per_pass_and_writes_what_it_measured(folder, monkeypatch, capsys):
    flags = ["--hf", str(folder), "--json", str(folder / "out.json")]
    flags += ["--prefill", "32", "--decode", "1", "4", "--context", "8", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["serving", *flags])
    assert main() == 0
    rows = json.loads((folder / "out.json").read_text())
    assert len(rows) == 3 * len(arms([0.25, 0.5, 0.75])) == 30
    assert all(row["moe_seconds"] > 0 and row["model_seconds"] > 0 for row in rows)
    assert capsys.readouterr().out.splitlines() == table(rows) and len(table(rows)) == 2 + 3 * 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shares", "1.5"], "--shares"),
        (["--repeats", "0"], "--repeats"),
        (["--device", "cuda"], "--device"),
    ],
)
def test_mistakes_are_named(flags, told):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=told):
        parse(["--hf", "x", *flags])
