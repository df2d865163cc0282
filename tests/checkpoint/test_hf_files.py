"""Reading and writing Hugging Face folders tensor by tensor; safetensors itself is the reference."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_hf_folder

from zeda_megatron.checkpoint.hf_files import HFReader, HFWriter
from zeda_megatron.checkpoint.staging import staged_folder
from zeda_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return make_hf_folder(tmp_path / "hf", torch.bfloat16)[0]


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_reader_gives_the_bits_that_safetensors_gives(folder):
    expected = {}
    for shard in shards(folder):
        expected.update(load_file(shard))
    assert len(shards(folder)) > 1
    reader = HFReader(folder)
    assert reader.keys() == sorted(expected)
    for key, tensor in expected.items():
        assert reader.shape(key) == tuple(tensor.shape)
        assert reader.dtype(key) == tensor.dtype == torch.bfloat16
        assert torch.equal(reader.read(key), tensor)
    assert reader.nbytes() == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_reader_knows_other_types_and_shapes(tmp_path, dtype):
    tensors = {
        "a": torch.ones(3, 2).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "none": torch.ones(0, 4).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = HFReader(tmp_path)
    for key, tensor in tensors.items():
        read = reader.read(key)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float())


def test_missing_folder_and_config_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        HFReader(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: file is missing"):
        HFReader(folder)


def test_broken_config_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        HFReader(folder)


def test_folder_without_weights_is_refused(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        HFReader(folder)


def test_missing_shard_is_named(folder):
    shards(folder)[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors: shard is missing"):
        HFReader(folder)


@pytest.mark.parametrize("cut", [1, 1000])
def test_shard_truncated_in_its_data_names_file_and_key(folder, cut):
    shard = shards(folder)[0]
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(UserError, match=rf"{shard.name}: shard is truncated, tensor \S+ ends at byte"):
        HFReader(folder)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_shard_truncated_in_its_header_is_named(folder, size):
    shard = shards(folder)[0]
    os.truncate(shard, size)
    with pytest.raises(UserError, match=f"{shard.name}: shard is truncated inside its header"):
        HFReader(folder)


def test_damaged_header_is_named(folder):
    shard = shards(folder)[0]
    data = bytearray(shard.read_bytes())
    data[8] = ord("x")
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name}: damaged safetensors header"):
        HFReader(folder)


def test_key_that_the_index_promises_but_no_shard_has(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = shards(folder)[0].name
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{shards(folder)[0].name}: tensor model\.ghost is missing"):
        HFReader(folder)


def test_wrong_shape_names_file_key_and_both_shapes(folder):
    reader = HFReader(folder)
    reader.check_shape("model.norm.weight", [(1,), (32,)])
    with pytest.raises(
        UserError, match=r"\.safetensors: tensor model\.norm\.weight has shape \[32\], expected \[33\]"
    ):
        reader.check_shape("model.norm.weight", [(33,)])


def test_unknown_key_is_named(folder):
    with pytest.raises(UserError, match="tensor nothing is missing"):
        HFReader(folder).read("nothing")


def test_writer_makes_shards_that_safetensors_and_the_index_agree_on(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    tensors["large"] = torch.randn(50, 50)
    base = torch.randn(4, 6)
    tensors["view"] = base[:, 2:4]
    writer = HFWriter(tmp_path, max_shard_bytes=1000)
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    assert writer.finish() == len(tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "model.safetensors.index.json"]
    )
    for name in names:
        stored = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in stored.values()) <= 1000 or list(stored) == ["large"]
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / name)[key], tensors[key])


def test_writer_makes_one_plain_file_when_all_fits(tmp_path):
    writer = HFWriter(tmp_path)
    writer.add("a", torch.ones(3))
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_writer_refuses_the_same_key_twice(tmp_path):
    writer = HFWriter(tmp_path)
    writer.add("a", torch.ones(3))
    with pytest.raises(ValueError, match="added twice"):
        writer.add("a", torch.ones(3))


def test_interrupted_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as staging:
        (staging / "model.safetensors").write_text("half")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"out: folder is not empty"), staged_folder(out):
        pass
    assert (out / "model.safetensors").read_text() == "precious"
    with staged_folder(out, overwrite=True) as staging:
        (staging / "zeda.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["zeda.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_delete_a_folder_that_is_no_checkpoint(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no checkpoint"), staged_folder(out, overwrite=True):
        pass
    assert (out / "thesis.tex").exists()


def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="folder is not empty"), staged_folder(out):
        out.mkdir()
        (out / "zeda.json").write_text("theirs")
    assert (out / "zeda.json").read_text() == "theirs"
