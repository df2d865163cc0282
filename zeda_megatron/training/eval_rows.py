"""Packed rows of held-out text, dealt out to the data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state

from ..data.context_part import context_part
from ..data.conversation import tokenize_rollouts
from ..data.packing import PackedBatch, PackedDataset
from ..data.prompts import load_rollouts
from ..data.tokenizers import load_tokenizer
from ..errors import UserError
from .options import Options
from .setup import hf_folder


@dataclass(frozen=True)
class EvalRows:
    """This rank's rows. All data-parallel ranks have equally many, since experts are shared."""

    rows: list[PackedBatch]
    """Rows of S tokens (S / context-parallel size of each); the last may be silent padding."""
    count: int
    """Rows with text, over all ranks."""
    fingerprint: str
    """Equal for equal text and packing."""


def read_eval_rows(options: Options) -> EvalRows:
    """The first rows of --eval-data-path, the same whatever the number of ranks.

    Raises `UserError` naming the flag for files without a conversation that can be used.
    """
    data, wanted = options.data, options.evaluation
    files = ", ".join(wanted.eval_data_path)
    tokenizer = load_tokenizer(
        data.tokenizer_model or hf_folder(options.model), data.tokenizer_type, data.chat_template_file
    )
    samples = list(
        tokenize_rollouts(
            load_rollouts(wanted.eval_data_path), tokenizer, data.seq_length, data.overlong, files
        )
    )
    if not samples:
        raise UserError(
            f"--eval-data-path {files}: no conversation is left to evaluate on (the files are empty, or --overlong "
            "left all of them out)"
        )
    packed = PackedDataset(
        samples, data.seq_length, tokenizer.pad_id, seed=0, align=options.sequence_multiple
    )
    count = min(wanted.eval_rows, packed.rows_in_epoch(0))
    # The interleaved schedule wants a multiple of the stages.
    multiple = options.parallel.pipeline_model_parallel_size if options.parallel.virtual_stages else 1
    return EvalRows(_deal(packed, count, multiple), count, f"{packed.fingerprint()} {count}")


def _deal(packed: PackedDataset, count: int, multiple: int) -> list[PackedBatch]:
    """Every data-parallel rank's part of the first `count` rows, filled up with silent rows."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = [packed[i] for i in range(count)[rank::size]]
    longest = -(-count // size)
    rows += [_silent(packed[0])] * (-(-longest // multiple) * multiple - len(rows))
    place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return [context_part(row, *place) for row in rows]


def _silent(row: PackedBatch) -> PackedBatch:
    """A row that runs through the model and counts nowhere."""
    return replace(
        row,
        padding_mask=torch.ones_like(row.padding_mask),
        loss_mask=torch.zeros_like(row.loss_mask),
    )
