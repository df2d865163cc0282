"""From options to live objects: student, teacher, the engine that samples answers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from megatron.core.utils import get_model_config

from ..checkpoint.folders import require_folder
from ..checkpoint.state import require_checkpoint, stored_names
from ..config.generate import GenerateOptions
from ..config.lora import ADAPTER
from ..config.model import ModelOptions
from ..config.options import Options
from ..config.zero_experts import ZeroExpertConfig
from ..data.tokenizers import ChatTokenizer, load_tokenizer
from ..distill.answers import RolloutEngine
from ..distill.builtin_engine import BuiltinEngine
from ..distill.student_servers import StudentServers
from ..distill.teacher import Teacher
from ..distill.vllm_engine import VLLMEngine
from ..errors import UserError
from ..models.adapters import install_adapters
from ..models.architecture import Architecture, read_architecture
from ..models.build import build_gpt_model, transformer_config
from ..models.hf_config import zero_experts_of
from ..models.load import load_weights
from ..models.on_disk import (
    HF_CONFIG_NAME,
    ZEDA_NAME,
    ModelFacts,
    adapted_steps,
    beside,
    read_facts,
    weight_folders,
    weights_id,
)
from ..models.weight_map import MTP
from ..moe.paired import paired_modules
from ..moe.pick_rules import parse_pick_rule
from ..moe.router_dials import set_dials
from ..runtime.megatron_api import forget_recorded_losses
from ..runtime.process_groups import device
from ..runtime.terminal import warn

TRAINABLE = {
    "router": (".router.",),
    "router+norms": (".router.", "norm"),
    "lora": (".router.", ADAPTER),
    "mtp": (MTP,),
}
"""Parts of the names of parameters that train, by `--trainable`. Transformer Engine's layers hold norms in the
projection behind them (`layer_norm_weight`)."""


@dataclass(frozen=True)
class Student:
    """The model that trains."""

    chunks: list[torch.nn.Module]
    """Bare model chunks (checkpoints, routers)."""
    wrapped: list[torch.nn.Module]
    """The same under Megatron's DDP (forward and backward)."""
    moves: list[torch.nn.Parameter]
    """Those of its parameters that train, or would."""
    arch: Architecture
    """Its geometry."""
    zero: ZeroExpertConfig
    """Its zero experts."""


def hf_folder(options: ModelOptions) -> Path:
    """Folder with config.json and tokenizer: --hf-config, or hf_config/ beside the checkpoint."""
    if options.pretrained_checkpoint:
        require_folder(options.pretrained_checkpoint, "--pretrained-checkpoint")
    if options.hf_config:
        return Path(options.hf_config)
    if options.pretrained_checkpoint:
        folder = beside(options.pretrained_checkpoint, HF_CONFIG_NAME)
        if folder is not None:
            return folder
        raise UserError(
            f"{Path(options.pretrained_checkpoint) / HF_CONFIG_NAME} is missing: give --hf-config, the folder of the "
            "HF model"
        )
    raise UserError("--hf-config is missing: give the folder of the HF model")


def run_tokenizer(options: Options, day: datetime.date) -> ChatTokenizer:
    """The tokenizer of the run: --tokenizer-model, else that of the HF folder. `day`: of the run, for its template."""
    data = options.data
    return load_tokenizer(
        data.tokenizer_model or hf_folder(options.model),
        data.tokenizer_type,
        data.chat_template_file,
        day=day,
    )


def zero_experts(
    options: ModelOptions, arch: Architecture, checkpoint: str | None = None
) -> ZeroExpertConfig:
    """Zero experts of the run: what the flags say, else what the checkpoint was converted with.

    Raises `UserError` for flags that would drop parameters of the checkpoint.
    """
    checkpoint = checkpoint or options.pretrained_checkpoint
    have = zero_experts_of(arch.hf)
    facts = read_facts(checkpoint) if checkpoint else None
    if facts is not None:
        have = facts.zero()
    number, kind, routing = have.num_zero_experts, have.zero_experts_type, have.zero_expert_routing
    if kind not in ("zero", "copy") and options.zero_experts_type not in (None, kind):
        raise UserError(
            f"--zero-experts-type {options.zero_experts_type}: {checkpoint} has {kind} zero experts, which this "
            "would drop; leave the flag out"
        )
    if options.zero_experts_type in ("constant", "low_rank") and options.zero_experts_type != kind:
        raise UserError(
            f"--zero-experts-type {options.zero_experts_type}: what answers for skipped experts is fitted; start "
            f"from a checkpoint of zeda fit --zero-experts-type {options.zero_experts_type}"
        )
    if options.num_zero_experts is not None:
        number = options.num_zero_experts
    wanted = options.zero_expert_routing or routing
    if number and wanted != routing:
        raise UserError(
            f"--zero-expert-routing {wanted}: {checkpoint} has {routing} zero experts; leave the flag out, or "
            "start from the static model"
        )
    if wanted == "paired" and options.num_zero_experts is None:
        number = arch.megatron["num_moe_experts"]
    return options.zero(
        replace(
            have,
            num_zero_experts=number,
            zero_experts_type=options.zero_experts_type or kind,
            zero_expert_routing=wanted,
        )
    )


