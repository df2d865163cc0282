"""Answers sampled from a model: what one is, what gives them, how a token is drawn, and one round of them.

Data- and context-parallel ranks share the prompts of a round, every rank gets to know all answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state

from ..config.generate import SamplingConfig
from ..errors import UserError
from ..runtime.agreement import gathered, rank, world_size


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
                stream.manual_seed(config.seed_of(stream_id))
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


@dataclass(frozen=True)
class Deal:
    """Who of the ranks gets prompts of its own."""

    places: int
    """Lists of prompts that are answered at the same time."""
    place: int
    """Which of them is this rank's."""
    speaks: bool
    """Whether it is this rank that tells the answers; others of its place know the same ones."""
    by_model: bool
    """Every copy of the model that trains has a place."""

    @classmethod
    def of_models(cls) -> Deal:
        """One list for every copy of the model: context-parallel ranks hold whole models, so while answering each has
        sequences of its own; tensor-parallel ranks and pipeline stages share."""
        return cls(
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_rank()
            == parallel_state.get_pipeline_model_parallel_rank()
            == 0,
            by_model=True,
        )

    @classmethod
    def of_groups(cls, size: int) -> Deal:
        """One list for every `size` neighbours."""
        return cls(world_size() // size, rank() // size, rank() % size == 0, by_model=False)


class RolloutEngine(Protocol):
    """Something that answers prompts with the weights that the model has now.

    Attributes:
        deal: who gets prompts of its own. All ranks call `generate` equally often, with an empty list where there are
            no prompts left.
        on_answer: what an engine that sees answers end one by one (the built-in one) calls then.
    """

    deal: Deal
    on_answer: Callable[[], Any]

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


@dataclass(frozen=True)
class Answer:
    """An answer of the student to one of the prompts of a run."""

    prompt_ids: list[int]
    """Token ids of the prompt."""
    response_ids: list[int]
    """Sampled tokens, the end token included if there is one."""
    logprobs: list[float]
    """Log-probability of each under the sampling distribution."""
    finish_reason: str
    """`stop` or `length`."""
    version: int
    """Updates that the student had had when it answered."""
    kind: str = ""
    """Domain of the prompt."""

    @classmethod
    def of(cls, asked: Asked, made: Generation, version: int) -> Answer:
        """What a student of so many updates has answered."""
        parts = (made.response_ids, made.logprobs, made.finish_reason)
        return cls(asked.prompt_ids, *parts, version, asked.kind)


@dataclass(frozen=True)
class Asked:
    """A prompt that wants an answer."""

    prompt_ids: list[int]
    """Its token ids."""
    stream_id: int
    """With the seed it fixes the answer's random numbers."""
    kind: str = ""
    """Its domain."""


@dataclass(frozen=True)
class Round:
    """Answers to a list of prompts, in its order; equal on all ranks but for `picks`."""

    answers: list[Answer]
    """All answers."""
    home: list[int] | None
    """Per answer the rank that gave it, among data- and context-parallel ranks; None: every rank has all `picks`."""
    picks: dict[int, torch.Tensor]
    """Routed experts int16 [T, L, K] of the answers that this rank knows them of, by number; empty unless recorded. -1
    in layers of other pipeline stages."""
    picks_shape: tuple[int, int]
    """(L, K)."""


def roll_out(
    engine: RolloutEngine,
    asked: list[Asked],
    sampling: SamplingConfig,
    version: int,
    record_routing: bool = False,
    picks_shape: tuple[int, int] = (0, 0),
) -> Round:
    """Answer prompts; all ranks call it with the same list. `picks_shape`: layers and picks per token."""
    deal = engine.deal
    # Long prompts are dealt out evenly.
    order = sorted(range(len(asked)), key=lambda i: (-len(asked[i].prompt_ids), i))
    home = [0] * len(asked)
    for place, number in enumerate(order):
        home[number] = place % deal.places
    mine = [i for i in range(len(asked)) if home[i] == deal.place]
    made = engine.generate(
        [asked[i].prompt_ids for i in mine], sampling, [asked[i].stream_id for i in mine], record_routing
    )
    everyone = dict(_gathered((deal.place, [_packed(one) for one in made]), deal))
    told = {place: iter(answers) for place, answers in everyone.items()}
    answers = [
        Answer(question.prompt_ids, *_unpacked(next(told[home[i]])), version, question.kind)
        for i, question in enumerate(asked)
    ]
    picks = {i: one.routed_experts_TLK for i, one in zip(mine, made, strict=True)} if record_routing else {}
    if record_routing and not deal.by_model:
        # Who trains on an answer has nothing to do with who gave it: all ranks get all picks.
        picks = {i: one for part in _gathered(picks, deal) for i, one in part.items()}
        home = None
    return Round(answers, home, picks, picks_shape)


def _packed(one: Generation) -> tuple:
    """Small on the wire: Python numbers take nine bytes and more."""
    ids, logprobs = torch.tensor(one.response_ids, dtype=torch.int32), torch.tensor(one.logprobs)
    return ids, logprobs, one.finish_reason


def _unpacked(packed: tuple) -> tuple[list[int], list[float], str]:
    ids, logprobs, reason = packed
    return ids.tolist(), logprobs.tolist(), reason


def _gathered(mine, deal: Deal) -> list:
    """What the ranks that speak have, of all places."""
    return [part for part in gathered(mine if deal.speaks else None) if part is not None]
