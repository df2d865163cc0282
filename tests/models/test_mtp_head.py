"""The head of multi-token prediction in Megatron: its definition in plain PyTorch, packed rows, masks."""

import pytest
import tiny
import tiny_mtp
import torch

from zeda_megatron.checkpoint.state import require_checkpoint
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.data.conversation import TokenSample
from zeda_megatron.data.packing import PackedDataset
from zeda_megatron.distill.passes import draft_states, forward_model
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import build_gpt_model, transformer_config
from zeda_megatron.models.load import load_weights
from zeda_megatron.moe.router_dials import zero_mask

pytestmark = pytest.mark.usefixtures("one_process")
LENGTHS = (9, 1, 2, 14, 6)


@pytest.fixture(scope="module")
def glm():
    return tiny_mtp.WithHead()


@pytest.fixture(scope="module")
def row():
    draw = torch.Generator().manual_seed(3)
    samples = [
        TokenSample(torch.randint(1, 96, (length,), generator=draw).tolist(), [True] * length)
        for length in LENGTHS
    ]
    return PackedDataset(samples, 40, pad_id=0, seed=1)[0]


def load(folder, tmp_path, zero=None, name="checkpoint", **flags):
    """The Megatron model of a folder, head included, as a conversion makes it."""
    hf_to_megatron(folder, tmp_path / name, mtp=True, **flags)
    arch = read_architecture(folder).with_mtp_head("--mtp")
    model = build_gpt_model(arch, transformer_config(arch), zero).eval()
    load_weights([model], require_checkpoint(tmp_path / name, "--load"), "--load")
    return model


@torch.no_grad()
def drafts(model, row):
    """Logits [S, V] of the head."""
    hidden = forward_model(model, row)
    return (draft_states(model, row, hidden) @ model.head_weight().t())[:, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["glm4_moe_lite", "glm4_moe", "deepseek_v3"])
def test_the_head_is_what_its_definition_says(tmp_path, row, family, tied):
    glm = tiny_mtp.WithHead(family=family, tie_word_embeddings=tied)
    glm.save(tmp_path / "hf")
    model = load(tmp_path / "hf", tmp_path)
    made, ends = drafts(model, row), row.cu_seqlens.tolist()
    compared = 0
    for start, end in zip(ends, ends[1:]):
        sequence = row.tokens[0, start:end]
        if row.padding_mask[0, start] or len(sequence) < 2:
            continue
        with torch.no_grad():
            expected = glm.draft_logits(sequence)
        tiny.close(made[start : end - 1], expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.5  # the bound means something
        compared += len(expected)
    assert compared == sum(length - 1 for length in LENGTHS)


def test_masked_students_head_is_the_teachers_bit_for_bit(glm, tmp_path, row):
    glm.save(tmp_path / "hf")
    static = load(tmp_path / "hf", tmp_path)
    dynamic = load(tmp_path / "hf", tmp_path, ZeroExpertConfig(4), "dynamic", num_zero_experts=4)
    with zero_mask(dynamic):
        assert torch.equal(drafts(dynamic, row), drafts(static, row))
    assert not torch.equal(drafts(dynamic, row), drafts(static, row))


def test_the_head_moves_nothing_but_itself(glm, tmp_path, row):
    glm.save(tmp_path / "hf")
    model = load(tmp_path / "hf", tmp_path, ZeroExpertConfig(4), num_zero_experts=4)
    draft_states(model, row, forward_model(model, row)).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient and all(name.startswith("mtp.layers.0.") for name in with_gradient)
    assert {
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.transformer_layer.mlp.router.weight",
    } <= with_gradient


def test_a_model_without_a_head_and_a_layout_that_cannot_hold_it_are_refused(glm, tmp_path):
    with pytest.raises(UserError, match=r"--mtp: config\.json says num_nextn_predict_layers 0"):
        tiny.architecture().with_mtp_head("--mtp")
    glm.save(tmp_path / "hf")
    arch = read_architecture(tmp_path / "hf").with_mtp_head("--mtp")
    parallel = ParallelConfig(pipeline_model_parallel_size=3)
    with pytest.raises(UserError, match="--pipeline-model-parallel-size 3 does not work with a head"):
        build_gpt_model(arch, transformer_config(arch, parallel))
