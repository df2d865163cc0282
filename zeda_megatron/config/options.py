"""All options of a training run, and what cannot be combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .arguments import Habit, check_choices, parse
from .generate import GenerateOptions
from .guard import EvalOptions, GuardOptions
from .model import ModelOptions
from .parallel import ParallelConfig
from .run import DataOptions, DistillOptions, LossConfig, OptimizerOptions, RunOptions
from .share import ShareOptions

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

_SO_ANYWAY = {
    "sequence_parallel": "it comes with --tensor-model-parallel-size, there is no tensor parallelism without it",
    "moe_grouped_gemm": "--expert-backend chooses how experts are multiplied",
    "use_mcore_models": "there are no others",
    "use_dist_ckpt": "there is no other format",
    "exit_signal_handler": "SIGTERM and SIGUSR1 always save and end the run",
    "accumulate_allreduce_grads_in_fp32": "gradients are always summed in fp32",
}
_OF_THE_MODEL = (
    "num_layers hidden_size ffn_hidden_size moe_ffn_hidden_size num_attention_heads num_query_groups num_experts "
    "moe_router_topk max_position_embeddings kv_channels rotary_base swiglu normalization"
)
HABITS = {
    **{name: Habit(must=True, why=why) for name, why in _SO_ANYWAY.items()},
    **{
        name: Habit(why="is read from the model's config.json; leave it out")
        for name in _OF_THE_MODEL.split()
    },
    "micro_batch_size": Habit(must=1, why="a micro-batch is one packed row, of --seq-length tokens"),
    "hidden_dropout": Habit(must=0.0, why="there is no dropout; leave it out"),
    "attention_dropout": Habit(must=0.0, why="there is no dropout; leave it out"),
    "ckpt_format": Habit(must="torch_dist", why="checkpoints are torch_dist; leave it out"),
    "fp16": Habit(why="half precision is --bf16 here"),
    "num_virtual_stages_per_pipeline_rank": Habit("virtual_pipeline_model_parallel_size"),
    "export_kd_teacher_load": Habit("teacher_load"),
    "train_data_path": Habit("data_path"),
    "valid_data_path": Habit("eval_data_path"),
}
"""Flags that users of Megatron-LM type."""


def sequence_multiple(context_ranks: int, data: DataOptions) -> int:
    """What the length of every packed sequence is a multiple of: --pad-seq-to-mult, or else what context parallelism
    needs.

    Raises:
        UserError: a sequence or a row of that length could not be cut.
    """
    needed = 2 * context_ranks if context_ranks > 1 else 1
    multiple = data.pad_seq_to_mult or needed
    if multiple < 1 or multiple % needed:
        raise UserError(
            f"--pad-seq-to-mult {data.pad_seq_to_mult} must be a multiple of {needed}, twice "
            "--context-parallel-size (or 0)"
            if needed > 1
            else f"--pad-seq-to-mult {data.pad_seq_to_mult} must not be negative"
        )
    if data.seq_length % multiple:
        raise UserError(
            f"--seq-length {data.seq_length} must be a multiple of {multiple}, as every sequence in a row "
            "(--context-parallel-size, --pad-seq-to-mult)"
        )
    return multiple


def read_options(argv: Sequence[str], prog: str) -> Options:
    """The options of a command line, not yet checked against one another. Raises `UserError` naming flag or key."""
    return Options(**parse(argv, GROUPS, prog=prog, habits=HABITS))


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
        return LossConfig(
            kind="ce" if stage == "pretrain" else kind,
            beta=self.distill.distill_beta,
            temperature=self.generate.temperature if on_policy else self.distill.distill_temperature,
            chunk_tokens=self.distill.loss_chunk_tokens,
        )

    def validate(self) -> None:
        """Raise `UserError` for what cannot work, before anything is built."""
        for group in vars(self).values():
            check_choices(group)
        self.parallel.validate()
        if not 0 <= self.run.stopped_exit_code <= 255:
            raise UserError(f"--stopped-exit-code {self.run.stopped_exit_code} must be from 0 to 255")
        if self.optimizer.min_lr > self.optimizer.lr:
            raise UserError(f"--min-lr {self.optimizer.min_lr} is larger than --lr {self.optimizer.lr}")
        self._validate_rows()
        self.share.validate()
        self.evaluation.validate(self.model.stage)
        self.guard.validate(self.model.stage, bool(self.evaluation.eval_data_path))
        if self.share.topk_range and self.model.moe_pick_rule:
            raise UserError("--topk-range sets the pick rule of every step: leave --moe-pick-rule out")
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
        if self.distill.teacher_schedule == "alongside" and self.distill.teacher_memory == "offload":
            raise UserError(
                "--teacher-schedule alongside does not work with --teacher-memory offload: the whole teacher would "
                "move for every micro-batch; use ahead, or another --teacher-memory"
            )
        if self.distill.teacher_memory == "shared" and self.model.trainable == "all":
            raise UserError(
                "--teacher-memory shared needs --trainable router, router+norms, lora or mtp: where all weights train, "
                "a second copy is needed (own)"
            )
        if self.optimizer.optimizer_cpu_offload and not (
            self.model.bf16 and self.optimizer.use_distributed_optimizer
        ):
            raise UserError("--optimizer-cpu-offload needs --bf16 and --use-distributed-optimizer")
        self._validate_lora()
        self._validate_mtp()

    def _validate_lora(self) -> None:
        """Adapters can be trained on this layout."""
        lora = self.model.lora
        if lora is None:
            return
        lora.validate()
        if lora.has("experts") and self.model.expert_backend == "kernels":
            raise UserError(
                "--lora-targets experts: --expert-backend kernels know no adapters; use auto, or --lora-targets "
                "attention+shared"
            )

    def _validate_mtp(self) -> None:
        """The head of multi-token prediction can be trained on this layout."""
        parallel, scale = self.parallel, self.distill.mtp_loss_scale
        if not scale:
            if self.model.trainable == "mtp":
                raise UserError("--trainable mtp needs --mtp-loss-scale above 0: nothing else would train")
            return
        told = f"--mtp-loss-scale {scale}"
        if self.model.stage in ("0", "eval"):
            raise UserError(f"{told}: --stage {self.model.stage} does not train; leave it out")
        balancing = self.model.moe_router_load_balancing_type
        if balancing not in ("grouped_aux_loss", "none"):
            raise UserError(
                f"{told} does not work with --moe-router-load-balancing-type {balancing}: Megatron counts decoder "
                "layers alone for it; use none"
            )
        if parallel.pipeline_model_parallel_size > 1:
            raise UserError(
                f"{told} needs --pipeline-model-parallel-size 1: the head takes the decoder's last states and the "
                "embedding, which the first stage has"
            )
        if parallel.context_parallel_size > 1:
            raise UserError(
                f"{told} needs --context-parallel-size 1: a draft is compared with the teacher at the next position, "
                "which another rank may have"
            )

    def _validate_loss(self) -> None:
        """The loss fits the stage."""
        loss, stage = self.loss(), self.model.stage
        if self.distill.hidden_loss_coeff and stage == "pretrain":
            raise UserError("--hidden-loss-coeff: --stage pretrain has no teacher to match; leave it out")
        if stage == "2" and loss.kind == "ce":
            raise UserError(
                "--distill-loss ce does not work in stage 2: on its own samples a model learns nothing from them; "
                "choose reverse_kl, sampled_reverse_kl, jsd or forward_kl"
            )
        if stage == "2" and self.distill.distill_temperature not in (1.0, self.generate.temperature):
            raise UserError(
                f"--distill-temperature {self.distill.distill_temperature}: stage 2 scores at the temperature it "
                f"samples with, --temperature {self.generate.temperature}; leave it out"
            )
        if loss.kind != "sampled_reverse_kl":
            return
        if stage != "2":
            raise UserError(
                "--distill-loss sampled_reverse_kl is for stage 2: its tokens must be sampled from the student"
            )

    @property
    def sequence_multiple(self) -> int:
        """What the length of every packed sequence is a multiple of; see the function."""
        return sequence_multiple(self.parallel.context_parallel_size, self.data)

    def _validate_rows(self) -> None:
        """Rows and sequences can be cut as the layout needs it."""
        sequence_multiple(self.parallel.context_parallel_size, self.data)
        parallel, length = self.parallel, self.data.seq_length
        context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
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
