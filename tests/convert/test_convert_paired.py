"""Conversion of paired zero experts: fresh heads, bits and thresholds both ways, the same picks in transformers."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from tiny import assert_same_bits, weights_of
from tiny_models import TINY, make_hf_folder
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from zeda_megatron.checkpoint.state import model_state, require_checkpoint, save_checkpoint
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.models.hf_config import describe_checkpoint
from zeda_megatron.models.load import load_model, load_weights
from zeda_megatron.models.on_disk import ModelFacts
from zeda_megatron.runtime.process_groups import initialize

CLI = Path(__file__).parents[2] / "tools" / "checkpoint_convert.py"
N, K, H = TINY["num_experts"], TINY["num_experts_per_tok"], TINY["hidden_size"]
PAIRED = ZeroExpertConfig(N, "zero", "paired")
AWAKE = {"zero_experts_type": "low_rank", "paired_head_width": 5, "stand_in_rank": 3}
"""Heads with hidden units, zero experts that answer."""
CONSTANT = {"zero_experts_type": "constant"}
THRESHOLDS = [-2.3456788, -3.1, -1.7]
SPARSE = {"mlp_only_layers": [0], "num_hidden_layers": 4, "decoder_sparse_step": 2}


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def edit_config(folder, **changes):
    config = config_of(folder) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (Path(folder) / "config.json").write_text(json.dumps(config))


def float32(values):
    return torch.tensor(values, dtype=torch.float32).tolist()


def load(folder, hf, zero=PAIRED, dtype=torch.float32, heads="stored"):
    """The Megatron model, loaded with Megatron's own loader."""
    initialize(ParallelConfig())
    arch = read_architecture(hf)
    model = build_gpt_model(arch, transformer_config(arch, dtype=dtype), zero).eval()
    load_weights([model], require_checkpoint(folder, "--load"), "--load", heads=heads)
    return model


def heads(model):
    """Paired zero experts of all MoE layers, in order."""
    found = [getattr(getattr(layer.mlp, "router", None), "paired", None) for layer in model.decoder.layers]
    return [paired for paired in found if paired is not None]


def draw_heads(model, thresholds=THRESHOLDS):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        routers = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
        for router, paired, threshold in zip(routers, heads(model), thresholds):
            answers = [] if router.zero_output is None else router.zero_output.parameters()
            for parameter in [*paired.parameters(), *answers]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            paired.threshold.fill_(threshold)


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.fixture
def tokens():
    return torch.randint(0, TINY["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(5))


def make_checkpoint(tmp_path, thresholds=THRESHOLDS, dtype=torch.float32, score=None, kind=None, **changes):
    """(static HF folder, Megatron model) with drawn heads, saved as training saves it in tmp_path/"m".

    `kind`: fields of its zero experts beside the score.
    """
    hf, _ = make_hf_folder(tmp_path / "hf", dtype, **changes)
    zero = ZeroExpertConfig(N, "zero", "paired", score or ZeroExpertConfig.paired_score)
    zero = replace(zero, **(kind or {}))
    if kind:
        hf_to_megatron(hf, tmp_path / "m")
        describe_checkpoint(tmp_path / "m", hf, ModelFacts().with_zero(zero))
    else:
        hf_to_megatron(hf, tmp_path / "m", zero_expert_routing="paired", paired_score=score)
    model = load(tmp_path / "m", hf, zero, dtype, heads="stored or fresh")
    draw_heads(model, thresholds)
    save_checkpoint(tmp_path / "m", 7, model_state([model]))
    return hf, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, SPARSE, {"tie_word_embeddings": True}])
