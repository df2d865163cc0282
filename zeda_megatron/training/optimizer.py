"""The optimizer and its schedule, and their state in checkpoints: plain, or sharded over data-parallel ranks, on every
parallel layout.

Megatron keeps one optimizer for the dense parameters and one for the experts. Plain values (the step count and
the hyperparameters) are written by rank 0 alone. If rank 0 has no experts, they are in no checkpoint and a resume
fails; so the step count is saved apart, ranks leave out optimizers without parameters, and the loader completes
what rank 0 could not know.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_model_config

from ..config.run import OptimizerOptions
from ..errors import UserError
from ..runtime.process_groups import device
from .build import Student

# One tensor per parameter, in the model's own shapes: readable on every layout. Megatron's default stores flat
# pieces, which its own checkpoint library no longer accepts.
_FORMAT = "fully_reshardable"
_DENSE, _EXPERTS = 0, 1


def build_optimizer(
    options: OptimizerOptions, student: Student, bf16: bool, paired_head_lr: float = 0.0
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's AdamW (fp32 master weights under bf16) and its schedule, counted in steps.

    Heads of paired zero experts have a learning rate of their own and no weight decay.
    """
    offload = {}
    if options.optimizer_cpu_offload:
        offload = {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "use_precision_aware_optimizer": True,
        }
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=options.use_distributed_optimizer,
        **offload,
    )
    overrides = get_standard_config_overrides(config)
    if paired_head_lr:
        head = ParamGroupOverride(wd_mult=0.0)
        if paired_head_lr != options.lr:
            # Megatron's schedule takes the rates; when it resumes, it tells groups apart by the factor.
            factor = paired_head_lr / options.lr
            head.update(max_lr=paired_head_lr, min_lr=options.min_lr * factor, lr_mult=factor)
        overrides[ParamKey(name="*.router.paired.*")] = head
    optimizer = get_megatron_optimizer(
        config, student.wrapped, config_overrides=overrides, use_gloo_process_groups=False
    )
    get_model_config(student.chunks[0]).grad_scale_func = optimizer.scale_loss
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=min(round(options.lr_warmup_fraction * options.train_iters), options.train_iters - 1),
        lr_decay_steps=options.train_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=options.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates done so far, the same on all ranks; all processes call it."""
    found = [0]
    for part in _parts(optimizer).values():
        found += [int(values["step"]) for values in part.optimizer.state.values() if "step" in values]
        found += [
            int(group["step"]) for group in part.optimizer.param_groups if group.get("step") is not None
        ]
    step = torch.tensor([max(found)], device=device())
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(step, op=torch.distributed.ReduceOp.MAX)
    return int(step)


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool
) -> dict[int, Any]:
    """Megatron sharded state dict of an optimizer; `is_loading` gives the frame that a load fills."""
    states = {}
    for number, part in _parts(optimizer).items():
        if is_loading and isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer.dummy_step()  # states come with the first step; what it does to weights a load undoes
        if isinstance(part, DistributedOptimizer) and _is_plain_adam(part):
            if is_loading:
                _make_room(part)
            if not part.optimizer.state:
                raise UserError(
                    "--use-distributed-optimizer: too few parameters train for all ranks to have a share; leave it off"
                )
        states[number] = part.sharded_state_dict(
            model_state, is_loading=is_loading, metadata={"distrib_optim_sharding_type": _FORMAT}
        )
        for group in _inner(states[number]).get("param_groups") or []:
            # The offloading optimizer notes its classes there, which nobody would unpickle.
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]
        add_prefix_for_sharding(states[number], f"chained_{number}.")
    return states


def load_optimizer_state(optimizer: MegatronOptimizer, states: dict[int, Any], step: int | None) -> None:
    """Put loaded state into an optimizer; `step` is what `optimizer_step` said when it was saved."""
    for number, part in _parts(optimizer).items():
        state = states[number]
        if not _knows_step(state) and step is not None:
            _complete(part, state, step)
        _take_rates(part, state)
        if isinstance(part, DistributedOptimizer) and _is_plain_adam(part):
            _load_sharded_adam(part, state)
        else:
            part.load_state_dict(state)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            _count_apart(part.optimizer)


def _count_apart(optimizer: HybridDeviceOptimizer) -> None:
    """Loaded, all parameters of the offloading optimizer count their steps in one tensor (Megatron-Core 0.16.1): each
    would count for all."""
    for part in optimizer.sub_optimizers:
        for values in part.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()


def _parts(optimizer: MegatronOptimizer) -> dict[int, MegatronOptimizer]:
    """The optimizers that have parameters on this pipeline and tensor-parallel rank."""
    parts = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        sharded = isinstance(part, DistributedOptimizer)
        if part.buffers if sharded else any(group["params"] for group in part.param_groups):
            parts[_EXPERTS if part.param_groups[0]["is_expert_parallel"] else _DENSE] = part
    return parts


def _is_plain_adam(part: MegatronOptimizer) -> bool:
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """Adam's own state: under `optimizer` where there are fp32 master weights beside it."""
    return state.get("optimizer", state)


def _knows_step(state: dict[str, Any]) -> bool:
    inner = _inner(state)
    groups = inner.get("param_groups") or [{}]
    return "common_step" in inner.get("state", {}) or groups[0].get("step") is not None


def _complete(part: MegatronOptimizer, state: dict[str, Any], step: int) -> None:
    """Hyperparameters are those of this run."""
    own_groups = [{k: v for k, v in g.items() if k != "params"} for g in part.optimizer.param_groups]
    if not _is_plain_adam(part) or isinstance(part, DistributedOptimizer):
        own_groups = [{**group, "step": step} for group in own_groups]
    if isinstance(part, DistributedOptimizer):
        state["optimizer"] = {"param_groups": own_groups}
        state["param_state_sharding_type"] = _FORMAT
        return
    inner = _inner(state)
    inner["param_groups"] = [{**own, **loaded} for own, loaded in zip(own_groups, inner["param_groups"])]
    if _is_plain_adam(part):
        inner["state"]["common_step"] = torch.tensor(float(step))


def _take_rates(part: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Loaded groups get this run's rates: newer versions tell groups apart by them, and --lr may have changed. And its
    kernel: the offloading optimizer asks for a fused one."""
    own_groups = {_group_key(group): group for group in part.optimizer.param_groups}
    loaded = state["optimizer"] if isinstance(part, DistributedOptimizer) else _inner(state)
    for group in loaded.get("param_groups") or []:
        own = own_groups.get(_group_key(group), {})
        group.update({rate: own[rate] for rate in ("max_lr", "min_lr", "fused") if rate in own})


def _group_key(group: dict[str, Any]) -> tuple:
    return tuple(group.get(key) for key in ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"))


def _make_room(part: DistributedOptimizer) -> None:
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in part.optimizer.state:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }


def _load_sharded_adam(part: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Megatron's loader expects a fused Adam, which keeps no step per parameter: load around it."""
    tensors = state.pop("param_state")
    part.load_state_dict(state)
    adam = part.optimizer.state
    steps = {parameter: values.pop("step") for parameter, values in adam.items()}
    with torch.no_grad():
        part.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        adam[parameter]["step"] = step.clone()  # Megatron hands all parameters one tensor
