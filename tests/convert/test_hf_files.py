"""Reading and writing Hugging Face folders tensor by tensor; safetensors itself is the reference."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_hf_folder

from zeda_megatron.convert.bits import same_bits
from zeda_megatron.convert.file_writer import FileWriter
from zeda_megatron.convert.hf_files import HFReader
from zeda_megatron.convert.safetensors_shards import Planned, plan_shards, write_index
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.whole_folder import Staging


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


def write(folder, tensors, max_shard_bytes):
    planned = [Planned(key, t.dtype, tuple(t.shape), t) for key, t in tensors.items()]
    make = lambda plans: (plan.source for plan in plans)  # noqa: E731
    shards = plan_shards(planned, max_shard_bytes)
    partial = Staging(folder)
    for path in (partial.work, partial.notes):
        path.mkdir(parents=True)
    FileWriter(partial, shards, 2, "test").run(lambda shard, stream: shard.write(stream, make(shard.tensors)))
    write_index(partial.work, shards)
    return partial.work


def test_writer_makes_shards_that_safetensors_and_the_index_agree_on(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    tensors["large"] = torch.randn(50, 50)
    base = torch.randn(4, 6)
    tensors["view"] = base[:, 2:4]
    tensors |= {"odd": torch.randn(3).bfloat16(), "wide": torch.randn(5).double(), "none": torch.ones(0, 4)}
    tensors |= {"scalar": torch.tensor(2.5), "bytes": torch.ones(3, dtype=torch.int8)}
    out = write(tmp_path, tensors, max_shard_bytes=1000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "model.safetensors.index.json"])
    for name in names:
        stored = load_file(out / name)
        assert sum(tensor.nbytes for tensor in stored.values()) <= 1000 or list(stored) == ["large"]
    for key, name in index["weight_map"].items():
        stored = load_file(out / name)[key]
        assert stored.dtype == tensors[key].dtype and torch.equal(stored, tensors[key])


def test_writer_makes_one_plain_file_when_all_fits(tmp_path):
    out = write(tmp_path, {"a": torch.ones(3)}, 1000)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_writer_refuses_the_same_key_twice():
    twice = [Planned("a", torch.float32, (3,), None)] * 2
    with pytest.raises(ValueError, match="added twice"):
        plan_shards(twice, 1000)


@pytest.mark.parametrize("start, stop", [(0, 16), (1, 17), (0, 13), (3, 4), (5, 5)])
def test_bits_are_compared_whatever_the_offset_and_length(start, stop):
    base = torch.randn(20).bfloat16()
    a, b = base[start:stop], base[start:stop].clone()
    assert same_bits(a, b)
    if len(b):
        b[-1] = float("nan")
        assert not same_bits(a, b) and same_bits(b, b.clone())
