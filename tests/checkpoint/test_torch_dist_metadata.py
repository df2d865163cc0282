"""A checkpoint runs no code, wherever it is loaded: evaluation, training, resuming."""

import ast
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_world
import torch
from corruptions import Payload
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from zeda_megatron.checkpoint.integrity import INTEGRITY
from zeda_megatron.checkpoint.torch_dist_metadata import METADATA_NAME, read_metadata, write_metadata
from zeda_megatron.errors import UserError
from zeda_megatron.models.load import load_model
from zeda_megatron.models.on_disk import adapted_steps


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def calls(module: str, name: str):
    """An index that calls MODULE.NAME before anything else."""

    def forge(folder: Path, mark: Path) -> None:
        file = folder / METADATA_NAME
        data = file.read_bytes()
        call = text(module) + text(name) + b"\x93" + text(f"touch {mark}") + b"\x85R0"
        file.write_bytes(data[:2] + call + data[2:])

    return forge


def objects(folder: Path, mark: Path) -> None:
    """Every object that is no tensor is one that calls."""
    index, made = read_metadata(folder), io.BytesIO()
    torch.save(Payload(mark), made)
    for at, place in index.storage_data.items():
        if not hasattr(index.state_dict_metadata[at.fqn], "chunks"):
            file = folder / place.relative_path
            place.offset, place.length = file.stat().st_size, len(made.getvalue())
            file.write_bytes(file.read_bytes() + made.getvalue())
    kept = Metadata(index.state_dict_metadata, storage_data=index.storage_data)
    (folder / METADATA_NAME).write_bytes(pickle.dumps(kept, protocol=4))


def plain(folder: Path, mark: Path) -> None:
    torch.save({"progress": Payload(mark)}, folder / "common.pt")


FORGED = {
    "index calls": (calls("os", "system"), "asks for os.system"),
    "index calls through a module of its own": (
        calls("torch.distributed.checkpoint.filesystem", "os.system"),
        None,
    ),
    "objects": (objects, None),
    "common.pt": (plain, "common.pt|Weights only"),
}
"""How, and what is said; None: nothing, the rest is read all the same."""


def forged(source: Path, tmp_path: Path, forge) -> tuple[Path, Path]:
    root, mark = shutil.copytree(source, tmp_path / "checkpoint"), tmp_path / "ran"
    (folder,) = (file.parent for file in root.glob(f"*/{METADATA_NAME}"))
    (folder / INTEGRITY).unlink()  # who forges a checkpoint can write that, too
    forge(folder, mark)
    return root, mark


def tried(load, said: str | None) -> None:
    if said is None:
        load()
        return
    with pytest.raises(UserError, match=said) as error:
        load()
    assert "zeda-index" not in str(error.value)


@pytest.mark.parametrize("name", FORGED)
def test_loading_weights_runs_nothing(name, world, one_process, tmp_path, monkeypatch):
    forge, said = FORGED[name]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    root, mark = forged(world.dynamic, tmp_path, forge)
    tried(lambda: load_model(str(root)), said)
    if said is None:
        kept, wanted = (load_model(str(one)).chunk.state_dict() for one in (root, world.dynamic))
        assert all(torch.equal(kept[key], wanted[key]) for key in wanted if torch.is_tensor(wanted[key]))
    else:
        tried(lambda: tiny_world.start(world, pretrained_checkpoint=root), said)
    assert not mark.exists() and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("name", FORGED)
def test_resuming_runs_nothing(name, world, halfway, tmp_path):
    forge, said = FORGED[name]
    root, mark = forged(halfway, tmp_path, forge)
    said = "Weights only load failed" if name == "objects" else said  # a resumed run wants them
    tried(lambda: tiny_world.start(world, save=root, verify_checkpoint="none"), said)
    assert not mark.exists()


def among_tensors(folder: Path) -> None:
    """The plain values of a checkpoint where Megatron-Core 0.19 puts them."""
    file, made, index = folder / "common.pt", io.BytesIO(), read_metadata(folder)
    torch.save([torch.load(file, weights_only=True)], made)
    at, data = MetadataIndex("common_state/shard_0_1"), next(folder.glob("*.distcp"))
    index.storage_data[at] = _StorageInfo(data.name, data.stat().st_size, len(made.getvalue()))
    index.state_dict_metadata[at.fqn] = BytesStorageMetadata()
    data.write_bytes(data.read_bytes() + made.getvalue())
    write_metadata(folder, Metadata(index.state_dict_metadata, storage_data=index.storage_data))
    file.unlink()
    (folder / INTEGRITY).unlink()


def test_a_checkpoint_of_the_newest_megatron_resumes_with_every_version(world, halfway, tmp_path):
    root = shutil.copytree(halfway, tmp_path / "run")
    (folder,) = root.glob("iter_*")
    if (folder / "common.pt").exists():  # written by 0.16
        among_tensors(folder)
    resumed, wanted = tiny_world.start(world, save=root), tiny_world.start(world, save=halfway)
    assert resumed.iteration == wanted.iteration == 2
    found, expected = tiny_world.snapshot(resumed), tiny_world.snapshot(wanted)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_plain_values_among_the_tensors_run_nothing(world, halfway, tmp_path):
    root = shutil.copytree(halfway, tmp_path / "run")
    (folder,) = root.glob("iter_*")
    if (folder / "common.pt").exists():
        among_tensors(folder)
    (folder / INTEGRITY).unlink(missing_ok=True)
    objects(folder, tmp_path / "ran")
    tried(lambda: tiny_world.start(world, save=root, verify_checkpoint="none"), "common_state.*Weights only")
    assert not (tmp_path / "ran").exists()


def test_a_plain_file_of_calls_runs_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    root, mark = forged(world.static, tmp_path, plain)
    (root / "zeda.json").unlink()
    tried(lambda: adapted_steps(root, "--hf"), "Weights only load failed")
    assert not mark.exists()


def test_no_other_place_opens_a_pickle():
    """Megatron's loader is called in one file, PyTorch's always with `weights_only`."""
    root = Path(__file__).parents[2]
    found = set()
    for file in [*root.glob("zeda_megatron/**/*.py"), *root.glob("tools/*.py"), *root.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            opens = call.startswith(
                ("dist_checkpointing.load", "pickle.load", "marshal.load", "dill.load", "joblib.load")
            )
            unsafe = call == "torch.load" and "weights_only=True" not in ast.unparse(node)
            if opens or unsafe or call.endswith(("FileSystemReader", "Unpickler")):
                found.add((file.name, call))
    assert found == {("state.py", "dist_checkpointing.load")}
