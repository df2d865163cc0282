"""Folders that are odd rather than broken: values, files and weights that somebody might really have, or send.

Each case is a name and a function that changes a copy of a good folder. What must happen is the same for all: the
folder is refused in one line, or converted to what transformers makes of it.
"""

import json
import os
import pickle
import socket
import struct

import torch
from corruptions import INDEX, edit_json, shards
from safetensors.torch import save_file
from tiny import weights_of

CONFIG = "config.json"
JUNK = (None, -1, 0, 1, 2.5, 1e308, 1e-320, True, "x", "", [], [0], {}, {"a": 1}, 10**400)
"""Values that no key, or nearly none, may have."""
KEYS = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim num_experts num_local_experts n_routed_experts num_experts_per_tok "
    "max_position_embeddings rms_norm_eps rope_theta rope_parameters rope_scaling partial_rotary_factor hidden_act "
    "attention_bias attention_dropout initializer_range tie_word_embeddings norm_topk_prob decoder_sparse_step "
    "mlp_only_layers mlp_layer_types first_k_dense_replace n_shared_experts routed_scaling_factor q_lora_rank "
    "kv_lora_rank use_sliding_window sliding_window layer_types model_type architectures dtype torch_dtype "
    "bos_token_id eos_token_id pad_token_id quantization_config auto_map zce_nums zce_types zce_routing id2label "
    "num_labels per_layer_config attn_implementation transformers_weights num_nextn_predict_layers use_cache "
    "is_encoder_decoder generation_config attribute_map return_dict name_or_path transformers_version"
).split()


def value_cases():
    for key in KEYS:
        for value in JUNK:
            yield f"{key} {str(value)[:12]!r}", edit_json(CONFIG, lambda c, k=key, v=value: {**c, k: v})
        yield f"{key} left out", edit_json(CONFIG, lambda c, k=key: {n: v for n, v in c.items() if n != k})


def pipe_cases():
    """What is no regular file, under every name that a folder of a model has."""
    names = (CONFIG, INDEX, "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json",
             "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
             "additional_chat_templates/tools.jinja", "LICENSE", "adapter_config.json", "notes")  # fmt: skip
    makers = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    for name in names:
        for kind, make in makers.items():

            def spoil(folder, name=name, make=make):
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.unlink(missing_ok=True)
                make(path)

            yield f"{name} is a {kind}", spoil

    def sock(folder):
        here = os.getcwd()
        os.chdir(folder)
        try:
            socket.socket(socket.AF_UNIX).bind("tokenizer.model")
        finally:
            os.chdir(here)

    yield "tokenizer.model is a socket", sock


def json_cases():
    """JSON that is valid, or nearly, and made to cost time, memory or a traceback."""
    texts = {
        "lists": b'{"a": [' + b"[]," * 3_000_000 + b"[]]}",
        "objects": b'{"a": [' + b'{"b":1},' * 2_500_000 + b"{}]}",
        "deep list": b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        "deep object": b'{"a": ' * 5_000 + b"1" + b"}" * 5_000,
        "digits": b'{"vocab_size": ' + b"9" * 5_000 + b"}",
        "large exponent": b'{"vocab_size": 1e99999}',
        "half a character": b'{"model_type": "\\ud800"}',
        "half a key": b'{"\\udfff": 1}',
        "null character": b'{"model_type": "a\\u0000b"}',
        "newline": b'{"architectures": ["a\\nb\\u2028c"]}',
        "escape": b'{"architectures": ["\\u001b[31m"]}',
        "long": b'{"architectures": ["' + b"x" * 1_000_000 + b'"]}',
        "byte order": b'\xef\xbb\xbf{"architectures": ["x"]}',
        "behind": b'{"architectures": ["x"]} {}',
    }
    for file in (CONFIG, INDEX, "tokenizer_config.json", "generation_config.json"):
        for name, text in texts.items():
            yield f"{file} {name}", lambda folder, f=file, t=text: (folder / f).write_bytes(t)
    for name, text in texts.items():

        def header(folder, text=text):
            shard = shards(folder)[0]
            shard.write_bytes(struct.pack("<Q", len(text)) + text)

        yield f"header {name}", header


