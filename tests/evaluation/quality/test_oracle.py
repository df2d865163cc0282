"""An oracle of what picks do: its numbers by hand, and decisions that skip alike."""

import json
from contextlib import nullcontext

import pytest
import torch
from tiny_world import fit

from zeda_megatron.data.rows import load_rows
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality import oracle
from zeda_megatron.fit.paired_fit import moe_layers
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def fits(world, tmp_path_factory):
    made = {name: tmp_path_factory.mktemp("oracle") / name for name in ("linear", "mlp", "silent", "awake")}
    fit(world, made["linear"], fit_target="effect")
    fit(world, made["mlp"], fit_target="effect", paired_head="mlp", paired_head_width=4)
    fit(world, made["silent"], fit_target="effect", target_zero_share=0.3)
    fit(world, made["awake"], fit_target="effect", zero_experts_type="constant")
    return {name: str(folder) for name, folder in made.items()}


def options(world, fits, *students, **changes):
    values = {"teacher": str(world.static), "data_path": str(world.rollouts), "seq_length": 128, "rows": 2}
    return oracle.OracleOptions(students=[fits[name] for name in students], **(values | changes))


def log_probability(model, row, labels, scale=None):
    """Of the labels where answers are; `scale`: (layer, expert, place among its rows, factor)."""
    chunk, handle = model.chunk, None
    if scale:
        number, expert, place, factor = scale

        def stretch(_experts, args, output):
            begin = int(torch.as_tensor(args[1])[:expert].sum())
            out = output[0].clone()
            out[begin + place] *= factor
            return (out, *output[1:])

        handle = moe_layers(chunk)[number].experts.register_forward_hook(stretch)
    with torch.no_grad(), zero_mask(chunk):
        hidden = forward_model(chunk, row)[:, 0]
    if handle:
        handle.remove()
    scores = (hidden @ chunk.head_weight()[: model.arch.vocab_size].t()).double().log_softmax(1)
    where = row.loss_mask[0] > 0
    return scores[where].gather(1, labels[0, where][:, None]).sum()


def test_what_a_pick_does_is_the_slope_of_the_loss_along_its_output(world, fits):
    model = load_model(fits["linear"])
    row = load_rows(str(world.rollouts), model.tokenizer, 128, 1)[0]
    picks = oracle.look_at_picks(model, row, 2, seed=7)
    with torch.no_grad(), zero_mask(model.chunk):
        hidden = forward_model(model.chunk, row)
    labels = list(oracle.sampled_labels(model.chunk, hidden, row, model, 2, 7))
    real_T = ~row.padding_mask[0]
    assert (picks.weight_TLK[real_T] > 0).all() and (picks.weight_TLK[~real_T] == 0).all()
    tried = 0
    for token in (3, 15, 30, 45, int(real_T.nonzero()[-1])):
        for layer in range(picks.ids_TLK.shape[1]):
            expert = int(picks.ids_TLK[token, layer, 1])
            # Rows of an expert are its tokens in order; padding is routed, too.
            with (
                oracle._probabilities(moe_layers(model.chunk)) as probs,
                torch.no_grad(),
                zero_mask(model.chunk),
            ):
                forward_model(model.chunk, row)
            place = int((probs[layer + 1][:token, expert] > 0).sum())
            for sample in range(2):
                sides = [
                    log_probability(model, row, labels[sample], (layer + 1, expert, place, factor))
                    for factor in (1.05, 0.95)
                ]
                slope = float(sides[1] - sides[0]) / 0.1
                assert float(picks.z_TLKM[token, layer, 1, sample]) == pytest.approx(
                    slope, abs=2e-3, rel=2e-2
                )
                tried += abs(slope) > 5e-3
    assert tried >= 4, "slopes of nothing prove nothing"


def test_greedy_takes_pick_after_pick_the_one_that_adds_least():
    draw = torch.Generator().manual_seed(0)
    z_TPM, extra_TP = torch.randn(5, 6, 3, generator=draw).double(), torch.rand(5, 6, generator=draw).double()
    made_TP = oracle.greedy_increments(z_TPM, extra_TP)

    def together(row, chosen):
        return float(z_TPM[row, chosen].sum(0).square().mean() + extra_TP[row, chosen].sum())

    for row in range(5):
        taken, least = [], 0.0
        while len(taken) < 6:
            left = [pick for pick in range(6) if pick not in taken]
            more = {pick: together(row, [*taken, pick]) - together(row, taken) for pick in left}
            best = min(left, key=more.get)
            least = max(least, more[best])
            assert float(made_TP[row, best]) == pytest.approx(least)
            taken.append(best)


def test_all_decisions_skip_the_same_share_and_the_share_of_nothing_is_the_teacher(world, fits):
    result = oracle.Comparison(options(world, fits, "silent", "mlp", target_share=0.4)).run()
    assert len(result["decisions"]) == 6 and set(result["closed"]) == {fits["mlp"]}
    for name, found in result["decisions"].items():
        assert found["zero_share"] == pytest.approx(0.4, abs=0.01), name
        assert found["kl"] > 0
    compared = oracle.Comparison(options(world, fits, "silent", target_share=0.4))
    model = load_model(fits["silent"])
    looked = [oracle.look_at_picks(model, row, 1, 0) for row in compared.rows]
    oracle.enable_replay([model.chunk])
    alone = [row.weight_TLK.double() for row in looked]
    compared.options = options(world, fits, "silent", target_share=0.0)
    nothing = compared._distance(model, compared._targets(looked, alone, model))
    assert nothing["zero_share"] == 0 and abs(nothing["kl"]) < 1e-6


def test_the_command_prints_a_table_and_writes_the_numbers(world, fits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(oracle.process_groups, "started", nullcontext)
    out = tmp_path / "oracle.json"
    flags = ["--teacher", str(world.static), "--data-path", str(world.rollouts), "--seq-length", "128"]
    flags += ["--rows", "1", "--samples", "2", "--out", str(out)]
    assert oracle.main(["--students", fits["linear"], fits["mlp"], *flags]) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "routing weight" in shown and f"{fits['mlp']} goes" in shown
    assert set(oracle.ORACLES) < set(result["decisions"])


def test_what_an_oracle_cannot_judge_is_refused(world, fits):
    with pytest.raises(UserError, match="has no paired zero experts that give nothing"):
        oracle.Comparison(options(world, fits, "awake")).run()
    with pytest.raises(UserError, match="has no paired zero experts"):
        oracle.Comparison(options(world, {"shared": str(world.dynamic)}, "shared")).run()
