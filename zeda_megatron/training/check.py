"""What only a machine can say of a run's options: which experts, dispatchers and pick rules work here."""

from __future__ import annotations

from ..config.options import Options
from ..moe.dispatch import check_dispatcher
from ..moe.experts import choose_backend
from ..moe.pick_rules import parse_pick_rule


def check_machine(options: Options) -> None:
    """Raise `UserError` naming the flag that cannot work on this machine."""
    model, parallel = options.model, options.parallel
    choose_backend(model.expert_backend)
    check_dispatcher(
        model.moe_token_dispatcher_type,
        model.moe_flex_dispatcher_backend,
        model.moe_permute_fusion,
        parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
        model.bf16,
    )
    if model.moe_pick_rule is not None:
        parse_pick_rule(model.moe_pick_rule)
