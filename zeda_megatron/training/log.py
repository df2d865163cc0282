"""What a run writes down: metrics.jsonl (every step, full precision), TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from ..config.run import RunOptions
from ..errors import UserError
from ..runtime.agreement import on_rank0
from ..runtime.lines_file import rewind
from ..runtime.terminal import progress_bar, told, warn

_TENSORBOARD = {
    "loss": "loss",
    "ce": "lm loss",
    "kl": "zeda/teacher_student_kl",
    "kd_loss": "zeda/kd_loss",
    "group_loss": "zeda/group_loss",
    "zero_share": "zeda/zero_share",
    "zero_weight": "zeda/zero_weight",
    "sparsity_coeff": "zeda/sparsity_coeff",
    "top1_agreement": "zeda/top1_agreement",
    "grad_norm": "grad-norm",
    "lr": "learning-rate",
    "tokens_per_second": "throughput/tokens_per_second",
    "peak_memory_gib": "memory/peak_gib",
}


class RunLog:
    """Logs on one rank; silent on the others."""

    def __init__(self, options: RunOptions, active: bool, first_step: int, last_step: int):
        self.options, self.active = options, active
        self.file = self.writer = self.bar = None
        self._told(lambda: self._open(first_step))
        if options.progress and active:
            self.bar = progress_bar(last_step, "step", initial=first_step)

    def _open(self, first_step: int) -> None:
        options = self.options
        place = options.metrics_path or (options.save and Path(options.save) / "metrics.jsonl")
        if place:
            path = Path(place)
            if options.metrics_path and not first_step and path.exists() and path.stat().st_size:
                raise UserError(
                    f"--metrics-path {path}: holds another run's figures; remove it or choose another file"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            # A resumed run has each step once.
            rewind(path, lambda line: line["step"] <= first_step, warn)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115
        target = options.tensorboard_dir or (options.save and str(Path(options.save) / "tensorboard"))
        if target:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(target, purge_step=first_step + 1 if first_step else None)

    def step(self, step: int, metrics: dict, zero_share_by_layer: list[float | None]) -> None:
        """Record one step; all ranks call it. Raises `UserError` on all of them if that cannot be written."""
        self._told(lambda: self._step(step, metrics, zero_share_by_layer))

    def _step(self, step: int, metrics: dict, zero_share_by_layer: list[float | None]) -> None:
        line = {"step": step, **metrics}
        if any(share is not None for share in zero_share_by_layer):
            line["zero_share_by_layer"] = zero_share_by_layer
        if self.file:
            self.file.write(json.dumps(line) + "\n")
        if self.writer and step % self.options.log_interval == 0:
            for name, tag in _TENSORBOARD.items():
                if metrics.get(name) is not None:
                    self.writer.add_scalar(tag, metrics[name], step)
            for i, share in enumerate(zero_share_by_layer):
                if share is not None:
                    self.writer.add_scalar(f"zeda/zero_share_layer_{i}", share, step)
        if self.bar is not None:
            shown = {"loss": f"{metrics['loss']:.4f}"}
            if metrics.get("kl") is not None:
                shown["kl"] = f"{metrics['kl']:.4f}"
            shown["zero"] = f"{metrics['zero_share']:.1%}"
            shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers for TensorBoard alone, at any step, as `zeda/<name>`; as `step` otherwise."""

        def write() -> None:
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(f"zeda/{name}", value, step)

        self._told(write)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        told(text)

    def close(self) -> None:
        """End the bar, close the files. A disk without room has been told of already."""
        for part in (self.bar, self.writer, self.file):
            if part is not None:
                with contextlib.suppress(OSError):
                    part.close()

    def _told(self, write: Callable[[], None]) -> None:
        try:
            on_rank0(write)
        except OSError as error:
            flags = ("save", "metrics_path", "tensorboard_dir")
            places = {flag: getattr(self.options, flag) for flag in flags}
            told = ", ".join(f"--{flag.replace('_', '-')} {place}" for flag, place in places.items() if place)
            raise UserError(
                f"{told}: cannot be written ({error.strerror or error}); checkpoints are unharmed"
            ) from error
