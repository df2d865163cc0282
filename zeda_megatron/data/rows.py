"""From options to packed rows: the one way for training, held-out text, fits and plans; and who takes which row.

Data-parallel ranks take rows in turn, context-parallel ones share each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from megatron.core import parallel_state

from ..config.fit import FitOptions
from ..config.options import Options, sequence_multiple
from ..config.run import DataOptions
from ..errors import UserError
from .chat_tokenizer import ChatTokenizer
from .conversation import pieces_differ, tokenize_rollouts
from .packing import PackedBatch, PackedDataset, blank_row, context_part
from .prompts import load_rollouts

CALIBRATION_ROWS = 16
"""Rows that the threshold is set on: at 2048 tokens and 8 picks, a quarter of a million picks per layer."""
LOOKED_AT = 8
"""Conversations that are encoded in pieces and as a whole, to compare."""
T = TypeVar("T")


def rows_for(
    files: Sequence[str],
    tokenizer: ChatTokenizer,
    seq_length: int,
    *,
    overlong: str = "error",
    seed: int = 0,
    align: int = 1,
    flag: str = "--data-path",
    say: Callable[[str], None] = lambda line: None,
) -> PackedDataset:
    """Packed rows of rollout files.

    Args:
        files: read one after the other.
        tokenizer: of the model.
        seq_length: S.
        overlong: what becomes of longer conversations (`tokenize_rollouts`).
        seed: of the order.
        align: every sequence is padded to a multiple of this.
        flag: that named the files, for messages.
        say: gets lines about what was left out, and about texts that are not learned as the template writes them.

    Raises:
        UserError: naming file and line or sample, or no conversation is left.
    """
    source = ", ".join(map(str, files))
    rollouts = load_rollouts(files)
    different = pieces_differ(islice(rollouts, LOOKED_AT), tokenizer)
    if different:
        say(different)
    samples = tokenize_rollouts(rollouts, tokenizer, seq_length, overlong, source, say)
    first = next(samples, None)
    if first is None:
        raise UserError(
            f"{flag} {source}: no conversation is left (the files are empty, or all were left out: --overlong, answers "
            "cut off while thinking)"
        )
    return PackedDataset(chain([first], samples), seq_length, tokenizer.pad_id, seed, align)


def training_rows(
    data: DataOptions, context_ranks: int, seed: int, tokenizer: ChatTokenizer, say: Callable[[str], None]
) -> PackedDataset:
    """All rows of --data-path, as a run on `context_ranks` context-parallel ranks is fed with them.

    Raises `UserError` naming file and line or sample, or the flag for files without a conversation that can be used.
    """
    return rows_for(
        data.data_path,
        tokenizer,
        data.seq_length,
        overlong=data.overlong,
        seed=seed,
        align=sequence_multiple(context_ranks, data),
        say=say,
    )


def load_rows(
    file: str, tokenizer: ChatTokenizer, seq_length: int, count: int, last: bool = False
) -> list[PackedBatch]:
    """The first packed rows of a rollout file, or the last."""
    packed = rows_for([file], tokenizer, seq_length, overlong="skip")
    numbers = range(packed.rows_in_epoch(0))
    return [packed[i] for i in (numbers[-count:] if last else numbers[:count])]


def rank_part(rows: Sequence[T]) -> Sequence[T]:
    """What this data-parallel rank takes of all rows (or of their numbers)."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return rows[rank::size]


def split_over_context(rows: list[PackedBatch]) -> list[PackedBatch]:
    """This context-parallel rank's part of each row."""
    place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return [context_part(row, *place) for row in rows]


def filled_up(
    mine: list[PackedBatch], count: int, blank: PackedBatch, multiple: int = 1
) -> list[PackedBatch]:
    """This rank's rows of `count`, and blank ones up to what every rank has: experts are shared, so all must run
    equally often. That number is a multiple of `multiple`."""
    per_rank = -(-count // (parallel_state.get_data_parallel_world_size() * multiple)) * multiple
    return [*mine, *[blank] * (per_rank - len(mine))]


@dataclass(frozen=True)
class EvalRows:
    """This rank's rows. All data-parallel ranks have equally many, since experts are shared."""

    rows: list[PackedBatch]
    """Rows of S tokens (S / context-parallel size of each); the last may be silent padding."""
    count: int
    """Rows with text, over all ranks."""
    fingerprint: str
    """Equal for equal text and packing."""


def read_eval_rows(options: Options, tokenizer: ChatTokenizer, say: Callable[[str], None]) -> EvalRows:
    """The first rows of --eval-data-path, the same whatever the number of ranks.

    Raises `UserError` naming the flag for files without a conversation that can be used.
    """
    data, wanted = options.data, options.evaluation
    packed = rows_for(
        wanted.eval_data_path,
        tokenizer,
        data.seq_length,
        overlong=data.overlong,
        align=options.sequence_multiple,
        flag="--eval-data-path",
        say=say,
    )
    count = min(wanted.eval_rows, packed.rows_in_epoch(0))
    rows = split_over_context(_deal(packed, range(count), options.parallel.row_multiple))
    return EvalRows(rows, count, f"{packed.fingerprint()} {count}")


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


def read_fit_rows(options: FitOptions, tokenizer: ChatTokenizer, say: Callable[[str], None]) -> FitRows:
    """The first rows of the rollouts, the same whatever the number of ranks.

    Raises `UserError` for files that give fewer than two rows.
    """
    data = rows_for(options.data_path, tokenizer, options.seq_length, overlong="truncate", say=say)
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


def _deal(data: PackedDataset, numbers: range, multiple: int = 1) -> list[PackedBatch]:
    mine = [data[row] for row in rank_part(numbers)]
    return filled_up(mine, len(numbers), blank_row(data.seq_length, data.pad_id), multiple)
