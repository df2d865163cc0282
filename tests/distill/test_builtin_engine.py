"""Continuous refilling, recorded routing and traces of the built-in engine."""

import copy
from contextlib import nullcontext

import pytest
import tiny
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.distill import builtin_engine
from zeda_megatron.distill.builtin_engine import AnsweringPass, BuiltinEngine, answering
from zeda_megatron.moe.paired import paired_modules
from zeda_megatron.moe.replay import recorded_picks, recording
from zeda_megatron.moe.router_dials import set_thresholds, zero_mask
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")
LENGTHS = (5, 1, 8, 3, 2, 13, 1, 4, 6, 9, 7)
SAMPLED = SamplingConfig(max_new_tokens=24, temperature=1.0, seed=3)
STOP = set(range(6))
"""A few of 96 ids: answers end at very different lengths."""


@pytest.fixture(scope="module")
def hf():
    return tiny.hf_model()


@pytest.fixture(scope="module")
def model(hf):
    return tiny.megatron_model(hf, ZeroExpertConfig(4))


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(6, 96, (length,), generator=draw).tolist() for length in LENGTHS]


def answers(model, prompts, slots=None, sampling=SAMPLED, **more):
    engine = BuiltinEngine(model, STOP, pad_id=0, max_length=64, slots=slots)
    return engine.generate(prompts, sampling, list(range(len(prompts))), **more)


def lengths(made):
    return [len(one.response_ids) for one in made]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """The answers, each given by itself."""
    made = [
        BuiltinEngine(model, STOP, 0, 64).generate([prompt], SAMPLED, [i])[0]
        for i, prompt in enumerate(prompts)
    ]
    assert len(set(lengths(made))) > 4
    return made


@pytest.mark.parametrize(
    ("slots", "slack"),
    [
        pytest.param(slots, slack, marks=[pytest.mark.slow] * (slots != 2 and slack != 1))
        for slots in (1, 2, 3, 7)
        for slack in (1, 5, 64)
    ],
)
def test_refilled_answers_equal_those_given_one_by_one(model, prompts, alone, slots, slack, monkeypatch):
    monkeypatch.setattr(builtin_engine, "SLACK", slack)  # the smaller, the more often the cache is moved
    made = answers(model, prompts, slots)
    assert [(g.response_ids, g.finish_reason) for g in made] == [
        (g.response_ids, g.finish_reason) for g in alone
    ]
    for one, other in zip(made, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_refilled_greedy_answers_equal_transformers(hf, model, prompts):
    greedy = SamplingConfig(max_new_tokens=24, temperature=0.0)
    with zero_mask(model):
        made = answers(model, prompts, 2, greedy)
    for prompt, one in zip(prompts, made, strict=True):
        expected = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=sorted(STOP),
            pad_token_id=0,
        )
        assert one.response_ids == expected[0, len(prompt) :].tolist()


def test_one_long_answer_does_not_keep_the_others_waiting(model, prompts):
    passes = []
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape))
    try:
        made = answers(model, prompts, slots=4)
    finally:
        hook.remove()
    assert max(shape[0] for shape in passes) <= 4
    steps = sum(shape[1] == 1 for shape in passes)
    by_length = sorted(lengths(made), reverse=True)
    in_batches = sum(max(by_length[i : i + 4]) for i in range(0, len(by_length), 4))
    worst = sum(max(lengths(made)[i : i + 4]) for i in range(0, len(prompts), 4))
    # Batches that wait for their longest answer take as many steps even when sorted by lengths that none can know.
    assert steps <= in_batches + 1 < worst


def test_rows_that_have_ended_leave_the_batch(model, prompts):
    batches = []
    hook = model.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    try:
        answers(model, prompts)
    finally:
        hook.remove()
    assert batches[1] == len(prompts) and batches[-1] <= len(prompts) // 2


@torch.no_grad()
def packed_picks(model, tokens):
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=len(tokens), max_seqlen_kv=len(tokens))
    with recording(model):
        model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None, packed_seq_params=packed)
        return recorded_picks([model], len(tokens))