def build_chunks(options: Options, arch: Architecture, zero: ZeroExpertConfig) -> list[torch.nn.Module]:
    """Bare model chunks of this pipeline rank, with Megatron's initial weights."""
    balancing = options.model.moe_router_load_balancing_type
    # Per-expert losses belong to Megatron's own router; ours has the group loss and refuses them.
    per_expert = balancing in ("aux_loss", "seq_aux_loss")
    overrides = {
        "moe_token_dispatcher_type": options.model.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": options.model.moe_flex_dispatcher_backend,
        "moe_permute_fusion": options.model.moe_permute_fusion,
        "moe_router_load_balancing_type": balancing if per_expert else "none",
        "moe_aux_loss_coeff": options.model.moe_aux_loss_coeff if per_expert else 0.0,
        "recompute_granularity": options.model.recompute_granularity,
    }
    if options.model.recompute_granularity == "full":
        overrides |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    elif options.model.recompute_granularity == "selective":
        overrides |= {"recompute_modules": ["moe"]}
    if options.model.moe_router_bias_update_rate:
        if not arch.megatron.get("moe_router_enable_expert_bias"):
            raise UserError(f"--moe-router-bias-update-rate: the routers of {arch.name} have no score bias")
        overrides |= {"moe_router_bias_update_rate": options.model.moe_router_bias_update_rate}
    dtype = torch.bfloat16 if options.model.bf16 else torch.float32
    config = transformer_config(arch, options.parallel, dtype, overrides)
    stock = per_expert and not zero.num_zero_experts and not options.model.moe_pick_rule
    stages = options.parallel.virtual_stages
    return [
        build_gpt_model(
            arch,
            config,
            None if stock else zero,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
            expert_backend=options.model.expert_backend,
        )
        for stage in (range(stages) if stages else [None])
    ]


def build_student(options: Options, trains: bool = True) -> Student:
    """Build, load and wrap the student. One that does not train has no gradient buffers and is not wrapped."""
    arch = read_architecture(hf_folder(options.model))
    if options.distill.mtp_loss_scale:
        arch = arch.with_mtp_head("--mtp-loss-scale")
    zero = zero_experts(options.model, arch)
    if options.model.recompute_granularity == "selective" and zero.zero_experts_type in ("copy", "learned"):
        raise UserError(
            f"--recompute-granularity selective is not supported with {zero.zero_experts_type} zero experts; use full"
        )
    forget_recorded_losses()
    chunks, lora = build_chunks(options, arch, zero), options.model.lora
    if lora is not None:
        install_adapters(chunks, lora, options.optimizer.seed)
    if options.model.pretrained_checkpoint:
        start, verify = options.model.pretrained_checkpoint, options.run.verify_checkpoint
        load_weights(chunks, start, "--pretrained-checkpoint", lora, heads="stored or fresh", verify=verify)
    if options.model.trainable != "all":
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                # Stand-ins, which are routers' too, never train.
                named = any(part in name for part in TRAINABLE[options.model.trainable])
                parameter.requires_grad_(parameter.requires_grad and named)
            if chunk.pre_process:
                # Recomputation follows gradients through its inputs only: with frozen embeddings none would begin.
                chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    trained = chunks if options.model.trainable != "mtp" else [chunks[-1].mtp]
    for paired in paired_modules(trained):
        # Which terms a score has decides whether its head has anything to learn.
        paired.requires_grad_(options.share.paired_head_lr > 0 and "head" in paired.terms)
    if options.model.moe_pick_rule:
        set_dials(chunks, pick_rule=parse_pick_rule(options.model.moe_pick_rule))
    moves = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    if not trains:
        for chunk in chunks:
            chunk.requires_grad_(False)
            if options.model.bf16:
                chunk.bfloat16()
        return Student(chunks, chunks, moves, arch, zero)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=options.optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # it raises on one rank alone; ours (`guards`) on all
    )
    wrapped = []
    for chunk in chunks:
        config = get_model_config(chunk)
        module = Float16Module(config, chunk) if options.model.bf16 else chunk
        wrapped.append(DistributedDataParallel(config, ddp, module))
    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = finalize_model_grads
    return Student(chunks, wrapped, moves, arch, zero)


