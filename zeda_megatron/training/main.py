"""One training process: what this machine cannot do, process groups, the stage, one run per folder."""

from __future__ import annotations

from pathlib import Path

from ..config.options import Options
from ..config.parallel import ParallelConfig
from ..moe.dispatch import check_dispatcher
from ..moe.experts import choose_backend
from ..moe.pick_rules import parse_pick_rule
from ..runtime import process_groups
from ..runtime.lock import NAME, locked
from ..runtime.terminal import warn
from .evaluate import run_evaluation
from .loop import TrainingRun
from .stage0 import run_stage0


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


def train(options: Options) -> int:
    """Start the process groups and run the stage. Returns the exit code.

    Raises:
        UserError: a flag that cannot work here, a file that is not what it should be, a folder in use.
    """
    parallel = options.parallel
    if options.model.stage == "0" and options.generate.asks_servers:
        parallel = ParallelConfig()  # servers bring their own layout, and no model runs here
    else:
        check_machine(options)
    with process_groups.started(parallel, options.optimizer.seed):
        if options.model.stage == "0":
            with locked(options.generate.rollout_path + ".lock", "--rollout-path", warn):
                return run_stage0(options)
        if options.model.stage == "eval":
            return run_evaluation(options)
        save = options.run.save
        with locked(save and Path(save) / NAME, "--save", warn) as lock:
            return TrainingRun(options, lock).run()
