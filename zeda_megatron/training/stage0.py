"""Runs stage 0 from options: build the teacher, answer the prompts, append to the rollout file."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..checkpoint.state import load_weights, require_checkpoint
from ..config.options import Options
from ..distill.stage0 import (
    RolloutFile,
    answer_questions,
    begun_on,
    make_questions,
    prompt_settings,
    sampling_settings,
)
from ..errors import UserError
from ..models.architecture import read_architecture
from ..moe.router_dials import set_dials
from ..runtime.agreement import from_rank0, on_rank0
from .build import build_chunks, hf_folder, run_tokenizer, teacher_id, teacher_source, zero_experts
from .log import warn
from .rollout_feed import rollout_engine
from .signals import StopRequest

ROUND = 4
"""Prompts handed to the engine at a time, per slot: it refills slots from them; then their answers are written."""


def run_stage0(options: Options) -> int:
    """Answer all prompts of --data-path into --rollout-path. Returns the exit code."""
    generate = options.generate
    sampling = generate.sampling(options.optimizer.seed)
    if not (options.distill.teacher_load or options.model.pretrained_checkpoint):
        raise UserError("--pretrained-checkpoint is missing: stage 0 needs the teacher's weights")
    source = teacher_source(options)
    arch = read_architecture(hf_folder(options.model))
    rank0 = torch.distributed.get_rank() == 0
    tokenizer = run_tokenizer(options, from_rank0(begun_on(generate.rollout_path)))
    for line in tokenizer.notes:
        warn(line)
    questions = make_questions(
        options.data.data_path,
        tokenizer,
        arch.max_position_embeddings,
        generate.samples_per_prompt,
        (generate.shard_index, generate.num_shards),
        options.data.overlong,
        warn,
    )
    folder = require_checkpoint(source, "--pretrained-checkpoint")
    shard = f"{generate.shard_index} of {generate.num_shards}" if generate.num_shards > 1 else None
    settings = sampling_settings(sampling, teacher_id(options)) | prompt_settings(tokenizer)
    file = RolloutFile(generate.rollout_path, settings | {"shard": shard})
    on_rank0(file.open)
    # Nothing is learned here, so a static checkpoint needs no word about the group loss.
    zero = replace(zero_experts(options.model, arch, source), group_loss_coeff=0.0)
    chunks = build_chunks(options, arch, zero)
    load_weights(chunks, folder, "--pretrained-checkpoint", verify=options.run.verify_checkpoint)
    set_dials(chunks, zero_mask=True)  # the teacher is the static model
    engine = rollout_engine(
        generate, chunks, arch, zero, tokenizer, arch.max_position_embeddings, static=True
    )
    with StopRequest() as stop:
        count = answer_questions(
            questions,
            engine,
            tokenizer,
            sampling,
            file,
            ROUND * generate.generate_batch_size,
            progress=options.run.progress,
            should_stop=stop.agreed,
        )
    if rank0:
        left = sum(question.key not in file.answered for question in questions)
        print(f"{file.path}: {count} answers now, {len(file.answered)} in all, {left} left")
        return options.run.stopped_exit_code if left else 0
    return 0
