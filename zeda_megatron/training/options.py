"""All options of a training run, and what cannot be combined."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.integrity import LEVELS
from ..config import (
    GROUP_LOSS_BUDGETS,
    GROUP_LOSS_SCOPES,
    GROUP_LOSS_VARIANTS,
    ZERO_EXPERT_ROUTINGS,
    ZERO_EXPERT_TYPES,
)
from ..data.packing import sequence_multiple
from ..distill.losses import LossConfig
from ..errors import UserError
from ..moe.dispatch import check_dispatcher
from ..moe.experts import choose_backend
from ..moe.pick_rules import parse_pick_rule
from ..runtime.process_groups import ParallelConfig
from .eval_options import EvalOptions
from .generate_options import GenerateOptions
from .guard_options import GuardOptions
from .model_options import ModelOptions
from .run_options import DataOptions, DistillOptions, OptimizerOptions, RunOptions
from .share_options import ShareOptions

GROUPS = {
    "model": ModelOptions,
    "share": ShareOptions,
    "data": DataOptions,
    "distill": DistillOptions,
    "optimizer": OptimizerOptions,
    "run": RunOptions,
    "evaluation": EvalOptions,
    "guard": GuardOptions,
    "generate": GenerateOptions,
    "parallel": ParallelConfig,
}


@dataclass(frozen=True)
class Options:
    """All options of a run."""

    model: ModelOptions
    share: ShareOptions
    data: DataOptions
    distill: DistillOptions
    optimizer: OptimizerOptions
    run: RunOptions
    evaluation: EvalOptions
    guard: GuardOptions
    generate: GenerateOptions
    parallel: ParallelConfig

    def loss(self) -> LossConfig:
        """The loss of the last stage. Raises `UserError` naming the flag."""
        stage, on_policy = self.model.stage, self.model.stage == "2"
        kind = self.distill.distill_loss or ("reverse_kl" if on_policy else "forward_kl")
        try:
            return LossConfig(
                kind="ce" if stage == "pretrain" else kind,
                beta=self.distill.distill_beta,
                temperature=self.generate.temperature if on_policy else self.distill.distill_temperature,
                chunk_tokens=self.distill.loss_chunk_tokens,
            )
        except UserError as error:
            names = {
                "kind": "--distill-loss",
                "beta": "--distill-beta",
                "temperature": "--distill-temperature",
            }
            word = str(error).split()[1]
            flag = names.get(word, "--loss-chunk-tokens")
            raise UserError(f"{flag}: {error}") from None

    def validate(self) -> None:
        """Raise `UserError` for what cannot work, before anything is built."""
        for flag, value, allowed in (
            ("--stage", self.model.stage, ("pretrain", "0", "1", "2", "eval")),
            ("--trainable", self.model.trainable, ("all", "router")),
            ("--teacher-memory", self.distill.teacher_memory, ("own", "offload", "shared")),
            ("--teacher-schedule", self.distill.teacher_schedule, ("ahead", "alongside")),
            ("--overlong", self.data.overlong, ("error", "skip", "truncate")),
            ("--lr-decay-style", self.optimizer.lr_decay_style, ("constant", "linear", "cosine")),
            (
                "--moe-router-load-balancing-type",
                self.model.moe_router_load_balancing_type,
                ("grouped_aux_loss", "aux_loss", "seq_aux_loss", "none"),
            ),
            ("--zero-experts-type", self.model.zero_experts_type or "zero", ZERO_EXPERT_TYPES),
            ("--zero-expert-routing", self.model.zero_expert_routing or "shared", ZERO_EXPERT_ROUTINGS),
            ("--group-loss-variant", self.model.group_loss_variant, GROUP_LOSS_VARIANTS),
            ("--group-loss-scope", self.model.group_loss_scope, GROUP_LOSS_SCOPES),
            ("--group-loss-budget", self.model.group_loss_budget, GROUP_LOSS_BUDGETS),
            ("--recompute-granularity", self.model.recompute_granularity or "full", ("full", "selective")),
            ("--verify-checkpoint", self.run.verify_checkpoint, LEVELS),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value!r} is unknown; choose one of {', '.join(allowed)}")
        for flag, value in (
            ("--train-iters", self.optimizer.train_iters),
            ("--global-batch-size", self.optimizer.global_batch_size),
            ("--seq-length", self.data.seq_length),
        ):
            if value < 1:
                raise UserError(f"{flag} {value} must be at least 1")
        for flag, value in (
            ("--lr", self.optimizer.lr),
            ("--min-lr", self.optimizer.min_lr),
            ("--weight-decay", self.optimizer.weight_decay),
            ("--clip-grad", self.optimizer.clip_grad),
            ("--save-interval", self.run.save_interval),
            ("--exit-interval", self.run.exit_interval),
            ("--most-recent-k", self.run.most_recent_k),
        ):
            if not value >= 0:
                raise UserError(f"{flag} {value} must not be negative")
        if not 0 <= self.run.stopped_exit_code <= 255:
            raise UserError(f"--stopped-exit-code {self.run.stopped_exit_code} must be from 0 to 255")
        if self.run.log_interval < 1:
            raise UserError(f"--log-interval {self.run.log_interval} must be at least 1")
        if self.optimizer.min_lr > self.optimizer.lr:
            raise UserError(f"--min-lr {self.optimizer.min_lr} is larger than --lr {self.optimizer.lr}")
        if not 0 <= self.optimizer.lr_warmup_fraction < 1:
            raise UserError(
                f"--lr-warmup-fraction {self.optimizer.lr_warmup_fraction} must be at least 0 and below 1"
            )
        self._validate_rows()
        choose_backend(self.model.expert_backend)
        check_dispatcher(
            self.model.moe_token_dispatcher_type,
            self.model.moe_flex_dispatcher_backend,
            self.model.moe_permute_fusion,
            self.parallel.expert_model_parallel_size * self.parallel.expert_tensor_parallel_size,
            self.model.bf16,
        )
        if self.model.moe_pick_rule is not None:
            parse_pick_rule(self.model.moe_pick_rule)
        self.share.validate()
        self.evaluation.validate(self.model.stage)
        self.guard.validate(self.model.stage, bool(self.evaluation.eval_data_path))
        if self.share.topk_range and self.model.moe_pick_rule:
            raise UserError("--topk-range sets the pick rule of every step: leave --moe-pick-rule away")
        if self.share.paired_head_lr and not self.optimizer.lr:
            raise UserError("--paired-head-lr needs --lr above 0: it is kept as a multiple of it")
        self.generate.validate(self.model.stage, self.optimizer.global_batch_size)
        self._validate_loss()
        if not self.data.data_path and self.model.stage != "eval":
            raise UserError("--data-path is missing: give one or more jsonl files")
        if self.distill.teacher_schedule == "alongside" and self.parallel.virtual_stages:
            raise UserError(
                "--teacher-schedule alongside does not work with the interleaved schedule "
                "(--virtual-pipeline-model-parallel-size): use ahead"
            )
        if self.distill.teacher_memory == "shared" and self.model.trainable != "router":
            raise UserError("--teacher-memory shared needs --trainable router: other weights must not move")

    def _validate_loss(self) -> None:
        """The loss fits the stage."""
        loss, stage = self.loss(), self.model.stage
        if stage == "2" and loss.kind == "ce":
            raise UserError(
                "--distill-loss ce does not work in stage 2: on its own samples a model learns nothing from them; "
                "choose reverse_kl, sampled_reverse_kl, jsd or forward_kl"
            )
        if stage == "2" and self.distill.distill_temperature not in (1.0, self.generate.temperature):
            raise UserError(
                f"--distill-temperature {self.distill.distill_temperature}: stage 2 scores at the temperature it "
                f"samples with, --temperature {self.generate.temperature}; leave it away"
            )
        if loss.kind != "sampled_reverse_kl":
            return
        if stage != "2":
            raise UserError(
                "--distill-loss sampled_reverse_kl is for stage 2: its tokens must be sampled from the student"
            )
        steps = self.generate.steps_per_round(self.optimizer.global_batch_size)
        if steps > 1:
            raise UserError(
                f"--distill-loss sampled_reverse_kl needs fresh answers for every step, and --rollout-batch-size "
                f"{self.generate.rollout_batch_size} serves {steps}; leave it away, or choose reverse_kl"
            )

    @property
    def sequence_multiple(self) -> int:
        """What the length of every packed sequence is a multiple of."""
        return sequence_multiple(self.parallel.context_parallel_size, self.data.pad_seq_to_mult)

    def _validate_rows(self) -> None:
        """Rows and sequences can be cut as the layout needs it."""
        parallel, length = self.parallel, self.data.seq_length
        context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
        if self.data.pad_seq_to_mult < 0 or (context > 1 and self.sequence_multiple % (2 * context)):
            raise UserError(
                f"--pad-seq-to-mult {self.data.pad_seq_to_mult} must be a multiple of {2 * context}, twice "
                "--context-parallel-size (or 0)"
            )
        if length % self.sequence_multiple:
            raise UserError(
                f"--seq-length {length} must be a multiple of {self.sequence_multiple}, as every sequence in a row "
                "(--context-parallel-size, --pad-seq-to-mult)"
            )
        if length % (tensor * context):
            what = "--tensor-model-parallel-size" + (" x --context-parallel-size" if context > 1 else "")
            raise UserError(
                f"--seq-length {length} must be a multiple of {what} {tensor * context}: sequence parallelism splits "
                "the rows"
            )
        stages, virtual = (
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
        )
        if virtual > 1 and stages < 2:
            raise UserError(
                f"--virtual-pipeline-model-parallel-size {virtual} needs --pipeline-model-parallel-size above 1"
            )
        for place in ("first", "last"):
            layers = getattr(parallel, f"decoder_{place}_pipeline_num_layers")
            if layers is not None and (stages < 2 or layers < 1):
                need = "must be at least 1" if stages > 1 else "needs --pipeline-model-parallel-size above 1"
                raise UserError(f"--decoder-{place}-pipeline-num-layers {layers} {need}")
