"""From options to the control of the zero share."""

from __future__ import annotations

from ..errors import UserError
from .group_loss_control import WeightControl
from .options import Options
from .paired_control import SparsityControl, ThresholdControl
from .setup import Student
from .share_control import ShareControl, TopKControl


def build_share_control(options: Options, student: Student) -> ShareControl:
    """The control that the options ask for; one that does nothing for shared zero experts with a fixed w.

    Raises `UserError` for a flag that this student has no use for.
    """
    wanted, chunks, zero = options.share, student.chunks, student.zero
    if wanted.topk_range:
        topk = chunks[0].config.moe_router_topk
        return TopKControl(chunks, wanted.topk_bounds(topk), options.optimizer.seed)
    if not zero.paired:
        for flag, value in (
            ("--zero-share-range", wanted.zero_share_range),
            ("--paired-head-lr", wanted.paired_head_lr),
            ("--paired-budget layer", wanted.paired_budget == "layer"),
        ):
            if value:
                raise UserError(f"{flag} is for paired zero experts; this model has none")
        if wanted.target_zero_share is None:
            return ShareControl()
        if not zero.group_loss_coeff or not wanted.target_zero_share > 0:
            raise UserError(
                f"--target-zero-share {wanted.target_zero_share}: shared zero experts are steered by the group loss; "
                "give a share above 0, --moe-router-load-balancing-type grouped_aux_loss and --moe-aux-loss-coeff"
            )
        if zero.group_loss_variant == "adamoe":
            raise UserError(
                f"--target-zero-share {wanted.target_zero_share}: --group-loss-variant adamoe has no weight that could "
                "be moved; choose routed or authors, or leave the share to --num-zero-experts"
            )
        real = chunks[0].config.num_moe_experts
        ramp = round(wanted.zero_share_ramp_fraction * options.optimizer.train_iters)
        return WeightControl(
            chunks, wanted.target_zero_share, real, zero.num_zero_experts, ramp, wanted.zero_weight_gain
        )
    if wanted.paired_control == "none":
        return ShareControl()
    if wanted.paired_control == "sparsity":
        ramp = round(wanted.sparsity_ramp_fraction * options.optimizer.train_iters)
        return SparsityControl(chunks, wanted.paired_target, ramp, wanted.sparsity_gain)
    by_layer = wanted.paired_budget == "layer"
    return ThresholdControl(
        chunks, wanted.paired_target, wanted.share_bounds(), options.optimizer.seed, by_layer
    )
