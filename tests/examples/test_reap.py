"""REAP: scores as the paper defines them, and a folder that is the model without the experts that were cut."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from examples.rivals.reap import PruneOptions, expert_scores, kept_experts, main, prune, write_pruned
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture

MODELS = {"qwen3": tiny.hf_model, "glm": tiny.glm_model, "mixtral": tiny.mixtral_model}
KINDS = {"qwen3": "softmax", "glm": "sigmoid", "mixtral": "softmax"}
CONVERSATIONS = [[5, 9, 33, 2, 71, 8, 14], [90, 3, 3, 41]]


def dense_scores(model, name: str) -> dict[int, torch.Tensor]:
    """Token by token and expert by expert, from the definition."""
    inputs: dict[int, list] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            inputs[number] = []
            hooks.append(
                layer.mlp.register_forward_pre_hook(lambda _, x, n=number: inputs[n].append(x[0][0]))
            )
    with torch.no_grad():
        for ids in CONVERSATIONS:
            model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    read, scores = tiny.hf_reader(model), {}
    for number, parts in inputs.items():
        hidden_TH, mlp = torch.cat(parts), model.model.layers[number].mlp
        bias = getattr(mlp.gate, "e_score_correction_bias", None)
        scale = getattr(model.config, "routed_scaling_factor", 1.0)
        routing = tiny.dense_routing(hidden_TH @ mlp.gate.weight.T, 3, 8, KINDS[name], bias, scale)
        sums, counts = [0.0] * 8, [0] * 8
        for token, weights_E in zip(hidden_TH, routing.weights_TE):
            for expert in range(8):
                if float(weights_E[expert].detach()) == 0:
                    continue
                prefix = f"model.layers.{number}.mlp.experts.{expert}."
                gate, up, down = (read(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
                output = down @ (torch.nn.functional.silu(gate @ token) * (up @ token))
                sums[expert] += float(weights_E[expert]) * float(output.norm())
                counts[expert] += 1
        scores[number] = torch.tensor([s / max(c, 1) for s, c in zip(sums, counts)])
    return scores


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_definition(name):
    model = MODELS[name]()
    ours, dense = expert_scores(model, CONVERSATIONS), dense_scores(model, name)
    assert list(ours) == list(dense) and len(ours) == 2
    for layer, scores_N in ours.items():
        tiny.close(scores_N.float(), dense[layer], rtol=1e-4, atol=1e-6)


def test_the_lowest_scores_go():
    scores = {1: torch.tensor([0.3, 0.0, 0.2, 0.9]), 4: torch.tensor([0.0, 0.5, 0.4, 0.1])}
    assert kept_experts(scores, 0.5, 2) == {1: [0, 3], 4: [1, 2]}
    assert kept_experts(scores, 0.25, 2) == {1: [0, 2, 3], 4: [1, 2, 3]}
    with pytest.raises(UserError, match="leaves 1 experts, but the router picks 2"):
        kept_experts(scores, 0.75, 2)
    with pytest.raises(UserError, match="--fraction 1"):
        kept_experts(scores, 1.0, 2)


def smaller(model, kept: dict[int, list[int]]):
    """The pruned model, cut by hand from transformers' own parameters."""
    config = model.config.to_dict()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    config |= {name: 5 for name in names if name in config}
    cut = type(model)(type(model.config).from_dict(config)).eval()
    state = model.state_dict()
    for layer, experts in kept.items():
        for key in list(state):
            if key.startswith(f"model.layers.{layer}.mlp.") and (".experts." in key or ".gate." in key):
                state[key] = state[key][experts]
    cut.load_state_dict(state)
    return cut


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_folder_is_the_model_cut_by_hand(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "whole")
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    kept = {layer: [0, 2, 3, 6, 7] if place == 0 else [1, 2, 4, 5, 7] for place, layer in enumerate(layers)}
    write_pruned(tmp_path / "whole", kept, tmp_path / "cut")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    ids = torch.tensor(CONVERSATIONS[:1])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, smaller(model, kept)(ids).logits)
    arch = read_architecture(tmp_path / "cut")
    assert arch.megatron["num_moe_experts"] == 5 and arch.megatron["moe_router_topk"] == 3


def test_a_pruned_model_answers_in_megatron_too(world, one_process, tmp_path):
    from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
    from zeda_megatron.models.load import load_model

    options = PruneOptions(str(world.hf), str(world.rollouts), 10, 0.5, str(tmp_path / "cut"))
    assert main(["--hf", options.hf, "--calibration", options.calibration, "--out", options.out]) == 0
    hf_to_megatron(tmp_path / "cut", tmp_path / "megatron")
    chunk = load_model(str(tmp_path / "megatron")).chunk
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 33, 2, 71]])
    with torch.no_grad():
        ours = chunk(ids, torch.arange(5)[None], None)[..., :272]
        tiny.close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert read_architecture(tmp_path / "cut").megatron["num_moe_experts"] == 4
    assert (tmp_path / "cut" / "tokenizer.json").is_file()


def test_mistakes_are_named(world, one_process, tmp_path):
    from zeda_megatron.convert.megatron_to_hf import megatron_to_hf

    with pytest.raises(UserError, match="--calibration is missing"):
        prune(PruneOptions(str(world.hf), out="x"))
    megatron_to_hf(world.dynamic, world.hf, tmp_path / "dynamic")
    with pytest.raises(UserError, match="has zero experts; prune the static model"):
        prune(PruneOptions(str(tmp_path / "dynamic"), str(world.rollouts), out=str(tmp_path / "cut")))
    with pytest.raises(UserError, match=r"would keep \[1, 2\] experts"):
        write_pruned(world.hf, {0: [1], 1: [1, 2]}, tmp_path / "cut")
