"""Fitting heads as a user does: from a checkpoint and rollouts to a checkpoint."""

import json

import pytest
import tiny
import tiny_world
import torch
from ridge_reference import dense_ridge
from tiny_world import fit

from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.convert.hf_files import HFReader
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.data.rows import load_rows
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.fit.run import FitOptions
from zeda_megatron.models.load import load_model
from zeda_megatron.moe import stats
from zeda_megatron.moe.paired import paired_modules
from zeda_megatron.moe.router_dials import set_dials
from zeda_megatron.strict_json import read_json

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "paired"
    return fit(world, out), out


def heads(folder):
    chunk = load_model(str(folder)).chunk
    return [(p.weight.detach(), p.bias.detach(), float(p.threshold)) for p in paired_modules(chunk)]


def rows_of(world, count):
    run = tiny_world.start(world)
    return [run.feed.dataset[i] for i in range(count)]


def test_the_checkpoint_serves_the_wanted_share_and_the_report_says_so(world, fitted):
    report, out = fitted
    assert report["zero_share"] == pytest.approx(0.5, abs=0.005)
    chunk = load_model(str(out)).chunk
    stats.reset(chunk)
    rows = rows_of(world, 7)
    with torch.no_grad():
        for row in rows:
            forward_model(chunk, row)
    assert stats.collect(chunk, 2, torch.device("cpu")).zero_share == pytest.approx(0.5, abs=0.03)
    assert [t for _, _, t in heads(out)] == [pytest.approx(report["threshold"], abs=1e-5)] * 2


def test_heads_predict_held_out_norms_better_than_constants(fitted):
    report, _ = fitted
    assert report["rows"] == 5 and report["held_out_rows"] == 2 and report["experts_without_rows"] == 0
    for layer, r2 in report["r2_by_layer"].items():
        assert 0.2 < r2 <= 1 and r2 > report["r2_of_constants_by_layer"][layer]


def test_the_fit_to_effects_predicts_held_out_effects_and_needs_no_residual(world, tmp_path):
    report = fit(world, tmp_path / "effect", fit_target="effect", effect_floor=1.0)
    assert report["paired_score"] == "weight+head"
    assert report["zero_share"] == pytest.approx(0.5, abs=0.005)
    for layer, r2 in report["r2_by_layer"].items():
        assert r2 > report["r2_of_constants_by_layer"][layer]
    assert not any(torch.equal(a[0], torch.zeros_like(a[0])) for a in heads(tmp_path / "effect"))


def test_heads_predict_the_norm_that_the_expert_really_gives(world, fitted):
    """Correlation over all experts and tokens of one layer's input, each expert run by hand."""
    chunk = load_model(str(fitted[1])).chunk
    layer, seen = chunk.decoder.layers[1].mlp, []
    layer.router.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 32)))
    set_dials(chunk, zero_mask=True)
    row = rows_of(world, 1)[0]
    with torch.no_grad():
        forward_model(chunk, row)
        x_TH = seen[0]
        head = layer.router.paired
        picked = (x_TH @ layer.router.weight.t()).topk(3).indices
        pairs = []
        for e, (fc1, fc2) in enumerate(tiny.expert_weights(layer)):
            mine = (picked == e).any(1)
            real = tiny.dense_experts(x_TH[mine], torch.ones(int(mine.sum()), 1), [(fc1, fc2)])
            pairs.append(torch.stack([real.norm(dim=1).log(), x_TH[mine] @ head.weight[e] + head.bias[e]]))
    assert torch.corrcoef(torch.cat(pairs, dim=1))[0, 1] > 0.6


def test_masked_student_is_the_teacher_after_the_fit(world, fitted):
    static, paired = load_model(str(world.static)).chunk, load_model(str(fitted[1])).chunk
    set_dials(paired, zero_mask=True)
    row = rows_of(world, 1)[0]
    with torch.no_grad():
        assert torch.equal(forward_model(static, row), forward_model(paired, row))


