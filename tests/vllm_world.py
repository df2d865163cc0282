"""Tiny dynamic checkpoints as the converter exports them, in sizes that vLLM's CPU kernels take, and their answers by
the files for transformers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiny
import tiny_world
import torch
from families import EVERY, QWEN3_5_MOE_TEXT, YARN, seeing_model
from safetensors.torch import load_file, save_file

LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
"""The latent sizes are the real models': vLLM's CPU kernel knows no others."""
LONG = {
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 64}
}
"""vLLM makes a table of so many positions, times the factor."""
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
DELTA = {
    "head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_value_heads": 4,
}
PLACES = {
    "rope_parameters": QWEN3_5_MOE_TEXT["rope_parameters"] | {"mrope_section": [4, 2, 2]},
}
"""Positions of three kinds, for 8 pairs of channels."""
MODELS = {
    "qwen": (tiny.hf_model, SIZES | {"head_dim": 32, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "glm": (tiny.glm_model, SIZES | LATENT),
    "mixtral": (
        tiny.mixtral_model,
        {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 32},
    ),
    "glm45": (EVERY["glm4_moe"].make, SIZES | {"head_dim": 32}),
    "v3": (EVERY["deepseek_v3"].make, SIZES | LATENT | LONG),
    "v2": (EVERY["deepseek_v2"].make, SIZES | LATENT | LONG | {"q_lora_rank": None}),
    "oss": (
        EVERY["gpt_oss"].make,
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "sliding_window": 20,
            "swiglu_limit": 7.0,
            "rope_parameters": YARN
            | {"truncate": False, "beta_slow": 1.0, "original_max_position_embeddings": 64},
        },
    ),
    "minimax": (
        EVERY["minimax_m2"].make,
        {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32, "rotary_dim": 16},
    ),
    "olmoe": (
        EVERY["olmoe"].make,
        {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
    ),
    "next": (
        EVERY["qwen3_next"].make,
        SIZES | DELTA,
    ),
    "q35": (EVERY["qwen3_5_moe_text"].make, SIZES | DELTA | PLACES),
    "seeing": (seeing_model, SIZES | DELTA | PLACES),
    "qwen2": (EVERY["qwen2_moe"].make, SIZES | {"num_attention_heads": 2, "mlp_only_layers": [0]}),
}
"""Families, and the sizes that change. The CPU kernels want multiples of 32 on each rank."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
NEW_TOKENS = 32


