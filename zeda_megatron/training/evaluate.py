"""Evaluation on held-out text, while training or of a checkpoint: how far the student is from its teacher, at which
zero share.

A forward pass in evaluation mode that leaves no trace: weights, gradients, random numbers and the routing statistics
of training steps stay as they are.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from ..config.options import Options
from ..config.run import LossConfig
from ..data.chat_tokenizer import RUN_DAY
from ..data.rows import EvalRows, read_eval_rows
from ..distill.passes import compare, means, total
from ..distill.teacher import Teacher
from ..durable_file import write_result
from ..errors import UserError
from ..moe import stats
from ..runtime.process_groups import device
from ..runtime.terminal import ending, progress_bar, told, warn
from .build import Student, build_student, build_teacher, run_tokenizer, teacher_source
from .log import RunLog


class Evaluator:
    """Measures the student on its rows.

    Args:
        teacher: None measures cross-entropy and zero share alone.
        group: rows that run through the pipeline at a time; hidden states of so many exist together.
        chunk_tokens: tokens whose logits exist at a time.
    """

    def __init__(
        self,
        rows: EvalRows,
        student: Student,
        teacher: Teacher | None,
        seq_length: int,
        group: int,
        chunk_tokens: int,
    ):
        self.rows, self.student, self.teacher, self.seq_length = rows, student, teacher, seq_length
        self.groups = [rows.rows[i : i + group] for i in range(0, len(rows.rows), group)]
        # The models' own distributions: no --distill-temperature here.
        self.loss = LossConfig("ce" if teacher is None else "forward_kl", chunk_tokens=chunk_tokens)

    def measure(self, progress: bool = False) -> dict[str, float]:
        """All processes call it; all get the same, whatever the layout.

        Returns:
            Means over response tokens: `eval_ce` (nats), and with a teacher `eval_kl` (KL(teacher || student), nats)
            and `eval_top1_agreement`; and `eval_zero_share`, over all tokens that are no padding.
        """
        return self.measure_layers(progress, leave=False)[0]

    def measure_layers(
        self, progress: bool = False, **how: Any
    ) -> tuple[dict[str, float], list[float | None]]:
        """`measure`, and the zero share of every layer (None: no MoE layer); `progress` shows a bar."""
        chunks, vocab, rows = self.student.chunks, self.student.arch.vocab_size, []
        bar = progress_bar(len(self.rows.rows), "row", "held out", progress, **how)
        with stats.evaluating(chunks), bar:
            for group in self.groups:
                compared = compare(chunks, self.teacher, group, self.seq_length, self.loss, vocab)
                rows += [one.sums for one in compared]
                bar.update(len(group))
            report = stats.collect(chunks, chunks[0].config.num_layers, device())
        # Tensor-parallel ranks have the same sums.
        sums = total(rows if parallel_state.get_tensor_model_parallel_rank() == 0 else [])
        if torch.distributed.get_world_size() > 1:
            sums = sums.to(device())
            torch.distributed.all_reduce(sums)
        names = ("ce",) if self.teacher is None else ("ce", "kl", "top1_agreement")
        found = {f"eval_{name}": value for name, value in means(sums).items() if name in names}
        return found | {"eval_zero_share": report.zero_share}, report.zero_share_by_layer


class Evaluation:
    """When a run evaluates, and what it says then. Without an evaluator it never does."""

    def __init__(self, evaluator: Evaluator | None, interval: int, last_step: int):
        self.evaluator, self.interval, self.last_step = evaluator, interval, last_step
        self._start: dict[str, float] = {}

    @property
    def fingerprint(self) -> str | None:
        """Of the held-out rows: measurements on others cannot be compared."""
        return None if self.evaluator is None else self.evaluator.rows.fingerprint

    def start(self, log: RunLog) -> dict[str, float]:
        """Measure before the first step of a fresh run. The line of step 1 gets it as `eval_start_*`."""
        found = self._measure(0, log)
        self._start = {name.replace("eval_", "eval_start_", 1): value for name, value in found.items()}
        return found

    def after_step(self, step: int, log: RunLog) -> dict[str, float]:
        """What the line of this step gets: nothing, or what `Evaluator.measure` returns."""
        start, self._start = self._start, {}
        due = step == self.last_step or (self.interval and step % self.interval == 0)
        return start | (self._measure(step, log) if due else {})

    def _measure(self, step: int, log: RunLog) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        begun = time.perf_counter()
        found = self.evaluator.measure(log.options.progress)
        log.scalars(step, found)
        when = f"after step {step}" if step else "before the first step"
        log.say(f"held out, {when}: {line_of(found)} ({time.perf_counter() - begun:.1f} s)")
        return found


def line_of(found: dict[str, float]) -> str:
    """`ce 2.3156, kl 0.0123, top1 agreement 91.20%, zero share 48.93%`."""
    return ", ".join(
        f"{name.removeprefix('eval_').replace('_', ' ')} "
        + (f"{value:.4f}" if name in ("eval_ce", "eval_kl") else f"{value:.2%}")
        for name, value in found.items()
    )


def build_evaluation(options: Options, student: Student, teacher: Teacher | None) -> Evaluation:
    """The evaluation that the options ask for; one that never measures without --eval-data-path."""
    wanted, evaluator = options.evaluation, None
    if wanted.eval_data_path:
        evaluator = build_evaluator(
            options, read_eval_rows(options, run_tokenizer(options, RUN_DAY), warn), student, teacher
        )
    return Evaluation(evaluator, wanted.eval_interval, options.optimizer.train_iters)


def build_evaluator(options: Options, rows: EvalRows, student: Student, teacher: Teacher | None) -> Evaluator:
    """No more rows at a time than a training step has; as many as the interleaved schedule wants."""
    in_step = options.optimizer.global_batch_size // parallel_state.get_data_parallel_world_size()
    multiple = options.parallel.row_multiple
    group = max(in_step // multiple, 1) * multiple
    length, chunk = options.data.seq_length, options.distill.loss_chunk_tokens
    return Evaluator(rows, student, teacher, length, group, chunk)


def run_evaluation(options: Options) -> int:
    """Measure --pretrained-checkpoint on --eval-data-path; print the figures, write them to --eval-output.

    Returns the exit code. Raises `UserError` naming the flag.
    """
    checkpoint = options.model.pretrained_checkpoint
    if not checkpoint:
        raise UserError("--pretrained-checkpoint is missing: give the checkpoint to evaluate")
    output = options.evaluation.eval_output
    if output and not os.access(Path(output).resolve().parent, os.W_OK):
        raise UserError(f"--eval-output {output}: its folder does not exist or cannot be written")
    # Nothing is learned, so a static checkpoint needs no word about the group loss.
    options = replace(options, model=replace(options.model, moe_router_load_balancing_type="none"))
    if options.distill.teacher_memory == "shared":  # one set of weights: that was while they had not moved
        options = replace(options, distill=replace(options.distill, teacher_memory="own"))
    teacher_source(options)  # says what is missing, and bad rows are told, before a large model is built
    rows = read_eval_rows(options, run_tokenizer(options, RUN_DAY), warn)
    begun = time.perf_counter()
    student = build_student(options, trains=False)
    teacher = build_teacher(options, student)
    found, by_layer = build_evaluator(options, rows, student, teacher).measure_layers(options.run.progress)
    if torch.distributed.get_rank() == 0:
        print(f"{checkpoint}: {line_of(found)} ({time.perf_counter() - begun:.1f} s)")
        if output:
            report = found | {"eval_zero_share_by_layer": by_layer, "checkpoint": str(checkpoint)}
            report |= {
                "teacher": str(teacher_source(options)),
                "rows": rows.count,
                "rows_fingerprint": rows.fingerprint,
            }
            write_result("--eval-output", output, json.dumps(report, indent=2) + "\n")
        wrote = f"wrote {output}" if output else "no --eval-output: nothing is kept"
        told(ending(wrote, f"zeda convert megatron-to-hf --megatron {checkpoint} exports it"))
    return 0
