"""Answers sampled from a model: what one is, and what gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..config.generate import SamplingConfig
from ..errors import UserError


@dataclass(frozen=True)
class Generation:
    """One sampled answer."""

    response_ids: list[int]
    """Sampled tokens, the end token included if there is one."""
    logprobs: list[float]
    """Log-probability of each under the sampling distribution."""
    finish_reason: str
    """`stop`: the model ended its answer. `length`: it was cut off."""
    routed_experts_TLK: torch.Tensor | None = None
    """int16 ids in [0, N+Nz), if they were asked for: the picks of every token that was fed to the model (prompt and
    answer without its last token) in every decoder layer; -1 in layers without experts. A pick that a paired zero
    expert took has N added to its id."""


class RolloutEngine(Protocol):
    """Something that answers prompts with the weights that the model has now."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        record_routing: bool = False,
    ) -> list[Generation]:
        """One answer per prompt (token ids), in their order.

        Args:
            stream_ids: one integer per prompt; with the seed it fixes the answer's random numbers.
            record_routing: fill `routed_experts_TLK`.
        """
        ...


def check_prompts(prompts: list[list[int]], max_length: int) -> None:
    """Raise `UserError` for a prompt that is empty or leaves no room for an answer."""
    for prompt in prompts:
        if not 0 < len(prompt) < max_length:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit a context of {max_length}")