def prompts() -> list[list[int]]:
    """Token ids of four prompts of different lengths."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(1, 250, (length,), generator=draw).tolist() for length in (5, 17, 40, 64)]


ZERO = {
    "shared": {"num_zero_experts": 4},
    "copy": {"num_zero_experts": 4, "zero_experts_type": "copy"},
    "learned": {"num_zero_experts": 4, "zero_experts_type": "learned"},
    "paired": {"zero_expert_routing": "paired", "paired_score": "weight+head+residual"},
    "awake": {"zero_expert_routing": "paired", "paired_score": "weight+head"},
}
"""How a conversion adds zero experts."""


class Folders(dict):
    """Exported folders, made when they are asked for; named after a family and its zero experts: `qwen_shared`,
    `glm_paired`, ..."""

    def __init__(self, root: Path):
        super().__init__()
        self._root, self._worlds = root, {}

    def __missing__(self, name: str) -> Path:
        from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
        from zeda_megatron.convert.megatron_to_hf import megatron_to_hf

        family, kind = name.split("_")
        if family not in self._worlds:
            model, sizes = MODELS[family]
            self._worlds[family] = tiny_world.make_world(self._root / family, model, **sizes)
        hf, folder = self._worlds[family].hf, self._root / name
        hf_to_megatron(hf, self._root / f"{name}_megatron", **ZERO[kind])
        megatron_to_hf(self._root / f"{name}_megatron", hf, folder)
        if family == "seeing":
            add_processor(folder)
        if kind == "awake":
            wake_up(folder)
        if kind in ("learned", "paired", "awake"):
            draw_added(folder, {"paired": -3.0, "awake": -1.0}.get(kind))
        self[name] = folder
        return folder


def add_processor(folder: Path) -> None:
    """What a published folder of a model that sees has for its pictures: four tokens and two small files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{end}_token_id": f"vision_{end}" for end in ("start", "end")}
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names.values()]})
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | ids))
    sizes = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "processor_class": "Qwen3VLProcessor",
    }
    sizes |= {
        "size": {"shortest_edge": 64, "longest_edge": 256},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for name, kind in (("", "image"), ("video_", "video")):
        kinds = {"image": "Qwen2VLImageProcessorFast", "video": "Qwen3VLVideoProcessor"}
        text = json.dumps(sizes | {f"{kind}_processor_type": kinds[kind]})
        (folder / f"{name}preprocessor_config.json").write_text(text)


def wake_up(folder: Path) -> None:
    """Heads get hidden units, zero experts answer; as an export of a fit has them."""
    from zeda_megatron.serving.transformers.zero_expert_routing import ZeroExperts, paired_shapes

    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".gate.zero_weight")]:
        experts, hidden = tensors[name].shape
        for added, shape in paired_shapes(ZeroExperts(experts, "low_rank", (), 5, 3), hidden).items():
            tensors[name.replace("zero_weight", added)] = torch.zeros(shape, dtype=tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(folder, zce_types=["low_rank"], zce_head_width=5, zce_rank=3)


def draw_added(folder: Path, threshold: float | None) -> None:
    """Give what a fresh checkpoint has as zeros (heads, learned outputs) something to say."""
    file, draw = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name in sorted(tensors):
        if ".zero_" in name:
            tensors[name] = torch.randn(tensors[name].shape, generator=draw) * 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    if threshold is not None:
        change_config(folder, zce_threshold=threshold)


def as_published(folder: Path, out: Path, model_type: str) -> Path:
    """A folder as the authors of the method publish theirs: shards with an index, the layer of multi-token prediction
    where the family has one, their four keys and no code."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    tensors, layers = load_file(out / "model.safetensors"), config["num_hidden_layers"]
    more = {}
    if "n_routed_experts" in config:
        last, ahead, hidden = f"model.layers.{layers - 1}.", f"model.layers.{layers}.", config["hidden_size"]
        ours = {key: value for key, value in tensors.items() if key.startswith(last)}
        tensors |= {key.replace(last, ahead): value.clone() for key, value in ours.items()}
        tensors |= {
            f"{ahead}{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "shared_head.norm")
        }
        tensors[f"{ahead}eh_proj.weight"] = torch.ones(hidden, 2 * hidden)
        more = {"num_nextn_predict_layers": 1}
    (out / "model.safetensors").unlink()
    names, place = sorted(tensors), {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        place |= dict.fromkeys(names[part::2], file)
        save_file({name: tensors[name] for name in names[part::2]}, out / file, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in out.glob("*.py"):
        file.unlink()
    gone = dict.fromkeys(["auto_map", *(key for key in config if key.startswith("zce_adapted"))])
    change_config(out, **gone, **more, model_type=model_type)
    ours = {key for key in json.loads((out / "config.json").read_text()) if "zce" in key}
    assert ours == {"use_zce_mask", "zce_nums", "zce_types"}
    return out


def packed(folder: Path, out: Path, number_format: str, plain: tuple[str, ...] = ()) -> Path:
    """A folder with 8-bit weights; those whose names have one of `plain` stay as they are."""
    from zeda_megatron.serving.quantize import QuantizeOptions, quantize

    quantize(QuantizeOptions(str(folder), str(out), number_format, packed=True))
    file, before = out / "model.safetensors", load_file(folder / "model.safetensors")
    tensors = load_file(file)
    for key in [key for key in before if any(word in key for word in plain)]:
        tensors[key] = before[key]
        tensors.pop(key + "_scale", None)
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    quantization["ignore"] += [f"re:.*{word}.*" for word in plain]
    change_config(out, quantization_config=quantization)
    return out


def change_config(folder: Path, **changes) -> None:
    """Change keys of config.json; None takes one away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    gone = {key for key, value in changes.items() if value is None}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in gone}))


@dataclass(frozen=True)
class Reference:
    """What the file for transformers answers."""

    tokens: list[list[int]]
    """Greedy answers."""
    counts: dict[str, list[int]]
    """Per MoE layer (by number): zero slots and all slots of all prompts and answers."""

    @property
    def shares(self) -> list[float]:
        return [zero / slots for zero, slots in self.counts.values()]


