"""Packed rows of held-out text, dealt out to the data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.options import Options
from ..data.chat_tokenizer import RUN_DAY
from ..data.packing import PackedBatch, blank_row
from ..data.rows import rows_for
from .build import run_tokenizer
from .dealing import filled_up, rank_part, split_over_context
from .log import warn


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
    tokenizer = run_tokenizer(options, RUN_DAY)
    packed = rows_for(
        wanted.eval_data_path,
        tokenizer,
        data.seq_length,
        overlong=data.overlong,
        align=options.sequence_multiple,
        flag="--eval-data-path",
        say=warn,
    )
    count = min(wanted.eval_rows, packed.rows_in_epoch(0))
    mine = [packed[row] for row in rank_part(range(count))]
    blank = blank_row(data.seq_length, tokenizer.pad_id)
    rows = split_over_context(filled_up(mine, count, blank, options.parallel.row_multiple))
    return EvalRows(rows, count, f"{packed.fingerprint()} {count}")
