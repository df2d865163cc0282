"""Guard rails: a run whose numbers leave the allowed range ends before that step is saved.

All ranks see the same numbers, so all end at the same step. What the guards remember is kept whether they are on or
off, and travels in the checkpoint: a resumed run ends where an uninterrupted one would have. NaN and infinity end a run
at the step where they appear, before anything is saved (`FiniteCheck`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..config.guard import GuardOptions
from ..distill.teacher import Teacher
from ..errors import UserError
from ..runtime.agreement import gathered, rank
from ..runtime.process_groups import device


class GuardTripped(UserError):
    """A guard rail was reached. All ranks raise it at the same step, so they can still end in an orderly way."""


class Window:
    """The last `size` numbers."""

    def __init__(self, size: int):
        self.size = size
        self.values: list[float] = []

    def add(self, value: float) -> None:
        self.values = [*self.values, value][-self.size :]

    def mean(self) -> float | None:
        """None before so many numbers were seen."""
        return sum(self.values) / self.size if len(self.values) == self.size else None


class ShareGuard:
    """The zero share stays in its band. `band` None: whatever it likes."""

    def __init__(self, band: tuple[float, float] | None, window: int):
        self.band, self.window = band, Window(window)

    def observe(self, metrics: dict[str, float]) -> str | None:
        """Look at one step; returns what is wrong and what to do."""
        self.window.add(metrics["zero_share"])
        mean = f"the mean zero share of the last {self.window.size} steps"
        seen = {mean: self.window.mean(), "the zero share on held-out text": metrics.get("eval_zero_share")}
        for what, share in seen.items():
            if self.band and share is not None and not self.band[0] <= share <= self.band[1]:
                low, high = self.band
                return (
                    f"{what} is {share:.4f}, --zero-share-band allows {low:g} to {high:g}; look at "
                    "--target-zero-share, --moe-zero-expert-weight and --moe-aux-loss-coeff, lower --lr, or "
                    "widen the band"
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.window.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.values = list(state["values"])[-self.window.size :]


class KlGuard:
    """The KL on held-out text does not rise again and again. `most` 0: it may.

    Args:
        fingerprint: of the held-out rows; what was measured on others is forgotten.
    """

    def __init__(self, most: int, fingerprint: str | None):
        self.most, self.fingerprint = most, fingerprint
        self.last: float | None = None
        self.low: float | None = None
        self.rises = 0

    def observe(self, metrics: dict[str, float]) -> str | None:
        """Look at one evaluation (a step without one changes nothing); returns what is wrong and what to do."""
        kl = metrics.get("eval_kl")
        if kl is None:
            return None
        if self.last is None or kl <= self.last:
            self.low, self.rises = kl, 0
        else:
            self.rises += 1
        self.last = kl
        if self.most and self.rises >= self.most:
            return (
                f"the KL to the teacher on held-out text rose in {self.rises} evaluations in a row, from "
                f"{self.low:.4g} to {kl:.4g}, and --max-kl-rises is {self.most}; lower --lr, or end "
                "with an earlier checkpoint"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "last": self.last, "low": self.low, "rises": self.rises}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] == self.fingerprint:
            self.last, self.low, self.rises = state["last"], state["low"], state["rises"]


class LengthGuard:
    """Responses do not collapse: their mean length stays above a share of what it was at first. `least` 0: it may
    fall."""

    def __init__(self, least: float, window: int):
        self.least, self.window = least, Window(window)
        self.first: float | None = None

    def observe(self, metrics: dict[str, float]) -> str | None:
        """Look at one step; returns what is wrong and what to do."""
        if self.least or "response_length" in metrics:
            self.window.add(metrics["response_length"])
        mean = self.window.mean()
        if self.first is None:
            self.first = mean
        if self.least and mean is not None and mean < self.least * self.first:
            return (
                f"the mean response length of the last {self.window.size} steps is {mean:.1f} tokens, "
                f"{mean / self.first:.1%} of the {self.first:.1f} of the first {self.window.size} steps, "
                f"--min-response-length-share allows {self.least:.1%}; lower --lr, or look at the sampled responses"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.window.values, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.values = list(state["values"])[-self.window.size :]
        self.first = state["first"]


class Guards:
    """All guard rails of a run.

    Args:
        fingerprint: of the held-out rows, None without evaluation.

    Attributes:
        newest: the last checkpoint, for the message; who saves or loads sets it.
    """

    def __init__(self, options: GuardOptions, fingerprint: str | None):
        self.newest: Path | None = None
        self._kl = KlGuard(options.max_kl_rises, fingerprint)
        self._guards = {
            "share": ShareGuard(options.band(), options.guard_window),
            "kl": self._kl,
            "length": LengthGuard(options.min_response_length_share, options.guard_window),
        }

    def start(self, found: dict[str, float]) -> None:
        """The evaluation before the first step: the first KL that later ones are compared with."""
        self._kl.observe(found)

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """Look at what a step has shown. Raises `GuardTripped`."""
        told = [guard.observe(metrics) for guard in self._guards.values()]  # all of them remember the step
        for text in filter(None, told):
            kept = (
                "nothing was saved before" if self.newest is None else f"{self.newest} is the last checkpoint"
            )
            raise GuardTripped(f"step {step}: {text} ({kept}; this step is not saved)")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; equal on all ranks."""
        return {name: guard.state_dict() for name, guard in self._guards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back; nothing for checkpoints that have none."""
        for name, guard in self._guards.items():
            if name in state:
                guard.load_state_dict(state[name])


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
        for name, what in (("loss", "the loss"), ("mtp_loss", "the loss of the multi-token-prediction head")):
            if self.active and not math.isfinite(metrics.get(name, 0.0)):
                self._end(f"{what} is {metrics[name]}", self._weights())

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
