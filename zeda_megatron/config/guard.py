"""Options of the evaluation on held-out text, and of what ends a run that has left its path. Each field is a flag and
a YAML key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import UserError
from .arguments import Count, Share, Whole, check_choices


@dataclass(frozen=True)
class EvalOptions:
    """Held-out text, and when the student is measured on it."""

    eval_data_path: list[str] | None = None
    """Conversations (jsonl with `messages`) that are not trained on. None: no evaluation."""

    eval_interval: Whole = 0
    """Steps between evaluations. There is always one before the first step and one after the last; 0: only these."""

    eval_rows: Count = 16
    """At most so many packed rows of --seq-length tokens, over all data-parallel ranks."""

    eval_output: str | None = None
    """Stage eval: JSON file for the figures."""

    def validate(self, stage: str) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        check_choices(self)
        if stage == "eval" and not self.eval_data_path:
            raise UserError(
                "--eval-data-path is missing: give one or more jsonl files of held-out conversations"
            )
        if self.eval_output and stage != "eval":
            raise UserError("--eval-output is for --stage eval; while training, figures go to metrics.jsonl")
        if self.eval_interval and not self.eval_data_path:
            raise UserError(
                f"--eval-interval {self.eval_interval} needs --eval-data-path: a jsonl file of held-out conversations"
            )


@dataclass(frozen=True)
class GuardOptions:
    """Guard rails: each ends the run before that step is saved. A loss that is no number ends it without any of
    them (--check-for-nan-in-loss-and-grad)."""

    zero_share_band: Annotated[list[str], "LOW HIGH"] | None = None
    """Two numbers, LOW HIGH: end the run when the mean zero share of the last --guard-window steps, or the zero share
    of an evaluation after the first step, is outside. None: off."""

    max_kl_rises: Whole = 0
    """End the run when the KL to the teacher on held-out text rose in so many evaluations in a row; 0: off."""

    min_response_length_share: Share = 0.0
    """Stage 2: end the run when the mean response length of the last --guard-window steps is below this share of that
    of the run's first --guard-window steps; 0: off."""

    guard_window: Count = 10
    """Steps that a mean is over. Before so many steps were made, no mean is looked at."""

    def band(self) -> tuple[float, float] | None:
        """`zero_share_band` as numbers. Raises `UserError` if they are none."""
        if self.zero_share_band is None:
            return None
        try:
            low, high = map(float, self.zero_share_band)
            if not 0 <= low < high <= 1:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--zero-share-band {' '.join(self.zero_share_band)}: give two numbers, 0 <= LOW < HIGH <= 1"
            ) from None
        return low, high

    def validate(self, stage: str, evaluates: bool) -> None:
        """Raise `UserError` naming the flag that cannot work. `evaluates`: there is held-out text."""
        check_choices(self)
        self.band()
        if self.max_kl_rises and not evaluates:
            raise UserError(
                f"--max-kl-rises {self.max_kl_rises} needs --eval-data-path: a jsonl file of held-out conversations"
            )
        if self.max_kl_rises and stage == "pretrain":
            raise UserError(f"--max-kl-rises {self.max_kl_rises} needs a teacher: --stage pretrain has none")
        share = self.min_response_length_share
        if share and stage != "2":
            raise UserError(
                f"--min-response-length-share {share} is for --stage 2, where the student writes responses; "
                "leave the flag out"
            )
