"""Ways to spoil a Hugging Face folder, each with what the error must name. Deterministic, no two alike."""

import json
import os
import pickle
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
NORM = "model.norm.weight"


class Payload:
    """A pickle that leaves a file behind if anybody runs it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def shard_of(folder, key):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][key]


def split(shard):
    """(header, data) of a safetensors file."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(shard, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_json(name, change):
    def spoil(folder):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(value) or value))

    return spoil


def truncated():
    for number in range(3):
        for keep in (0, 4, 8, 50, 0.5, -100, -8, -1):

            def spoil(folder, number=number, keep=keep):
                shard = shards(folder)[number]
                size = shard.stat().st_size
                os.truncate(shard, int(size * keep) if isinstance(keep, float) else keep + size * (keep < 0))

            yield f"shard {number} cut to {keep}", spoil, f"model-{number + 1:05d}-of"


def header_lengths():
    lies = (0, 1, 2, 100_000_001, 2**31, 2**40, 2**63, 2**64 - 1)
    for lie in (*lies, "-1", "+1", "+8", "file"):

        def spoil(folder, lie=lie):
            shard = shards(folder)[0]
            data = shard.read_bytes()
            length = int.from_bytes(data[:8], "little")
            length = len(data) if lie == "file" else length + int(lie) if isinstance(lie, str) else lie
            shard.write_bytes(length.to_bytes(8, "little") + data[8:])

        yield f"header length {lie}", spoil, "model-00001-of"


def flipped_bits():
    draw = random.Random(7)
    for i in range(32):
        where, bit = draw.random(), draw.randrange(8)

        def spoil(folder, where=where, bit=bit):
            shard = shards(folder)[1]
            data = bytearray(shard.read_bytes())
            length = int.from_bytes(data[:8], "little")
            start = data.index(b'"model.')  # behind the free text of __metadata__
            data[start + int(where * (length + 8 - start))] ^= 1 << bit
            shard.write_bytes(data)

        yield f"bit flip {i}", spoil, ("model-0000", "model.layers", "tensor", "type")


def headers():
    """Lies of the header about one tensor."""

    def lie(field, change, key=GATE):
        def spoil(folder):
            shard = shard_of(folder, key)
            header, data = split(shard)
            header[key][field] = change(header[key][field])
            join(shard, header, data)

        return spoil

    changes = {
        "doubled": lambda v: [v[0] * 2, *v[1:]],
        "transposed": lambda v: v[::-1],
        "negative": lambda v: [-n for n in v],
        "of text": lambda v: [str(n) for n in v],
        "of fractions": lambda v: [n + 0.5 for n in v],
        "of truth": lambda v: [True] * len(v),
        "huge": lambda v: [2**62] * len(v),
        "nested": lambda v: [v],
        "null": lambda v: None,
        "text": lambda v: "32",
        "longer": lambda v: [*v, 3],
    }
    for name, change in changes.items():
        yield f"shape {name}", lie("shape", change), GATE
    more = {
        "overlapping": lambda v: [v[0] - 64, v[1] - 64],
        "moved on": lambda v: [v[0] + 64, v[1] + 64],
        "out of range": lambda v: [v[0] + 10**6, v[1] + 10**6],
        "past the end": lambda v: [v[0], 2**50],
    }
    for name in (
        "negative",
        "of text",
        "of fractions",
        "huge",
        "nested",
        "null",
        "text",
        "longer",
        "transposed",
    ):
        more[name] = changes[name]
    for name, change in more.items():
        yield f"offsets {name}", lie("data_offsets", change), ("tensor", "model-0000")
    for value in ("F33", "", None, 4, ["F32"], "C64", "F4"):
        yield f"dtype {value!r}", lie("dtype", lambda v, value=value: value), GATE
    yield "dtype F16 of F32 data", lie("dtype", lambda v: "F16"), GATE
    for field in ("shape", "dtype", "data_offsets"):

        def drop(folder, field=field):
            header, data = split(shard_of(folder, GATE))
            del header[GATE][field]
            join(shard_of(folder, GATE), header, data)

        yield f"no {field}", drop, GATE
    for name, item in {"list": [], "number": 3, "null": None}.items():

        def replace(folder, item=item):
            header, data = split(shard_of(folder, GATE))
            join(shard_of(folder, GATE), header | {GATE: item}, data)

        yield f"tensor is a {name}", replace, GATE
    for name, text in {"list": b"[]", "text": b'"x"', "twice": None, "nothing": b"{}"}.items():

        def rewrite(folder, text=text):
            header, data = split(shard_of(folder, GATE))
            one = json.dumps({GATE: header[GATE]}).encode()[1:-1]
            whole = json.dumps(header).encode()
            join(shard_of(folder, GATE), text or whole[:-1] + b"," + one + b"}", data)

        yield f"header {name}", rewrite, ("model-0000",)

    def tail(folder):
        with shards(folder)[0].open("ab") as file:
            file.write(b"\0" * 16)

    yield "bytes behind the data", tail, "model-00001-of"


