"""NaN and infinity end a run at the step where they appear: on all ranks, before anything is saved."""

from __future__ import annotations

import math

import torch

from ..distill.teacher import Teacher
from ..errors import UserError
from ..runtime.agreement import gathered, rank
from ..runtime.process_groups import device

_ON = "(--no-check-for-nan-in-loss-and-grad goes on regardless)"


class NotFinite(UserError):
    """The run has diverged. All ranks raise it at the same step, so they can still end in an orderly way."""


class FiniteCheck:
    """Looks at what all ranks know alike (loss, gradient norm) and, before a save, at each rank's weights.

    Args:
        student: bare model chunks of this rank.
        teacher: the frozen teacher, if there is one.
        save: folder of checkpoints, for the message.
        active: `--check-for-nan-in-loss-and-grad`.
    """

    def __init__(
        self, student: list[torch.nn.Module], teacher: Teacher | None, save: str | None, active: bool
    ):
        self.models = {"student": student, "teacher": teacher.model_chunks if teacher else []}
        self.save, self.active = save, active
        self.step = 0

    def loss(self, metrics: dict[str, float]) -> None:
        """After forward and backward, before the update: the weights are still those of the step before."""
        if self.active and not math.isfinite(metrics["loss"]):
            self._end(f"the loss is {metrics['loss']}", self._weights())

    def update(self, metrics: dict[str, float]) -> None:
        """After the update: it has spoilt the weights if the gradient is no number."""
        for name, what in (("grad_norm", "the gradient norm"), ("group_loss", "the group loss")):
            if self.active and not math.isfinite(metrics.get(name) or 0.0):
                self._end(f"{what} is {metrics[name]}", [])

    def weights(self) -> None:
        """Before a save: a weight that no token has met yet shows in no loss."""
        found = self._weights() if self.active else []
        if found:
            self._end("a weight is no finite number", found)

    def _weights(self) -> list[str]:
        """Names of weights of all ranks that hold NaN or infinity."""
        norms = {
            f"{name} {weight}": torch.linalg.vector_norm(tensor.detach(), torch.inf).float()
            for name, chunks in self.models.items()
            for chunk in chunks
            for weight, tensor in chunk.named_parameters()
            if tensor.numel()
        }
        # A parked teacher's are on the host; the others wait for the device together.
        where = device()
        sound = torch.stack([norm.to(where) for norm in norms.values()]).isfinite().tolist() if norms else []
        told = f" (rank {rank()})" if rank() else ""
        mine = [name + told for name, fine in zip(norms, sound) if not fine]
        return [name for names in gathered(mine[:3]) for name in names]

    def _end(self, what: str, weights: list[str]) -> None:
        where = f"; not finite: {', '.join(weights[:3])}" if weights else ""
        kept = f"; checkpoints in --save {self.save} are from before" if self.save else ""
        advice = "start from sound weights" if weights else "lower --lr or look at the data of this step"
        raise NotFinite(f"step {self.step}: {what}{where}{kept}; {advice} {_ON}")