def trained_parameters(chunks: list[torch.nn.Module]) -> int:
    """How many numbers of the whole model train; all ranks ask together."""
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    expert = parallel_state.get_expert_data_parallel_group()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    count = 0.0
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad or not param_is_not_shared(parameter):
                continue
            if not getattr(parameter, "allreduce", True):  # experts are the same in their own group alone
                copies = expert.size()
            else:
                copies = dense.size() * (1 if getattr(parameter, "tensor_model_parallel", False) else ranks)
            count += parameter.numel() / copies
    total = torch.tensor(count, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(total)
    return round(total.item())


def build_teacher(options: Options, student: Student) -> Teacher:
    """The frozen teacher in its memory mode, loaded from --teacher-load (default: where the student started)."""
    mode = options.distill.teacher_memory
    source = teacher_source(options)
    if mode == "shared":
        return Teacher(student.chunks, mode, _values_of_teacher(options, student, source))
    zero = student.zero
    if options.distill.teacher_load and beside(source, ZEDA_NAME):
        # The teacher may be the static checkpoint: its zero experts are masked anyway.
        plain = replace(
            options.model, num_zero_experts=None, zero_experts_type=None, zero_expert_routing=None
        )
        zero = zero_experts(plain, student.arch, source)
    # It is asked what the next token is, never for drafts.
    arch = student.arch.without_mtp_head()
    chunks = build_chunks(options, arch, replace(zero, group_loss_coeff=0.0))
    seen = source == options.model.pretrained_checkpoint  # and looked at, for the student
    verify = "none" if seen else options.run.verify_checkpoint
    load_weights(chunks, source, "--teacher-load", heads="stored or fresh", verify=verify)
    if options.model.bf16:
        for chunk in chunks:
            chunk.bfloat16()
    return Teacher(chunks, mode)


def _values_of_teacher(
    options: Options, student: Student, source: str
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """The student's parameters, adapters aside, that a teacher with the student's weights has otherwise, now or once
    they have moved; and what it has there.

    Raises `UserError` unless the teacher is where the student starts, or what that was trained from.
    """
    start, flag = options.model.pretrained_checkpoint, "--pretrained-checkpoint"
    line = [folder.resolve() for folder in weight_folders(start, flag)] if start else []
    folder = require_checkpoint(source, "--teacher-load").resolve()
    if folder not in line:
        raise UserError(
            f"--teacher-memory shared: --teacher-load {source} is not where the student starts, nor what "
            f"{flag} {start} says it was trained from; give one of these, or own"
        )
    trained = line[line.index(folder) + 1 :]
    if trained and (read_facts(start) or ModelFacts()).lora and options.model.lora is None:
        raise UserError(
            f"--teacher-memory shared: {flag} {start} has adapters, which are part of the student's weights now; give "
            "--trainable lora, or own"
        )
    moves = {id(parameter) for parameter in student.moves} if options.model.trainable != "mtp" else ()
    named = [(name, p) for chunk in student.chunks for name, p in chunk.named_parameters()]
    names = {name for name, parameter in named if id(parameter) in moves}
    names |= stored_names(student.chunks, trained, flag)
    names = {name for name in names if ADAPTER not in name}
    swapped = [parameter for name, parameter in named if name in names]
    mine = [parameter.detach().clone() for parameter in swapped]
    if not trained:
        return list(zip(swapped, mine))
    load_weights(
        student.chunks,
        source,
        "--teacher-load",
        options.model.lora,
        heads="stored or fresh",
        verify="none",  # looked at for the student
        only=names.__contains__,
    )
    values = [parameter.detach().clone() for parameter in swapped]
    with torch.no_grad():
        for parameter, value in zip(swapped, mine):
            parameter.copy_(value)
    return list(zip(swapped, values))


def teacher_source(options: Options) -> str:
    """Checkpoint of the teacher: --teacher-load, else where the student starts, or the original that this says it was
    trained from. Every default teacher is chosen here.

    Raises `UserError` if there is none, or if the student starts from adapted weights that do not say from which.
    """
    if options.distill.teacher_load:
        return options.distill.teacher_load
    source = options.model.pretrained_checkpoint
    if source is None:
        raise UserError("--teacher-load is missing: the teacher needs a checkpoint (or use --stage pretrain)")
    if adapted_steps(source, "--pretrained-checkpoint") != 0:
        original = str(weight_folders(source, "--pretrained-checkpoint")[0])
        if adapted_steps(original, "--pretrained-checkpoint") == 0:
            return original
        raise UserError(
            f"--teacher-load is missing: --pretrained-checkpoint {source} has been adapted already, so it is not the "
            "original; give the checkpoint of the original as teacher"
        )
    return source


def teacher_id(options: Options) -> str:
    """What tells one teacher from another, whatever its folder is called (`on_disk.weights_id`)."""
    return weights_id(teacher_source(options), "--teacher-load")


def rollout_engine(
    options: GenerateOptions,
    chunks: list[torch.nn.Module],
    arch: Architecture,
    zero: ZeroExpertConfig,
    tokenizer: ChatTokenizer,
    max_length: int,
    static: bool = False,
    save: str | None = None,
) -> RolloutEngine:
    """The engine that --rollout-engine names. `static`: the zero experts are masked, the weights do not change. `save`:
    folder of the run."""
    vocab, slots = min(tokenizer.vocab_size, arch.vocab_size), options.generate_batch_size
    if options.rollout_engine == "vllm":
        ranks = options.rollout_tensor_parallel_size
        return VLLMEngine(chunks, arch, zero, tokenizer.eos_ids, max_length, vocab, slots, static, ranks)
    if options.asks_servers:
        folder = options.rollout_weights or (save and Path(save) / "rollout_weights")
        if not folder:
            raise UserError("--rollout-weights is missing: servers get the student's weights there")
        return StudentServers(chunks, arch, zero, tokenizer, max_length, options, Path(folder), warn)
    return BuiltinEngine(chunks, tokenizer.eos_ids, tokenizer.pad_id, max_length, vocab, slots)