def test_fresh_heads_are_zero_keep_all_picks_and_change_no_other_bit(tmp_path, tokens, dtype, changes):
    hf, _ = make_hf_folder(tmp_path / "hf", dtype, **changes)
    hf_to_megatron(hf, tmp_path / "static")
    summary = hf_to_megatron(hf, tmp_path / "paired", zero_expert_routing="paired")
    assert summary.zero == PAIRED
    facts = json.loads((tmp_path / "paired/zeda.json").read_text())
    assert (facts["num_zero_experts"], facts["zero_experts_type"]) == (N, "zero")
    assert (facts["zero_expert_routing"], facts["paired_score"]) == ("paired", "weight+head+residual")
    assert "paired_score" not in json.loads((tmp_path / "static/zeda.json").read_text())
    static = load(tmp_path / "static", hf, ZeroExpertConfig(), dtype)
    paired = load(tmp_path / "paired", hf, PAIRED, dtype)
    expected = {k: v for k, v in static.state_dict().items() if torch.is_tensor(v)}
    found = {k: v for k, v in paired.state_dict().items() if torch.is_tensor(v)}
    for name in found.keys() - expected.keys():
        assert ".mlp.router.paired." in name
    assert_same_bits({name: found[name] for name in expected}, expected)
    for head in heads(paired):
        assert head.weight.shape == (N, H) and head.weight.dtype == head.bias.dtype == dtype
        assert not head.weight.any() and not head.bias.any()
        assert torch.equal(head.threshold, torch.tensor([-1e4]))
    assert torch.equal(logits_of(paired, tokens), logits_of(static, tokens))
    assert verify(hf, tmp_path / "paired") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, SPARSE])
@pytest.mark.parametrize("kind", [None, AWAKE, CONSTANT], ids=["silent", "awake", "constant"])
def test_round_trips_give_back_every_bit_and_threshold(tmp_path, dtype, changes, kind):
    thresholds = THRESHOLDS[: 2 if changes else 3]
    static, model = make_checkpoint(tmp_path, thresholds, dtype, kind=kind, **changes)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "hf1")
    first, config = weights_of(tmp_path / "hf1"), config_of(tmp_path / "hf1")
    layers = [1, 3] if changes else [0, 1, 2]
    for layer, head in zip(layers, heads(model)):
        gate = f"model.layers.{layer}.mlp.gate."
        assert torch.equal(first[gate + "zero_weight"], head.weight)
        assert torch.equal(first[gate + "zero_bias"], head.bias)
        assert first[gate + "weight"].shape == (N + 1, H) and not first[gate + "weight"][N].any()
    assert (config["zce_nums"], config["zce_types"]) == ([N], [(kind or {}).get("zero_experts_type", "zero")])
    if kind is AWAKE:
        assert (config["zce_head_width"], config["zce_rank"]) == (5, 3)
        assert first[gate + "zero_down"].shape == (N, 3, H) and first[gate + "zero_up"].any()
    assert (config["zce_routing"], config["zce_score"]) == ("paired", "weight+head+residual")
    assert config["zce_threshold"] == float32(thresholds)
    assert config["architectures"] == ["Qwen3MoePlusPlusForCausalLM"]
    original = {
        k: v[:N] if k.endswith("gate.weight") else v for k, v in first.items() if "gate.zero_" not in k
    }
    assert_same_bits(original, weights_of(static))
    # Hugging Face -> Megatron -> Hugging Face, through the static config beside the checkpoint
    hf_to_megatron(tmp_path / "hf1", tmp_path / "m2")
    megatron_to_hf(tmp_path / "m2", tmp_path / "m2/hf_config", tmp_path / "hf2")
    assert_same_bits(weights_of(tmp_path / "hf2"), first)
    assert config_of(tmp_path / "hf2") == config
    # Megatron -> Hugging Face -> Megatron
    expected = {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}
    again = load(tmp_path / "m2", static, replace(PAIRED, **(kind or {})), dtype)
    assert_same_bits({k: v for k, v in again.state_dict().items() if torch.is_tensor(v)}, expected)
    assert verify(tmp_path / "hf1", tmp_path / "m2") == verify(static, tmp_path / "m2") == []


def test_equal_thresholds_are_one_number_that_no_dtype_rounds(tmp_path):
    static, _ = make_checkpoint(tmp_path, [-2.3456788] * 3)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out", dtype="bf16")
    assert config_of(tmp_path / "out")["zce_threshold"] == float32([-2.3456788])[0]
    assert weights_of(tmp_path / "out")["model.layers.0.mlp.gate.zero_bias"].dtype == torch.bfloat16
    hf_to_megatron(tmp_path / "out", tmp_path / "back", dtype="bf16")
    model = load(tmp_path / "back", static, PAIRED, torch.bfloat16)
    assert [head.threshold.item() for head in heads(model)] == float32([-2.3456788] * 3)
    assert {head.threshold.dtype for head in heads(model)} == {torch.float32}


