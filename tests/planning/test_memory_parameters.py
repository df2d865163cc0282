"""The memory estimate's counts against what our own builder, Megatron's DDP and its optimizer really allocate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from families import FAMILIES

MODELS = {
    "qwen": tiny.TINY | {"num_hidden_layers": 4},
    "odd": tiny.TINY
    | {"num_hidden_layers": 4, "mlp_only_layers": [0], "tie_word_embeddings": True, "vocab_size": 97},
    "glm": tiny.GLM | {"num_hidden_layers": 4},
    "glm mtp": tiny.GLM | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1},
    "mixtral": tiny.MIXTRAL | {"num_hidden_layers": 4},
    **{
        name: family.fields | {"num_hidden_layers": 4}
        for name, family in FAMILIES.items()
        if name not in ("qwen3_moe", "glm4_moe_lite", "mixtral")
    },
}
SHARDED = ["--use-distributed-optimizer"]
FEW = {
    "dp2 sharded": SHARDED,
    "tp2 etp2": ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "2"],
    "ep2 sharded": ["--expert-model-parallel-size", "2", *SHARDED],
    "pp2 1+3": ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"],
    "routers": ["--trainable", "router", *SHARDED],
    "tp2 adapters": ["--trainable", "lora", "--lora-rank", "8", "--tensor-model-parallel-size", "2"],
}
MORE = {
    "dp2": [],
    "fp32 sharded": [*SHARDED, "--no-bf16"],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "cp2 sharded": ["--context-parallel-size", "2", *SHARDED],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "pp2 vpp2": [
        "--pipeline-model-parallel-size",
        "2",
        "--virtual-pipeline-model-parallel-size",
        "2",
    ],
    "tp2 routers": ["--trainable", "router", "--tensor-model-parallel-size", "2"],
    "tp2 routers and norms": ["--trainable", "router+norms", "--tensor-model-parallel-size", "2"],
    "pp2 routers and norms": ["--trainable", "router+norms", "--pipeline-model-parallel-size", "2"],
    "pp2 adapters": ["--trainable", "lora", "--pipeline-model-parallel-size", "2"],
    "ep2 adapters sharded": ["--trainable", "lora", "--expert-model-parallel-size", "2", *SHARDED],
    "adapters of attention": ["--trainable", "lora", "--lora-targets", "attention"],
    "adapters of shared": ["--trainable", "lora", "--lora-targets", "shared"],
    "paired": ["--zero-expert-routing", "paired", "--moe-router-load-balancing-type", "none"],
    "learned": ["--zero-experts-type", "learned", "--moe-router-load-balancing-type", "none"],
}
FOUR = {
    "tp2 ep2 pp2": [
        *["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"],
        *["--pipeline-model-parallel-size", "2"],
    ],
    "tp2 ep4 sharded": ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4", *SHARDED],
    "ep2 pp2 3+1 sharded": [
        *["--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
        *["--decoder-last-pipeline-num-layers", "1", *SHARDED],
    ],
    "dp4 sharded": SHARDED,
}


def cases(layouts: dict):
    """Models and their layouts: a head of multi-token prediction needs one pipeline stage and whole sequences."""
    for model in MODELS:
        for layout, flags in layouts.items():
            words = layout.split()
            if model == "gpt_oss" and "etp2" in words:
                continue  # its experts have biases
            if model == "qwen3_next" and "cp2" in words:
                continue  # its states go through whole sequences
            if model != "glm mtp" or not any(word.startswith(("pp", "cp")) for word in words):
                yield model, layout, [*flags, *(["--mtp-loss-scale", "0.3"] if model == "glm mtp" else [])]
    if "routers" in layouts:
        yield "glm mtp", "head alone", ["--mtp-loss-scale", "1", "--trainable", "mtp"]


def read_options(folder: Path, model: str, flags: list[str]):
    from zeda_megatron.config.arguments import parse
    from zeda_megatron.config.options import GROUPS, Options

    zero = [] if "paired" in flags else ["--num-zero-experts", "4"]
    fixed = ["--hf-config", str(folder / model), "--data-path", "x", "--bf16", "--seq-length", "64", *zero]
    options = Options(**parse([*fixed, *flags], GROUPS))
    options.validate()
    return options


def allocated(options) -> dict:
    """What one rank holds after its first optimizer step."""
    from megatron.core import parallel_state

    from zeda_megatron.training.build import build_student
    from zeda_megatron.training.optimizer import build_optimizer

    student = build_student(options)
    parameters = [(name, p) for chunk in student.chunks for name, p in chunk.named_parameters()]
    optimizer, _ = build_optimizer(options.optimizer, student, options.model.bf16)
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    optimizer.step()  # states are made by the first step
    own = {p.untyped_storage().data_ptr() for _, p in parameters}
    states = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            for p in group["params"]:
                copy = p.untyped_storage().data_ptr() not in own
                moments = (part.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))
                states += copy * p.nbytes + sum(moment.nbytes for moment in moments)
    buffers = [b for chunk in student.wrapped for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    expert = sum(p.numel() for name, p in parameters if ".experts." in name)
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "tensors": len(parameters),
        "expert": expert,
        "dense": sum(p.numel() for _, p in parameters) - expert,
        "router": sum(p.numel() for name, p in parameters if ".router." in name),
        "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        "weights": sum(p.nbytes for _, p in parameters),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": states,
    }


def work(rank: int, world: int, folder: Path, layouts: dict) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    from zeda_megatron.runtime import cpu

    cpu.install()
    from megatron.core import parallel_state

    from zeda_megatron.runtime.process_groups import initialize

    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    made = {}
    for model, layout, flags in cases(layouts):
        options = read_options(folder, model, flags)
        initialize(options.parallel)
        made[f"{model}, {layout}"] = allocated(options)
        parallel_state.destroy_model_parallel()
    (folder / f"{rank}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()


def check(folder: Path, world: int, layouts: dict) -> None:
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.planning.memory import data_ranks, standing_bytes
    from zeda_megatron.planning.memory_parameters import stage_parameters
    from zeda_megatron.training.build import zero_experts

    for model, config in MODELS.items():
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config))
    mp.spawn(work, args=(world, folder, layouts), nprocs=world)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    for model, layout, flags in cases(layouts):
        case = f"{model}, {layout}"
        options, arch = read_options(folder, model, flags), read_architecture(folder / model)
        arch = arch.with_mtp_head("model") if options.distill.mtp_loss_scale else arch
        zero = zero_experts(options.model, arch)
        counts = stage_parameters(arch, options.parallel, zero, options.model.lora)
        sharers = data_ranks(options, world) * options.parallel.context_parallel_size
        of_experts = (
            options.parallel.expert_model_parallel_size * options.parallel.expert_tensor_parallel_size
        )
        copies = world // (of_experts * options.parallel.pipeline_model_parallel_size)
        sharded, whole = options.optimizer.use_distributed_optimizer, 0.0
        for rank in ranks:
            found, count = rank[case], counts[rank[case]["stage"]]
            mine = standing_bytes(options, count, sharers, copies)
            trainable = count.trainable(options.model.trainable, False)
            assert (found["dense"], found["expert"]) == (count.dense, count.expert), case
            assert found["router"] == count.router and found["trainable"] == sum(trainable), case
            assert found["weights"] == mine["weights"], case
            # The distributed optimizer begins every tensor at a multiple of 64 numbers, and pads the buffer's end.
            padding = 4 * (64 * found["tensors"] + 2 * 128 * world) if sharded else 0
            assert 0 <= found["gradients"] - mine["gradients (fp32)"] <= padding, case
            state = 12 if options.model.bf16 else 8
            estimate = mine["optimizer (sharded)" if sharded else "optimizer"]
            assert abs(found["optimizer"] - estimate) <= state * padding / 4, case
            shares = (sharers, copies) if sharded else (1, 1)
            whole += state * sum(number / share for number, share in zip(trainable, shares))
        assert sum(rank[case]["optimizer"] for rank in ranks) == pytest.approx(whole, abs=1e-3), case


@pytest.mark.slow
def test_counts_are_what_two_processes_allocate(tmp_path):
    check(tmp_path, 2, FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_counts_are_what_two_processes_allocate_on_more_layouts(tmp_path):
    check(tmp_path, 2, MORE)


@pytest.mark.slow
def test_counts_are_what_four_processes_allocate(tmp_path):
    check(tmp_path, 4, FOUR)


@pytest.mark.parametrize(("example", "zero"), [("qwen3_30b_a3b", 64), ("glm_4_7_flash", 32)])
def test_stages_of_the_large_models_add_up_to_the_model(example, zero):
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.config.zero_experts import ZeroExpertConfig
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.planning.flops import Geometry
    from zeda_megatron.planning.memory_parameters import stage_parameters

    folder = Path(__file__).resolve().parents[2] / "examples" / example
    arch, geometry = read_architecture(folder), Geometry.read(folder)
    layers = geometry.layers
    for stages, first in ((1, None), (4, layers - 3 * (layers // 4))):
        parallel = ParallelConfig(
            pipeline_model_parallel_size=stages, decoder_first_pipeline_num_layers=first
        )
        counts = stage_parameters(arch, parallel, ZeroExpertConfig(zero))
        rows = geometry.moe_layers * zero * geometry.hidden
        assert sum(count.total for count in counts) == geometry.parameters + rows
        assert sum(count.expert for count in counts) == geometry.routed_parameters
        assert sum(count.layers for count in counts) == layers


def test_heads_with_hidden_units_and_stand_ins_are_counted_and_stand_ins_never_train(one_process):
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.config.zero_experts import ZeroExpertConfig
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.models.build import build_gpt_model, transformer_config
    from zeda_megatron.planning.memory_parameters import stage_parameters

    arch, zero = read_architecture(tiny.TINY), ZeroExpertConfig(8, "low_rank", "paired", "weight+head", 5, 3)
    model = build_gpt_model(arch, transformer_config(arch), zero)
    (count,) = stage_parameters(arch, ParallelConfig(), zero)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert count.total == sum(numbers.values())
    assert count.paired == sum(number for name, number in numbers.items() if ".paired." in name)
    assert count.stand_ins == sum(number for name, number in numbers.items() if ".zero_output." in name) > 0
    assert count.trainable("all", True) == (count.dense - count.stand_ins, count.expert)
    assert count.trainable("router", False) == (count.router - count.paired - count.stand_ins, 0)


@pytest.mark.parametrize("targets", ["attention", "experts", "shared", "attention+experts+shared"])
@pytest.mark.parametrize("model", MODELS)
def test_adapters_are_counted_as_a_built_model_has_them(one_process, model, targets):
    from zeda_megatron.config.lora import LoRA
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.config.zero_experts import ZeroExpertConfig
    from zeda_megatron.models.adapters import install_adapters
    from zeda_megatron.models.architecture import read_architecture
    from zeda_megatron.models.build import build_gpt_model, transformer_config
    from zeda_megatron.planning.memory_parameters import stage_parameters

    arch, zero, lora = read_architecture(MODELS[model]), ZeroExpertConfig(4), LoRA(8, 16.0, targets)
    built = build_gpt_model(arch, transformer_config(arch), zero)
    install_adapters([built], lora)
    numbers = {name: parameter.numel() for name, parameter in built.named_parameters()}
    (count,) = stage_parameters(arch, ParallelConfig(), zero, lora)
    adapters = {name: number for name, number in numbers.items() if ".adapter." in name}
    expert = sum(number for name, number in adapters.items() if ".experts." in name)
    assert (count.adapters, count.expert_adapters) == (sum(adapters.values()) - expert, expert)
    assert count.total == sum(numbers.values()) and count.of_decoder == count.total - sum(adapters.values())
    routers = sum(number for name, number in numbers.items() if ".router." in name)
    assert count.trainable("lora", False) == (routers + count.adapters, expert)
