"""Checkpoints that other parallel layouts wrote: loaded, saved again by Megatron, compared and exported."""

import json
import os

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from tiny_models import TINY, make_hf_folder

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.hf_files import HFReader
from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.convert.verify import verify

NZ, N = 3, TINY["num_experts"]
SOURCES = {"m": ZeroExpertConfig(NZ), "p": ZeroExpertConfig(N, "zero", "paired")}
THRESHOLDS = [-2.5, -3.0, -1e4, 0.125]
LAYOUTS = {
    "tp2 ep2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2),
    "tp2 etp2": dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
    "pp2 3+1": dict(pipeline_model_parallel_size=2, decoder_last_pipeline_num_layers=1),
}
FOUR = {
    "tp2 ep2 pp2": dict(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, pipeline_model_parallel_size=2
    )
}


def resave(rank, world, folder, layouts):
    """In each layout: build this rank's part, load the conversion, save it as a training run does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    from zeda_megatron.runtime import cpu

    cpu.install()
    from megatron.core import parallel_state

    from zeda_megatron.checkpoint.state import model_state, save_checkpoint
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.models.build import build_gpt_model, transformer_config
    from zeda_megatron.models.load import load_weights
    from zeda_megatron.runtime.process_groups import initialize

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    arch = read_architecture(folder / "hf")
    for name, sizes in layouts.items():
        parallel = ParallelConfig(**sizes)
        initialize(parallel)
        for source, zero in SOURCES.items():
            model = build_gpt_model(
                arch,
                transformer_config(arch, parallel),
                zero,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
            load_weights([model], folder / source / "release", "--load")
            save_checkpoint(folder / f"{source} {name}", 5, model_state([model]))
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def add_heads(hf, folder):
    """The same model with drawn heads of paired zero experts, written without our converter."""
    reader, draw = HFReader(hf), torch.Generator().manual_seed(4)
    tensors = {key: reader.read(key) for key in list(reader.keys())}
    for layer in range(4):
        gate = f"model.layers.{layer}.mlp.gate."
        tensors[gate + "weight"] = torch.nn.functional.pad(tensors[gate + "weight"], (0, 0, 0, 1))
        tensors[gate + "zero_weight"] = torch.randn(N, TINY["hidden_size"], generator=draw)
        tensors[gate + "zero_bias"] = torch.randn(N, generator=draw)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    more = {"zce_nums": [N], "zce_types": ["zero"], "zce_routing": "paired", "zce_threshold": THRESHOLDS}
    (folder / "config.json").write_text(json.dumps(reader.config | more))


def check_layouts(tmp_path, world, layouts):
    assert TINY["vocab_size"] % 2 == 1  # padded under tensor parallelism
    hf, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=4)
    hf_to_megatron(hf, tmp_path / "m", num_zero_experts=NZ)
    megatron_to_hf(tmp_path / "m", hf, tmp_path / "expected")
    add_heads(hf, tmp_path / "paired")
    hf_to_megatron(tmp_path / "paired", tmp_path / "p")
    mp.spawn(resave, args=(world, tmp_path, layouts), nprocs=world)
    for source, wanted in (("m", "expected"), ("p", "paired")):
        expected = HFReader(tmp_path / wanted)
        for name in layouts:
            saved, out = tmp_path / f"{source} {name}", tmp_path / f"{source} {name} out"
            assert verify(hf, saved) == verify(tmp_path / wanted, saved) == [], (source, name)
            megatron_to_hf(saved, hf, out)
            back = HFReader(out)
            keys = back.keys()
            assert keys == expected.keys()
            for key in keys:
                assert torch.equal(back.read(key), expected.read(key)), (source, name, key)
            assert back.config.get("zce_threshold") == (THRESHOLDS if source == "p" else None)


def test_two_processes_tensor_expert_and_pipeline_parallel(tmp_path):
    check_layouts(tmp_path, 2, LAYOUTS)


@pytest.mark.slow
def test_four_processes_all_mixed(tmp_path):
    check_layouts(tmp_path, 4, FOUR)
