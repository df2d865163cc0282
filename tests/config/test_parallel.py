"""Layers on pipeline stages: even, uneven, interleaved."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from zeda_megatron.config.parallel import ParallelConfig, stage_layers, stage_sizes
from zeda_megatron.errors import UserError


def layout(stages, first=None, last=None, virtual=1):
    return ParallelConfig(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )


def by_megatron(num_layers, parallel):
    """Layers of every stage, by Megatron's counts and offsets."""
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
    )
    chunks = range(parallel.virtual_stages) if parallel.virtual_stages else [None]
    found = []
    for rank in range(parallel.pipeline_model_parallel_size):
        mine = []
        for chunk in chunks:
            offset = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank)
            mine += range(offset, offset + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank))
        found.append(tuple(mine))
    return tuple(found)


def test_every_split_that_passes_is_megatrons_and_no_other_would_do():
    sizes = (None, 1, 2, 3, 4, 5)
    passed = 0
    for num_layers, stages, first, last, virtual in itertools.product(
        (4, 7, 12), (2, 3, 4), sizes, sizes, (1, 2)
    ):
        parallel = layout(stages, first, last, virtual)
        theirs = None
        with contextlib.suppress(ValueError, AssertionError, ZeroDivisionError):
            theirs = by_megatron(num_layers, parallel)
        try:
            mine = stage_layers(num_layers, parallel)
        except UserError:  # Megatron lets some splits pass in which layers are missing or come twice
            assert theirs is None or not every_layer_once(num_layers, theirs)
            continue
        passed += 1
        assert mine == theirs and every_layer_once(num_layers, mine)
    assert passed > 50


def every_layer_once(num_layers, stages):
    return sorted(itertools.chain(*stages)) == list(range(num_layers)) and all(stages)


def test_a_prime_number_of_layers_has_uneven_stages():
    assert stage_sizes(47, layout(2, first=24)) == (24, 23)
    assert stage_sizes(47, layout(4, last=11)) == (12, 12, 12, 11)
    assert stage_sizes(47, layout(4, first=13, last=10)) == (13, 12, 12, 10)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (layout(2), ["does not divide the model's 47 layers", "--decoder-first-pipeline-num-layers"]),
        (
            layout(4, first=12),
            ["--decoder-first-pipeline-num-layers 12", "35 are left for 3", "does not divide"],
        ),
        (layout(2, first=47), ["0 are left for 1 other stages"]),
        (layout(2, first=24, last=24), ["--decoder-last-pipeline-num-layers 24", "-1 are left for 0"]),
        (layout(3, first=60), ["-13 are left for 2"]),
        (layout(2, first=0), ["must be at least 1"]),
        (layout(1, last=47), ["--pipeline-model-parallel-size above 1"]),
        (layout(2, first=24, virtual=2), ["--virtual-pipeline-model-parallel-size 2", "24 + 23"]),
        (layout(2, first=23, last=24, virtual=2), ["--virtual-pipeline-model-parallel-size 2", "one of"]),
        (layout(2, first=20, virtual=3), ["--virtual-pipeline-model-parallel-size 3", "20 + 27"]),
    ],
)
def test_a_split_that_cannot_be_is_named_in_one_line(parallel, words):
    with pytest.raises(UserError) as error:
        stage_sizes(47, parallel)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
