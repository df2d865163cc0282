"""Options of a training run. Each field is a flag and a YAML key (see `arguments.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.integrity import LEVELS
from ..config import (
    GROUP_LOSS_SCOPES,
    GROUP_LOSS_VARIANTS,
    ZERO_EXPERT_ROUTINGS,
    ZERO_EXPERT_TYPES,
    ZeroExpertConfig,
)
from ..distill.losses import LossConfig
from ..errors import UserError
from ..moe.dispatch import check_dispatcher
from ..moe.experts import choose_backend
from ..moe.pick_rules import parse_pick_rule
from ..runtime.process_groups import ParallelConfig
from .share_options import ShareOptions


@dataclass(frozen=True)
class ModelOptions:
    """The model and its zero experts."""

    stage: str = "1"
    """What to run. `pretrain`: no teacher, cross-entropy. `0`: the teacher answers prompts. `1`: distillation on
    its answers."""

    hf_config: str | None = None
    """Folder of the HF model (config.json gives the architecture). Default: hf_config/ of the checkpoint."""

    pretrained_checkpoint: str | None = None
    """Megatron checkpoint to start from (from tools/checkpoint_convert.py). None: random weights."""

    num_zero_experts: int | None = None
    """Nz. Default: as many as the checkpoint has."""

    zero_experts_type: str | None = None
    """zero, copy or learned. Default: as the checkpoint was converted."""

    zero_expert_routing: str | None = None
    """shared (the paper's zero experts) or paired (one per real expert). Default: as the checkpoint."""

    paired_score: str | None = None
    """Terms of a pick's score under paired routing, joined by '+': weight, head, residual. Default: as the
    checkpoint, else all three."""

    paired_temperature: float = 1.0
    """Width of the gate through which a paired head trains."""

    moe_zero_expert_weight: float = 2.0
    """w: the group loss is least at a zero share of w*Nz/(N+w*Nz)."""

    moe_router_load_balancing_type: str = "grouped_aux_loss"
    """grouped_aux_loss (shared zero experts; paired ones have no such loss), aux_loss or seq_aux_loss (static
    models), none."""

    moe_aux_loss_coeff: float = 0.1
    """Coefficient of that loss (alpha)."""

    group_loss_variant: str = "routed"
    """routed: count real slots. authors: count as the paper's code does."""

    group_loss_scope: str = "tp_cp"
    """tp_cp: slots of one micro-batch. tp_dp_cp: of all data-parallel ranks."""

    renormalize_after_drop: bool = False
    """Rescale the real weights after dropping zero slots (for study; costs quality)."""

    moe_pick_rule: str | None = None
    """Thin out the student's picks: topk=2 (NET), skip=0.4, top_p=0.7, each with optional ',renormalize'."""

    expert_backend: str = "auto"
    """Product of the local experts: auto, grouped_mm, loop."""

    moe_token_dispatcher_type: str = "alltoall"
    """alltoall, allgather, or flex (DeepEP's kernels; GPUs)."""

    moe_flex_dispatcher_backend: str = "deepep"
    """deepep or hybridep."""

    moe_permute_fusion: bool = False
    """Sort rows by expert with Transformer Engine's fused kernels (GPUs)."""

    trainable: str = "all"
    """all, or router (only the routers train)."""

    bf16: bool = False
    """bfloat16 weights and activations with fp32 master weights; otherwise fp32."""

    recompute_granularity: str | None = None
    """None, full or selective activation recomputation."""

    def zero(
        self, num_zero_experts: int, zero_experts_type: str, routing: str = "shared", score: str | None = None
    ) -> ZeroExpertConfig:
        """The zero-expert config of this run."""
        grouped = self.moe_router_load_balancing_type == "grouped_aux_loss" and routing == "shared"
        return ZeroExpertConfig(
            num_zero_experts=num_zero_experts,
            zero_experts_type=zero_experts_type,
            zero_expert_routing=routing,
            paired_score=score or ZeroExpertConfig.paired_score,
            paired_temperature=self.paired_temperature,
            group_loss_coeff=self.moe_aux_loss_coeff if grouped else 0.0,
            moe_zero_expert_weight=self.moe_zero_expert_weight,
            group_loss_variant=self.group_loss_variant,
            group_loss_scope=self.group_loss_scope,
            renormalize_after_drop=self.renormalize_after_drop,
        )


@dataclass(frozen=True)
class DataOptions:
    """Text and tokens."""

    data_path: list[str] | None = None
    """Rollout files (jsonl with `messages`), or prompt files for stage 0."""

    tokenizer_model: str | None = None
    """HF folder or sentencepiece .model. Default: the folder of --hf-config."""

    tokenizer_type: str = "auto"
    """auto, hf or sentencepiece."""

    chat_template_file: str | None = None
    """jinja2 chat template that replaces the tokenizer's."""

    seq_length: int = 2048
    """Tokens of one packed row; a micro-batch is one row."""

    pad_seq_to_mult: int = 0
    """Every sequence in a row is padded to a multiple of this. 0: of what context parallelism needs, 2 x its size."""

    overlong: str = "error"
    """What to do with a conversation longer than a row: error, skip or truncate."""


@dataclass(frozen=True)
class DistillOptions:
    """Teacher and loss."""

    distill_loss: str = "forward_kl"
    """ce (the paper's stage 1), forward_kl, reverse_kl or jsd."""

    distill_beta: float = 0.5
    """beta of jsd."""

    distill_temperature: float = 1.0
    """Divides both logits."""

    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at a time."""

    teacher_load: str | None = None
    """Checkpoint of the teacher. Default: --pretrained-checkpoint."""

    teacher_memory: str = "own"
    """own: a second copy of the weights. offload: that copy waits in host memory. shared: with --trainable
    router, the student's own weights with the zero experts masked."""

    teacher_schedule: str = "ahead"
    """ahead: the teacher runs all micro-batches of a step first; their hidden states wait on the last pipeline stage.
    alongside: each of its micro-batches runs just before the student's, in the same pipeline."""

    calculate_per_token_loss: bool = True
    """Every response token of a step weighs the same. Off: every row does."""


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule; defaults are the paper's stage 1."""

    train_iters: int = 100
    """Optimizer steps."""

    global_batch_size: int = 128
    """Packed rows per step over all data-parallel ranks."""

    lr: float = 2e-5
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end."""

    lr_decay_style: str = "cosine"
    """constant, linear or cosine."""

    lr_warmup_fraction: float = 0.1
    """Share of the steps that warm up."""

    weight_decay: float = 0.1
    """AdamW's weight decay."""

    adam_beta1: float = 0.9
    """beta1."""

    adam_beta2: float = 0.98
    """beta2."""

    adam_eps: float = 1e-8
    """epsilon."""

    clip_grad: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    check_for_nan_in_loss_and_grad: bool = True
    """End the run, on all ranks and without a save, at the first loss, gradient norm or weight that is no number."""

    use_distributed_optimizer: bool = False
    """Shard optimizer states over data-parallel ranks."""

    seed: int = 1234
    """Seed of initial weights and data order."""


@dataclass(frozen=True)
class RunOptions:
    """Checkpoints, logging, end of the run."""

    save: str | None = None
    """Folder of checkpoints, metrics.jsonl and TensorBoard files."""

    load: str | None = None
    """Folder to resume from. Default: --save, if it holds a checkpoint."""

    save_interval: int = 0
    """Steps between checkpoints; 0 saves at the end only."""

    most_recent_k: int = 0
    """Keep only the newest k checkpoints; 0 keeps all."""

    async_save: bool = False
    """Write checkpoints in child processes while training goes on."""

    verify_checkpoint: str = "hash"
    """Before a checkpoint is loaded, compare its files with its integrity.json: hash (reads them all, split over the
    ranks), size, none."""

    tensorboard_dir: str | None = None
    """Default: tensorboard/ in --save."""

    log_interval: int = 1
    """Steps between TensorBoard entries; metrics.jsonl gets every step."""

    progress: bool = True
    """Progress bar on rank 0."""

    exit_interval: int = 0
    """Stop (and save) when the step is a multiple of this; 0 never."""


@dataclass(frozen=True)
class GenerateOptions:
    """Stage 0: the teacher's answers."""

    rollout_path: str | None = None
    """jsonl file that answers are appended to."""

    max_new_tokens: int = 256
    """Longest answer."""

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    """Nucleus sampling."""

    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is all."""

    generate_batch_size: int = 32
    """Prompts answered at a time."""

    samples_per_prompt: int = 1
    """Answers per prompt."""


GROUPS = {
    "model": ModelOptions,
    "share": ShareOptions,
    "data": DataOptions,
    "distill": DistillOptions,
    "optimizer": OptimizerOptions,
    "run": RunOptions,
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
    generate: GenerateOptions
    parallel: ParallelConfig

    def loss(self) -> LossConfig:
        """The loss of the last stage. Raises `UserError` naming the flag."""
        try:
            return LossConfig(
                kind="ce" if self.model.stage == "pretrain" else self.distill.distill_loss,
                beta=self.distill.distill_beta,
                temperature=self.distill.distill_temperature,
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
            ("--stage", self.model.stage, ("pretrain", "0", "1")),
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
            ("--recompute-granularity", self.model.recompute_granularity or "full", ("full", "selective")),
            ("--verify-checkpoint", self.run.verify_checkpoint, LEVELS),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value!r} is unknown; choose one of {', '.join(allowed)}")
        for flag, value in (
            ("--train-iters", self.optimizer.train_iters),
            ("--global-batch-size", self.optimizer.global_batch_size),
            ("--seq-length", self.data.seq_length),
            ("--max-new-tokens", self.generate.max_new_tokens),
            ("--generate-batch-size", self.generate.generate_batch_size),
            ("--samples-per-prompt", self.generate.samples_per_prompt),
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
        if self.share.topk_range and self.model.moe_pick_rule:
            raise UserError("--topk-range sets the pick rule of every step: leave --moe-pick-rule away")
        if self.share.paired_head_lr and not self.optimizer.lr:
            raise UserError("--paired-head-lr needs --lr above 0: it is kept as a multiple of it")
        self.loss()
        if not self.data.data_path:
            raise UserError("--data-path is missing: give one or more jsonl files")
        if self.model.stage == "0" and not self.generate.rollout_path:
            raise UserError("--rollout-path is missing: stage 0 appends its answers to that jsonl file")
        if self.model.stage == "0":
            for flag, value in (
                ("--pipeline-model-parallel-size", self.parallel.pipeline_model_parallel_size),
                ("--context-parallel-size", self.parallel.context_parallel_size),
            ):
                if value > 1:
                    raise UserError(
                        f"{flag} {value}: stage 0 needs 1 (the model answers token by token); use tensor, expert or "
                        "data parallelism"
                    )
        if self.distill.teacher_schedule == "alongside" and self.parallel.virtual_stages:
            raise UserError(
                "--teacher-schedule alongside does not work with the interleaved schedule "
                "(--virtual-pipeline-model-parallel-size): use ahead"
            )
        if self.distill.teacher_memory == "shared" and self.model.trainable != "router":
            raise UserError("--teacher-memory shared needs --trainable router: other weights must not move")

    @property
    def sequence_multiple(self) -> int:
        """What the length of every packed sequence is a multiple of."""
        ranks = self.parallel.context_parallel_size
        return self.data.pad_seq_to_mult or (2 * ranks if ranks > 1 else 1)

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
