"""Rows of text for a fit, dealt out to the data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config.fit import FitOptions
from ..data.packing import PackedBatch, PackedDataset, blank_row
from ..data.rows import rows_for
from ..data.tokenizers import load_tokenizer
from ..errors import UserError
from ..training.dealing import filled_up, rank_part
from ..training.log import warn

CALIBRATION_ROWS = 16
"""Rows that the threshold is set on: at 2048 tokens and 8 picks, a quarter of a million picks per layer."""


@dataclass(frozen=True)
class FitRows:
    """This rank's rows. All ranks have equally many, since experts are shared: the last may be silent padding."""

    fit: list[PackedBatch]
    """Heads are fitted on these."""
    held_out: list[PackedBatch]
    """R^2 is measured on these."""
    calibration: list[PackedBatch]
    """The threshold is set on these."""
    fit_count: int
    """Rows of the fit over all ranks."""
    held_out_count: int
    """Rows held out, over all ranks."""


def read_fit_rows(options: FitOptions, hf: Path) -> FitRows:
    """The first rows of the rollouts, the same whatever the number of ranks.

    Raises `UserError` for files that give fewer than two rows.
    """
    tokenizer = load_tokenizer(hf)
    data = rows_for(options.data_path, tokenizer, options.seq_length, overlong="truncate", say=warn)
    there = data.rows_in_epoch(0)
    if there < 2:
        raise UserError(
            f"--data-path {', '.join(options.data_path)}: {there} packed row, at least two are needed (more text, or a "
            "smaller --seq-length)"
        )
    held_out = min(options.held_out_rows, max(there // 4, 1))
    fit = min(options.fit_rows, there - held_out)
    total = fit + held_out
    return FitRows(
        _deal(data, range(fit)),
        _deal(data, range(fit, total)),
        _deal(data, range(max(total - CALIBRATION_ROWS, 0), total)),
        fit,
        held_out,
    )


def _deal(data: PackedDataset, numbers: range) -> list[PackedBatch]:
    mine = [data[row] for row in rank_part(numbers)]
    return filled_up(mine, len(numbers), blank_row(data.seq_length, data.pad_id))
