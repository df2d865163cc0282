"""What sampling takes, against sums by hand."""

import json
from pathlib import Path

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.planning.flops import Geometry
from zeda_megatron.planning.rollout_sheet import main

HF = str(Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b")
ASKED = ["--hf", HF, "--answers", "1000", "--tokens", "3600", "--prompt-tokens", "400", "--hours", "2"]


def sheet(capsys, *flags: str) -> dict:
    assert main([*ASKED, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_memory_and_tokens_are_those_of_a_sum_by_hand(capsys):
    found = sheet(capsys, "--gpu", "h200", "--gpu-memory", "140", "--gpu-share", "0.5")
    weights = 2 * Geometry.read(HF).parameters / 2**30
    cache = 48 * 2 * 4 * 128 * 2 * 4000 / 2**30  # layers, keys and values, heads, channels, bytes, tokens
    assert found["tokens"] == 3_600_000 and found["tokens_per_second_needed"] == 500
    assert found["weights_gib_per_gpu"] == pytest.approx(weights)
    assert found["cache_gib_per_answer"] == pytest.approx(cache)
    assert found["answers_under_way"] == int((70 - weights) / cache)


def test_a_measured_speed_takes_the_place_of_the_roofline(capsys):
    found = sheet(capsys, "--gpu-memory", "140", "--tokens-per-second", "150")
    assert (found["engines"], found["gpus"], found["measured"]) == (4, 4, True)
    assert found["hours_of_one_engine"] == pytest.approx(3_600_000 / 150 / 3600)


def test_more_gpus_an_engine_and_skipped_picks_are_faster(capsys):
    one, two = sheet(capsys, "--gpu-memory", "140"), sheet(capsys, "--tensor-parallel-size", "2")
    assert two["tokens_per_second_of_an_engine"] > one["tokens_per_second_of_an_engine"]
    assert two["gpus"] == 2 * two["engines"]
    few = ["--gpu-memory", "140", "--answers", "16"]  # the later of two flags counts
    skipped = sheet(capsys, *few, "--zero-share", "0.5")
    assert skipped["tokens_per_second_of_an_engine"] > sheet(capsys, *few)["tokens_per_second_of_an_engine"]
    assert skipped["answers_under_way"] == 16


def test_it_is_printed_as_a_table(capsys):
    assert main([*ASKED, "--gpu-memory", "140"]) == 0
    said = capsys.readouterr().out
    assert "tokens a second for that time" in said and "at best, by roofline" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--gpu-share", "0.3"],
            r"--tensor-parallel-size 1: 56\.\d GiB of weights and one answer of 4000 tokens",
        ),
        (["--gpu-share", "1.5"], "--gpu-share"),
        (["--answers", "0"], "--answers 0"),
        (["--hours", "-1"], "--hours"),
        (["--tokens-per-second", "0"], "--tokens-per-second"),
        (["--zero-share", "1"], "--zero-share"),
        (["--gpu", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        main([*ASKED, *flags])
