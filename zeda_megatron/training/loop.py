"""The training loop: rows in, steps, logs, checkpoints, resume."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from ..checkpoint.resume import intact_checkpoint
from ..checkpoint.saving import CheckpointSaver
from ..checkpoint.state import load_checkpoint, load_plain_values, model_state, require_checkpoint
from ..data.context_part import context_part
from ..data.conversation import tokenize_rollouts
from ..data.packing import PackedDataset
from ..data.prompts import load_rollouts
from ..data.tokenizers import load_tokenizer
from ..distill.teacher import forward_only
from ..errors import UserError
from ..models.architecture import read_architecture
from ..moe import stats
from ..moe.threshold import calibrate_threshold, format_thresholds
from ..runtime.process_groups import device
from .evaluate import build_evaluation
from .finite import FiniteCheck, NotFinite
from .guards import Guards, GuardTripped
from .log import RunLog, warn
from .optimizer_state import load_optimizer_state, optimizer_step, sharded_optimizer_state
from .options import Options
from .setup import build_optimizer, build_student, build_teacher, hf_folder
from .share_control import build_share_control
from .side_files import write_side_files
from .signals import StopRequest
from .step import Stepper, forward_model


class TrainingRun:
    """A run of stage 1 (or of plain training, `--stage pretrain`)."""

    def __init__(self, options: Options):
        self.options = options
        self.dataset = build_dataset(options)
        self.student = build_student(options)
        has_teacher = options.model.stage != "pretrain"
        self.teacher = build_teacher(options, self.student) if has_teacher else None
        self.optimizer, self.schedule = build_optimizer(
            options.optimizer, self.student, options.model.bf16, options.share.paired_head_lr
        )
        run = options.run
        self.finite = FiniteCheck(
            self.student.chunks,
            self.teacher,
            run.save,
            options.optimizer.check_for_nan_in_loss_and_grad,
        )
        self.stepper = Stepper(
            self.student,
            self.teacher,
            self.optimizer,
            options.loss(),
            options.data.seq_length,
            alongside=options.distill.teacher_schedule == "alongside",
            per_token=options.distill.calculate_per_token_loss,
            check=self.finite.loss,
        )
        self.control = build_share_control(options, self.student)
        self.evaluation = build_evaluation(options, self.student, self.teacher)
        self.guards = Guards(options.guard, self.evaluation.fingerprint)
        self.saver = CheckpointSaver(run.save, run.most_recent_k, run.async_save) if run.save else None
        self.iteration = 0
        self.consumed_rows = 0
        self.consumed_tokens = 0
        self._resume()

    def run(self) -> int:
        """Train to --train-iters (or to a signal). Returns the exit code."""
        options, run = self.options.optimizer, self.options.run
        log = RunLog(run, torch.distributed.get_rank() == 0, self.iteration, options.train_iters)
        stopping = False
        try:
            with StopRequest() as stop:
                if self.iteration == 0:
                    self.guards.start(self.evaluation.start(log))
                while self.iteration < options.train_iters and not stopping:
                    self._one_step(log)
                    stopping = stop.agreed() or (
                        run.exit_interval and self.iteration % run.exit_interval == 0
                    )
                    due = run.save_interval and self.iteration % run.save_interval == 0
                    self._keep(due or stopping or self.iteration == options.train_iters)
                self._finish_saving()
            if stopping:
                where = (
                    f"saved step {self.iteration}" if self.saver else "nothing saved: --save was not given"
                )
                log.say(f"stopped at step {self.iteration} on request; {where}")
        except (NotFinite, GuardTripped):
            self._finish_saving()  # a checkpoint of before, still on its way to the disk
            raise
        except BaseException:
            if self.saver:
                self.saver.abandon()
            raise
        finally:
            log.close()
        return 0

    def _keep(self, due: bool) -> None:
        """Publish what was written in the background meanwhile; save if it is time to."""
        if self.saver:
            self.saver.poll()
            if due:
                self.save()

    def _finish_saving(self) -> None:
        if self.saver:
            self.saver.finish()

    def _one_step(self, log: RunLog) -> None:
        started = time.perf_counter()
        lr = self.schedule.get_lr({})
        self.control.before_step(self.iteration)
        self.finite.step = self.iteration + 1
        metrics = self.stepper.step(self._rows())
        self.schedule.step(increment=1)
        self.iteration += 1
        self.consumed_rows += self.options.optimizer.global_batch_size
        self.consumed_tokens += int(metrics["tokens"])
        layers = self.student.chunks[0].config.num_layers
        by_layer = self.options.share.paired_budget == "layer"
        report = stats.collect(self.student.chunks, layers, device(), scores_by_layer=by_layer)
        zero = self.student.zero
        metrics["kd_loss"] = metrics["loss"]
        metrics["group_loss"] = report.group_loss * zero.group_loss_coeff
        metrics["loss"] = metrics["kd_loss"] + metrics["group_loss"]
        self.finite.update(metrics)
        metrics["zero_share"] = report.zero_share
        metrics |= self.control.after_step(report)
        metrics["lr"] = lr
        metrics["consumed_tokens"] = self.consumed_tokens
        metrics["seconds"] = time.perf_counter() - started
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds"]
        if self.iteration == self.options.optimizer.train_iters:
            self._calibrate(log)
        metrics |= self.evaluation.after_step(self.iteration, log)
        log.step(self.iteration, metrics, report.zero_share_by_layer)
        self.guards.after_step(self.iteration, metrics)

    def _calibrate(self, log: RunLog) -> None:
        """Set the threshold of paired zero experts so that training rows give the target share in evaluation."""
        wanted, chunks = self.options.share, self.student.chunks
        if not (self.student.zero.paired and wanted.calibration_rows and wanted.paired_control != "none"):
            return
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        count = max(wanted.calibration_rows // size, 1)
        rows = self.rows_of_rank(rank + i * size for i in range(count))
        forward = partial(
            forward_only, seq_length=self.options.data.seq_length, forward=forward_model
        )  # all rows in one run of the pipeline
        share, by_layer = wanted.paired_target, wanted.paired_budget == "layer"
        found = calibrate_threshold(chunks, [rows], share, forward, by_layer=by_layer)
        log.say(f"threshold {format_thresholds(found)} for a zero share of {share:.1%}")

    def _rows(self) -> list:
        """This data-parallel rank's rows of the next global batch."""
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        first, count = self.consumed_rows, self.options.optimizer.global_batch_size
        return self.rows_of_rank(range(first + rank, first + count, size))

    def rows_of_rank(self, rows: Iterable[int]) -> list:
        """These rows, or this context-parallel rank's part of them."""
        place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        return [context_part(self.dataset[row], *place) for row in rows]

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        """Everything that a resumed run needs, as a Megatron sharded state dict."""
        model = model_state(self.student.chunks)
        return {
            **model,
            "optimizer": sharded_optimizer_state(
                self.optimizer, model if len(self.student.chunks) > 1 else model["model"], is_loading
            ),
            "schedule": self.schedule.state_dict(),
            "progress": {
                "iteration": self.iteration,
                "consumed_rows": self.consumed_rows,
                "consumed_tokens": self.consumed_tokens,
                "optimizer_step": optimizer_step(self.optimizer),
                "distributed_optimizer": self.options.optimizer.use_distributed_optimizer,
            },
            "share_control": self.control.state_dict(),
            "guards": self.guards.state_dict(),
            "data": self.dataset.fingerprint(),
        }

    def save(self) -> None:
        """Write `iter_*`, and beside it what export and evaluation need to know."""
        self.finite.weights()
        self.saver.save(self.iteration, self.state())
        self.guards.newest = self.saver.folder(self.iteration)
        with self.saver.told():
            if torch.distributed.get_rank() == 0:
                write_side_files(self.saver.root, hf_folder(self.options.model), self.student.zero)

    def _resume(self) -> None:
        run = self.options.run
        flag, root = ("--load", run.load) if run.load else ("--save", run.save)
        if not root:
            return
        folder = intact_checkpoint(root, flag, run.verify_checkpoint, warn)
        if folder is None:
            if run.load:
                require_checkpoint(root, flag)  # says what is missing
            return
        plain = load_plain_values(folder, flag)
        sharded = plain.get("progress", {}).get("distributed_optimizer")
        if sharded not in (None, self.options.optimizer.use_distributed_optimizer):
            raise UserError(
                f"{flag} {folder}: was saved {'with' if sharded else 'without'} --use-distributed-optimizer; resume "
                f"{'with' if sharded else 'without'} it (the two keep the optimizer's state in different forms)"
            )
        loaded = load_checkpoint(folder, self.state(is_loading=True), flag)
        if loaded.get("data") != self.dataset.fingerprint():
            raise UserError(
                f"{flag} {folder}: was trained on other data (--data-path, --seq-length or --seed differ); "
                "resume with the same, or start in a new --save folder"
            )
        for name, chunk in zip(model_state(self.student.chunks), self.student.chunks):
            chunk.load_state_dict(loaded[name], strict=True)
        progress = loaded["progress"]
        load_optimizer_state(self.optimizer, loaded["optimizer"], progress.get("optimizer_step"))
        self.schedule.load_state_dict(loaded["schedule"])
        self.control.load_state_dict(loaded.get("share_control", {}))
        self.guards.load_state_dict(loaded.get("guards", {}))
        self.guards.newest = folder
        self.iteration = progress["iteration"]
        self.consumed_rows = progress["consumed_rows"]
        self.consumed_tokens = progress["consumed_tokens"]


