"""Learned zero experts that begin with the experts' mean output: against a plain loop over tokens and experts."""

import pytest
import tiny
import tiny_world
import torch

from examples.rivals.mean_output import MeanOptions, begin, mean_outputs
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.data.rows import load_rows
from zeda_megatron.distill.passes import forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.models.load import load_model
from zeda_megatron.models.on_disk import read_facts
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")
K = tiny.TINY["num_experts_per_tok"]


@pytest.fixture(scope="module")
def learned(one_process, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned") / "start"
    hf_to_megatron(world.hf, folder, num_zero_experts=4, zero_experts_type="learned")
    return folder


@torch.no_grad()
def by_definition(model, rows) -> dict[int, torch.Tensor]:
    """Every real token through every expert that its router picks."""
    found = {}
    for layer in model.decoder.layers:
        inputs, outputs = [], []
        hook = layer.mlp.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        with zero_mask(model):
            for row in rows:
                forward_model(model, row)
        hook.remove()
        weight = layer.mlp.router.weight[:8]
        for row, hidden_SBH in zip(rows, inputs):
            for x_H in hidden_SBH.flatten(0, 1)[~row.padding_mask.flatten()]:
                for expert in (weight @ x_H).topk(K).indices.tolist():
                    fc1, fc2 = tiny.expert_weights(layer.mlp)[expert]
                    gate, up = (fc1 @ x_H).chunk(2)
                    outputs.append(fc2 @ (torch.nn.functional.silu(gate) * up))
        found[layer.layer_number] = torch.stack(outputs).double().mean(0)
    return found


def test_every_zero_expert_begins_with_the_mean_of_all_picks(world, learned, tmp_path):
    out = tmp_path / "out"
    begin(MeanOptions(str(learned), str(world.rollouts), rows=2, seq_length=128, out=str(out)))
    before, after = load_model(learned), load_model(out)
    rows = load_rows(str(world.rollouts), before.tokenizer, 128, 2)
    for number, mean in by_definition(before.chunk, rows).items():
        bias = after.chunk.decoder.layers[number - 1].mlp.router.zero_output.bias
        assert bias.shape == (4, 32) and mean.abs().max() > 1e-3
        for one in bias:
            tiny.close(one, mean.float(), rtol=1e-4, atol=1e-6)
    assert read_facts(out) == read_facts(learned)


def test_training_goes_on_from_it(world, learned, tmp_path):
    begin(MeanOptions(str(learned), str(world.rollouts), rows=1, seq_length=128, out=str(tmp_path / "out")))
    run = tiny_world.start(world, pretrained_checkpoint=tmp_path / "out", train_iters=1)
    assert run.run() == 0


def test_a_checkpoint_with_other_zero_experts_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"--checkpoint .*: has no learned zero experts"):
        begin(MeanOptions(str(world.dynamic), str(world.rollouts), out=str(tmp_path / "out")))


def test_a_layer_that_no_token_reaches_begins_with_zeros(learned):
    assert all(not mean.any() for mean in mean_outputs(load_model(learned).chunk, []).values())
