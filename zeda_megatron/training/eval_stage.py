"""Measures an adapted checkpoint against its teacher on held-out text, in any layout that trains; trains nothing."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..config.options import Options
from ..durable_file import write_result
from ..errors import UserError
from .build_teacher import build_teacher, teacher_source
from .eval_rows import read_eval_rows
from .evaluate import build_evaluator, line_of
from .setup import build_student


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
    rows = read_eval_rows(options)
    begun = time.perf_counter()
    student = build_student(options, trains=False)
    teacher = build_teacher(options, student)
    found, by_layer = build_evaluator(options, rows, student, teacher).measure_layers()
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
    return 0
