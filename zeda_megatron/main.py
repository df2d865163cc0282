"""Entry point of training: `torchrun launch/pretrain_zeda.sh --config FILE.yaml [--flag value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from .runtime import cpu
from .runtime.worker import leave_with_parent, run_worker


def main(argv: list[str] | None = None) -> int:
    """Parse options, start the process groups, run the stage. Returns the exit code."""
    cpu.install()
    from .runtime import process_groups
    from .training.options import read_options

    options = read_options(sys.argv[1:] if argv is None else argv, "pretrain_zeda")
    options.validate()
    process_groups.initialize(options.parallel, options.optimizer.seed)
    try:
        from .runtime.lock import NAME, locked
        from .training.log import warn

        if options.model.stage == "0":
            from .training.stage0 import run_stage0

            with locked(options.generate.rollout_path + ".lock", "--rollout-path", warn):
                return run_stage0(options)
        if options.model.stage == "eval":
            from .training.evaluate import run_evaluation

            return run_evaluation(options)
        from .training.loop import TrainingRun

        save = options.run.save
        with locked(save and Path(save) / NAME, "--save", warn) as lock:
            return TrainingRun(options, lock).run()
    finally:
        process_groups.destroy()


if __name__ == "__main__":
    run_worker(main)
elif __name__ == "__mp_main__":  # a child that writes a checkpoint
    leave_with_parent()