def test_heads_are_the_ridge_fit_to_experts_run_by_hand_without_padding(world, fitted):
    """Inputs of every layer of the static model, padding cut off, each expert on its tokens, a dense solver."""
    static, inputs = load_model(str(world.static)), {1: [], 2: []}
    rows = load_rows(str(world.rollouts), static.tokenizer, 128, 5)
    assert any(row.padding_mask.any() for row in rows)
    for number, layer in enumerate(static.chunk.decoder.layers, 1):
        layer.mlp.register_forward_pre_hook(
            lambda _m, args, seen=inputs[number]: seen.append(args[0].reshape(-1, 32))
        )
    with torch.no_grad():
        for row in rows:
            forward_model(static.chunk, row)
    real_T = torch.cat([~row.padding_mask[0] for row in rows])
    for number, (weight, bias, _) in enumerate(heads(fitted[1]), 1):
        layer, x_TH = static.chunk.decoder.layers[number - 1].mlp, torch.cat(inputs[number])[real_T]
        picked = (x_TH @ layer.router.weight.detach().t()).topk(3).indices
        for e, (fc1, fc2) in enumerate(tiny.expert_weights(layer)):
            x = x_TH[(picked == e).any(1)]
            with torch.no_grad():
                y = tiny.dense_experts(x, torch.ones(len(x), 1), [(fc1, fc2)]).norm(dim=1).log()
            expected_weight, expected_bias = dense_ridge(x, y, 1.0)
            tiny.close(weight[e].double(), expected_weight, atol=1e-5, rtol=1e-3)
            tiny.close(bias[e].double(), expected_bias, atol=1e-4, rtol=1e-3)


def test_layers_that_do_not_fit_into_memory_are_fitted_in_further_passes(world, fitted, tmp_path):
    report = fit(world, tmp_path / "one", max_memory_gb=1e-9)
    assert (report["passes"], fitted[0]["passes"]) == (2, 1)
    for one, other in zip(heads(tmp_path / "one"), heads(fitted[1])):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_constants_only_and_weight_only_fit_less(world, tmp_path):
    report = fit(world, tmp_path / "constants", constants_only=True, target_zero_share=0.3)
    assert report["r2_by_layer"] == report["r2_of_constants_by_layer"]
    assert all(not u.any() and c.any() for u, c, _ in heads(tmp_path / "constants"))
    report = fit(world, tmp_path / "weight", paired_score="weight")
    assert report["r2_by_layer"] == {} and report["zero_share"] == pytest.approx(0.5, abs=0.01)
    assert json.loads((tmp_path / "weight" / "zeda.json").read_text())["paired_score"] == "weight"


def test_a_run_starts_from_the_fitted_checkpoint(world, fitted, tmp_path):
    run = tiny_world.start(world, pretrained_checkpoint=fitted[1], train_iters=2, save=tmp_path)
    assert run.student.zero.paired and run.run() == 0
    assert tiny_world.read_metrics(tmp_path)[0]["zero_share"] == pytest.approx(0.5, abs=0.1)


def test_the_hf_export_has_the_heads_and_the_threshold(world, fitted, tmp_path):
    report, out = fitted
    megatron_to_hf(out, world.hf, tmp_path / "hf")
    reader = HFReader(tmp_path / "hf")
    for layer, (weight, bias, _) in enumerate(heads(out)):
        assert torch.equal(reader.read(f"model.layers.{layer}.mlp.gate.zero_weight").float(), weight)
        assert torch.equal(reader.read(f"model.layers.{layer}.mlp.gate.zero_bias").float(), bias)
    config = read_json(tmp_path / "hf" / "config.json")
    assert config["zce_threshold"] == pytest.approx(report["threshold"], abs=1e-5)


def test_a_fitted_checkpoint_fitted_again_gives_the_same_heads(world, fitted, tmp_path):
    fit(world, tmp_path / "again", pretrained_checkpoint=str(fitted[1]))
    for one, other in zip(heads(tmp_path / "again"), heads(fitted[1])):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def test_bfloat16_heads_stay_near_single_precision(world, fitted, tmp_path):
    report = fit(world, tmp_path / "half", bf16=True)
    assert report["zero_share"] == pytest.approx(0.5, abs=0.005)
    for layer, r2 in fitted[0]["r2_by_layer"].items():
        assert report["r2_by_layer"][layer] == pytest.approx(r2, abs=0.05)


