"""Entry point of training: `torchrun launch/pretrain_zeda.sh --config FILE.yaml [--flag value ...]`."""

from __future__ import annotations

import sys
import warnings

from .arguments import parse
from .runtime import cpu
from .runtime.worker import leave_with_parent, run_worker


def main(argv: list[str] | None = None) -> int:
    """Parse options, start the process groups, run the stage. Returns the exit code."""
    cpu.install()
    _quiet()
    from .runtime import process_groups
    from .training.options import GROUPS, Options

    options = Options(**parse(sys.argv[1:] if argv is None else argv, GROUPS, prog="pretrain_zeda"))
    options.validate()
    process_groups.initialize(options.parallel, options.optimizer.seed)
    try:
        if options.model.stage == "0":
            from .training.stage0 import run_stage0

            return run_stage0(options)
        from .training.loop import TrainingRun

        return TrainingRun(options).run()
    finally:
        process_groups.destroy()


def _quiet() -> None:
    """Silence what a user can do nothing about, and nothing else."""
    # Megatron warns about every optional package it does not find; `tools/doctor.py` tells that better.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Collectives that Megatron calls have a new name in PyTorch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Its checkpoints use PyTorch's older interface: three warnings at every save and load.
    for module in (r"megatron\.core\.dist_checkpointing", r"torch\.distributed\.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


if __name__ == "__main__":
    run_worker(main)
elif __name__ == "__mp_main__":  # a child that writes a checkpoint
    leave_with_parent()
