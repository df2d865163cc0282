"""Conversion needs memory for a few tensors, not for the model."""

import ctypes
import gc
import json
import threading
import time
from dataclasses import replace

import psutil
import pytest
import tiny
import torch
from odd_folders import single
from tiny_models import TINY

from tools.measure.random_model import write_random_model
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify
from zeda_megatron.models.families import qwen3_moe
from zeda_megatron.models.weight_map import TURNS, PublishedNames

CONFIG = TINY | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=6_000,
    hidden_size=512,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
    num_experts=32,
    moe_intermediate_size=256,
)
SHARD = 20_000_000


class PeakMemory:
    """Highest resident memory above that at the start, sampled every few milliseconds."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # give freed blocks back, or they would hide new ones
        self.process, self.stop = psutil.Process(), False
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stop:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *exception):
        self.stop = True
        self.thread.join()
        self.extra = self.peak - self.start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a model's folder, its bytes); its conversion lands beside it, in `m`."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    size = write_random_model(folder, CONFIG, SHARD, torch.float32)
    assert size > 280e6
    return folder, size


def converted(hf):
    return hf_to_megatron(hf, hf.with_name("m"), num_zero_experts=16, max_shard_bytes=SHARD, workers=2)


STEPS = {
    "import": converted,
    "export": lambda hf: megatron_to_hf(hf.with_name("m"), hf, hf.with_name("out"), SHARD, workers=2),
    "verify": lambda hf: verify(hf, hf.with_name("m"), workers=2),
}


@pytest.mark.parametrize("step", STEPS)
def test_peak_memory_is_a_small_part_of_the_model(model, step, record_property):
    hf, size = model
    if step != "import" and not hf.with_name("m").exists():
        converted(hf)
    with PeakMemory() as memory:
        result = STEPS[step](hf)
    record_property("model_MB", size / 1e6)
    record_property("extra_MB", memory.extra / 1e6)
    print(f"{step}: model {size / 1e6:.0f} MB, peak extra memory {memory.extra / 1e6:.0f} MB")
    # largest tensor 12 MB; a few copies of it for each of two workers and, on export, one shard
    assert memory.extra < size / 3
    assert step != "verify" or result == []


MERGED = CONFIG | dict(num_hidden_layers=1, num_experts=96, moe_intermediate_size=512)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder whose experts are merged: in bf16 one tensor of 100 MB, one of 50 MB."""
    folder = tmp_path_factory.mktemp("merged") / "hf"
    write_random_model(folder, MERGED | {"num_experts": 4}, 2_000_000_000, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(MERGED))
    hidden, width, experts = (
        MERGED[f"{key}"] for key in ("hidden_size", "moe_intermediate_size", "num_experts")
    )
    tensors = {key: value for key, value in tiny.weights_of(folder).items() if ".experts." not in key}
    tensors["model.layers.0.mlp.gate.weight"] = torch.rand(experts, hidden).to(torch.bfloat16)
    layer = "model.layers.0.mlp.experts."
    tensors[f"{layer}gate_up_proj"] = torch.rand(experts, hidden, 2 * width).to(torch.bfloat16)
    tensors[f"{layer}down_proj"] = torch.rand(experts, width, hidden).to(torch.bfloat16)
    single(folder, tensors)
    return folder


@pytest.mark.parametrize("step", STEPS)
def test_merged_experts_need_memory_for_a_few_of_them(merged, step, monkeypatch):
    names = PublishedNames(experts=TURNS, writes_fused=True)
    monkeypatch.setattr(qwen3_moe, "WEIGHTS", replace(qwen3_moe.WEIGHTS, published=names))
    if step != "import" and not merged.with_name("m").exists():
        converted(merged)
    with PeakMemory() as memory:
        result = STEPS[step](merged)
    print(f"{step}: peak extra memory {memory.extra / 1e6:.0f} MB")
    assert (
        memory.extra < 60e6
    )  # the larger tensor has 100 MB, an expert's part of it 1 MB, the embedding 6 MB
    assert step != "verify" or result == []
