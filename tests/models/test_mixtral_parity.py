"""Mixtral in Megatron against transformers."""

import pytest
import tiny
import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")


def tokens():
    return torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model, tokens_BS):
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 12}], ids=str)
def test_logits_equal_transformers(changes, backend):
    hf = tiny.mixtral_model(**changes)
    with torch.no_grad():
        expected = hf(tokens()).logits
    tiny.close(logits(tiny.megatron_model(hf, backend=backend), tokens()), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # the bound means something


def test_masked_student_is_the_static_model_bit_for_bit():
    hf = tiny.mixtral_model()
    static, dynamic = tiny.megatron_model(hf), tiny.megatron_model(hf, ZeroExpertConfig(4))
    with zero_mask([dynamic]):
        assert torch.equal(logits(dynamic, tokens()), logits(static, tokens()))
    assert not torch.equal(logits(dynamic, tokens()), logits(static, tokens()))


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 4096}, {"router_jitter_noise": 0.1}, {"num_experts_per_tok": 1}],
    ids=str,
)
def test_settings_that_would_not_be_followed_are_refused(changes):
    config = tiny.mixtral_model().config.to_dict() | {"architectures": ["MixtralForCausalLM"]} | changes
    with pytest.raises(UserError, match=next(iter(changes))):
        read_architecture(config)
