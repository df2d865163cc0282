"""Mappings on whole tensors: both directions, coverage, seeded zero rows."""

import pytest
import torch

from zeda_megatron.errors import UserError
from zeda_megatron.models.families.qwen3_moe import WEIGHTS as QWEN3_MOE_WEIGHTS
from zeda_megatron.models.weight_kinds import (
    QKV,
    Added,
    Direct,
    GateUp,
    ModelDims,
    Router,
    Setting,
    widen,
    zero_rows,
)
from zeda_megatron.models.weight_map import WeightMap

DIMS = ModelDims(num_query_groups=2, head_dim=4, num_real_experts=6, seed=7)


def tensors(shapes):
    return {key: torch.randn(shape[0]) for key, shape in shapes.items()}


def round_trip(mapping, shape):
    """Draw Hugging Face tensors of the declared shapes, go there and back."""
    original = tensors(mapping.hf_shapes(shape, DIMS))
    merged = mapping.to_mcore(original.__getitem__, shape, DIMS)
    assert merged.shape == shape
    back = mapping.to_hf(merged, DIMS)
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(back[key], tensor), key
    return original, merged


@pytest.mark.parametrize("rest", [(5,), ()])
def test_qkv_interleaves_per_query_group_and_comes_back(rest):
    mapping = QKV("q", "k", "v", "qkv")
    original, merged = round_trip(mapping, (6 * 4 + 2 * 2 * 4, *rest))
    group = 3 * 4 + 4 + 4  # three query heads, one key, one value
    for g in range(2):
        rows = merged[g * group : (g + 1) * group]
        assert torch.equal(rows[:12], original["q"][g * 12 : (g + 1) * 12])
        assert torch.equal(rows[12:16], original["k"][g * 4 : (g + 1) * 4])
        assert torch.equal(rows[16:], original["v"][g * 4 : (g + 1) * 4])


def test_gate_comes_before_up():
    original, merged = round_trip(GateUp("gate", "up", "fc1"), (10, 3))
    assert torch.equal(merged[:5], original["gate"]) and torch.equal(merged[5:], original["up"])


def test_direct_keeps_the_tensor():
    round_trip(Direct("a", "b"), (3, 4))
    round_trip(Added("a", "b"), (3, 4))


@pytest.mark.parametrize("shape", [(9, 5), (9,)])
def test_router_keeps_old_rows_and_appends_zero_rows(shape):
    old = torch.randn(6, *shape[1:], dtype=torch.float32).bfloat16()
    wide = Router("gate", "router").to_mcore(lambda key: old, shape, DIMS)
    assert wide.shape == shape and wide.dtype == old.dtype
    assert torch.equal(wide[:6], old)
    assert wide[6:].abs().sum() > 0


def test_router_leaves_a_checkpoint_that_has_its_zero_rows_alone():
    old = torch.randn(9, 5)
    assert torch.equal(Router("gate", "router").to_mcore(lambda key: old, (9, 5), DIMS), old)


def test_zero_rows_follow_mean_and_deviation_of_each_dimension():
    old = torch.randn(64, 3) * torch.tensor([0.1, 1.0, 5.0]) + torch.tensor([4.0, 0.0, -2.0])
    rows = zero_rows(old, 20000, seed=1, name="x")
    assert torch.allclose(rows.mean(0), old.mean(0), atol=0.15)
    assert torch.allclose(rows.std(0), old.std(0), rtol=0.05)


def test_zero_rows_depend_on_seed_and_name_only():
    old = torch.randn(8, 4)
    first = widen(old, 12, seed=3, name="layer 0")
    torch.manual_seed(99)
    assert torch.equal(widen(old, 12, seed=3, name="layer 0"), first)
    assert not torch.equal(widen(old, 12, seed=4, name="layer 0"), first)
    assert not torch.equal(widen(old, 12, seed=3, name="layer 1"), first)


def test_wildcards_take_layer_and_expert_from_the_megatron_name():
    mapping = QWEN3_MOE_WEIGHTS.for_mcore_name(
        "decoder.layers.17.mlp.experts.local_experts.102.linear_fc1.weight"
    )
    assert mapping.gate == "model.layers.17.mlp.experts.102.gate_proj.weight"
    assert mapping.up == "model.layers.17.mlp.experts.102.up_proj.weight"
    dense = QWEN3_MOE_WEIGHTS.for_mcore_name("decoder.layers.3.mlp.linear_fc1.weight")
    assert dense.gate == "model.layers.3.mlp.gate_proj.weight"


def test_every_template_has_a_megatron_name_of_its_own():
    names = [mapping.mcore.format(layer=0, expert=0) for mapping in QWEN3_MOE_WEIGHTS.mappings]
    assert len(set(names)) == len(names)
    for name, mapping in zip(names, QWEN3_MOE_WEIGHTS.mappings):
        assert type(QWEN3_MOE_WEIGHTS.for_mcore_name(name)) is type(mapping)


def test_a_setting_is_no_tensor_of_the_checkpoint_but_a_number_per_layer():
    threshold = QWEN3_MOE_WEIGHTS.for_mcore_name("decoder.layers.5.mlp.router.paired.threshold")
    assert isinstance(threshold, Setting) and threshold.key == "zce_threshold"
    assert threshold.hf_shapes((1,), DIMS) == {}
    value = torch.tensor([-2.5])
    assert threshold.to_hf(value, DIMS) == {}
    assert threshold.to_mcore({"zce_threshold/5": value}.__getitem__, (1,), DIMS) is value


def test_unknown_megatron_parameter_is_named():
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.mixer"):
        QWEN3_MOE_WEIGHTS.for_mcore_name("decoder.layers.0.mixer.weight")


MAP = WeightMap(
    mappings=(
        Direct("e", "embedding"),
        Direct("h", "head"),
        Direct("l.{layer}", "x.{layer}"),
        Added("new", "b"),
    ),
    tied={"h": "e"},
    ignored=(r"l\.\d+\.inv_freq",),
)
SHAPES = {"embedding": (2, 2), "x.0": (2,), "x.1": (2,)}


def test_bind_covers_each_key_once():
    bound = MAP.bind(SHAPES | {"head": (2, 2)}, ["e", "h", "l.0", "l.1", "l.0.inv_freq"], DIMS)
    assert [mapping.hf for mapping in bound.values()] == ["e", "l.0", "l.1", "h"]


def test_bind_accepts_the_repeated_head_of_a_tied_model():
    assert "head" not in MAP.bind(SHAPES, ["e", "h", "l.0", "l.1"], DIMS)


def test_bind_lists_missing_keys():
    with pytest.raises(UserError, match=r"folder: 1 tensors are missing: l\.1"):
        MAP.bind(SHAPES, ["e", "l.0"], DIMS, "folder")


def test_bind_lists_unknown_keys():
    with pytest.raises(UserError, match=r"folder: 4 tensors do not belong .*: a, l\.2, l\.3 and 1 more"):
        MAP.bind(SHAPES, ["e", "l.0", "l.1", "l.2", "l.3", "a", "z"], DIMS, "folder")


def test_bind_refuses_a_key_that_two_parameters_want():
    twice = WeightMap(mappings=(Direct("e", "embedding"), Direct("e", "head")))
    with pytest.raises(UserError, match="tensor e is used twice"):
        twice.bind({"embedding": (2,), "head": (2,)}, ["e"], DIMS)


def test_bind_lets_static_checkpoints_lack_added_parameters():
    assert "b" in MAP.bind(SHAPES | {"b": (2,)}, ["e", "l.0", "l.1"], DIMS)
