"""What a request may ask of the dials in vLLM, and what the engine's settings must leave alone."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from zeda_megatron.serving.vllm.request_dials import PLACE, RequestDials

pytestmark = pytest.mark.vllm
BEGIN, END = 7, 8


def make_config(**changes):
    parallel = {"pipeline_parallel_size": 1, "use_sequence_parallel_moe": False, "enable_dbo": False}
    graphs, seeing = changes.pop("full_graphs", False), changes.pop("seeing", False)
    cache = SimpleNamespace(enable_prefix_caching=changes.pop("prefix_caching", False))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | changes),
        model_config=SimpleNamespace(supports_multimodal_inputs=seeing),
        cache_config=cache,
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs), static_forward_context={}
        ),
    )


def make_dials(**changes):
    config = make_config(**changes)
    dials = RequestDials(config, torch.device("cpu"), False)
    assert config.compilation_config.static_forward_context[PLACE] is dials
    return dials


def asked(**extra):
    return SimpleNamespace(extra_args=extra)


def update(dials, removed=(), added=(), moved=()):
    added = [(place, params, [0] * prompt, []) for place, params, prompt in added]
    dials.update_state(BatchUpdate(batch_size=4, removed=removed, added=added, moved=moved))


def see(dials, *parts):
    """A pass over some tokens of every request: (ids, first position)."""
    ids = torch.tensor([one for part, _ in parts for one in part])
    positions = torch.cat([torch.arange(first, first + len(part)) for part, first in parts])
    starts = torch.tensor([0, *torch.tensor([len(part) for part, _ in parts]).cumsum(0)], dtype=torch.int32)
    dials._see(ids, positions, starts)
    return [one.tolist() for one in dials.of_tokens[: len(ids)].split([len(part) for part, _ in parts])]


THINKS = {"zce_dial": -1.0, "zce_dial_thinking": 2.0, "zce_think_tokens": [BEGIN, END]}


def test_thinking_is_what_comes_after_its_mark_up_to_and_with_the_other():
    dials = make_dials()
    update(dials, added=[(0, asked(**THINKS), 2), (1, asked(zce_dial=0.5), 3), (2, asked(), 1)])
    first = see(dials, ([1, BEGIN], 0), ([1, BEGIN, 3], 0), ([4], 0))
    assert first == [[0, 0], [0.5, 0.5, 0.5], [0]], (
        "a prompt is read under the own dial where thinking has one"
    )
    second = see(dials, ([5], 2), ([BEGIN], 3), ([END], 1))
    assert second == [[2.0], [0.5], [0.0]], "the prompt had begun to think"
    assert see(dials, ([END], 3), ([1], 4), ([1], 2))[0] == [2.0]
    assert see(dials, ([9], 4), ([1], 5), ([1], 3))[0] == [-1.0]


def test_a_prompt_that_comes_in_parts_is_one_prompt():
    whole, parts = make_dials(), make_dials()
    prompt = [1, BEGIN, 3, END, BEGIN, 4]
    for dials in (whole, parts):
        update(dials, added=[(0, asked(**THINKS), 3)])
    expected = see(whole, (prompt, 0))[0]
    assert expected == [0, 0, 0, 2.0, -1.0, 2.0]
    made = [one for i in (0, 2, 4) for one in see(parts, (prompt[i : i + 2], i))[0]]
    assert made == expected


def test_requests_take_their_dials_along():
    dials = make_dials()
    update(dials, added=[(0, asked(zce_dial=1.0), 1), (1, asked(**THINKS), 1), (2, asked(zce_dial=3.0), 1)])
    see(dials, ([1], 0), ([BEGIN], 0), ([1], 0))
    update(dials, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert see(dials, ([5], 1), ([1], 1), ([1], 1)) == [[2.0], [1.0], [3.0]]
    update(dials, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert see(dials, ([1], 2), ([1], 2)) == [[3.0], [1.0]]
    update(dials, removed=[1], added=[(1, asked(), 1)])
    assert see(dials, ([1], 3), ([BEGIN], 0)) == [[3.0], [0.0]], "nothing is left of who was there"


def test_rows_that_fill_up_a_batch_are_nobodys():
    dials = make_dials()
    update(dials, added=[(0, asked(zce_dial=1.0), 1)])
    dials._see(torch.tensor([1, BEGIN, 0]), torch.tensor([0, 0, 0]), torch.tensor([0, 1], dtype=torch.int32))
    assert dials.of_tokens[:3].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"zce_dail": 1.0}, "zce_dail is unknown"),
        ({"zce_dial": "much"}, "zce_dial 'much' is not a finite number"),
        ({"zce_dial": float("inf")}, "zce_dial inf"),
        ({"zce_dial_thinking": 1.0}, "go together"),
        ({"zce_think_tokens": [1, 2]}, "go together"),
        ({"zce_dial_thinking": 1.0, "zce_think_tokens": [1]}, "two token ids"),
        ({"zce_dial_thinking": 1.0, "zce_think_tokens": [1, 1]}, "two token ids"),
        ({"zce_dial_thinking": 1.0, "zce_think_tokens": ["<think>", "</think>"]}, "two token ids"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_key(extra, told):
    with pytest.raises(ValueError, match=told):
        RequestDials.validate_params(asked(**extra))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({"use_sequence_parallel_moe": True}, "sequence-parallel"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"seeing": True}, "--limit-mm-per-prompt"),
        ({"full_graphs": True}, "PIECEWISE"),
    ],
)
def test_settings_that_hide_tokens_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        make_dials(**changes)