@pytest.mark.parametrize("slots", [None, 3])
def test_recorded_routing_is_that_of_a_training_pass(model, prompts, slots):
    made = answers(model, prompts, slots, record_routing=True)
    plain = answers(model, prompts, slots)
    assert [g.response_ids for g in made] == [g.response_ids for g in plain]
    assert all(g.routed_experts_TLK is None for g in plain)
    zero = 0
    for prompt, one in zip(prompts, made, strict=True):
        fed = prompt + one.response_ids[:-1]
        assert one.routed_experts_TLK.shape == (len(fed), 2, 3)
        assert torch.equal(one.routed_experts_TLK, packed_picks(model, fed))
        zero += int((one.routed_experts_TLK >= 8).sum())
    assert zero > 0  # ids of zero experts are among them


def test_recorded_routing_of_paired_experts_says_which_picks_were_skipped(hf, prompts):
    model = tiny.megatron_model(hf, ZeroExpertConfig(8, zero_expert_routing="paired"))
    for i, paired in enumerate(paired_modules(model)):
        tiny.draw(paired, seed=i)
    set_thresholds(model, [-2.0])
    made = answers(model, prompts, record_routing=True)
    picks = torch.cat([one.routed_experts_TLK for one in made])
    assert 0.1 < float((picks >= 8).float().mean()) < 0.9
    for prompt, one in zip(prompts, made, strict=True):
        assert torch.equal(one.routed_experts_TLK, packed_picks(model, prompt + one.response_ids[:-1]))


def test_layers_without_experts_have_no_picks(prompts):
    hf = tiny.hf_model(mlp_only_layers=[0], num_hidden_layers=3)
    model = tiny.megatron_model(hf, ZeroExpertConfig(4))
    picks = answers(model, prompts[:2], record_routing=True)[0].routed_experts_TLK
    assert (picks[:, 0] == -1).all() and (picks[:, 1:] >= 0).all()


def test_statistics_and_replay_of_training_are_untouched(model, prompts):
    def state():
        return [(copy.deepcopy(router.routing_stats), router.router_replay) for router in routers(model)]

    before = state()
    answers(model, prompts, record_routing=True)
    assert state() == before


SPLITS = ("sequence_parallel", "context_parallel_size", "cp_group", "training")


def splits(chunks):
    """What of a model says how sequences are split, and what it returns."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    holders = [holder for module in modules for holder in (module, getattr(module, "config", None))]
    return [getattr(holder, name, None) for holder in holders for name in SPLITS]


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_how_sequences_are_split_is_set_aside_while_answering_and_put_back(hf, ends):
    chunks = [tiny.megatron_model(hf, ZeroExpertConfig(4)).train() for _ in range(2)]
    group = torch.distributed.group.WORLD
    for chunk in chunks:
        chunk.config.sequence_parallel = True
        chunk.config.context_parallel_size = 2
        chunk.rotary_pos_emb.cp_group = group
        for layer in chunk.decoder.layers:
            layer.self_attention.core_attention.cp_group = group
    chunks[1].eval()
    before = splits(chunks)
    with pytest.raises(KeyError) if ends == "badly" else nullcontext(), answering(chunks):
        for chunk in chunks:
            assert not (chunk.training or chunk.config.sequence_parallel)
            assert chunk.config.context_parallel_size == 1 and chunk.rotary_pos_emb.cp_group is None
            assert all(layer.self_attention.core_attention.cp_group is None for layer in chunk.decoder.layers)
        if ends == "badly":
            raise KeyError
    assert splits(chunks) == before
    assert [chunk.training for chunk in chunks] == [True, False]


def test_an_explicit_mask_of_the_future_changes_no_answer(model, prompts, monkeypatch):
    """Under context parallelism every pass has one, whatever the attention."""
    plain = answers(model, prompts, slots=3)
    made = AnsweringPass.__init__

    def explicit(self, chunks):
        made(self, chunks)
        self.explicit = True

    monkeypatch.setattr(AnsweringPass, "__init__", explicit)
    masks = []
    hook = model.register_forward_pre_hook(lambda module, args: masks.append(args[2]))
    try:
        again = answers(model, prompts, slots=3)
    finally:
        hook.remove()
    assert all(mask is not None for mask in masks)
    assert [one.response_ids for one in again] == [one.response_ids for one in plain]
