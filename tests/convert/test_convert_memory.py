"""Conversion needs memory for a few tensors, not for the model."""

import ctypes
import gc
import threading
import time

import psutil
import pytest
import torch
from tiny_models import TINY

from tools.measure.random_model import write_random_model
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify

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
