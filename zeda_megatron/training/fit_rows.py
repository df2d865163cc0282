"""The text that paired zero experts are fitted on: packed rows of the teacher's answers."""

from __future__ import annotations

from pathlib import Path

from megatron.core import parallel_state

from ..data.conversation import tokenize_rollouts
from ..data.packing import PackedBatch, PackedDataset
from ..data.prompts import load_rollouts
from ..data.tokenizers import load_tokenizer
from ..errors import UserError
from .fit_options import FitOptions


def read_fit_rows(options: FitOptions, hf: Path) -> tuple[list[PackedBatch], list[PackedBatch]]:
    """This data-parallel rank's rows to fit on and rows held out, equally many on every rank.

    `hf` is the folder with the tokenizer. Raises `UserError` if there is too little text.
    """
    tokenizer, shown = load_tokenizer(hf), ", ".join(options.data_path)
    samples = tokenize_rollouts(
        load_rollouts(options.data_path), tokenizer, options.seq_length, "truncate", shown
    )
    data = PackedDataset(samples, options.seq_length, tokenizer.pad_id, seed=0)
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    there = data.rows_in_epoch(0) // size
    if there < 2:
        raise UserError(
            f"--data-path {shown}: {data.rows_in_epoch(0)} packed rows for {size} data-parallel ranks; at least two "
            "each are needed (more text, or a smaller --seq-length)"
        )
    held_out = min(max(options.held_out_rows // size, 1), max(there // 4, 1))
    count = min(max(options.fit_rows // size, 1), there - held_out)
    rows = [data[rank + i * size] for i in range(count + held_out)]
    return rows[:count], rows[count:]
