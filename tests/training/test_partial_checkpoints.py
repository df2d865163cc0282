"""Checkpoints of runs in which few weights train: they hold these, over the checkpoint that the run started from."""

import json
import shutil

import pytest
import tiny
import tiny_world
import torch
from families import FAMILIES, seeing_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny import weights_of

from zeda_megatron.checkpoint.state import require_checkpoint
from zeda_megatron.checkpoint.torch_dist_metadata import read_metadata
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.models.adapters import adapters_of, switched_off
from zeda_megatron.models.load import load_model
from zeda_megatron.models.on_disk import read_facts
from zeda_megatron.serving.load import load_zero_expert_model

pytestmark = pytest.mark.usefixtures("one_process")
LORA = {
    "trainable": "lora",
    "lora_rank": 8,
    "lora_alpha": 64,
    "teacher_memory": "shared",
    "lr_warmup_fraction": 0.0,
}
ROUTER = {"trainable": "router", "teacher_memory": "shared"}
KINDS = {"router": ROUTER, "router+norms": ROUTER | {"trainable": "router+norms"}, "lora": LORA}
TOKENS = torch.randint(0, 272, (2, 15), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(chunk):
    return chunk.eval()(TOKENS, torch.arange(15).expand_as(TOKENS), None)


@pytest.fixture(scope="module")
def trained(one_process, world, tmp_path_factory):
    """A finished run of each kind: its folder, and what the student answered at its end."""
    found = {}
    for kind, flags in KINDS.items():
        folder = tmp_path_factory.mktemp("partial") / kind
        run = tiny_world.start(world, save=folder, train_iters=3, **flags)
        run.run()
        found[kind] = folder, logits(run.student.chunks[0])
    return found


def held(folder):
    """Names of the model's tensors in a checkpoint's own folder."""
    names = read_metadata(require_checkpoint(folder, "--load")).state_dict_metadata
    return {name for name in names if name.startswith(("decoder", "embedding", "output_layer"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_trains_and_is_read_with_its_base(kind, world, trained):
    folder, answers = trained[kind]
    parts = {"router": (), "router+norms": ("norm",), "lora": (".adapter.",)}[kind]
    assert all(".router." in name or any(part in name for part in parts) for name in held(folder))
    assert len(held(folder)) > len(parts) and read_facts(folder).base == str(
        require_checkpoint(world.dynamic, "-")
    )
    tiny.close(logits(load_model(folder).chunk), answers, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_as_if_it_had_not_stopped(kind, world, trained, tmp_path):
    flags = KINDS[kind] | {"save": tmp_path, "train_iters": 3}
    tiny_world.start(world, exit_interval=2, **flags).run()
    second = tiny_world.start(world, **flags)
    assert second.iteration == 2
    second.run()
    assert torch.equal(logits(second.student.chunks[0]), trained[kind][1])


def test_an_export_has_merged_what_was_trained(world, trained, tmp_path):
    folder, answers = trained["lora"]
    megatron_to_hf(folder, world.hf, tmp_path / "hf")
    theirs = load_zero_expert_model(tmp_path / "hf")
    with torch.no_grad():
        tiny.close(theirs(TOKENS).logits, answers, rtol=0, atol=1e-4)
    assert verify(tmp_path / "hf", folder) == []
    hf_to_megatron(tmp_path / "hf", tmp_path / "again")
    assert (
        read_facts(tmp_path / "again").adapted_steps == 3
        and verify(tmp_path / "hf", tmp_path / "again") == []
    )


MAKE = {name: family.make for name, family in FAMILIES.items()}
if "qwen3_5_moe_text" in FAMILIES:
    MAKE["qwen3_5_moe"] = seeing_model
USUAL = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "qwen3_5_moe")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in MAKE]
)
def test_peft_opens_adapters_beside_the_weights_and_merges_the_same_bits(name, tmp_path, tmp_path_factory):
    """Projections bit for bit; of experts peft computes the product in another order."""
    world = tiny_world.make_world(tmp_path_factory.mktemp(name), MAKE[name])
    tiny_world.start(world, save=tmp_path / "run", train_iters=2, **LORA).run()
    for how in ("merged", "beside"):
        megatron_to_hf(tmp_path / "run", world.hf, tmp_path / how, adapters=how)
    merged = load_zero_expert_model(tmp_path / "merged")
    opened = PeftModel.from_pretrained(
        load_zero_expert_model(tmp_path / "beside"), tmp_path / "beside/adapter"
    ).eval()
    with torch.no_grad():
        tiny.close(opened(TOKENS).logits, merged(TOKENS).logits, rtol=0, atol=1e-4)
    theirs, ours = opened.merge_and_unload().state_dict(), merged.state_dict()
    assert theirs.keys() == ours.keys()
    start = load_zero_expert_model(tmp_path / "beside").state_dict()
    for key, weight in ours.items():
        if ".experts." in key:
            tiny.close(theirs[key], weight, rtol=0, atol=1e-6)
        else:
            assert torch.equal(theirs[key], weight), key
    moved = {key for key, weight in ours.items() if not torch.equal(start[key], weight)}
    halves = load_file(tmp_path / "beside/adapter/adapter_model.safetensors")
    modes = {path.stat().st_mode for path in (tmp_path / "beside").rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert len(moved) == len(halves) // 2


def test_adapters_are_merged_into_bf16_weights_with_one_rounding(world, tmp_path):
    hf_to_megatron(world.hf, tmp_path / "start", num_zero_experts=4, dtype="bf16")
    flags = LORA | {"bf16": True, "pretrained_checkpoint": tmp_path / "start"}
    tiny_world.start(world, save=tmp_path / "run", train_iters=2, **flags).run()
    for how in ("merged", "beside"):
        megatron_to_hf(tmp_path / "run", world.hf, tmp_path / how, adapters=how)
    base = load_zero_expert_model(tmp_path / "beside", dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, tmp_path / "beside/adapter").merge_and_unload().state_dict()
    for key, weight in weights_of(tmp_path / "merged").items():
        if "self_attn" in key and key.endswith("proj.weight"):
            assert weight.dtype == torch.bfloat16 and torch.equal(theirs[key], weight), key


def test_an_export_without_adapters_has_none_beside(world, trained, tmp_path):
    with pytest.raises(UserError, match=r"--adapters beside: .*router.* has none; leave it out"):
        megatron_to_hf(trained["router"][0], world.hf, tmp_path / "hf", adapters="beside")
    assert not (tmp_path / "hf").exists()


# --- what starts from one -----------------------------------------------------------------------------------


def test_all_weights_go_on_from_merged_ones(world, trained, tmp_path):
    folder, answers = trained["lora"]
    run = tiny_world.start(world, pretrained_checkpoint=folder, save=tmp_path, train_iters=1, lr=0.0)
    assert not any(".adapter." in name for name in tiny_world.parameters(run))
    tiny.close(logits(run.student.chunks[0]), answers, rtol=0, atol=2e-5)
    run.student.chunks[0].train()
    run.run()
    facts = read_facts(tmp_path)
    assert facts.base is None and facts.lora is None and facts.adapted_steps == 4
    assert "output_layer.weight" in held(tmp_path)


def test_the_next_run_goes_on_with_the_adapters_and_asks_the_same_teacher(world, trained, tmp_path):
    folder, answers = trained["lora"]
    run = tiny_world.start(world, pretrained_checkpoint=folder, save=tmp_path, train_iters=1, **LORA)
    first = tiny_world.start(world, **LORA)
    assert run.teacher_id == first.teacher_id
    assert tiny_world.weight_hash(run.teacher) == tiny_world.weight_hash(first.teacher)
    assert torch.equal(logits(run.student.chunks[0]), answers)
    with switched_off(adapters_of(run.student.chunks)):
        assert not torch.equal(logits(run.student.chunks[0]), answers)
    run.student.chunks[0].train()
    run.run()
    facts = read_facts(tmp_path)
    assert facts.base == str(require_checkpoint(folder, "-")) and facts.adapted_steps == 4
    tiny.close(logits(load_model(tmp_path).chunk), logits(run.student.chunks[0]), rtol=0, atol=2e-5)


def test_routers_may_train_on_over_adapters(world, trained, tmp_path):
    """Three checkpoints above one another."""
    folder, answers = trained["lora"]
    flags = ROUTER | {"teacher_memory": "own", "pretrained_checkpoint": folder}
    run = tiny_world.start(world, save=tmp_path / "run", train_iters=1, **flags)
    tiny.close(logits(run.student.chunks[0]), answers, rtol=0, atol=2e-5)
    run.student.chunks[0].train()
    run.run()
    assert all(".router." in name for name in held(tmp_path / "run"))
    tiny.close(logits(load_model(tmp_path / "run").chunk), logits(run.student.chunks[0]), rtol=0, atol=2e-5)
    megatron_to_hf(tmp_path / "run", world.hf, tmp_path / "hf")
    with torch.no_grad():
        theirs = load_zero_expert_model(tmp_path / "hf")(TOKENS).logits
    tiny.close(theirs, logits(run.student.chunks[0]), rtol=0, atol=1e-4)


def test_norms_that_do_not_train_any_more_are_the_teachers_in_its_passes(world, trained):
    """What a run before has moved and this one leaves alone is told apart too."""
    flags = ROUTER | {"pretrained_checkpoint": trained["router+norms"][0]}
    run, first = tiny_world.start(world, **flags), tiny_world.start(world, **ROUTER)
    assert tiny_world.weight_hash(run.teacher) == tiny_world.weight_hash(first.teacher)
    tiny.close(logits(run.student.chunks[0]), trained["router+norms"][1], rtol=0, atol=0)


def test_paired_zero_experts_are_fitted_to_merged_weights(world, tmp_path):
    flags = LORA | {"pretrained_checkpoint": world.static, "moe_router_load_balancing_type": "none"}
    tiny_world.start(world, save=tmp_path / "run", train_iters=3, **flags).run()
    report = tiny_world.fit(world, tmp_path / "fitted", pretrained_checkpoint=str(tmp_path / "run"))
    assert 0.4 < report["zero_share"] < 0.6
    facts = read_facts(tmp_path / "fitted")
    assert facts.base is None and facts.lora is None and facts.adapted_steps == 3


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (LORA | {"lora_rank": 16}, "was trained with --lora-rank 8 --lora-alpha 64 --lora-targets attention"),
        (LORA | {"lora_targets": "experts"}, "go on with these"),
        (ROUTER, "has adapters, which are part of the student's weights now; give --trainable lora, or own"),
    ],
)
def test_other_adapters_than_a_checkpoints_are_refused(world, trained, flags, match):
    with pytest.raises(UserError, match=match):
        tiny_world.start(world, pretrained_checkpoint=trained["lora"][0], **flags)


def test_a_shared_teacher_must_be_what_the_student_came_from(world, trained, tmp_path):
    hf_to_megatron(world.hf, tmp_path / "other", num_zero_experts=4, seed=9)
    flags = ROUTER | {"teacher_load": tmp_path / "other", "pretrained_checkpoint": trained["router"][0]}
    with pytest.raises(
        UserError, match=r"--teacher-memory shared: --teacher-load .*other is not where the student"
    ):
        tiny_world.start(world, **flags)


def test_a_base_that_is_gone_or_another_is_told_and_may_move(world, tmp_path):
    base = shutil.copytree(world.dynamic, tmp_path / "base")
    tiny_world.start(world, pretrained_checkpoint=base, save=tmp_path / "run", train_iters=1, **ROUTER).run()
    expected = logits(load_model(tmp_path / "run").chunk)
    base.rename(tmp_path / "moved")
    for use in (load_model, lambda folder: megatron_to_hf(folder, world.hf, tmp_path / "hf")):
        with pytest.raises(
            UserError, match=r"holds what has trained; the rest is in .*base.* where no checkpoint is"
        ):
            use(tmp_path / "run")
    zeda = tmp_path / "run/zeda.json"
    about = json.loads(zeda.read_text())
    zeda.write_text(json.dumps(about | {"base": str(tmp_path / "moved")}))
    assert torch.equal(logits(load_model(tmp_path / "run").chunk), expected)
    shutil.rmtree(tmp_path / "moved")
    other = tiny_world.make_world(tmp_path / "others", seed=4)
    zeda.write_text(json.dumps(about | {"base": str(other.dynamic)}))
    with pytest.raises(UserError, match="but that checkpoint has other weights now; restore it"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    "entry",
    [
        {"lora": {"rank": 5}},
        {"lora": [1]},
        {"lora": {"rank": 8, "more": 1}},
        {"base": 3},
        {"base_weights": []},
    ],
)
def test_entries_that_make_no_sense_are_named(trained, tmp_path, entry):
    folder = shutil.copytree(trained["lora"][0], tmp_path / "run")
    about = json.loads((folder / "zeda.json").read_text())
    (folder / "zeda.json").write_text(json.dumps(about | entry))
    with pytest.raises(UserError, match=rf"run/zeda.json: {next(iter(entry))} .* makes no sense"):
        load_model(folder)


def test_adapters_without_their_description_are_refused(world, trained, tmp_path):
    tiny_world.start(
        world,
        pretrained_checkpoint=None,
        hf_config=world.hf,
        stage="pretrain",
        save=tmp_path / "run",
        train_iters=1,
        num_zero_experts=4,
        trainable="lora",
        lora_rank=8,
    ).run()
    assert "output_layer.weight" in held(tmp_path / "run") and read_facts(tmp_path / "run").lora.rank == 8
    (tmp_path / "run/zeda.json").unlink()
    with pytest.raises(UserError, match=r"holds adapters, and no zeda.json says their --lora-alpha"):
        megatron_to_hf(tmp_path / "run", world.hf, tmp_path / "hf")


def test_kernels_know_no_adapters(world):
    with pytest.raises(UserError, match="--lora-targets experts: --expert-backend kernels know no adapters"):
        tiny_world.options(world, expert_backend="kernels", **LORA)
