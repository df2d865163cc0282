"""`zeda plan fit`: what it finds is counted alike by `zeda plan memory`, and nothing cheaper was passed over."""

import json
import re
import shlex
from pathlib import Path

import pytest

from zeda_megatron.planning import first_fit, memory_sheet
from zeda_megatron.planning.first_fit import RUNGS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("one_process")


def asked(gpus, memory, stage="stage1", model="qwen3_30b_a3b", *more):
    folder = EXAMPLES / model
    files = ["--hf", str(folder), "--config", str(folder / f"{stage}.yaml")]
    return [*files, "--gpus", str(gpus), "--gpu-memory", str(memory), *more]


def found(capsys, *args):
    code = first_fit.main([*asked(*args), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("gpus", "memory", "gives_up"),
    [(8, 140, 0), (8, 79, 0), (8, 40, 2), (8, 23, 3), (2, 47, 3), (1, 79, 3), (1, 72, 4)],
)
def test_the_recipe_that_it_prints_fits_and_is_counted_alike(capsys, gpus, memory, gives_up):
    code, tries = found(capsys, gpus, memory)
    last = tries[-1]
    assert code == 0 and [one["fits"] for one in tries] == [False] * gives_up + [True]
    assert [one["gives_up"] for one in tries] == [rung.gives_up for rung in RUNGS[: gives_up + 1]]
    flags = shlex.split(" ".join(last["flags"]))
    memory_sheet.main([*asked(gpus, memory), *flags, "--json"])
    sheet = json.loads(capsys.readouterr().out)
    assert sheet["total"] == last["total"] <= memory
    assert sheet["total_at_worst_load"] == last["total_at_worst_load"]
    assert ("--trainable" in flags) == (gives_up > 2)
    assert ("--optimizer-cpu-offload" in flags) == (gives_up == 2)


def test_a_recipe_that_fits_stays_as_it_is(capsys):
    assert first_fit.main(asked(8, 140)) == 0
    told = capsys.readouterr().out
    assert re.search(r"nothing +TP4 EP8 DP2 +65,536 .* fits\n", told) and "add to the recipe: nothing" in told


def test_tokens_of_a_step_stay_where_rows_get_shorter(capsys):
    _, tries = found(capsys, 1, 79)
    flags = dict(pair.split() for pair in tries[-1]["flags"] if " " in pair)
    assert int(flags["--seq-length"]) * int(flags["--global-batch-size"]) == 65536 * 12


def test_fewer_answers_at_a_time_come_before_fewer_weights_that_train(capsys):
    code, tries = found(capsys, 8, 79, "stage2")
    assert code == 0 and any(flag.startswith("--generate-batch-size") for flag in tries[0]["flags"])


def test_answers_get_shorter_when_nothing_else_helps(capsys):
    code, tries = found(capsys, 2, 47, "stage2")
    flags = dict(pair.split() for pair in tries[-1]["flags"] if " " in pair)
    assert code == 0 and tries[-1]["gives_up"] == RUNGS[5].gives_up and flags["--trainable"] == "lora"
    assert 2 * int(flags["--max-new-tokens"]) <= int(flags["--seq-length"]) < 65536


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_nothing_fits_into_too_little(capsys, stage):
    assert first_fit.main(asked(1, 20, stage)) == 1
    told = capsys.readouterr().out
    assert "nothing fits: more GPUs, larger ones, or a smaller model" in told and "add to" not in told


MACHINES = [("1", "80"), ("2", "48"), ("8", "24"), ("8", "80"), ("8", "141")]


def test_the_table_of_machines_is_what_the_tool_prints(capsys):
    page = (EXAMPLES.parent / "docs" / "few_gpus.md").read_text()
    table = page.split("<!-- machines: begin -->")[1].split("<!-- machines: end -->")[0]
    rows = re.findall(r"^\| (\d+) × (\d+) GB \| `(\w+)/(\w+)\.yaml` \| (.*) \|$", table, re.M)
    assert [row[:4] for row in rows] == [
        (gpus, size, model, stage)
        for model in ("qwen3_30b_a3b", "glm_4_7_flash")
        for gpus, size in MACHINES
        for stage in ("stage1", "stage2")
    ]
    for gpus, size, model, stage, cells in rows:
        assert first_fit.main([*asked(gpus, int(size) - 1, stage, model), "--markdown"]) == 0
        assert capsys.readouterr().out.strip() == cells


def test_more_memory_never_gives_up_more(capsys):
    counts = []
    for memory in (23, 40, 60, 79, 100, 140):
        counts.append(len(found(capsys, 8, memory, "stage1", "glm_4_7_flash")[1]))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 1
