"""Stage 0 in several jobs: together they answer what one job answers."""

import pytest
from stage0_files import answers, stage0

from zeda_megatron.errors import UserError


@pytest.mark.parametrize("shards", [2, 4, 12])
def test_shards_together_give_the_answers_of_one_job(world, one_process, tmp_path, shards):
    """Nine prompts: of twelve shards three are empty. Two samples each, and a prompt that occurs twice."""
    prompts = tmp_path / "prompts.jsonl"
    text = world.prompts.read_text()
    prompts.write_text(text.splitlines(keepends=True)[0] + text)
    common = {"data_path": prompts, "samples_per_prompt": 2}
    whole = stage0(world, tmp_path / "whole.jsonl", **common)
    files = [
        stage0(world, tmp_path / f"{i}.jsonl", num_shards=shards, shard_index=i, **common)
        for i in range(shards)
    ]
    assert answers(*(file for file in files if file.exists())) == answers(whole)


def test_a_file_of_another_shard_is_refused(world, one_process, tmp_path):
    stage0(world, tmp_path / "a.jsonl", num_shards=2, shard_index=0)
    for other in ({"num_shards": 2, "shard_index": 1}, {"num_shards": 3}, {}):
        with pytest.raises(UserError, match=r"a.jsonl was sampled with shard = '0 of 2', now it is"):
            stage0(world, tmp_path / "a.jsonl", **other)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_shards": 2, "shard_index": 2}, "--shard-index 2 must be from 0 to --num-shards - 1"),
        ({"shard_index": -1}, "--shard-index -1 must be"),
        ({"num_shards": 0}, "--num-shards 0 must be at least 1"),
        ({"num_shards": 2, "stage": "1", "data_path": "x"}, "--num-shards is for stage 0"),
    ],
)
def test_a_shard_that_cannot_be_is_a_user_error(world, tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        stage0(world, tmp_path / "a.jsonl", **values)


def test_a_stopped_run_says_so_by_its_exit_code(world, one_process, tmp_path, monkeypatch):
    from zeda_megatron.training.signals import StopRequest

    monkeypatch.setattr(StopRequest, "agreed", lambda self: True)
    few = {"generate_batch_size": 1, "stopped_exit_code": 75}
    stage0(world, tmp_path / "a.jsonl", expected_code=75, **few)
    stage0(world, tmp_path / "b.jsonl", expected_code=0, generate_batch_size=9, stopped_exit_code=75)
