"""Options of the evaluation on held-out text, during training or alone. Each field is a flag and a YAML key."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class EvalOptions:
    """Held-out text, and when the student is measured on it."""

    eval_data_path: list[str] | None = None
    """Conversations (jsonl with `messages`) that are not trained on. None: no evaluation."""

    eval_interval: int = 0
    """Steps between evaluations. There is always one before the first step and one after the last; 0: only these."""

    eval_rows: int = 16
    """At most so many packed rows of --seq-length tokens, over all data-parallel ranks."""

    eval_output: str | None = None
    """Stage eval: JSON file for the figures."""

    def validate(self, stage: str) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        if stage == "eval" and not self.eval_data_path:
            raise UserError(
                "--eval-data-path is missing: give one or more jsonl files of held-out conversations"
            )
        if self.eval_output and stage != "eval":
            raise UserError("--eval-output is for --stage eval; while training, figures go to metrics.jsonl")
        if self.eval_interval < 0:
            raise UserError(f"--eval-interval {self.eval_interval} must not be negative")
        if self.eval_rows < 1:
            raise UserError(f"--eval-rows {self.eval_rows} must be at least 1")
        if self.eval_interval and not self.eval_data_path:
            raise UserError(
                f"--eval-interval {self.eval_interval} needs --eval-data-path: a jsonl file of held-out conversations"
            )