def median_thresholds(model, tokens):
    """Give each layer, from the first on, a threshold between its two middle scores: rounding decides nothing."""
    for head in heads(model):
        seen = {}

        def scores(hidden, probs, inner=head.scores, seen=seen):
            seen.update(probs=probs, scores=inner(hidden, probs))
            return seen["scores"]

        head.scores = scores
        logits_of(model, tokens)
        del head.scores
        probs, scores = seen["probs"], seen["scores"]
        ordered = scores[probs > 0].sort().values
        half = len(ordered) // 2
        head.threshold.fill_(float(ordered[half - 1] + ordered[half]) / 2)


@pytest.mark.parametrize("score", ["weight+head+residual", "head", "weight"])
@pytest.mark.parametrize(
    "changes", [{}, SPARSE, {"norm_topk_prob": False}, {"kind": AWAKE}, {"kind": CONSTANT}]
)
def test_transformers_makes_the_same_picks_and_logits(tmp_path, tokens, score, changes):
    static, model = make_checkpoint(tmp_path, score=score, **changes)
    median_thresholds(model, tokens)
    save_checkpoint(tmp_path / "m", 8, model_state([model]))
    kept, picked = [], []
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda _m, _a, out: kept.append(out[1]))
    expected = logits_of(model, tokens)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(exported).__name__ == "Qwen3MoePlusPlusForCausalLM"
    for block in exported.moe_blocks():
        block.gate.register_forward_hook(lambda _m, _a, out: picked.append(out[2]))
    with torch.no_grad():
        found = exported(tokens).logits
    assert tiny.gap(found, expected) < 1e-4
    assert len(kept) == len(picked) > 1
    for map_TN, ids_TK in zip(kept, picked):
        ours = torch.zeros(len(ids_TK), N + 1, dtype=torch.bool).scatter(1, ids_TK, True)[:, :N]
        # Megatron's rows are [S, B], those of transformers [B, S].
        theirs = map_TN.reshape(tokens.shape[1], tokens.shape[0], N).transpose(0, 1).reshape(-1, N)
        assert torch.equal(ours, theirs)
        assert ours.sum() == tokens.numel() * K / 2
    assert exported.zero_share() == [0.5] * len(kept)
    with torch.no_grad():
        exported.set_zero_mask(True)
        masked = exported(tokens).logits
        stock = Qwen3MoeForCausalLM.from_pretrained(static)
        assert torch.equal(masked, stock(tokens).logits)
    assert (found - masked).abs().max() > 0.01


