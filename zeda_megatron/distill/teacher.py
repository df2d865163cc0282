"""The frozen teacher: a pipeline of its own beside the student, forward only, hidden states kept.

Memory modes (`--teacher-memory`): `own` keeps a second copy of the weights, `offload` parks that copy in host
memory between passes, `shared` borrows the student's weights where few of them train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..data.packing import PackedBatch
from ..models.adapters import adapters_of, switched_off
from ..moe.router_dials import zero_mask
from ..moe.stats import evaluating
from ..runtime.process_groups import device
from .passes import forward_model, forward_only


class Teacher:
    """A frozen model that gives the hidden states of the last layer (after the final norm).

    Args:
        model_chunks: unwrapped model chunks of this pipeline rank; for `shared`, the student's own.
        mode: own, offload or shared.
        values: for `shared`, those of the student's parameters that the teacher has otherwise, and what it has there.

    Attributes:
        running: a pass is under way.
    """

    def __init__(
        self,
        model_chunks: list[torch.nn.Module],
        mode: str,
        values: Sequence[tuple[torch.nn.Parameter, torch.Tensor]] = (),
    ):
        self.model_chunks, self.mode, self.running = model_chunks, mode, False
        self._values, self._adapters = values, adapters_of(model_chunks)
        if mode != "shared":
            for chunk in model_chunks:
                chunk.eval().requires_grad_(False)
            if mode == "offload":
                self._move("cpu")

    def hidden_states(self, batches: list[PackedBatch], seq_length: int) -> list[torch.Tensor]:
        """Run the teacher over micro-batches through the pipeline.

        Returns:
            On the last pipeline stage one [S, B, H] tensor per micro-batch (this rank's part under sequence
            parallelism); elsewhere an empty list. Never a tensor of the size of the vocabulary.
        """

        with self._in_place():
            return forward_only(self.model_chunks, batches, seq_length)

    @torch.no_grad()
    def stage_output(self, batch: PackedBatch, received: torch.Tensor | None) -> torch.Tensor:
        """Run this rank's pipeline stage on one micro-batch: `received` is what the stage before it gave."""
        (chunk,) = self.model_chunks
        with self._in_place():
            chunk.set_input_tensor(None if received is None else received.detach())
            return forward_model(chunk, batch)

    def head_weight(self) -> torch.Tensor:
        """The teacher's LM head on the last stage, on the device of the computation."""
        weight = self.model_chunks[-1].head_weight().detach()
        return weight.cuda() if self.mode == "offload" and torch.cuda.is_available() else weight

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Teacher's weights in place, zero experts masked, adapters off, evaluation mode; restored afterwards."""
        student = [parameter.data for parameter, _ in self._values]
        for parameter, weight in self._values:
            parameter.data = weight
        if self.mode == "offload":
            self._move("cuda" if torch.cuda.is_available() else "cpu")
        self.running = True
        try:
            with evaluating(self.model_chunks), zero_mask(self.model_chunks), switched_off(self._adapters):
                yield
        finally:
            self.running = False
            if self.mode == "offload":
                self._move("cpu")
            for (parameter, _), weight in zip(self._values, student):
                parameter.data = weight

    def _move(self, device: str) -> None:
        for chunk in self.model_chunks:
            chunk.to(device)


class Remembered(Teacher):
    """A teacher that runs over these rows once, and knows them from then on; hidden states wait in host memory."""

    def __init__(self, model_chunks: list[torch.nn.Module], rows: list[PackedBatch]):
        super().__init__(model_chunks, "own")
        self._rows = rows
        self._known: dict[int, torch.Tensor] = {}

    def hidden_states(self, batches: list[PackedBatch], seq_length: int) -> list[torch.Tensor]:
        """As `Teacher.hidden_states`."""
        return [self._of_row(row, seq_length) for row in batches]

    def _of_row(self, row: PackedBatch, seq_length: int) -> torch.Tensor:
        place = next((i for i, known in enumerate(self._rows) if known is row), None)
        if place in self._known:
            return self._known[place].to(device())
        (hidden,) = super().hidden_states([row], seq_length)
        if place is not None:
            self._known[place] = hidden.cpu()
        return hidden
