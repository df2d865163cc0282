"""Each command is stopped at each of its changes to the disk, or told there that the disk is full or broken; the same
command then ends with what it gives without that, leaves nothing behind, and refuses nothing.

`ZEDA_FAULTS_ALL=1` also tries every one of several writes in a row to the same file (hours for the trainings).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_world
import torch
from machine import Command, Machine, compiler
from ordeal import contents, ordeal
from run_folders import write_run

from zeda_megatron.checkpoint.integrity import find_damage
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(20_000),
    pytest.mark.skipif(compiler() is None, reason="needs a C compiler: apt-get install gcc"),
]
TOP = Path(__file__).parents[2]
CONVERT, TRAIN, FIT, QUANTIZE = (
    str(TOP / name)
    for name in (
        "tools/checkpoint_convert.py",
        "launch/pretrain_zeda.sh",
        "tools/fit_zero_rows.py",
        "tools/quantize.py",
    )
)
SMALL = {"num_hidden_layers": 1, "num_experts": 4}
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")
STEPS = (
    "--seq-length 128 --global-batch-size 4 --train-iters 2 --save-interval 1 --most-recent-k 1 --no-progress"
)
ANSWERS = "--benchmarks reasoning_gym:chain_sum --limit 3 --samples 2 --max-new-tokens 8 --concurrency 2"

COMMANDS = {
    "import": (CONVERT, "hf-to-megatron --hf hf --out out --num-zero-experts 4"),
    "import of several files": (
        CONVERT,
        "hf-to-megatron --hf hf --out out --max-shard-bytes 30000 --workers 2",
    ),
    "export": (CONVERT, "megatron-to-hf --megatron dynamic --hf-template hf --out out"),
    "overwriting import": (CONVERT, "hf-to-megatron --hf hf --out static --num-zero-experts 4 --overwrite"),
    "overwriting export": (
        CONVERT,
        "megatron-to-hf --megatron dynamic --hf-template hf --out earlier --overwrite",
    ),
    "stage 0": (
        TRAIN,
        "--stage 0 --pretrained-checkpoint static --data-path prompts.jsonl --max-new-tokens 5 "
        "--rollout-path rolled.jsonl",
    ),
    "stage 1": (TRAIN, f"--pretrained-checkpoint dynamic --data-path rollouts.jsonl --save run {STEPS}"),
    "stage 1 in the background": (
        TRAIN,
        f"--pretrained-checkpoint dynamic --data-path rollouts.jsonl --save run --async-save {STEPS}",
    ),
    "stage 2": (
        TRAIN,
        "--stage 2 --pretrained-checkpoint dynamic --teacher-load static --data-path prompts.jsonl "
        f"--max-new-tokens 8 --save run {STEPS}",
    ),
    "stage 1 of two": (
        TRAIN,
        f"--pretrained-checkpoint dynamic --data-path rollouts.jsonl --save run {STEPS}",
    ),
    "fit": (
        FIT,
        "--pretrained-checkpoint static --data-path rollouts.jsonl --save fit --fit-rows 5 "
        "--held-out-rows 2 --seq-length 128",
    ),
    "evaluation of a folder": ("zeda_megatron", f"evaluate run --model hf --output ev {ANSWERS}"),
    "evaluation of a checkpoint": ("zeda_megatron", f"evaluate run --model dynamic --output ev {ANSWERS}"),
    "quantise": (QUANTIZE, "--hf exported --out out"),
    "report": ("zeda_megatron", "evaluate report --runs answered/teacher,answered/zeda --output page"),
}
RANKS = {"stage 1 of two": 2}
LONG = ("stage 1", "stage 1 in the background", "stage 2", "stage 1 of two", "fit")
ALL = os.environ.get("ZEDA_FAULTS_ALL") == "1"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """(machine, a folder with what the commands start from)."""
    scratch = tmp_path_factory.mktemp("faults")
    pristine = scratch / "pristine"
    pristine.mkdir()
    world = tiny_world.make_world(pristine, **SMALL)
    shutil.copytree(world.hf, pristine / "earlier")
    megatron_to_hf(world.dynamic, world.hf, pristine / "exported")
    for arm, share in (("teacher", None), ("zeda", 0.4)):
        verdicts = {"gsm8k": {f"q{i}": [i % 3 > 0] for i in range(6)}}
        write_run(pristine / "answered" / arm, arm, verdicts, share, zero_experts=share is not None)
    machine = Machine(scratch, scratch / "disk")
    yield machine, pristine
    machine.close()


def command(name: str) -> Command:
    start, flags = COMMANDS[name]
    return Command((start, *flags.split()), module="/" not in start, ranks=RANKS.get(name, 1))


def result(root: Path) -> dict:
    """Contents without what differs between two runs that nobody disturbs: times, the order of Megatron's index (its
    bytes are compared with `integrity.json`, and this with the folder), how a pickle says the same, names of
    TensorBoard's files."""
    found = contents(root)
    for name in list(found):
        path = root / name
        if "events.out.tfevents" in name or path.name == "rollout_answers.jsonl":
            del found[name]  # the second: what a run keeps for going on, a line more or less
        elif path.name == "integrity.json":
            found[name] = str(find_damage(path.parent))
        elif path.name == ".metadata":
            found[name] = ".metadata"
        elif path.name == "common.pt":
            found[name] = str(plain(torch.load(path, weights_only=False)))
        elif path.name in ("metrics.jsonl", "answers.jsonl"):
            found[name] = str(records(path))
        elif path.name == "fit.json":
            found[name] = str(timeless(json.loads(path.read_text())))
    return found


def plain(value):
    """The same, however a pickle says it (which strings are one object)."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else repr(value)


def timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.endswith(TIMES)}


def records(path: Path) -> dict:
    """Lines of a log by what they tell of, the newest of each; every line must be whole."""
    lines = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return {str(line.get("step", (line.get("uid"), line.get("sample")))): line for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_goes_on(disk, name):
    if name == "quantise":
        pytest.importorskip(
            "modelopt", reason="ModelOpt is not installed: bash tests/serving/modelopt_env.sh"
        )
    machine, pristine = disk
    tally = ordeal(machine, pristine, command(name), result, all_of_them=ALL or name not in LONG)
    print(f"{name}: {tally.tried}, {len(tally.misses)} misses", *tally.misses, sep="\n")
    assert tally.tried["kill"] > 5 and not tally.misses, "\n".join(tally.misses)
