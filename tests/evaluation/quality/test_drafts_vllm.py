"""Drafts that are counted as accepted here are those that vLLM accepts, with a head that was trained and exported."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_mtp
import tiny_world
import vllm_world

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.evaluation.quality import drafts
from zeda_megatron.evaluation.quality.heldout import load_held_out
from zeda_megatron.models.load import LoadedModel
from zeda_megatron.moe.router_dials import set_thresholds

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.usefixtures("one_process")]
# vLLM gives the norms of latents the config's epsilon; and it goes by keys that transformers' class leaves out.
SIZES = vllm_world.MODELS["glm"][1] | {"rms_norm_eps": 1e-6}
KEYS = {"first_k_dense_replace": 1, "topk_method": "noaux_tc"}
ALONE = {"trainable": "mtp", "mtp_loss_scale": 1.0, "teacher_memory": "shared", "num_zero_experts": 0}
NEW_TOKENS = 48
THRESHOLD = -1.0
"""Of a dynamic model: log of the weight that a pick must have."""


@pytest.fixture(scope="module")
def world(one_process, tmp_path_factory):
    """A model whose head has been trained on its own answers: checkpoint `run`, exported folder `out`."""
    root = tmp_path_factory.mktemp("world")
    world = tiny_world.make_world(root, tiny_mtp.WithHead, **SIZES)
    hf_to_megatron(world.hf, root / "static mtp", mtp=True)
    world = replace(world, static=root / "static mtp", dynamic=root / "static mtp")
    run = tiny_world.start(
        world, save=root / "run", lr=5e-3, train_iters=200, moe_router_load_balancing_type="none", **ALONE
    )
    model = LoadedModel(run.student.chunks[0].eval(), run.student.arch, load_tokenizer(world.hf))
    questions = load_held_out(str(world.rollouts), model.tokenizer, 256)
    rows = drafts._answers(model, questions, wanted(40))
    run.stepper.seq_length = 256
    for step in range(200):
        run.stepper.step([rows[(2 * step + i) % len(rows)] for i in range(2)])
        run.schedule.step(increment=1)
        run.iteration += 1
    run.save()
    run.saver.finish()
    megatron_to_hf(root / "run", world.hf, root / "out")
    vllm_world.change_config(root / "out", **KEYS)
    return world


def wanted(answers: int) -> drafts.DraftOptions:
    return drafts.DraftOptions(seq_length=256, own_answers=answers, own_answer_tokens=NEW_TOKENS)


def test_as_many_steps_and_accepted_drafts_as_in_vllm(world):
    compare(world, world.hf.with_name("run"), world.hf.with_name("out"))


def test_a_dynamic_model_drafts_with_its_own_head_in_vllm(world, tmp_path):
    """The plugin answers and skips; vLLM's own class drafts, from the folder that the export has for it."""
    hf_to_megatron(
        world.hf.with_name("out"),
        tmp_path / "paired",
        zero_expert_routing="paired",
        paired_score="weight",
        mtp=True,
    )
    megatron_to_hf(tmp_path / "paired", world.hf, tmp_path / "dynamic")
    vllm_world.change_config(tmp_path / "dynamic", zce_threshold=THRESHOLD)
    compare(world, tmp_path / "paired", tmp_path / "dynamic", [THRESHOLD])


def compare(world, megatron, folder, thresholds=None):
    model = drafts.load_model(megatron, mtp=True)
    if thresholds:
        set_thresholds(model.chunk, thresholds)
    held_out = load_held_out(str(world.heldout), model.tokenizer, 256)
    head = model.chunk.mtp.layers[0]
    mine = drafts.on_own_answers(model.chunk, head, drafts._answers(model, held_out, wanted(10)))
    job = {
        "folder": str(folder),
        "drafts": str(folder / "drafts") if thresholds else None,
        "prompts": held_out.prompts[:: len(held_out.prompts) // 10][:10],
        "new_tokens": NEW_TOKENS,
        "vocab": min(model.tokenizer.vocab_size, model.arch.vocab_size),
        "eos": sorted(model.tokenizer.eos_ids),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_drafting.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | vllm_world.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    theirs = json.loads(line)
    assert sum(map(len, theirs["answers"])) - 10 == round(mine["accepted_length"] * mine["steps"])
    kept = round(mine["acceptance"] * mine["steps"])
    assert (theirs["drafts"], theirs["accepted"]) == (mine["steps"], kept)
    assert 0.1 < mine["acceptance"] < 0.9  # the comparison means something
    assert (theirs["zero_slots"] > 0) == bool(thresholds)