def greedy(model, prompt, count):
    """Plain greedy decoding, the whole sequence again for each token."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        best = logits_of(model, tokens)[0, -1, : TINY["vocab_size"]].argmax()
        tokens = torch.cat([tokens, best.reshape(1, 1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


def test_left_padded_prompts_get_the_same_answers_with_a_cache(tmp_path):
    static, model = make_checkpoint(tmp_path, [-2.0] * 3)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompts = [[5, 17, 33, 9, 60, 2, 71], [44, 8], [90, 3, 12, 12, 50]]
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = exported.generate(
        rows,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    assert made[:, longest:].tolist() == [greedy(model, prompt, 12) for prompt in prompts]
    assert all(0.1 < share < 0.9 for share in exported.zero_share())


def test_heads_are_recognised_by_their_keys(tmp_path):
    static, _ = make_checkpoint(tmp_path, score="weight+head")
    megatron_to_hf(tmp_path / "m", static, tmp_path / "known")
    assert config_of(tmp_path / "known")["zce_score"] == "weight+head"
    (tmp_path / "m/zeda.json").unlink()
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    assert_same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "known"))
    assert config_of(tmp_path / "out")["zce_score"] == "weight+head+residual"
    assert config_of(tmp_path / "out")["zce_threshold"] == float32(THRESHOLDS)
    # a template that is paired itself knows the score
    megatron_to_hf(tmp_path / "m/iter_0000007", tmp_path / "known", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "known")


def test_stacked_layers_of_stock_megatron_are_read(tmp_path):
    static, model = make_checkpoint(tmp_path)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "expected")
    model.decoder.config.moe_layer_freq = 1
    state = model.sharded_state_dict()
    assert any(item.key == "decoder.layers.mlp.router.paired.threshold" for item in state.values())
    (tmp_path / "stock").mkdir()
    dist_checkpointing.save(state, str(tmp_path / "stock"))
    megatron_to_hf(tmp_path / "stock", static, tmp_path / "out")
    assert_same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "expected"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")


def test_verify_sees_head_threshold_and_score(tmp_path):
    static, _ = make_checkpoint(tmp_path)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "m") == []
    shard = tmp_path / "out/model.safetensors"
    tensors = load_file(shard)
    for key in ("model.layers.1.mlp.gate.zero_weight", "model.layers.2.mlp.gate.zero_bias"):
        tensors[key].view(-1)[1] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    threshold = [THRESHOLDS[0], THRESHOLDS[1] + 1e-6, THRESHOLDS[2]]
    edit_config(tmp_path / "out", zce_threshold=threshold, zce_score="weight")
    lines = verify(tmp_path / "out", tmp_path / "m")
    assert sorted(line.split(":")[0] for line in lines) == [
        "config.json",
        "model.layers.1.mlp.gate.zero_weight",
        "model.layers.2.mlp.gate.zero_bias",
        "zce_threshold/1",
    ]


def test_source_hash_counts_a_threshold_of_the_source(tmp_path):
    static, _ = make_checkpoint(tmp_path)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_config(tmp_path / "b", zce_threshold=-2.0)
    for name in "ab":
        hf_to_megatron(tmp_path / name, tmp_path / f"m{name}")
    hf_to_megatron(static, tmp_path / "static")
    digests = [
        json.loads((tmp_path / name / "zeda.json").read_text())["source_sha256"]
        for name in ("ma", "mb", "m", "static")
    ]
    assert len(set(digests)) == 3 and digests[2] == digests[3]  # a fresh head is no part of the source


def test_load_model_builds_what_zeda_json_says(tmp_path, tokens):
    _, model = make_checkpoint(tmp_path, score="weight+head")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "a": 2}, unk_token="a"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", chat_template="{{ messages }}"
    ).save_pretrained(tmp_path / "m/hf_config")
    loaded = load_model(str(tmp_path / "m")).chunk
    assert [head.terms for head in heads(loaded)] == [("weight", "head")] * 3
    assert [head.threshold.item() for head in heads(loaded)] == float32(THRESHOLDS)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_zero_experts": 3}, "--num-zero-experts 3: paired routing has one zero expert per real one, 4"),
        ({"num_zero_experts": 0}, "--num-zero-experts 0: paired routing"),
        ({"zero_experts_type": "copy"}, "--zero-experts-type copy"),
        ({"paired_score": "weight+height"}, "--paired-score 'weight.height'"),
        ({"zero_expert_routing": "pared"}, "--zero-expert-routing 'pared'"),
        ({"zero_expert_routing": "shared", "paired_score": "head"}, "needs --zero-expert-routing paired"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(tmp_path, flags, message):
    hf, _ = make_hf_folder(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        hf_to_megatron(hf, tmp_path / "out", **({"zero_expert_routing": "paired"} | flags))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zce_routing": "pared"}, "zce_routing 'pared' is unknown"),
        ({"zce_threshold": None}, "zce_threshold is missing"),
        ({"zce_threshold": "low"}, "zce_threshold 'low' must be a finite number"),
        ({"zce_threshold": math.nan}, "zce_threshold is not a finite number"),
        ({"zce_threshold": [-1.0]}, "a list of 3, one per MoE layer"),
        ({"zce_nums": [3]}, r"zce_nums \[3\] .* does not fit paired routing"),
        ({"zce_nums": None}, "zce_nums None .* does not fit paired routing"),
        ({"zce_score": "weight+height"}, "zce_score 'weight.height' is unknown"),
        (
            {"zce_routing": None, "zce_nums": None, "zce_types": None},
            "tensors do not belong to this architecture",
        ),
    ],
)
def test_broken_paired_folders_are_named(tmp_path, changes, message):
    static, _ = make_checkpoint(tmp_path)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message):
        hf_to_megatron(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_head_that_is_missing_or_left_over_is_named(tmp_path):
    static, model = make_checkpoint(tmp_path)
    megatron_to_hf(tmp_path / "m", static, tmp_path / "out")
    with pytest.raises(UserError, match=r"--zero-expert-routing shared: .* already has 4 zero experts"):
        hf_to_megatron(tmp_path / "out", tmp_path / "again", zero_expert_routing="shared")
    with pytest.raises(UserError, match=r"--paired-score head: .* paired routing; leave the flag out"):
        hf_to_megatron(tmp_path / "out", tmp_path / "again", paired_score="head")
    shutil.copytree(tmp_path / "out", tmp_path / "stray")
    edit_config(tmp_path / "stray", zce_nums=None, zce_types=None, zce_routing=None)
    with pytest.raises(UserError, match=r"gate\.zero_\w+ belongs to zero experts, but config.json has no"):
        hf_to_megatron(tmp_path / "stray", tmp_path / "again", zero_expert_routing="paired")
    shard = tmp_path / "out/model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.gate.zero_bias"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.gate\.zero_bias is missing"):
        hf_to_megatron(tmp_path / "out", tmp_path / "again")
    heads(model)[1].threshold.fill_(math.inf)
    save_checkpoint(tmp_path / "m", 8, model_state([model]))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.router\.paired\.threshold is inf"):
        megatron_to_hf(tmp_path / "m", static, tmp_path / "again")
    hf_to_megatron(static, tmp_path / "lost")
    shutil.copyfile(tmp_path / "m/zeda.json", tmp_path / "lost/zeda.json")
    with pytest.raises(UserError, match=r"zeda\.json says paired zero experts"):
        megatron_to_hf(tmp_path / "lost", static, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_template_keeps_its_logit_bias_and_the_import_drops_it(tmp_path):
    hf, _ = make_hf_folder(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "m", num_zero_experts=3)
    megatron_to_hf(tmp_path / "m", hf, tmp_path / "out")
    assert "zce_logit_bias" not in config_of(tmp_path / "out")
    edit_config(tmp_path / "out", zce_logit_bias=0.5)
    megatron_to_hf(tmp_path / "m", tmp_path / "out", tmp_path / "again")
    assert config_of(tmp_path / "again")["zce_logit_bias"] == 0.5
    hf_to_megatron(tmp_path / "out", tmp_path / "back")
    assert "zce_logit_bias" not in config_of(tmp_path / "back/hf_config")


def test_commands_convert_export_and_verify(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(CLI), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(CLI), run_name="__main__")
        return stop.value.code, capsys.readouterr()

    hf, _ = make_hf_folder(tmp_path / "hf")
    flags = ("--zero-expert-routing", "paired", "--paired-score", "weight+head")
    code, out = run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m", *flags)
    assert code == 0 and "4 zero experts" in out.out
    assert json.loads((tmp_path / "m/zeda.json").read_text())["paired_score"] == "weight+head"
    code, _ = run(
        "megatron-to-hf", "--megatron", tmp_path / "m", "--hf-template", hf, "--out", tmp_path / "out"
    )
    assert code == 0 and config_of(tmp_path / "out")["zce_threshold"] == -1e4
    assert run("verify", "--hf", tmp_path / "out", "--megatron", tmp_path / "m")[0] == 0
    edit_config(tmp_path / "out", zce_threshold=-2.0)
    code, out = run("verify", "--hf", tmp_path / "out", "--megatron", tmp_path / "m")
    assert code == 1 and "different: zce_threshold/0" in out.err
    code, out = run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "n", "--paired-score", "head")
    assert code == 2 and out.err == "error: --paired-score head needs --zero-expert-routing paired\n"