def test_experts_with_too_little_text_are_counted(world, tmp_path):
    report = fit(world, tmp_path / "little", fit_rows=1, held_out_rows=1, seq_length=32)
    assert report["experts_with_few_rows"] + report["experts_without_rows"] == 16
    assert all(bias.isfinite().all() for _, bias, _ in heads(tmp_path / "little"))


def test_nothing_is_overwritten_unless_asked(world, fitted, tmp_path):
    with pytest.raises(UserError, match="--overwrite"):
        fit(world, fitted[1])
    target = tmp_path / "there"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(UserError, match="has no zeda"):
        fit(world, target, overwrite=True)
    assert (target / "old").exists()
    (target / "zeda.json").write_text("{}")
    fit(world, target, overwrite=True, paired_score="weight")
    assert not (target / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": None}, "--data-path"),
        ({"data_path": ["/nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"pretrained_checkpoint": "/nowhere"}, "nowhere"),
        ({"target_zero_share": 1.0}, "--target-zero-share"),
        ({"ridge": 0.0}, "--ridge"),
        ({"fit_rows": 0}, "--fit-rows"),
        ({"fit_target": "size"}, "--fit-target"),
        ({"effect_floor": -1.0}, "--effect-floor"),
        ({"paired_score": "depth"}, "--paired-score"),
        ({"seq_length": 100_000}, "--seq-length"),
        ({"zero_experts_type": "learned"}, "--zero-experts-type"),
        ({"zero_experts_type": "low_rank"}, "--zero-experts-type low_rank needs a score without residual"),
        ({"stand_in_rank": 0}, "--stand-in-rank"),
        ({"paired_head": "mlp", "constants_only": True}, "--paired-head mlp"),
    ],
)
def test_mistakes_are_named(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        fit(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "width", "kind", "score", "rank"),
    [
        ({}, 96, "low_rank", "weight+head", 4),
        ({}, 768, "low_rank", "weight+head", 16),
        ({}, 1536, "low_rank", "weight+head", 32),
        ({"stand_in_rank": 10}, 512, "low_rank", "weight+head", 10),
        ({"zero_experts_type": "constant", "stand_in_rank": 10}, 768, "constant", "weight+head", 0),
        ({"zero_experts_type": "zero"}, 768, "zero", "weight+head", 0),
        ({"fit_target": "norm"}, 768, "zero", "weight+head+residual", 0),
        ({"fit_target": "norm", "paired_score": "weight+head"}, 768, "low_rank", "weight+head", 16),
    ],
)
def test_zero_experts_wake_up_at_two_hundredths_of_an_experts_width_unless_told_otherwise(
    changes, width, kind, score, rank
):
    zero = FitOptions("a", ["b"], "c", **changes).zero(8, width)
    assert (zero.zero_experts_type, zero.paired_score, zero.stand_in_rank) == (kind, score, rank)
    zero.validate(8, 2)


def test_a_fit_says_what_comes_next_and_given_again_that_it_is_there(world, tmp_path, capsys):
    out = tmp_path / "out"
    fit(world, out, paired_score="weight")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"saved {out}; next: zeda train --stage 1 --pretrained-checkpoint {out} ")
    assert f"--teacher-load {world.static} --data-path {world.rollouts} trains it" in last
    assert last.endswith(f"zeda convert megatron-to-hf --megatron {out} exports it")
    with pytest.raises(UserError, match=f"--save {out}: exists; train or export it, .*--overwrite"):
        fit(world, out, paired_score="weight")


def test_a_fit_that_breaks_off_leaves_nothing(world, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("zeda_megatron.fit.run.save_checkpoint", broken)
    with pytest.raises(KeyboardInterrupt):
        fit(world, tmp_path / "out", paired_score="weight")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named_before_the_fit(world, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--save .*cannot be written"):
        fit(world, tmp_path / "file" / "out")


def test_shared_zero_experts_and_layouts_that_split_experts_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="shared zero experts"):
        fit(world, tmp_path / "out", pretrained_checkpoint=str(world.dynamic))
    options = FitOptions("a", ["b"], str(tmp_path / "out"))
    for name in ("pipeline_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size"):
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            options.validate(ParallelConfig(**{name: 2}))
