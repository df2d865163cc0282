"""Damaged and malicious input: one clear line, nothing written, nothing replaced, no code run."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from corruptions import HF_CASES, Payload, snapshot
from tiny_models import make_hf_folder
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from zeda_megatron.__main__ import main as zeda
from zeda_megatron.checkpoint.integrity import find_damage, require_intact
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.verify import verify
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good Hugging Face folder and its conversion."""
    root = tmp_path_factory.mktemp("whole")
    make_hf_folder(root / "hf", num_hidden_layers=2, mlp_only_layers=[], max_shard_size="20kB")
    hf_to_megatron(root / "hf", root / "m", num_zero_experts=2, max_shard_bytes=30_000)
    return root


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the command, which must fail as promised; gives its one line."""

    def run(*arguments, source):
        out = tmp_path / "out"
        if len(str(arguments)) % 2:  # in half of the cases something is there that must survive
            out.mkdir()
            (out / "zeda.json").write_text("precious")
            arguments = (*arguments, "--overwrite")
        before, below = snapshot(source), sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            run_worker(lambda: zeda(["convert", *map(str, (*arguments, "--out", out))]))
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1200, err
        assert "Traceback" not in err
        assert snapshot(source) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == below  # no target, no .partial, no canary
        assert not out.exists() or snapshot(out) == {"zeda.json": b"precious"}
        return err

    return run


def assert_names(line, needles):
    needles = (needles,) if isinstance(needles, str) else needles
    assert any(needle in line for needle in needles), (needles, line)


def test_there_are_enough_cases_and_no_two_are_alike():
    names = [name for name, _, _ in (*HF_CASES, *MEGATRON_CASES)]
    assert len(set(names)) == len(names) >= 200


@pytest.mark.parametrize("name, spoil, needles", HF_CASES, ids=[case[0] for case in HF_CASES])
def test_corrupted_hugging_face_folder_is_refused(whole, tmp_path, refused, name, spoil, needles):
    hf = tmp_path / "hf"
    shutil.copytree(whole / "hf", hf)
    spoil(hf)
    assert_names(refused("hf-to-megatron", "--hf", hf, source=hf), needles)


def release(root):
    return root / "release"


def unsealed(change):
    """Spoil a checkpoint whose integrity.json is gone, as one from stock Megatron."""

    def spoil(root):
        (release(root) / "integrity.json").unlink()
        change(root)

    return spoil


def cut(name, keep):
    def spoil(root):
        file = release(root) / name
        size = file.stat().st_size
        os.truncate(file, int(size * keep) if isinstance(keep, float) else keep + size * (keep < 0))

    return spoil


def flip(name, where):
    def spoil(root):
        file = release(root) / name
        data = bytearray(file.read_bytes())
        data[int(where * len(data))] ^= 4
        file.write_bytes(data)

    return spoil


def written(name, data, base=release):
    return lambda root: (base(root) / name).write_bytes(data)


def edited_index(change):
    """Change the index as an attacker could, who may open it with pickle."""

    def spoil(root):
        file = release(root) / ".metadata"
        index = pickle.loads(file.read_bytes())
        change(index, release(root))
        file.write_bytes(pickle.dumps(index))

    return unsealed(spoil)


def first_place(index):
    return next(iter(index.storage_data.values()))


def first_tensor(index):
    return next(v for v in index.state_dict_metadata.values() if isinstance(v, TensorStorageMetadata))


def set_place(**values):
    return edited_index(lambda index, folder: [setattr(first_place(index), k, v) for k, v in values.items()])


def poisoned_tensor(index, folder):
    torch.save(Payload(folder.parents[1] / "ran"), folder / "__0_9.distcp")
    place = first_place(index)
    place.relative_path, place.offset = "__0_9.distcp", 0
    place.length = (folder / "__0_9.distcp").stat().st_size


def megatron_cases():
    data, index = "__0_0.distcp", ".metadata"
    for name in (data, index):
        for keep in (0, 1, 10, 0.5, -1):
            yield f"{name} cut to {keep}", cut(name, keep), name
            yield f"{name} cut to {keep}, no hashes", unsealed(cut(name, keep)), name
        yield f"{name} missing", lambda root, n=name: (release(root) / n).unlink(), (name, "release/")
    yield f"{data} missing, no hashes", unsealed(lambda root: (release(root) / data).unlink()), data
    for i, where in enumerate(random.Random(3).random() for _ in range(10)):
        yield f"bit flip {i} of the data", flip(data, where), data
        yield f"bit flip {i} of the index", flip(index, where), index
    yield (
        "metadata.json missing",
        lambda root: (release(root) / "metadata.json").unlink(),
        ("release", "metadata.json"),
    )
    for what, value in {"None": None, "dict": {}, "list": [], "text": "x", "number": 3}.items():
        yield f"index is {what}", unsealed(written(index, pickle.dumps(value))), index
    yield "index is noise", unsealed(written(index, random.Random(5).randbytes(500))), index

    def armed(root):
        (release(root) / index).write_bytes(pickle.dumps(Payload(root.parent / "ran")))

    yield "index runs code", unsealed(armed), (index, "refused")
    evil = b'cbuiltins\neval\n(S\'__import__("os").mkdir("ran")\'\ntR.'
    yield "index evaluates", unsealed(written(index, evil)), (index, "refused")
    yield "tensor runs code", edited_index(poisoned_tensor), "__0_9.distcp"
    for name in ("../x.distcp", "/etc/passwd", "", "..", "a/b", None, 3, "gone.distcp"):
        yield f"place in {name!r}", set_place(relative_path=name), (".metadata", "gone.distcp")
    for value in (-1, 10**12, 1.5, None, "0"):
        yield f"place at {value!r}", set_place(offset=value), (".metadata", data)
        yield f"length {value!r}", set_place(length=value), (".metadata", data)
    yield (
        "place moved",
        edited_index(lambda i, f: setattr(first_place(i), "offset", first_place(i).offset + 7)),
        data,
    )
    yield "places lost", edited_index(lambda i, f: i.storage_data.clear()), ".metadata"
    yield "places are no dict", edited_index(lambda i, f: setattr(i, "storage_data", [1])), ".metadata"
    yield (
        "wrong type",
        edited_index(lambda i, f: setattr(first_tensor(i).properties, "dtype", torch.int8)),
        "type",
    )
    yield (
        "other type",
        edited_index(lambda i, f: setattr(first_tensor(i).properties, "dtype", torch.float16)),
        data,
    )
    for size in ((1, 2, 3), (-1, 32), (10**9, 32), ()):
        change = lambda i, f, s=size: setattr(first_tensor(i), "size", torch.Size(s))  # noqa: E731
        yield f"global size {size}", edited_index(change), (".metadata", "has shape", "tensor")
    yield "chunks lost", edited_index(lambda i, f: first_tensor(i).chunks.clear()), "is incomplete"
    zeda = {
        "cut": b'{"num_zero',
        "list": b"[]",
        "not UTF-8": b'{"a": "\xff"}',
        "NaN": b'{"seed": NaN}',
        "count of text": b'{"num_zero_experts": "two"}',
        "unknown type": b'{"zero_experts_type": "free"}',
        "type of a list": b'{"zero_experts_type": ["zero"]}',
        "unknown routing": b'{"zero_expert_routing": "random"}',
        "score of a number": b'{"paired_score": 3}',
        "renormalise of text": b'{"renormalize_after_drop": "no"}',
    }
    for name, text in zeda.items():
        yield f"zeda.json {name}", written("zeda.json", text, lambda root: root), "zeda.json"
    hashes = {
        "cut": b'{"files": ',
        "list": b"[]",
        "no files": b"{}",
        "files of text": b'{"files": "x"}',
        "no size": b'{"files": {"__0_0.distcp": {}}}',
        "leads out": b'{"files": {"../../m/zeda.json": {"size": 1, "sha256": ""}}}',
        "deep": b"[" * 200_000,
    }
    for name, text in hashes.items():
        yield f"integrity.json {name}", written("integrity.json", text), "integrity.json"


MEGATRON_CASES = list(megatron_cases())


@pytest.mark.parametrize("name, spoil, needles", MEGATRON_CASES, ids=[case[0] for case in MEGATRON_CASES])
def test_corrupted_megatron_folder_is_refused(whole, tmp_path, refused, name, spoil, needles):
    m, hf = tmp_path / "m", whole / "hf"
    shutil.copytree(whole / "m", m)
    spoil(m)
    assert_names(refused("megatron-to-hf", "--megatron", m, "--hf-template", hf, source=m), needles)


def test_pickles_that_no_conversion_needs_are_never_opened(whole, tmp_path, capsys):
    shutil.copytree(whole / "m", tmp_path / "m")
    (tmp_path / "m/release/integrity.json").unlink()
    (tmp_path / "m/release/common.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    arguments = ["--megatron", tmp_path / "m", "--hf-template", whole / "hf", "--out", tmp_path / "out"]
    assert zeda(["convert", "megatron-to-hf", *map(str, arguments)]) == 0
    assert not (tmp_path / "ran").exists()


def test_python_files_of_a_folder_are_never_run(whole, tmp_path, capsys):
    hf = tmp_path / "hf"
    shutil.copytree(whole / "hf", hf)
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (hf / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((hf / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (hf / "config.json").write_text(json.dumps(config))
    assert zeda(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    assert not (tmp_path / "ran").exists()


def test_links_of_the_hugging_face_cache_are_followed(whole, tmp_path):
    """hub/models--x/snapshots/rev/file is a link to hub/models--x/blobs/hash."""
    snapshot_folder, blobs = tmp_path / "models--x/snapshots/rev", tmp_path / "models--x/blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((whole / "hf").iterdir())):
        shutil.copyfile(path, blobs / f"{number:08x}")
        (snapshot_folder / path.name).symlink_to(f"../../blobs/{number:08x}")
    hf_to_megatron(snapshot_folder, tmp_path / "m")
    assert verify(snapshot_folder, tmp_path / "m") == []


def test_import_has_the_hashes_that_training_checks(whole, tmp_path):
    told = json.loads((whole / "m/release/integrity.json").read_text())["files"]
    files = {path.name for path in (whole / "m/release").iterdir()} - {"integrity.json"}
    assert set(told) == files and {"__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt"} <= files
    assert find_damage(whole / "m/release") is None
    shutil.copytree(whole / "m", tmp_path / "m")
    flip("__0_1.distcp", 0.5)(tmp_path / "m")
    with pytest.raises(UserError, match=r"release: __0_1\.distcp has changed since it was written"):
        require_intact(tmp_path / "m/release", "--pretrained-checkpoint", "hash")
