"""Differences between Megatron-Core's versions, on shapes recorded from 0.16.1 and 0.19.2."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest

from zeda_megatron.runtime.megatron_api import accepted, moe_submodules, replace_experts


class SequentialMLP:
    pass


class OtherExperts:
    pass


class Ours:
    pass


@dataclass
class Submodules:
    """`MoESubmodules` of both versions: a field `experts`, and a router."""

    experts: object
    router: object = None


@dataclass
class Spec:
    """`ModuleSpec` of both versions."""

    module: object
    params: dict = field(default_factory=dict)
    submodules: object = None


def layer(version, experts=SequentialMLP):
    """A layer spec as `get_gpt_decoder_block_spec` of that version makes it."""
    if version == "0.16":
        moe = Submodules(Spec(experts, submodules="fc"))
        return Spec("TransformerLayer", submodules=SimpleNamespace(mlp=Spec("MoELayer", submodules=moe)))
    moe = Submodules(partial(experts, submodules="fc"))
    return Spec("TransformerLayer", submodules=SimpleNamespace(mlp=partial("MoELayer".join, submodules=moe)))


@pytest.mark.parametrize("version", ["0.16", "0.19"])
def test_moe_layers_are_found_and_dense_ones_are_none(version):
    assert isinstance(moe_submodules(layer(version)), Submodules)
    dense = Spec("MLP", submodules=SimpleNamespace(linear_fc1=None))
    if version == "0.19":
        dense = partial("MLP".join, submodules=SimpleNamespace(linear_fc1=None))
    assert moe_submodules(Spec("TransformerLayer", submodules=SimpleNamespace(mlp=dense))) is None


def test_experts_are_replaced_and_their_parts_stay():
    old, new = moe_submodules(layer("0.16")), moe_submodules(layer("0.19"))
    assert replace_experts(old, SequentialMLP, Ours, backend="loop")
    assert (old.experts.module, old.experts.params, old.experts.submodules) == (
        Ours,
        {"backend": "loop"},
        "fc",
    )
    assert replace_experts(new, SequentialMLP, Ours, backend="loop")
    assert (new.experts.func, new.experts.keywords) == (Ours, {"submodules": "fc", "backend": "loop"})


@pytest.mark.parametrize("version", ["0.16", "0.19"])
def test_experts_of_another_kind_are_left_alone(version):
    moe = moe_submodules(layer(version, OtherExperts))
    before = moe.experts
    assert not replace_experts(moe, SequentialMLP, Ours)
    assert moe.experts is before


def test_only_keywords_that_a_version_knows_are_passed():
    def old(sharded_state_dict, checkpoint_dir, async_sharded_save=False):
        """dist_checkpointing.save of 0.16.1 (some parameters left out)."""

    def new(sharded_state_dict, checkpoint_dir, async_sharded_save=False, async_strategy="nvrx"):
        """The same of 0.19.2, whose default wants another package."""

    assert accepted(old, async_strategy="mcore") == {}
    assert accepted(new, async_strategy="mcore") == {"async_strategy": "mcore"}
