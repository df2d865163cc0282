"""Checkpoints that other parallel layouts wrote: loaded, saved again by Megatron, compared and exported."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from tiny_models import TINY, make_hf_folder

from zeda_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf, verify
from zeda_megatron.checkpoint.hf_files import HFReader
from zeda_megatron.config import ZeroExpertConfig

NZ = 3
LAYOUTS = {
    "tp2 ep2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2),
    "tp2 etp2": dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
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

    from zeda_megatron.checkpoint.state import load_weights, model_state, save_checkpoint
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.models.build import build_gpt_model, transformer_config
    from zeda_megatron.runtime.process_groups import ParallelConfig, initialize

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    arch = read_architecture(folder / "hf")
    for name, sizes in layouts.items():
        parallel = ParallelConfig(**sizes)
        initialize(parallel)
        model = build_gpt_model(
            arch,
            transformer_config(arch, parallel),
            ZeroExpertConfig(NZ),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        load_weights([model], folder / "m" / "release", "--load")
        save_checkpoint(folder / name, 5, model_state([model]))
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def check_layouts(tmp_path, world, layouts):
    assert TINY["vocab_size"] % 2 == 1  # padded under tensor parallelism
    hf, _ = make_hf_folder(tmp_path / "hf", num_hidden_layers=4)
    hf_to_megatron(hf, tmp_path / "m", num_zero_experts=NZ)
    megatron_to_hf(tmp_path / "m", hf, tmp_path / "expected")
    mp.spawn(resave, args=(world, tmp_path, layouts), nprocs=world)
    expected = HFReader(tmp_path / "expected")
    for name in layouts:
        assert verify(hf, tmp_path / name) == [], name
        megatron_to_hf(tmp_path / name, hf, tmp_path / f"{name} out")
        back = HFReader(tmp_path / f"{name} out")
        keys = back.keys()
        assert keys == expected.keys()
        for key in keys:
            assert torch.equal(back.read(key), expected.read(key)), (name, key)


def test_two_processes_tensor_expert_and_pipeline_parallel(tmp_path):
    check_layouts(tmp_path, 2, LAYOUTS)


@pytest.mark.slow
def test_four_processes_all_mixed(tmp_path):
    check_layouts(tmp_path, 4, FOUR)
