"""An adapted model is never its own teacher by accident, and a teacher is known by its weights, not by its folder."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.rivals.reap import write_pruned
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.models.load import load_model
from zeda_megatron.models.on_disk import ModelFacts, adapted_steps, read_facts, weights_id
from zeda_megatron.training.build import teacher_source
from zeda_megatron.training.evaluate import run_evaluation
from zeda_megatron.training.stage0 import run_stage0

pytestmark = pytest.mark.usefixtures("one_process")
PLAIN = {"moe_router_load_balancing_type": "none"}


def train(world, save, **flags):
    assert tiny_world.start(world, save=save, **{"train_iters": 2} | flags).run() == 0
    return save


def fit(world, start, save):
    tiny_world.fit(world, save, pretrained_checkpoint=str(start), fit_rows=2, held_out_rows=1)
    return save


def reimport(hf, out):
    hf_to_megatron(hf, out)
    return out


def resaved(hf, out, **changes):
    """The folder as transformers writes it after it has opened it."""
    model = AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True, dtype="auto")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(hf).save_pretrained(out)
    edit(out / "config.json", **changes)
    return out


def edit(file, **changes):
    told = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in told.items() if value is not ...}))


@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory):
    """Adapted checkpoints by the way that they went, and the steps that each has to tell."""
    root = tmp_path_factory.mktemp("adapted")
    run = train(world, root / "run", save_interval=1)
    megatron_to_hf(run, world.hf, root / "hf")
    megatron_to_hf(run / "iter_0000001", world.hf, root / "hf_1")
    resaved(root / "hf", root / "resaved")
    paired = fit(world, world.static, root / "fit")
    paired = train(world, root / "paired", pretrained_checkpoint=paired, teacher_load=world.static, **PLAIN)
    net = {"pretrained_checkpoint": world.static, "moe_pick_rule": "topk=2"}
    net = train(world, root / "net", **net, **PLAIN)
    megatron_to_hf(net, world.hf, root / "net_hf")
    write_pruned(root / "net_hf", {0: [0, 1, 2, 3], 1: [2, 3, 4, 5]}, root / "pruned_hf")
    authors = resaved(root / "hf", root / "authors", zce_adapted_steps=...)
    again = {"pretrained_checkpoint": run, "teacher_load": world.dynamic}
    pretrain = {"pretrained_checkpoint": net, "stage": "pretrain", **PLAIN}
    shutil.copytree(run / "iter_0000002", root / "taken out")
    shutil.copytree(reimport(root / "hf", root / "back") / "release", root / "back taken out")
    for name, kept in (("lost", run), ("lost_net", net)):
        shutil.copytree(kept / "iter_0000002", root / name)
        shutil.copytree(kept / "hf_config", root / f"{name}_config")
        megatron_to_hf(root / name, root / f"{name}_config", root / f"{name}_hf")
    shutil.copytree(run, root / "without facts")
    (root / "without facts" / "zeda.json").unlink()
    return {
        "the run": (run, 2),
        "one of its steps": (run / "iter_0000002", 2),
        "a step outside of its run": (root / "taken out", 2),
        "a run whose zeda.json was never written": (root / "without facts", 2),
        "exported and imported": (root / "back", 2),
        "an import's weights alone": (root / "back taken out", 2),
        "one step, exported and imported": (reimport(root / "hf_1", root / "back_1"), 2),
        "saved by transformers": (reimport(root / "resaved", root / "back_resaved"), 2),
        "published by its authors": (reimport(authors, root / "back_authors"), None),
        "a step outside of its run, imported": (reimport(root / "lost_hf", root / "back_lost"), None),
        "the same without zero experts": (reimport(root / "lost_net_hf", root / "back_lost_net"), None),
        "paired": (paired, 2),
        "paired and fitted anew": (fit(world, paired, root / "anew"), 2),
        "without zero experts": (net, 2),
        "without zero experts, imported": (reimport(root / "net_hf", root / "back_net"), 2),
        "pruned": (reimport(root / "pruned_hf", root / "back_pruned"), 2),
        "adapted and then trained plainly": (train(world, root / "plain", **pretrain), 2),
        "adapted twice": (train(world, root / "twice", **again), 4),
    }


@pytest.fixture(scope="module")
def originals(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    megatron_to_hf(world.dynamic, world.hf, root / "hf")
    fitted = fit(world, world.static, root / "fit")
    pretrain = {"pretrained_checkpoint": world.static, "stage": "pretrain", **PLAIN}
    return {
        "static": world.static,
        "dynamic": world.dynamic,
        "its weights alone": world.dynamic / "release",
        "fitted": fitted,
        "exported and imported": reimport(root / "hf", root / "back"),
        "saved by transformers": reimport(resaved(root / "hf", root / "resaved"), root / "back_resaved"),
        "trained plainly": train(world, root / "plain", **pretrain),
    }


def test_every_way_that_an_adapted_model_goes_keeps_its_mark(adapted):
    told = {name: adapted_steps(folder, "--load") for name, (folder, _) in adapted.items()}
    assert told == {name: steps for name, (_, steps) in adapted.items()}


def test_no_stage_takes_an_adapted_model_as_its_teacher_by_default(world, adapted, tmp_path):
    for name, (folder, _) in adapted.items():
        for stage in ("0", "1", "2", "eval"):
            with pytest.raises(UserError, match=r"--teacher-load is missing.*adapted already"):
                teacher_source(tiny_world.options(world, stage=stage, **stage_flags(stage, world, folder)))
                raise AssertionError(name)
    run = adapted["exported and imported"][0]
    for stage, entry in (("0", run_stage0), ("eval", run_evaluation)):
        with pytest.raises(UserError, match=r"--teacher-load is missing.*adapted already"):
            entry(tiny_world.options(world, stage=stage, **stage_flags(stage, world, run)))
    for memory in ({"teacher_memory": "shared", "trainable": "router"}, {"teacher_memory": "offload"}):
        with pytest.raises(UserError, match=r"--teacher-load is missing.*adapted already"):
            tiny_world.start(world, pretrained_checkpoint=run, **memory)


def stage_flags(stage, world, folder):
    data = {"1": world.rollouts, "eval": None}.get(stage, world.prompts)
    more = {"eval_data_path": world.heldout, "eval_rows": 1} if stage == "eval" else {}
    more |= {"rollout_path": world.hf.parent / "never.jsonl"} if stage == "0" else {}
    more |= {"max_new_tokens": 8} if stage in "02" else {}
    return {"pretrained_checkpoint": folder, "data_path": data, "teacher_load": None, **PLAIN, **more}


def test_a_teacher_that_was_asked_for_may_be_adapted(world, adapted):
    run = adapted["exported and imported"][0]
    assert teacher_source(tiny_world.options(world, pretrained_checkpoint=run, teacher_load=run)) == str(run)
    flags = {"teacher_memory": "shared", "trainable": "router", "teacher_load": f"{run}/"}
    assert tiny_world.start(world, pretrained_checkpoint=run, **flags).teacher is not None


def test_weights_that_nobody_distilled_may_teach(world, originals):
    for name, folder in originals.items():
        options = tiny_world.options(world, pretrained_checkpoint=folder, **PLAIN)
        assert teacher_source(options) == str(folder), name


def test_a_resumed_run_tells_all_its_steps(world, adapted, tmp_path):
    flags = {"pretrained_checkpoint": adapted["the run"][0], "teacher_load": world.static}
    train(world, tmp_path, **flags, exit_interval=1)
    assert read_facts(tmp_path).adapted_steps == 3
    train(world, tmp_path, **flags)
    assert read_facts(tmp_path).adapted_steps == 4


@pytest.mark.parametrize("value", [-1, 1.5, "many", True, [2]])
def test_steps_that_make_no_sense_are_named(adapted, tmp_path, value):
    hf = shutil.copytree(adapted["the run"][0].parent / "hf", tmp_path / "hf")
    edit(hf / "config.json", zce_adapted_steps=value)
    with pytest.raises(UserError, match=r"config.json: zce_adapted_steps .* whole number from 0"):
        hf_to_megatron(hf, tmp_path / "out")
    out = shutil.copytree(adapted["exported and imported"][0], tmp_path / "m")
    edit(out / "zeda.json", adapted_steps=value)
    with pytest.raises(UserError, match=r"m/zeda.json: adapted_steps .* makes no sense"):
        adapted_steps(out, "--load")


# --- what tells a teacher from another ---------------------------------------------------------------------------


def test_a_teacher_is_known_by_its_weights_wherever_its_folder_lies(adapted, originals, tmp_path):
    ids = {}
    for name, folder in {**originals, **{name: folder for name, (folder, _) in adapted.items()}}.items():
        ids[name] = weights_id(folder, "--teacher-load")
        moved = shutil.copytree(folder, tmp_path / name / "another name")
        if not folder.name.startswith(("iter_", "release")):  # whose zeda.json stands one above
            assert weights_id(moved, "--teacher-load") == ids[name], name
    assert ids["static"] == ids["dynamic"] == ids["fitted"]  # zero rows and heads do not teach
    different = ("static", "trained plainly", "the run", "paired", "without zero experts", "adapted twice")
    assert len({ids[name] for name in different}) == len(different)
    assert ids["paired"] == ids["paired and fitted anew"]
    assert ids["the run"] == ids["one of its steps"] == ids["a step outside of its run"]


@pytest.mark.parametrize("kind", ["trained plainly", "fitted"])
def test_a_renamed_teacher_does_not_stop_a_resume(world, originals, tmp_path, kind):
    teacher = shutil.copytree(originals[kind], tmp_path / "teacher")
    flags = {"teacher_load": teacher, "train_iters": 1}
    train(world, tmp_path / "run", **flags)
    renamed = teacher.rename(tmp_path / "another name")
    assert tiny_world.start(world, save=tmp_path / "run", **flags | {"teacher_load": renamed}).iteration == 1
    with pytest.raises(UserError, match="another teacher"):
        other = originals["trained plainly" if kind == "fitted" else "fitted"]
        tiny_world.start(world, save=tmp_path / "run", **flags | {"teacher_load": other})


def test_one_step_of_a_run_can_be_measured(adapted):
    run = adapted["the run"][0]
    whole, one = (load_model(str(folder)).chunk for folder in (run, run / "iter_0000002"))
    assert one.decoder.layers[0].mlp.router.zero.num_zero_experts == 4
    assert all(a.equal(b) for a, b in zip(whole.parameters(), one.parameters(), strict=True))


def test_zeda_json_comes_back_as_it_was_written(tmp_path):
    facts = ModelFacts(4, "learned", "shared", None, 5, 3, True, None, "ab", 7, "bf16", "X")
    (tmp_path / "zeda.json").write_text(facts.text())
    assert read_facts(tmp_path) == read_facts(tmp_path / "iter_0000003") == facts
    (tmp_path / "zeda.json").write_text("{}")
    assert read_facts(tmp_path) == ModelFacts()
    assert ModelFacts().with_zero(facts.zero()) == replace(
        facts, adapted_steps=0, source_sha256=None, seed=None, dtype=None, source_architecture=None
    )
