"""Damaged checkpoints: never loaded silently, never a traceback; an older intact one takes over."""

import hashlib
import json
import os
import shutil
from importlib.metadata import version

import pytest
import tiny_world
import torch

from zeda_megatron.checkpoint.integrity import INTEGRITY
from zeda_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("one_process")
NEWEST = "iter_0000004"


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A run of four steps that saved after two and four: (folder, state at the end)."""
    folder = tmp_path_factory.mktemp("saved")
    run = tiny_world.start(world, save=folder, save_interval=2, train_iters=4)
    run.run()
    return folder, tiny_world.snapshot(run)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def garbage(file):
    file.write_text("{")


COMMON = "common.pt" if version("megatron-core").startswith("0.16") else ".metadata"
"""The file with what is no tensor."""
WAYS = {
    "a bit flips": ("__0_0.distcp", flip, "has changed since it was written"),
    "a file is cut": ("__0_0.distcp", cut, "bytes, "),
    "a file is missing": ("__0_0.distcp", os.unlink, "is missing"),
    "the common state is cut": (COMMON, cut, "bytes, "),
    "a bit of the index flips": (".metadata", flip, "has changed since it was written"),
    "the last file is missing": ("metadata.json", os.unlink, "is missing"),
    "the list of hashes is not a list": (INTEGRITY, garbage, "cannot be read"),
}
damaged = pytest.mark.parametrize(("name", "damage", "words"), WAYS.values(), ids=WAYS)


def test_every_file_of_a_checkpoint_has_its_size_and_hash_on_record(saved):
    for folder in saved[0].glob("iter_*"):
        told = json.loads((folder / INTEGRITY).read_text())["files"]
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != INTEGRITY}
        assert {COMMON, ".metadata", "metadata.json", "__0_0.distcp"} <= set(files)
        assert told == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        }


@damaged
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(world, copy, capsys, name, damage, words):
    damage(copy / NEWEST / name)
    run = tiny_world.start(world, save=copy, train_iters=4)
    assert run.iteration == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: --save {copy}: {NEWEST}/{name}") and words in line
    assert line.endswith("going on from iter_0000002 instead")


@damaged
def test_a_damaged_checkpoint_that_load_names_itself_is_a_user_error(world, copy, name, damage, words):
    damage(copy / NEWEST / name)
    with pytest.raises(UserError, match=f"--load .*{NEWEST}: {name} ") as caught:
        tiny_world.start(world, load=copy / NEWEST, train_iters=4)
    assert words in str(caught.value) and "backup" in str(caught.value) and "\n" not in str(caught.value)


def test_after_a_damaged_checkpoint_the_run_ends_as_if_nothing_had_happened(world, saved, copy):
    flip(copy / NEWEST / "__0_0.distcp")
    run = tiny_world.start(world, save=copy, train_iters=4)
    run.run()
    mine = tiny_world.snapshot(run)
    assert all(torch.equal(mine[name], tensor) for name, tensor in saved[1].items())
    assert tiny_world.read_metrics(copy) == tiny_world.read_metrics(saved[0])
    assert tiny_world.start(world, save=copy, train_iters=4).iteration == 4  # the new one is intact


def test_if_no_checkpoint_is_intact_the_run_does_not_begin(world, copy):
    for folder in copy.glob("iter_*"):
        cut(folder / "__0_0.distcp")
    for flag in ("save", "load"):
        with pytest.raises(UserError, match=f"--{flag} .*{NEWEST}/__0_0.distcp .*no older .*intact"):
            tiny_world.start(world, train_iters=4, **{flag: copy})


def test_weights_to_start_from_are_verified_too(world, copy):
    flip(copy / NEWEST / "__0_0.distcp")
    with pytest.raises(UserError, match=f"--pretrained-checkpoint .*{NEWEST}: __0_0.distcp has changed"):
        tiny_world.start(world, pretrained_checkpoint=copy)
    with pytest.raises(UserError, match=f"--teacher-load .*{NEWEST}: __0_0.distcp has changed"):
        tiny_world.start(world, teacher_load=copy)


def test_size_finds_a_cut_file_but_not_a_flipped_bit(world, copy):
    file = copy / NEWEST / "__0_0.distcp"
    flip(file)
    assert tiny_world.start(world, save=copy, train_iters=4, verify_checkpoint="size").iteration == 4
    cut(file)
    assert tiny_world.start(world, save=copy, train_iters=4, verify_checkpoint="size").iteration == 2


def test_a_checkpoint_without_hashes_is_loaded_with_a_warning(world, copy, capsys):
    (copy / NEWEST / INTEGRITY).unlink()
    assert tiny_world.start(world, save=copy, train_iters=4).iteration == 4
    assert f"{NEWEST}: has no integrity.json, so it was not verified" in capsys.readouterr().err


def test_what_a_run_that_went_back_left_behind_does_not_push_out_good_checkpoints(world, copy, tmp_path):
    """Two are to be kept; the damaged iter_0000004 is not one of them."""
    cut(copy / NEWEST / "__0_0.distcp")
    tiny_world.start(world, save=copy, train_iters=3, most_recent_k=2).run()
    assert sorted(path.name for path in copy.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
