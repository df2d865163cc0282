"""Options of data, distillation, optimizer and checkpoints. Each field is a flag and a YAML key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError
from .arguments import Amount, Count, Share, Whole

LOSS_KINDS = ("ce", "forward_kl", "reverse_kl", "sampled_reverse_kl", "jsd")
VERIFY_LEVELS = ("hash", "size", "none")


@dataclass(frozen=True)
class DataOptions:
    """Text and tokens."""

    data_path: list[str] | None = None
    """Rollout files, or prompt files for the stages 0 and 2: JSON lines, plain or gzipped (docs/data.md)."""

    tokenizer_model: str | None = None
    """HF folder or sentencepiece .model. Default: the folder of --hf-config."""

    tokenizer_type: Literal["auto", "hf", "sentencepiece"] = "auto"
    """auto, hf or sentencepiece."""

    chat_template_file: str | None = None
    """jinja2 chat template that replaces the tokenizer's."""

    seq_length: Count = 2048
    """Tokens of one packed row; a micro-batch is one row."""

    pad_seq_to_mult: int = 0
    """Every sequence in a row is padded to a multiple of this. 0: of what context parallelism needs, 2 x its size."""

    overlong: Literal["error", "skip", "truncate"] = "error"
    """What to do with a conversation longer than a row: error, skip or truncate. Prompts that leave no room for an
    answer (stages 0 and 2) are left out by skip, and refused else."""


@dataclass(frozen=True)
class DistillOptions:
    """Teacher and loss."""

    distill_loss: Literal[LOSS_KINDS] | None = None
    """ce (the paper's stage 1), forward_kl (default of stage 1), reverse_kl (default of stage 2), jsd, or
    sampled_reverse_kl (the paper's stage 2)."""

    distill_beta: float = 0.5
    """beta of jsd."""

    distill_temperature: float = 1.0
    """Divides both logits. Stage 2 scores at the --temperature it samples with."""

    hidden_loss_coeff: Amount = 0.0
    """Also match the residual stream after each layer: coefficient of its squared error relative to the teacher's, a
    mean over layers and response tokens (stages 1 and 2). 0: do not."""

    mtp_loss_scale: Amount = 0.0
    """Also train the head of multi-token prediction, of a checkpoint that was converted with --mtp: factor of its loss,
    KL(teacher's next choice || draft). The rest of the model does not feel it. 0: the head is not built."""

    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at a time."""

    teacher_load: str | None = None
    """Checkpoint of the teacher. Default: --pretrained-checkpoint."""

    teacher_memory: Literal["own", "offload", "shared"] = "own"
    """own: a second copy of the weights. offload: that copy waits in host memory. shared: unless
    --trainable is all, the student's own weights with the zero experts masked, beside the first values of those that
    train."""

    teacher_schedule: Literal["ahead", "alongside"] = "ahead"
    """ahead: the teacher runs all micro-batches of a step first; their hidden states wait on the last pipeline stage.
    alongside: each of its micro-batches runs just before the student's, in the same pipeline."""

    calculate_per_token_loss: bool = True
    """Every response token of a step weighs the same. Off: every row does."""


@dataclass(frozen=True)
class LossConfig:
    """Which loss the student gets. Raises UserError for values that make no sense."""

    kind: str = "forward_kl"
    """ce (the labels, as the paper's stage 1), forward_kl (KL(teacher || student)), reverse_kl
    (KL(student || teacher)), sampled_reverse_kl (its policy gradient on labels that the student has sampled, the
    paper's stage 2) or jsd (GKD's mixture of both)."""
    beta: float = 0.5
    """Weight of the teacher in the jsd mixture, between 0 and 1 exclusive."""
    temperature: float = 1.0
    """Divides the logits of both models. The loss is not multiplied by its square."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time: 16 to 20 bytes * chunk_tokens * vocabulary / TP."""

    def __post_init__(self) -> None:
        if self.kind not in LOSS_KINDS:
            raise UserError(f"--distill-loss {self.kind!r} is unknown; choose one of {', '.join(LOSS_KINDS)}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise UserError(
                f"--distill-beta {self.beta} is out of range: jsd needs a number between 0 and 1 exclusive (for the "
                "ends choose --distill-loss forward_kl and reverse_kl)"
            )
        if not self.temperature > 0.0:
            raise UserError(f"--distill-temperature {self.temperature} must be above 0")
        if self.chunk_tokens < 1:
            raise UserError(f"--loss-chunk-tokens {self.chunk_tokens} must be at least 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether the kind compares with the teacher; "ce" can do without."""
        return self.kind != "ce"


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule; defaults are the paper's stage 1."""

    train_iters: Count = 100
    """Optimizer steps."""

    global_batch_size: Count = 128
    """Packed rows per step over all data-parallel ranks; in stage 2 answers per step."""

    lr: Amount = 2e-5
    """Peak learning rate."""

    min_lr: Amount = 0.0
    """Learning rate at the end."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """constant, linear or cosine."""

    lr_warmup_fraction: Share = 0.1
    """Share of the steps that warm up."""

    weight_decay: Amount = 0.1
    """AdamW's weight decay."""

    adam_beta1: Share = 0.9
    """beta1."""

    adam_beta2: Share = 0.98
    """beta2."""

    adam_eps: Amount = 1e-8
    """epsilon."""

    clip_grad: Amount = 1.0
    """Largest gradient norm; 0 does not clip."""

    check_for_nan_in_loss_and_grad: bool = True
    """End the run, on all ranks and without a save, at the first loss, gradient norm or weight that is no number."""

    use_distributed_optimizer: bool = False
    """Shard optimizer states over data-parallel ranks."""

    optimizer_cpu_offload: bool = False
    """Keep optimizer states and fp32 master weights in host memory, and update them there (Megatron-Core's own
    optimizer for that; needs --bf16 and --use-distributed-optimizer)."""

    seed: int = 1234
    """Seed of initial weights and data order."""

    def schedule(self) -> dict[str, Any]:
        """What decides the learning rate of every step, by flag."""
        names = ("train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_fraction")
        return {"--" + name.replace("_", "-"): getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What every command has that may take long."""

    progress: bool = True
    """Show on stderr how far the work is, and the time left; where that is no terminal, a line every half minute."""


@dataclass(frozen=True)
class RunOptions(Watched):
    """Checkpoints, logging, end of the run."""

    save: str | None = None
    """Folder of checkpoints, metrics.jsonl and TensorBoard files."""

    load: str | None = None
    """Folder to resume from. Default: --save, if it holds a checkpoint."""

    save_interval: Whole = 0
    """Steps between checkpoints; 0 saves at the end only."""

    most_recent_k: Whole = 0
    """Keep only the newest k checkpoints; 0 keeps all."""

    async_save: bool = False
    """Write checkpoints in child processes while training goes on."""

    verify_checkpoint: Literal[VERIFY_LEVELS] = "hash"
    """Before a checkpoint is loaded, compare its files with its integrity.json: hash (reads them all, split over the
    ranks), size, none."""

    tensorboard_dir: str | None = None
    """Default: tensorboard/ in --save."""

    metrics_path: str | None = None
    """File for a line of figures per step. Default: metrics.jsonl in --save."""

    log_interval: Count = 1
    """Steps between TensorBoard entries; metrics.jsonl gets every step."""

    exit_interval: Whole = 0
    """Stop (and save) when the step is a multiple of this; 0 never."""

    stopped_exit_code: int = 0
    """Exit code of a run that was stopped (SIGTERM, SIGUSR1, --exit-interval) before its work was done. A job script
    that must tell it from a finished run takes 75."""