def build_dataset(options: Options) -> PackedDataset:
    """Tokenise the rollouts and plan their packing; equal on all ranks."""
    data = options.data
    tokenizer = load_tokenizer(
        data.tokenizer_model or hf_folder(options.model), data.tokenizer_type, data.chat_template_file
    )
    arch = read_architecture(hf_folder(options.model))
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {arch.vocab_size} rows: "
            "give the tokenizer that belongs to the model with --tokenizer-model"
        )
    samples = tokenize_rollouts(
        load_rollouts(data.data_path), tokenizer, data.seq_length, data.overlong, ", ".join(data.data_path)
    )
    data_ranks = parallel_state.get_data_parallel_world_size()
    if options.optimizer.global_batch_size % data_ranks:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size} is not a multiple of the {data_ranks} "
            "data-parallel ranks"
        )
    stages = options.parallel.pipeline_model_parallel_size
    if options.parallel.virtual_stages and options.optimizer.global_batch_size // data_ranks % stages:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size}: the interleaved schedule wants a multiple of "
            f"--pipeline-model-parallel-size {stages} rows on each of the {data_ranks} data-parallel ranks"
        )
    return PackedDataset(
        samples, data.seq_length, tokenizer.pad_id, options.optimizer.seed, options.sequence_multiple
    )