def types():
    for dtype in ("int8", "uint8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"):
        for key in (GATE, NORM):

            def spoil(folder, dtype=dtype, key=key):
                tensors = load_file(shard_of(folder, key))
                tensors[key] = tensors[key].to(getattr(torch, dtype))
                save_file(tensors, shard_of(folder, key), metadata={"format": "pt"})

            yield f"{key[-11:]} is {dtype}", spoil, key
    for kinds in (("bfloat16",), ("float16", "bfloat16"), ("float64",)):

        def mix(folder, kinds=kinds):
            for key, kind in zip((GATE, NORM), kinds):
                tensors = load_file(shard_of(folder, key))
                tensors[key] = tensors[key].to(getattr(torch, kind))
                save_file(tensors, shard_of(folder, key), metadata={"format": "pt"})

        yield f"mixed with {kinds}", mix, ("gate_proj", "linear_fc1", NORM)


def indices():
    def entry(name, key=GATE):
        return edit_json(INDEX, lambda value: value["weight_map"].update({key: name}))

    names = [
        "nowhere.safetensors", "model-00099-of-00099.safetensors", "", ".", "..", "/etc/passwd", "/model.safetensors",
        "../model.safetensors", "a/../../m.safetensors", "sub/m.safetensors", "..\\m.safetensors", "m\0.safetensors",
        "pytorch_model.bin", "model.pt", "config.json", "x" * 300 + ".safetensors",
        "\ud800.safetensors", 3, None, ["a"], {"a": 1}, True,
    ]  # fmt: skip
    for name in names:
        yield f"index names {str(name)[:40]!r}", entry(name), name if name in names[:2] else INDEX
    for key in (GATE, NORM, "lm_head.weight", "model.embed_tokens.weight"):
        yield (
            f"index lacks {key}",
            edit_json(INDEX, lambda v, key=key: v["weight_map"].pop(key) and None),
            key,
        )
    yield "index has a ghost", entry("model-00001-of-00009.safetensors", "model.ghost"), "model-0000"
    yield "index names the wrong shard", entry(None) and edit_json(INDEX, _other_shard), GATE
    for name, value in {"list": [], "text": "x", "number": 3, "null": None, "empty": {}}.items():
        yield f"weight_map is {name}", edit_json(INDEX, lambda v, value=value: {"weight_map": value}), INDEX
    yield "no weight_map", edit_json(INDEX, lambda v: {"metadata": {}}), INDEX

    def twice(folder):
        tensors = load_file(shard_of(folder, NORM))
        other = next(shard for shard in shards(folder) if shard != shard_of(folder, NORM))
        save_file(load_file(other) | {NORM: tensors[NORM]}, other, metadata={"format": "pt"})

    yield "tensor in two shards", twice, NORM


def _other_shard(value):
    names = sorted(set(value["weight_map"].values()) - {value["weight_map"][GATE]})
    value["weight_map"][GATE] = names[0]