def single(folder, tensors):
    for path in [*shards(folder), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def names_case(rename, keep=lambda key: True):
    def spoil(folder):
        single(folder, {rename(key): value for key, value in weights_of(folder).items() if keep(key)})

    return spoil


def fused(folder):
    """One tensor for all experts of a layer, as the model has it in memory."""
    weights = weights_of(folder)
    layers = {key.partition(".experts.")[0] for key in weights if ".experts." in key}
    for layer in layers:
        experts = range(sum(key.startswith(f"{layer}.experts.") for key in weights) // 3)
        parts = {
            p: [weights.pop(f"{layer}.experts.{e}.{p}_proj.weight") for e in experts]
            for p in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"])]
        weights[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        weights[f"{layer}.experts.down_proj"] = torch.stack(parts["down"])
    single(folder, weights)


def weight_cases():
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "transformer.", "a\nb."):
        yield f"prefix {prefix!r}", names_case(lambda key, p=prefix: p + key)
    yield "no prefix", names_case(lambda key: key.removeprefix("model."))
    yield "language model", names_case(lambda key: key.replace("model.", "language_model.", 1))
    yield "inner language model", names_case(lambda key: key.replace("model.", "model.language_model.", 1))
    yield "compiled layers", names_case(lambda key: key.replace("self_attn.", "self_attn._orig_mod."))
    yield "no head", names_case(str, lambda key: key != "lm_head.weight")
    yield "no layer", names_case(str, lambda key: ".layers.1." not in key)
    yield "no expert", names_case(str, lambda key: ".experts.1." not in key)
    yield "adapter in it", names_case(lambda key: key.replace("q_proj.", "q_proj.base_layer."))
    yield "merged experts", fused
    for suffix in (
        "weight_scale_inv",
        "weight_scale",
        "qweight",
        "scales",
        "weight_packed",
        "SCB",
        "quant_state.x",
    ):

        def quantised(folder, suffix=suffix):
            extra = {
                k.replace(".weight", f".{suffix}"): torch.ones(1) for k in weights_of(folder) if "q_proj" in k
            }
            single(folder, weights_of(folder) | extra)

        yield f"quantised with {suffix}", quantised
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):

        def packed(folder, dtype=dtype):
            single(folder, {k: v.to(dtype) if "proj" in k else v for k, v in weights_of(folder).items()})

        yield f"quantised to {dtype}", packed
    for method in ("fp8", "awq", "gptq", "modelopt", "compressed-tensors", "x"):
        told = {"quant_method": method}
        yield f"told {method}", edit_json(CONFIG, lambda c, t=told: {**c, "quantization_config": t})

    def more_rows(folder):
        single(
            folder,
            {k: torch.cat([v, v]) if k.endswith("gate.weight") else v for k, v in weights_of(folder).items()},
        )

    yield "routers of twice the rows", more_rows


def source_cases():
    """Several sources of weights in one folder, or none that is whole."""
    yield "no index", lambda folder: (folder / INDEX).unlink()

    def also(name, change=lambda tensors: tensors):
        return lambda folder: save_file(change(weights_of(folder)), folder / name, {"format": "pt"})

    noise = lambda tensors: {key: torch.zeros_like(value) for key, value in tensors.items()}  # noqa: E731
    yield "model.safetensors beside the index", also("model.safetensors", noise)
    yield "consolidated.safetensors beside the index", also("consolidated.safetensors", noise)
    yield "another shard beside the index", also("model-00009-of-00009.safetensors", noise)
    yield "model.fp16.safetensors beside the index", also("model.fp16.safetensors", noise)
    yield "adapter_model.safetensors", also("adapter_model.safetensors", noise)

    def pickled(name):
        return lambda folder: torch.save(noise(weights_of(folder)), folder / name)

    yield "pytorch_model.bin beside the index", pickled("pytorch_model.bin")
    yield "consolidated.00.pth beside the index", pickled("consolidated.00.pth")

    def adapter(folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')

    yield "adapter_config.json", adapter

    def index_of_one(folder):
        tensors = weights_of(folder)
        single(folder, tensors)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))

    yield "an index of one file", index_of_one

    def only(name):
        def spoil(folder):
            tensors = weights_of(folder)
            single(folder, tensors)
            (folder / "model.safetensors").rename(folder / name)

        return spoil

    for name in (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00001.safetensors",
        "x.gguf",
    ):
        yield f"only {name}", only(name)
    for change in (
        {"transformers_weights": "x.safetensors"},
        {"_name_or_path": "/etc/passwd"},
        {"some_new_key": [1]},
    ):
        yield f"config {change}", edit_json(CONFIG, lambda c, x=change: {**c, **x})
    for name in (
        "model\n.safetensors",
        "model\u2028.safetensors",
        "model\x1b[2J.safetensors",
        "mod\udc80el.safetensors",
    ):

        def renamed(folder, name=name):
            old = shards(folder)[0]
            old.rename(folder / name)
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"] = {k: name if v == old.name else v for k, v in index["weight_map"].items()}
            (folder / INDEX).write_text(json.dumps(index))

        yield f"shard called {name!a}", renamed


FILES = [*pipe_cases(), *json_cases(), *weight_cases(), *source_cases()]
VALUES = list(value_cases())


LONG_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."
"""A pickle whose memo would have two billion places."""


def metadata_bomb(text):
    return lambda root: (root / "release" / ".metadata").write_bytes(text)


def nested_sizes():
    """Shapes made of ever the same long tuple: a few bytes for each copy."""
    items = b"(" + b"K\x01" * 100_000 + b"t"
    call = b"ctorch\nSize\nq\x00" + items + b"q\x01\x85R"
    return b"\x80\x02" + call + b"h\x00h\x01\x85R" * 1000 + b"."


def megatron_cases():
    def put(name, data):
        return lambda root: (root / name).write_bytes(data)

    def tracker(data):
        return put("latest_checkpointed_iteration.txt", data)

    for name, text in {
        "5000 digits": b"9" * 5000, "300 letters": b"x" * 300, "a million letters": b"x" * 10**6, "nothing": b"",
        "out": b"../m/release", "null": b"rel\0ease", "lines": b"release\nrelease", "not UTF-8": b"\xff\xfe",
        "negative": b"-1", "space": b" release \n", "Arabic digits": "٣".encode(), "dots": b"..", "far": b"99999999",
    }.items():  # fmt: skip
        yield f"tracker of {name}", tracker(text)
    for name in ("latest_checkpointed_iteration.txt", "zeda.json", "release/integrity.json", "release/.metadata",
                 "release/metadata.json", "release/common.pt", "release/__0_0.distcp", "release/notes",
                 "hf_config/config.json", "hf_config/tokenizer.json", "hf_config/generation_config.json"):  # fmt: skip
        for kind, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():

            def spoil(root, name=name, make=make):
                (root / name).unlink(missing_ok=True)
                make(root / name)

            yield f"{name} is a {kind}", spoil
    one = '{"files": {"__0_0.distcp": {"size": %s, "sha256": "%s"}}}'
    for name, text in {
        "infinite size": one % ("Infinity", ""), "huge size": one % ("1e400", ""), "size of text": one % ('"3"', ""),
        "size of truth": one % ("true", ""), "negative size": one % ("-1", ""), "digits": one % ("9" * 5000, ""),
        "null name": '{"files": {"a\\u0000b": {"size": 1, "sha256": ""}}}',
        "half a name": '{"files": {"\\ud800": {"size": 1, "sha256": ""}}}',
        "name with a newline": '{"files": {"a\\nb": {"size": 1, "sha256": ""}}}',
        "long name": '{"files": {"%s": {"size": 1, "sha256": ""}}}' % ("x" * 300),
        "hash of a number": '{"files": {"__0_0.distcp": {"size": 1, "sha256": 3}}}',
        "lists": '{"files": {"a": [' + "[]," * 3_000_000 + "[]]}}", "deep": '{"files": ' + "[" * 100_000,
        "null": "null", "files null": '{"files": null}',
    }.items():  # fmt: skip
        yield f"integrity.json of {name}", put("release/integrity.json", text.encode())
        if len(text) < 10**5:
            yield f"zeda.json of {name}", put("zeda.json", text.encode())
    yield "memo bomb", metadata_bomb(LONG_MEMO)
    yield "memo bomb of text", metadata_bomb(b"}p2147483647\n.")
    yield "shapes of a long tuple", metadata_bomb(nested_sizes())
    yield (
        "paths of long parts",
        metadata_bomb(
            b"\x80\x02cpathlib\nPurePosixPath\nq\x00("
            + b"X\x00\x00\x01\x00"
            + b"a" * 65536
            + b"q\x01"
            + b"h\x01" * 2000
            + b"tR."
        ),
    )
    yield "a dictionary copied", metadata_bomb(b"\x80\x02ccollections\nOrderedDict\n(]tR.")
    yield "an array of bytes", metadata_bomb(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.")
    yield "a long text", metadata_bomb(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.")
    yield "a long frame", metadata_bomb(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.")
    yield "nested tuples", metadata_bomb(b"\x80\x02" + b"(" * 10**6)
    for name, code in {
        "eval": b"cbuiltins\neval\n(S'1'\ntR.",
        "persistent": b"P1\n.",
        "extension": b"\x82\x01.",
    }.items():
        yield f"pickle with {name}", metadata_bomb(code)
    yield "an empty index", metadata_bomb(pickle.dumps({}))


MEGATRON_ODD = list(megatron_cases())
