"""Options of the fit of paired zero experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .arguments import Amount, Count, Positive, Share, check_choices, require
from .parallel import ParallelConfig
from .run import Watched
from .share import BUDGETS
from .zero_experts import PAIRED_TYPES, ZeroExpertConfig

SCORES = {"norm": ZeroExpertConfig.paired_score, "effect": "weight+head"}
"""What is fitted -> the terms that a score then needs."""


def stand_in_rank(expert_width: int) -> int:
    """Rank of a fit's maps unless it is told another: 2% of the experts' neurons, rounded up to a multiple of 4."""
    return 4 * math.ceil(0.02 * expert_width / 4)


@dataclass(frozen=True)
class FitOptions(Watched):
    """What to fit."""

    pretrained_checkpoint: str | None = None
    """Megatron checkpoint of the static model (or one with paired zero experts, fitted anew)."""

    data_path: list[str] | None = None
    """Rollout files (jsonl with `messages`): what the model answered, best in stage 0."""

    save: str | None = None
    """Folder of the new checkpoint."""

    overwrite: bool = False
    """Replace the checkpoint in --save if there is one."""

    fit_target: Literal["effect", "norm"] = "effect"
    """effect: a head predicts what the pick does to the answer's log-probability; takes a backward pass. norm: the size
    of its expert's output."""

    effect_floor: Amount = 1.0
    """For effect: part of an expert's output that counts wherever it points. 0: the bare effect, which starves
    tokens whose answer is certain. Large: the norm, weighted by how sensitive each layer is."""

    paired_score: str | None = None
    """Terms of a pick's score, joined by '+': weight, head, residual. Without head no head is fitted. Default:
    weight+head, for --fit-target norm weight+head+residual."""

    paired_head: Literal["linear", "mlp"] = "linear"
    """linear: one ridge regression per expert. mlp: besides, hidden units that all experts of a layer share; fitted by
    a few seconds of gradient descent that starts there."""

    paired_head_width: Count = 32
    """Hidden units of the mlp head."""

    zero_experts_type: Literal[PAIRED_TYPES] | None = None
    """What a zero expert gives in its expert's place: nothing (zero), a vector (constant), or a linear map of its input
    and a vector (low_rank); fitted to what the skipped picks would have given. Default: low_rank, with a score that has
    residual zero."""

    stand_in_rank: Count | None = None
    """Rank of the map of low_rank. Default: 2% of an expert's width, rounded up to a multiple of 4."""

    constants_only: bool = False
    """One constant per expert instead of a linear head."""

    ridge: Positive = 1.0
    """Penalty on an expert's head: as if it had seen this many rows more per hidden channel, all with answer 0."""

    target_zero_share: Share = 0.5
    """Zero share that the threshold is set for."""

    paired_budget: Literal[BUDGETS] = "model"
    """model: one threshold, layers share the target among themselves. layer: each layer holds the target itself."""

    fit_rows: Count = 64
    """Packed rows that heads are fitted on, over all processes."""

    held_out_rows: Count = 8
    """Further rows, for R^2."""

    seq_length: Count = 2048
    """Tokens of a packed row."""

    max_memory_gb: Positive = 8.0
    """Memory for the sums of one pass on each process; layers that do not fit wait for the next pass."""

    bf16: bool = False
    """bfloat16 weights."""

    def zero(self, num_experts: int, expert_width: int) -> ZeroExpertConfig:
        """The zero experts that the fit makes, for experts of this many neurons."""
        kind = self.zero_experts_type or ("zero" if "residual" in self._terms else "low_rank")
        rank = self.stand_in_rank or stand_in_rank(expert_width)
        return ZeroExpertConfig(
            num_experts,
            kind,
            "paired",
            "+".join(self._terms),
            self.paired_head_width if self.paired_head == "mlp" else 0,
            rank if kind == "low_rank" else 0,
        )

    @property
    def _terms(self) -> list[str]:
        return (self.paired_score or SCORES[self.fit_target]).split("+")

    def validate(self, parallel: ParallelConfig) -> None:
        """Raise `UserError` naming the flag."""
        check_choices(self)
        parallel.validate()
        require(self, "pretrained_checkpoint", "data_path", "save")
        if self.zero_experts_type in ("constant", "low_rank") and "residual" in self._terms:
            raise UserError(
                f"--zero-experts-type {self.zero_experts_type} needs a score without residual: --fit-target effect, or "
                "--paired-score weight+head"
            )
        if self.paired_head == "mlp" and (self.constants_only or "head" not in self._terms):
            raise UserError(
                "--paired-head mlp needs a head that is fitted: not --constants-only, and head in the score"
            )
        for flag, value in (
            ("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size),
            ("--expert-tensor-parallel-size", parallel.expert_tensor_parallel_size),
            ("--context-parallel-size", parallel.context_parallel_size),
        ):
            if value > 1:
                raise UserError(f"{flag} {value}: a fit needs 1; use expert, data or tensor parallelism")
