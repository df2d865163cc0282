"""The Megatron model against transformers: logits, packed rows, generation; and promise 1 on one process."""

import pytest
import tiny
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.distill.answers import Sampler, filter_logits
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.errors import UserError
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")
VARIANTS = {
    "plain": {},
    "norm_topk_prob off": {"norm_topk_prob": False},
    "dense first layer": {"mlp_only_layers": [0], "num_hidden_layers": 3},
    "every second layer sparse": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "other rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
}
PROMPTS = [[5, 17, 3, 80, 41], [9], [60, 61, 62, 63, 64, 65, 66, 67], [9, 30, 2]]
GREEDY = SamplingConfig(max_new_tokens=9, temperature=0.0)


@pytest.fixture(scope="module")
def hf():
    return tiny.hf_model()


@pytest.fixture(scope="module")
def model(hf):
    return tiny.megatron_model(hf)


@pytest.fixture(scope="module")
def dynamic(hf):
    return tiny.megatron_model(hf, ZeroExpertConfig(4))


def tokens(rows=2, length=11, seed=4):
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens_BS, **more):
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None, **more)


@torch.no_grad()
def packed_logits(model, sequences):
    ends = torch.tensor([0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    row = torch.tensor([token for sequence in sequences for token in sequence])[None]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
    longest = max(map(len, sequences))
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return model(row, positions, None, packed_seq_params=packed)[0]


def engine(model, stop=(), max_length=64):
    return BuiltinEngine(model, set(stop), pad_id=0, max_length=max_length)


def greedy_by_transformers(hf, prompt, count, stop=None):
    made = hf.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        use_cache=True,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, backend):
    hf = tiny.hf_model(**VARIANTS[variant])
    with torch.no_grad():
        expected = hf(tokens()).logits
    tiny.close(logits(tiny.megatron_model(hf, backend=backend), tokens()), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # the bound means something


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True, "sliding_window": 4},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": 1},
    ],
)
def test_configs_that_the_megatron_model_would_not_follow_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes)).replace("rope_parameters", "rope_type")):
        tiny.architecture(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("variant", ["plain", "norm_topk_prob off", "dense first layer"])
def test_masked_student_is_the_teacher_bit_for_bit(variant, backend, dtype):
    hf = tiny.hf_model(**VARIANTS[variant])
    static = tiny.megatron_model(hf, None, backend, dtype=dtype)
    dynamic = tiny.megatron_model(hf, ZeroExpertConfig(5, group_loss_coeff=0.1), backend, dtype=dtype)
    sequences = [[1, 2, 3, 4], [50, 40, 30], [7] * 6]
    with zero_mask(dynamic):
        assert torch.equal(logits(dynamic, tokens()), logits(static, tokens()))
        assert torch.equal(packed_logits(dynamic, sequences), packed_logits(static, sequences))
    assert not torch.equal(logits(dynamic, tokens()), logits(static, tokens()))


@pytest.mark.parametrize("which", ["model", "dynamic"])
def test_packed_rows_equal_separate_sequences(request, which):
    made = request.getfixturevalue(which)
    sequences = [[5, 6, 7, 8, 9], [5], [80, 81, 82], [5, 6, 7, 8, 9]]
    separate = torch.cat([logits(made, torch.tensor([s]))[0] for s in sequences])
    tiny.close(packed_logits(made, sequences), separate, rtol=0, atol=1e-5)


def test_hidden_states_times_the_head_are_the_logits(model):
    expected = logits(model, tokens())
    hidden_SBH = logits(model, tokens(), return_hidden=True)
    assert hidden_SBH.shape == (11, 2, 32)
    tiny.close((hidden_SBH @ model.head_weight().t()).transpose(0, 1), expected, rtol=0, atol=1e-5)


def test_greedy_generation_equals_transformers_for_uneven_prompts(hf, model):
    made = engine(model).generate(PROMPTS, GREEDY, list(range(len(PROMPTS))))
    for prompt, generation in zip(PROMPTS, made):
        assert generation.response_ids == greedy_by_transformers(hf, prompt, 9)
        assert generation.finish_reason == "length"
        whole = torch.tensor([prompt + generation.response_ids])
        with torch.no_grad():
            logp = hf(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, whole[0, len(prompt) :, None]).flatten().tolist()
        assert generation.logprobs == pytest.approx(expected, abs=1e-4)


def test_generation_of_the_dynamic_model_equals_its_full_forward_passes(dynamic):
    made = engine(dynamic).generate(PROMPTS, GREEDY, list(range(len(PROMPTS))))
    for prompt, generation in zip(PROMPTS, made):
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(logits(dynamic, torch.tensor([ids]))[0, -1].argmax()))
        assert generation.response_ids == ids[len(prompt) :]


