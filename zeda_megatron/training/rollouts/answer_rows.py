"""Sampled answers as packed rows of a training step, dealt out to the data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state

from ...data.packing import PackedBatch, PackedDataset, TokenSample, blank_row
from ...data.rows import filled_up, rank_part, split_over_context
from ...distill.answers import Answer, Round
from ...distill.exchange import exchange


@dataclass(frozen=True)
class AnswerRows:
    """How answers become rows."""

    seq_length: int
    """Tokens of a row."""
    pad_id: int
    """Token id of padding."""
    align: int = 1
    """Every sequence is padded to a multiple of this."""
    multiple: int = 1
    """The rows of a rank are a multiple of this: blank ones fill up."""
    train_truncated: bool = True
    """Whether answers that were cut off are learned from."""

    def learns(self, answer: Answer) -> bool:
        """Whether its tokens count in the loss."""
        return self.train_truncated or answer.finish_reason == "stop"

    def pack(self, answers: list[Answer], routing: Round | None = None) -> tuple[list[PackedBatch], float]:
        """This rank's rows (under context parallelism its part of them), equally many on every rank; all ranks call
        it with the same answers.

        Args:
            routing: the round that these answers are, if the rows shall carry its routed experts.

        Returns:
            The rows, and rows over rows with text on all ranks (`StepRows.padding_factor`).
        """
        samples = [
            TokenSample(
                answer.prompt_ids + answer.response_ids,
                [False] * len(answer.prompt_ids) + [self.learns(answer)] * len(answer.response_ids),
                answer.kind,
            )
            for answer in answers
        ]
        data = PackedDataset(samples, self.seq_length, self.pad_id, seed=0, align=self.align)
        numbers = [data.row_samples(row) for row in range(data.rows_in_epoch(0))]
        rows = [data[row] for row in rank_part(range(len(numbers)))]
        if routing is not None:
            lengths = [len(sample.tokens) for sample in samples]
            rows = self._with_picks(rows, numbers, lengths, routing)
        rows = filled_up(rows, len(numbers), blank_row(self.seq_length, self.pad_id), self.multiple)
        total = len(rows) * parallel_state.get_data_parallel_world_size()
        return split_over_context(rows), total / len(numbers)

    def _with_picks(
        self, rows: list[PackedBatch], numbers: list[list[int]], lengths: list[int], routing: Round
    ) -> list[PackedBatch]:
        """Lay the routed experts beside the tokens. An answer's last token was never fed: its picks are left open."""
        ranks = parallel_state.get_data_parallel_world_size()
        place = {number: row % ranks for row, group in enumerate(numbers) for number in group}
        inner = routing.picks_shape
        picks = exchange(
            routing.picks,
            routing.home,
            [place[i] for i in range(len(lengths))],
            [(length - 1, *inner) for length in lengths],
            torch.int16,
        )
        made = []
        for row, group in zip(rows, rank_part(numbers), strict=True):
            picks_SLK = torch.full((self.seq_length, *inner), -1, dtype=torch.int16)
            for start, number in zip(row.cu_seqlens.tolist(), group):
                picks_SLK[start : start + lengths[number] - 1] = picks[number]
            made.append(replace(row, picks=picks_SLK[None]))
        return made
