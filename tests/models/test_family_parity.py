"""Every family in Megatron against transformers, every weight drawn: norms, biases, sinks and score biases too."""

import pytest
import tiny
import torch
from families import FAMILIES

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import MODELS, read_architecture
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]
every_variant = pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=map(": ".join, VARIANTS))


def tokens(length=21):
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model, tokens_BS):
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)


def test_no_family_of_the_package_is_left_out():
    assert set(FAMILIES) == {model.MODEL_TYPES[0] for model in MODELS}


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@every_variant
def test_logits_equal_transformers(name, variant, backend):
    hf = FAMILIES[name].make(**FAMILIES[name].variants[variant])
    with torch.no_grad():
        expected = hf(tokens()).logits
    tiny.close(logits(tiny.megatron_model(hf, backend=backend), tokens()), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # the bound means something


@every_variant
def test_masked_student_is_the_static_model_bit_for_bit(name, variant):
    hf = FAMILIES[name].make(**FAMILIES[name].variants[variant])
    static, dynamic = tiny.megatron_model(hf), tiny.megatron_model(hf, ZeroExpertConfig(4))
    with zero_mask([dynamic]):
        assert torch.equal(logits(dynamic, tokens()), logits(static, tokens()))
    assert not torch.equal(logits(dynamic, tokens()), logits(static, tokens()))


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