def texts():
    """Files that are no JSON, or more than JSON allows."""
    bad = {
        "empty": b"",
        "not JSON": b"{'a': 1}",
        "cut": b'{"a": ',
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a list": b"[1, 2]",
        "text": b'"a"',
        "null": b"null",
        "deep": b"[" * 200_000,
        "long number": b'{"a": ' + b"9" * 5000 + b"}",
        "NaN": b'{"bad_number": NaN}',
        "a key twice": b'{"bad_number": 1, "bad_number": 2}',
    }
    for file in (CONFIG, INDEX):
        for name, data in bad.items():
            yield f"{file} {name}", lambda folder, f=file, d=data: (folder / f).write_bytes(d), file


def configs():
    """Values of a wrong type or size."""
    wrong = {
        "hidden_size": ["32", 32.5, None, 0, -32, True, 10**12, [32]],
        "num_hidden_layers": ["3", 3.0, None, 0, -1, 10**9, {}],
        "num_attention_heads": [0, "4", None, 3],
        "num_key_value_heads": [0, -2, 3, "2"],
        "num_experts": [0, -4, "4", 4.5, 10**9, None],
        "num_experts_per_tok": [0, 5, "2", None],
        "vocab_size": [0, "97", None, 10**12],
        "moe_intermediate_size": [0, "16", None],
        "intermediate_size": ["48", None, -1],
        "head_dim": ["8", 0, 8.5],
        "rms_norm_eps": ["small", None, [1e-6], float("nan"), float("inf")],
        "attention_dropout": ["0", True, float("nan")],
        "architectures": ["Qwen3MoeForCausalLM", [None], [["a"]], {"a": 1}, [3], ["os.system"]],
        "tie_word_embeddings": ["false", 1, []],
        "mlp_only_layers": ["0", [None], [-1], 3],
        "rope_parameters": ["x", [1], {"rope_theta": "x", "rope_type": "default"}],
        "decoder_sparse_step": [0, "1", None],
        "zce_nums": [3, "3", [-1], [None], [1.5], [10**9]],
        "auto_map": ["x", [1]],
    }
    for key, values in wrong.items():
        for value in values:
            yield (
                f"{key} {value!r}",
                edit_json(CONFIG, lambda v, k=key, x=value: {**v, k: x}),
                key.rstrip("s"),
            )
    for value in (["sparse"], [3], "zero", ["zero", "copy"]):
        change = {"zce_nums": [2], "zce_types": value}
        yield f"zce_types {value!r}", edit_json(CONFIG, lambda v, c=change: v | c), "zce_types"


def links():
    for name in (CONFIG, INDEX, "model-00001-of", "tokenizer_config.json"):

        def spoil(folder, name=name):
            file = next(path for path in folder.iterdir() if path.name.startswith(name))
            outside = folder.parent / "outside"
            outside.mkdir()
            os.replace(file, outside / file.name)
            file.symlink_to(outside / file.name)

        yield f"link {name}", spoil, (name, "link")

    def circle(folder):
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(CONFIG)

    yield "link in a circle", circle, CONFIG

    def pipe(folder):
        shards(folder)[0].unlink()
        os.mkfifo(folder / "model-00001-of-00009.safetensors")

    yield "pipe for a shard", pipe, "model-00001-of"


def pickles():
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):

        def spoil(folder, name=name):
            for path in [*shards(folder), folder / INDEX]:
                path.unlink()
            (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "ran")))

        yield f"only {name}", spoil, (name, "pickle")

    def named(folder):
        shards(folder)[0].write_bytes(pickle.dumps(Payload(folder.parent / "ran")) + b"\0" * 100)

    yield "pickle called safetensors", named, "model-00001-of"


HF_CASES = [
    case
    for make in (
        truncated,
        header_lengths,
        flipped_bits,
        headers,
        types,
        indices,
        texts,
        configs,
        links,
        pickles,
    )
    for case in make()
]


def snapshot(folder: Path):
    """Names and content of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