def test_answers_end_at_a_stop_token_and_keep_it(hf, model):
    free = [greedy_by_transformers(hf, prompt, 9) for prompt in PROMPTS]
    stop = {free[0][3], free[2][0]}
    for prompt, whole, made in zip(
        PROMPTS, free, engine(model, stop).generate(PROMPTS, GREEDY, [0, 1, 2, 3])
    ):
        end = next((i + 1 for i, token in enumerate(whole) if token in stop), None)
        assert made.response_ids == whole[:end]
        assert made.response_ids == greedy_by_transformers(hf, prompt, 9, sorted(stop))
        assert made.finish_reason == ("stop" if end else "length")
        assert len(made.logprobs) == len(made.response_ids)


def test_answers_end_at_max_new_tokens_and_at_the_end_of_the_context(model):
    made = engine(model, max_length=10).generate(PROMPTS, GREEDY, [0, 1, 2, 3])
    assert [len(g.response_ids) for g in made] == [min(9, 10 - len(p)) for p in PROMPTS]
    assert {g.finish_reason for g in made} == {"length"}
    for count in (1, 2):
        made = engine(model).generate(PROMPTS, SamplingConfig(count, temperature=0.0), [0, 1, 2, 3])
        assert [len(g.response_ids) for g in made] == [count] * 4


@pytest.mark.parametrize("prompt", [[], [1] * 10, [1] * 11])
def test_prompts_that_leave_no_room_are_user_errors(model, prompt):
    with pytest.raises(UserError, match=f"prompt of {len(prompt)} tokens.*context of 10"):
        engine(model, max_length=10).generate([[1], prompt], GREEDY, [0, 1])


def test_sampling_is_reproducible_and_independent_of_the_batch(model):
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.3, seed=11)
    together = engine(model).generate(PROMPTS, sampling, [3, 4, 5, 6])
    assert engine(model).generate(PROMPTS, sampling, [3, 4, 5, 6]) == together
    backwards = engine(model).generate(PROMPTS[::-1], sampling, [6, 5, 4, 3])[::-1]
    alone = [engine(model).generate([p], sampling, [i])[0] for p, i in zip(PROMPTS, [3, 4, 5, 6])]
    assert [g.response_ids for g in together] == [g.response_ids for g in alone]
    assert [g.response_ids for g in together] == [g.response_ids for g in backwards]
    for other in (
        engine(model).generate(PROMPTS, sampling, [7, 8, 9, 10]),
        engine(model).generate(PROMPTS, SamplingConfig(12, 1.3, seed=12), [3, 4, 5, 6]),
    ):
        assert [g.response_ids for g in other] != [g.response_ids for g in together]


def test_generation_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    model.train()
    engine(model).generate(PROMPTS, GREEDY, [0, 1, 2, 3])
    assert model.training
    model.eval()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert engine(model).generate([], GREEDY, []) == []


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (500, 1.0), (0, 0.6), (0, 0.01), (8, 0.5)]
)
def test_top_k_and_top_p_cut_the_tokens_that_transformers_cuts(temperature, top_k, top_p):
    logits_BV = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filter_logits(logits_BV, SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, expected)


def test_samples_follow_the_distribution():
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    draws = 4000
    config = SamplingConfig(temperature=0.8, top_k=4)
    sampler = Sampler(config, list(range(draws)), torch.device("cpu"))
    tokens, logprobs = sampler(logits_BV.expand(draws, -1), list(range(draws)))
    wanted_V = torch.tensor([2.0, 1.0, 0.0, float("-inf"), 0.5]).div(0.8).softmax(0)
    share_V = torch.bincount(tokens, minlength=5) / draws
    assert (share_V - wanted_V).abs().max() < 4 * (0.25 / draws) ** 0.5
    torch.testing.assert_close(logprobs, wanted_V.log()[tokens])


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"top_k": -1}, "--top-k -1"),
    ],
)
def test_senseless_sampling_settings_are_user_errors(settings, flag):
    with pytest.raises(UserError, match=flag):
        SamplingConfig(**settings)
