"""Differences between Megatron-Core's versions, on shapes recorded from 0.16.1 and 0.19.2."""

import queue
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from zeda_megatron.runtime.megatron_api import (
    accepted,
    moe_submodules,
    name_layer_of_head,
    one_head,
    replace_experts,
    write_or_say_why,
)


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


class Writer:
    """`FileSystemWriterAsync` of 0.19.2 around the failures of its workers; files are lists of bytes to join."""

    @staticmethod
    def write_preloaded_data(file, number, results_queue):
        try:
            made = number, [b"".join(file)]
        except Exception as error:
            made = number, error
        if results_queue is not None:
            results_queue.put(made)
        return made

    @staticmethod
    def write_preloaded_data_multithread(rank, files, global_results_queue):
        def check(result):
            assert isinstance(result, list), type(result)

        results, own = {}, queue.Queue()
        try:  # the last file is the writer's own, and the first that it writes
            number, made = Writer.write_preloaded_data(files[-1], number=len(files) - 1, results_queue=None)
            check(made)
            results[number] = made
        except Exception as error:
            results = RuntimeError(f"An error is caught while starting worker, error: {error}")
        if not isinstance(results, Exception):
            for number, file in enumerate(files[:-1]):
                Writer.write_preloaded_data(file, number=number, results_queue=own)
                number, made = own.get()
                check(made)
                results[number] = made
        global_results_queue.put(results)


GOOD, BAD = [b"a", b"b"], [b"a", "words"]


@pytest.mark.parametrize("files", [[GOOD, GOOD], [GOOD, BAD], [BAD, GOOD], [BAD, BAD], [BAD]])
def test_a_writer_that_fails_says_why_whichever_of_its_files_it_was(files, monkeypatch):
    monkeypatch.setattr(filesystem_async, "FileSystemWriterAsync", Writer)
    stock, results = Writer.write_preloaded_data, queue.SimpleQueue()
    write_or_say_why(Writer.write_preloaded_data_multithread, 0, files, results)
    made = results.get_nowait()
    if BAD in files:
        assert isinstance(made, TypeError) and "bytes-like object" in str(made)
    else:
        assert made == {0: [b"ab"], 1: [b"ab"]}
    assert results.empty() and Writer.write_preloaded_data is stock


def test_a_writer_that_asserts_something_else_is_left_to_say_it(monkeypatch):
    def write(rank, files, results_queue):
        raise AssertionError("something else")

    monkeypatch.setattr(filesystem_async, "FileSystemWriterAsync", Writer)
    with pytest.raises(AssertionError, match="something else"):
        write_or_say_why(write, 0, [], queue.SimpleQueue())


@pytest.mark.parametrize("name", ["transformer_layer", "mtp_model_layer"])
def test_the_layer_of_a_head_has_one_name(name):
    head = torch.nn.Module()
    head.add_module(name, torch.nn.Linear(2, 2))
    head.norm = torch.nn.LayerNorm(2)
    name_layer_of_head(head)
    assert getattr(head, name) is head.transformer_layer and len(list(head.children())) == 2
    assert {key.split(".")[0] for key in head.state_dict()} == {"transformer_layer", "norm"}


def test_a_head_is_counted_only_while_it_is_built():
    config = SimpleNamespace(mtp_num_layers=None)
    with pytest.raises(KeyError), one_head(config):
        assert config.mtp_num_layers == 1
        raise KeyError
    assert config.mtp_num_layers is None
