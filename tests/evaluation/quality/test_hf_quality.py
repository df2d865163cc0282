"""Quality of an exported folder is what `measure` says of the checkpoint that it came from."""

import json

import pytest
import tiny
import tiny_world
import torch

from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality import hf_quality
from zeda_megatron.evaluation.quality.measure import MeasureOptions, measure_arm
from zeda_megatron.moe.paired import paired_modules
from zeda_megatron.moe.router_dials import set_thresholds
from zeda_megatron.serving.load import load_model


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    """Held-out conversations, some of them questions with an answer."""
    file = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    lines = [json.loads(line) for line in world.heldout.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["kind"] = "prose" if i % 2 else "task"
        line["label"] = line["messages"][-1]["content"] if i % 4 else "\x1a"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def pairs(world, one_process, tmp_path_factory):
    """Per routing: (Megatron checkpoint, folder exported from it)."""
    made = {}
    for routing in ("shared", "paired"):
        folder = tmp_path_factory.mktemp(routing)
        start = {"pretrained_checkpoint": world.dynamic}
        if routing == "paired":
            start = {"pretrained_checkpoint": world.static, "zero_expert_routing": "paired"}
        run = tiny_world.start(world, save=folder, **start)
        for i, head in enumerate(paired_modules(run.student.chunks)):
            tiny.draw(head, seed=i, std=0.1)
        set_thresholds(run.student.chunks, [-2.0])
        run.save()
        megatron_to_hf(folder, world.hf, folder / "out")
        made[routing] = folder, folder / "out"
    return made


@pytest.mark.parametrize("routing", ["shared", "paired"])
def test_figures_are_those_of_the_megatron_checkpoint(world, labelled, pairs, routing, tmp_path, capsys):
    megatron, hf = pairs[routing]
    expected = measure_arm(
        MeasureOptions(
            teacher=str(world.static),
            student=str(megatron),
            heldout=str(labelled),
            seq_length=256,
            max_new_tokens=8,
        )
    )
    flags = ["--teacher", world.hf, "--models", hf, world.hf, "--heldout", labelled, "--seq-length", 256]
    flags += ["--max-new-tokens", 8, "--batch-size", 7, "--out", tmp_path / "out.json"]
    assert hf_quality.main([str(flag) for flag in flags]) == 0
    made = json.loads((tmp_path / "out.json").read_text())[str(hf)]
    for key in ("ce", "kl_to_teacher", "zero_share", "exact_match"):
        assert made[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert made["top1_agreement_teacher"] == pytest.approx(expected["top1_agreement"], abs=0.02)
    assert 0.05 < made["zero_share"] < 0.95 and made["kl_to_teacher"] > 1e-4
    # The second folder is the teacher itself.
    static = json.loads((tmp_path / "out.json").read_text())[str(world.hf)]
    assert static["kl_to_teacher"] < 1e-9 < static["kl_to_first"]
    assert static["zero_share"] == 0.0
    assert len(capsys.readouterr().out.splitlines()) == 4


@torch.no_grad()
def test_a_right_answer_is_told_from_a_wrong_one(world):
    from zeda_megatron.data.tokenizers import load_tokenizer
    from zeda_megatron.evaluation.quality.heldout import Task

    model, tokenizer = load_model(world.hf).eval(), load_tokenizer(world.hf)
    prompts = [tokenizer.encode(text) for text in ("one two", "the cat sleeps and")]
    tasks = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_id
        )
        answer = tokenizer.decode([t for t in made[0, len(prompt) :].tolist() if t != tokenizer.eos_id])
        tasks += [Task("right", prompt, answer.strip()), Task("wrong", prompt, answer.strip() + "!")]
    found = hf_quality.exact_match(model, tasks, tokenizer, batch_size=4, max_new_tokens=6)
    assert found == {"right": 1.0, "wrong": 0.0}


def test_missing_flags_are_named(world):
    with pytest.raises(UserError, match="--models is missing"):
        hf_quality.main(["--teacher", str(world.hf)])
