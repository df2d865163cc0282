"""GLM-4.7-Flash in Megatron against transformers: logits, packed rows, generation; and promise 1 on one process."""

import pytest
import tiny
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import Glm4MoeLiteConfig

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.distill import builtin_engine
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import check_layout
from zeda_megatron.models.latent_attention import DriftingRotary
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")
VARIANTS = {
    "plain": {},
    "queries without latents": {"q_lora_rank": None},
    "two shared experts": {"n_shared_experts": 2},
    "two dense layers": {"mlp_layer_types": ["dense", "dense", "sparse"]},
    "tied embeddings": {"tie_word_embeddings": True},
    "other scale": {"routed_scaling_factor": 0.7},
}
LENGTHS = (5, 1, 8, 3, 2, 13, 1, 4, 6, 9, 7)
STOP = set(range(6))
SEQUENCES = [[5, 6, 7, 8, 9], [5], [80, 81, 82], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def hf():
    return tiny.glm_model()


@pytest.fixture(scope="module")
def dynamic(hf):
    return tiny.megatron_model(hf, ZeroExpertConfig(4))


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(6, 96, (length,), generator=draw).tolist() for length in LENGTHS]


GREEDY = SamplingConfig(max_new_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def greedy_answers(hf, prompts):
    """What transformers answers to each prompt."""
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=sorted(STOP), pad_token_id=0)
    made = [hf.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    assert len(set(map(len, made))) > 4
    return made


def tokens(rows=2, length=11, seed=4):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens_BS):
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)


@torch.no_grad()
def packed_logits(model, sequences):
    ends = torch.tensor([0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    row = torch.tensor([token for sequence in sequences for token in sequence])[None]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
    longest = max(map(len, sequences))
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    return model(row, positions, None, packed_seq_params=packed)[0]


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, backend):
    hf = tiny.glm_model(**VARIANTS[variant])
    with torch.no_grad():
        expected = hf(tokens()).logits
    model = tiny.megatron_model(hf, backend=backend)
    tiny.close(logits(model, tokens()), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # the bound means something


def test_norms_of_the_latents_have_their_own_epsilon():
    """With small latents the epsilon decides: `rms_norm_eps` in its place would be far off."""
    hf = tiny.glm_model(rms_norm_eps=1e-2)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_a_proj.weight.mul_(1e-3)
            layer.self_attn.kv_a_proj_with_mqa.weight.mul_(1e-3)
        expected = hf(tokens()).logits
    model = tiny.megatron_model(hf)
    tiny.close(logits(model, tokens()), expected, rtol=0, atol=1e-4)
    for layer in model.decoder.layers:
        layer.self_attention.kv_layernorm.eps = 1e-2
    assert (logits(model, tokens()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("which", ["static", "dynamic"])
def test_packed_rows_equal_separate_sequences(hf, which):
    model = tiny.megatron_model(hf, ZeroExpertConfig(4) if which == "dynamic" else None)
    separate = torch.cat([logits(model, torch.tensor([s]))[0] for s in SEQUENCES])
    tiny.close(packed_logits(model, SEQUENCES), separate, rtol=0, atol=1e-5)
    if which == "static":
        with torch.no_grad():
            expected = torch.cat([hf(torch.tensor([s])).logits[0] for s in SEQUENCES])
        tiny.close(separate, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_masked_student_is_the_teacher_bit_for_bit(hf, backend, dtype):
    static = tiny.megatron_model(hf, None, backend, dtype=dtype)
    dynamic = tiny.megatron_model(hf, ZeroExpertConfig(5, group_loss_coeff=0.1), backend, dtype=dtype)
    with zero_mask(dynamic):
        assert torch.equal(logits(dynamic, tokens()), logits(static, tokens()))
        assert torch.equal(packed_logits(dynamic, SEQUENCES), packed_logits(static, SEQUENCES))
    assert not torch.equal(logits(dynamic, tokens()), logits(static, tokens()))


def test_no_cast_rounds_the_score_bias(hf, dynamic):
    model = tiny.megatron_model(hf, ZeroExpertConfig(4)).bfloat16()
    made, wanted = routers(model), routers(dynamic)
    assert len(made) == 2 and made[0].weight.dtype == torch.bfloat16
    for router, other in zip(made, wanted, strict=True):
        assert router.expert_bias.dtype == torch.float32 and torch.equal(
            router.expert_bias, other.expert_bias
        )
        assert not torch.equal(router.expert_bias.bfloat16().float(), router.expert_bias)


@pytest.mark.parametrize(
    ("slots", "slack"),
    [
        pytest.param(slots, slack, marks=[pytest.mark.slow] * (slots != 2 and slack != 1))
        for slots in (1, 2, 3, None)
        for slack in (1, 5, 64)
    ],
)
def test_refilled_greedy_answers_equal_transformers(
    dynamic, prompts, greedy_answers, slots, slack, monkeypatch
):
    """The smaller the slack, the more often the cache is moved, with keys in it that are rotated already."""
    monkeypatch.setattr(builtin_engine, "SLACK", slack)
    with zero_mask(dynamic):
        engine = BuiltinEngine(dynamic, STOP, pad_id=0, max_length=64, slots=slots)
        made = engine.generate(prompts, GREEDY, list(range(len(prompts))))
    assert [one.response_ids for one in made] == greedy_answers


def test_refilled_samples_have_the_logprobs_of_whole_passes(dynamic, prompts, monkeypatch):
    monkeypatch.setattr(builtin_engine, "SLACK", 1)
    sampling = SamplingConfig(max_new_tokens=24, temperature=1.0, seed=3)
    engine = BuiltinEngine(dynamic, STOP, pad_id=0, max_length=64, slots=2)
    for prompt, one in zip(prompts, engine.generate(prompts, sampling, list(range(11))), strict=True):
        whole = torch.tensor([prompt + one.response_ids])
        logp = logits(dynamic, whole)[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, whole[0, len(prompt) :, None]).flatten().tolist()
        assert one.logprobs == pytest.approx(expected, abs=5e-5)


def test_far_positions_keep_their_differences(dynamic):
    rotary = dynamic.decoder.layers[0].self_attention.rotary_pos_emb
    assert isinstance(rotary, DriftingRotary)

    def turn(drift):
        context = type("Context", (), {"drift": drift, "max_sequence_length": 8})()
        length = rotary.get_rotary_seq_len(context, None, None, dynamic.config)
        return rotary(length)[:, 0, 0]

    near, far = turn(0), turn(3_000_000)
    expected = near[5] - near[2]
    tiny.close((far[5] - far[2]).cos(), expected.cos(), rtol=0, atol=1e-5)
    tiny.close((far[5] - far[2]).sin(), expected.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"norm_topk_prob": False},
        {"n_group": 2},
        {"rope_interleave": False},
        {"num_key_value_heads": 2},
        {"num_experts_per_tok": 1},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_configs_that_the_megatron_model_would_not_follow_are_refused(changes):
    config = Glm4MoeLiteConfig(**tiny.GLM).to_dict() | changes
    with pytest.raises(UserError, match=next(iter(changes))):
        read_architecture(config)


def test_a_layout_that_cuts_the_shared_expert_unevenly_is_refused():
    arch = read_architecture(Glm4MoeLiteConfig(**tiny.GLM).to_dict())
    arch.megatron["moe_shared_expert_intermediate_size"] = 17
    with pytest.raises(UserError, match="17 channels of the shared expert"):
        check_layout(arch, ParallelConfig(tensor_model_parallel_size=2))
