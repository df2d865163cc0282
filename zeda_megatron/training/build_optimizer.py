"""From options to Megatron's optimizer and schedule."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_model_config

from ..config.run import OptimizerOptions
from .setup import Student


def build_optimizer(
    options: OptimizerOptions, student: Student, bf16: bool, paired_head_lr: float = 0.0
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's AdamW (fp32 master weights under bf16) and its schedule, counted in steps.

    Heads of paired zero experts have a learning rate of their own and no weight decay.
    """
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