@torch.no_grad()
def reference(folder: Path, turn=lambda model: None, turn_each=None) -> Reference:
    """Answer with transformers; `turn` may move the model's dial, `turn_each(model, number)` before each prompt, and
    give a logits processor."""
    from zeda_megatron.serving.load import load_zero_expert_model

    model = load_zero_expert_model(folder, dtype=torch.float32).eval()
    turn(model)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = []
    for number, prompt in enumerate(prompts()):
        ids = torch.tensor([prompt])
        processor = turn_each and turn_each(model, number)
        more = {"logits_processor": [processor]} if processor else {}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        tokens.append(made[0, len(prompt) :].tolist())
    numbers = [i for i, layer in enumerate(model.decoder.layers) if layer.mlp in model.moe_blocks()]
    counts = {
        str(number): [int(block.zero_slots), int(block.all_slots)]
        for number, block in zip(numbers, model.moe_blocks())
    }
    return Reference(tokens, counts)


def offline(folder: Path, rounds: int = 1, extra_args: list[dict] | None = None, **llm) -> dict:
    """Answer with vLLM's offline engine; `llm` are its arguments, `extra_args` those of each prompt."""
    (made,) = _answers([(_job(folder, prompts(), rounds, extra_args, llm), {})])
    return made


def offline_of_two(folder: Path, **llm) -> dict:
    """Two data-parallel engines answer every other prompt; what both did, as if one had."""
    port, halves = str(free_port()), (prompts()[::2], prompts()[1::2])
    jobs = [
        (
            _job(folder, half, 1, None, llm),
            {"VLLM_DP_RANK": str(rank), "VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_PORT": port},
        )
        for rank, half in enumerate(halves)
    ]
    even, odd = _answers(jobs)
    tokens = [one for pair in zip(even["rounds"][0], odd["rounds"][0]) for one in pair]
    counts = {key: [a + b for a, b in zip(even["counts"][key], odd["counts"][key])] for key in odd["counts"]}
    return {"rounds": [tokens], "counts": counts}


def attention_of(folder: Path) -> str | None:
    """The backend that latent attention has to name: where a processor has AMX vLLM takes one that knows no float32."""
    config = json.loads((folder / "config.json").read_text())
    return "CPU_MLA" if "kv_lora_rank" in config else None


def _job(folder: Path, prompts: list[list[int]], rounds: int, extra_args, llm: dict) -> str:
    llm = {"attention_backend": attention_of(folder)} | llm
    job = {"folder": str(folder), "llm": llm, "prompts": prompts, "rounds": rounds, "extra_args": extra_args}
    return json.dumps(job | {"new_tokens": NEW_TOKENS})


def _answers(jobs: list[tuple[str, dict[str, str]]]) -> list[dict]:
    """Run the offline engine, a process for every job and its environment."""
    command = [sys.executable, str(Path(__file__).parent / "serving" / "vllm_run.py")]
    plain = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = [subprocess.Popen(command, text=True, env=plain | env, **pipes) for _, env in jobs]
    with ThreadPoolExecutor() as threads:
        told = list(threads.map(lambda process, job: process.communicate(job[0]), started, jobs))
    made = []
    for process, (out, err) in zip(started, told):
        assert process.returncode == 0, err[-4000:] + out[-4000:]
        (line,) = [line for line in out.splitlines() if line.startswith('{"rounds"')]
        made.append(json.loads(line))
    return made


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """vLLM's server on a free port of this machine. (The command `vllm` looks for a package of that name, which
    vllm-cpu is not; this is the module behind `vllm serve`.)"""

    def __init__(self, folder: Path, tmp_path: Path, flags: list[str], extra: dict):
        self.log = tmp_path / "server.log"
        self.port = free_port()
        metrics = tmp_path / "prometheus"
        metrics.mkdir()
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", "dynamic", "--host", "127.0.0.1", "--port", str(self.port)),
            *(
                "--dtype",
                "float32",
                "--max-model-len",
                "128",
                "--enforce-eager",
                "--no-enable-prefix-caching",
            ),
            *("--additional-config", json.dumps({"zeda_metric_seconds": 0, **extra})),
            *(["--attention-backend", backend] if (backend := attention_of(folder)) else []),
            *flags,
        ]
        self.env = os.environ | ENVIRONMENT | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env)
        while not self._alive():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(1)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def _alive(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
