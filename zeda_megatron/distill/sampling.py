"""Choosing the next token: temperature, top-k, top-p, one random stream per answer."""

from __future__ import annotations

import torch

from ..config.generate import SamplingConfig


def filter_logits(logits_BV: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Logits at the sampling temperature, -inf where top-k or top-p cut. float32 [B, V]; temperature > 0."""
    logits_BV = logits_BV.float() / config.temperature
    if config.top_k and config.top_k < logits_BV.shape[1]:
        lowest = logits_BV.topk(config.top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest, float("-inf"))
    if config.top_p < 1:
        ordered, index = logits_BV.sort(dim=1, descending=True)
        probs = ordered.softmax(dim=1)
        # Keep tokens until the mass before them reaches p; the likeliest always stays.
        cut = probs.cumsum(dim=1) - probs >= config.top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), float("-inf"))
    return logits_BV


class Sampler:
    """Draws tokens. Answer i has its own random stream, so batching does not change it.

    Args:
        config: how to sample.
        stream_ids: one integer per answer; together with the seed it fixes the answer's random numbers.
    """

    def __init__(self, config: SamplingConfig, stream_ids: list[int], device: torch.device):
        self.config = config
        self._streams = []
        if config.temperature > 0:
            for stream_id in stream_ids:
                stream = torch.Generator(device=device)
                stream.manual_seed((config.seed * 1_000_003 + stream_id) % 2**63)
                self._streams.append(stream)

    def __call__(self, logits_BV: torch.Tensor, answers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of some answers, and its log-probability under the sampling distribution.

        Args:
            logits_BV: [B, V], one row per answer. answers: their numbers; others keep their streams.

        Returns:
            tokens [B] int64, log-probabilities [B] float32.
        """
        if self.config.temperature == 0:
            logp = logits_BV.float().log_softmax(dim=1)
            tokens = logits_BV.argmax(dim=1)
        else:
            logp = filter_logits(logits_BV, self.config).log_softmax(dim=1)
            # The Gumbel trick: argmax(log p + noise) is a draw from p.
            noise = torch.stack(
                [
                    torch.empty(logp.shape[1], device=logp.device).exponential_(
                        generator=self._streams[answer]
                    )
                    for answer in answers
                ]
            )
            tokens = (logp - noise.log()).argmax(dim=1)
        return tokens, logp.gather(1, tokens[:, None]).squeeze(1)
