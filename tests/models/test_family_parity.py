"""Every family in Megatron against transformers, every weight drawn: norms, biases, sinks and score biases too."""

import pytest
import tiny
import torch
from families import EVERY, FAMILIES
from megatron.core.packed_seq_params import PackedSeqParams

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.distill import builtin_engine
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import MODELS, read_architecture
from zeda_megatron.moe.router_dials import zero_mask
from zeda_megatron.serving.vllm.register import SEEING

pytestmark = pytest.mark.usefixtures("one_process")
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]
every_variant = pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=map(": ".join, VARIANTS))
plain_ones_first = pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(*one, id=": ".join(one), marks=[pytest.mark.slow] * (one[1] != "plain"))
        for one in VARIANTS
    ],
)
"""The others are slow."""


def tokens(length=21):
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model, tokens_BS):
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)


def test_no_family_of_the_package_is_left_out():
    """Models that see are in tests/convert/test_seeing_models.py; their language model is a family here."""
    assert set(EVERY) == {model.MODEL_TYPES[0] for model in MODELS} - set(SEEING)


@every_variant
def test_logits_equal_transformers(name, variant):
    hf = FAMILIES[name].make(**FAMILIES[name].variants[variant])
    with torch.no_grad():
        expected = hf(tokens()).logits
    for backend in ("loop", "grouped_mm") if variant == "plain" else ("grouped_mm",):
        made = logits(tiny.megatron_model(hf, backend=backend), tokens())
        tiny.close(made, expected, rtol=0, atol=1e-4, msg=backend)
    assert expected.std() > 0.5  # the bound means something


@plain_ones_first
def test_masked_student_is_the_static_model_bit_for_bit(name, variant):
    hf = FAMILIES[name].make(**FAMILIES[name].variants[variant])
    static, dynamic = tiny.megatron_model(hf), tiny.megatron_model(hf, ZeroExpertConfig(4))
    with zero_mask([dynamic]):
        assert torch.equal(logits(dynamic, tokens()), logits(static, tokens()))
    assert not torch.equal(logits(dynamic, tokens()), logits(static, tokens()))


SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5], [80, 81, 82], [5, 6, 7, 8, 9]]


@plain_ones_first
@torch.no_grad()
def test_packed_rows_equal_separate_sequences(name, variant):
    """Windows and sinks are each sequence's own, positions begin anew."""
    model = tiny.megatron_model(FAMILIES[name].make(**FAMILIES[name].variants[variant]), ZeroExpertConfig(4))
    separate = torch.cat([logits(model, torch.tensor([s]))[0] for s in SEQUENCES])
    lengths = torch.tensor([0, *map(len, SEQUENCES)])
    ends, longest = lengths.cumsum(0, dtype=torch.int32), int(lengths.max())
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    row = torch.tensor([token for sequence in SEQUENCES for token in sequence])[None]
    positions = torch.cat([torch.arange(len(s)) for s in SEQUENCES])[None]
    tiny.close(model(row, positions, None, packed_seq_params=packed)[0], separate, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_refilled_greedy_answers_of_the_built_in_engine_equal_transformers(name, monkeypatch):
    """Two answers at a time in a cache that is moved again and again; longer than any window."""
    monkeypatch.setattr(builtin_engine, "SLACK", 1)
    hf, draw = FAMILIES[name].make(), torch.Generator().manual_seed(2)
    prompts = [torch.randint(6, 96, (n,), generator=draw).tolist() for n in (5, 1, 8, 3, 13, 2, 9)]
    stop = set(range(6))
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=sorted(stop), pad_token_id=0)
    wanted = [hf.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert len(set(map(len, wanted))) > 1
    model = tiny.megatron_model(hf, ZeroExpertConfig(4))
    with zero_mask(model):
        engine = BuiltinEngine(model, stop, pad_id=0, max_length=64, slots=2)
        made = engine.generate(prompts, SamplingConfig(max_new_tokens=24, temperature=0.0), list(range(7)))
    assert [one.response_ids for one in made] == wanted


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, family in FAMILIES.items() for changes in family.refused],
    ids=str,
)
def test_settings_that_would_not_be_followed_are_refused(name, changes):
    config = FAMILIES[name].make().config.to_dict() | {"architectures": [FAMILIES[name].architecture]}
    words = "all layers are dense" if changes == {"first_k_dense_replace": 3} else next(iter(changes))
    with pytest.raises(UserError, match=words):
        read_architecture(config | changes)
