"""From options to the frozen teacher, and what tells it from another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checkpoint.state import load_weights, require_checkpoint
from ..distill.teacher import Teacher
from ..errors import UserError
from ..models.on_disk import ZEDA_NAME, beside
from ..models.origin import adapted_steps, weights_id
from .options import Options
from .setup import Student, build_chunks, zero_experts


def build_teacher(options: Options, student: Student) -> Teacher:
    """The frozen teacher in its memory mode, loaded from --teacher-load (default: where the student started)."""
    mode = options.distill.teacher_memory
    source = teacher_source(options)
    if mode == "shared":
        if Path(source).resolve() != Path(options.model.pretrained_checkpoint or "").resolve():
            raise UserError(
                "--teacher-memory shared: the teacher is the student's start, --teacher-load must equal "
                "--pretrained-checkpoint"
            )
        return Teacher(student.chunks, mode)
    zero = student.zero
    if options.distill.teacher_load and beside(source, ZEDA_NAME):
        # The teacher may be the static checkpoint: its zero experts are masked anyway.
        plain = replace(
            options.model, num_zero_experts=None, zero_experts_type=None, zero_expert_routing=None
        )
        zero = zero_experts(plain, student.arch, source)
    chunks = build_chunks(options, student.arch, replace(zero, group_loss_coeff=0.0))
    folder = require_checkpoint(source, "--teacher-load")
    seen = source == options.model.pretrained_checkpoint  # and looked at, for the student
    verify = "none" if seen else options.run.verify_checkpoint
    load_weights(chunks, folder, "--teacher-load", fresh_heads=True, verify=verify)
    if options.model.bf16:
        for chunk in chunks:
            chunk.bfloat16()
    return Teacher(chunks, mode)


def teacher_source(options: Options) -> str:
    """Checkpoint of the teacher: --teacher-load, else where the student starts. Every default teacher is chosen here.

    Raises `UserError` if there is none, or if the student starts from weights that have been adapted already.
    """
    if options.distill.teacher_load:
        return options.distill.teacher_load
    source = options.model.pretrained_checkpoint
    if source is None:
        raise UserError("--teacher-load is missing: the teacher needs a checkpoint (or use --stage pretrain)")
    if adapted_steps(source, "--pretrained-checkpoint") != 0:
        raise UserError(
            f"--teacher-load is missing: --pretrained-checkpoint {source} has been adapted already, so it is not the "
            "original; give the checkpoint of the original as teacher"
        )
    return source


def teacher_id(options: Options) -> str:
    """What tells one teacher from another, whatever its folder is called (`origin.weights_id`)."""
    return weights_id(teacher_source(options), "--teacher-load")
