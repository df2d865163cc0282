"""One round of rollouts: data- and context-parallel ranks share the prompts, every rank gets to know all answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from ..config.generate import SamplingConfig
from .rollout import Generation, RolloutEngine


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
    home: list[int]
    """Per answer the rank that gave it, among data- and context-parallel ranks."""
    picks: dict[int, torch.Tensor]
    """Routed experts int16 [T, L, K] of the answers that this rank gave, by number; empty unless recorded. -1 in layers
    of other pipeline stages."""
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
    # Context-parallel ranks hold whole models: while answering, each has sequences of its own.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, ranks = group.rank(), group.size()
    # Long prompts are dealt out evenly.
    order = sorted(range(len(asked)), key=lambda i: (-len(asked[i].prompt_ids), i))
    home = [0] * len(asked)
    for place, number in enumerate(order):
        home[number] = place % ranks
    mine = [i for i in range(len(asked)) if home[i] == rank]
    made = engine.generate(
        [asked[i].prompt_ids for i in mine], sampling, [asked[i].stream_id for i in mine], record_routing
    )
    everyone = _gathered([_packed(one) for one in made], group)
    answers = [
        Answer(question.prompt_ids, *_unpacked(next(everyone[home[i]])), version, question.kind)
        for i, question in enumerate(asked)
    ]
    picks = {i: one.routed_experts_TLK for i, one in zip(mine, made, strict=True)} if record_routing else {}
    return Round(answers, home, picks, picks_shape)


def _packed(one: Generation) -> tuple:
    """Small on the wire: Python numbers take nine bytes and more."""
    ids, logprobs = torch.tensor(one.response_ids, dtype=torch.int32), torch.tensor(one.logprobs)
    return ids, logprobs, one.finish_reason


def _unpacked(packed: tuple) -> tuple[list[int], list[float], str]:
    ids, logprobs, reason = packed
    return ids.tolist(), logprobs.tolist(), reason


def _gathered(mine: list, group) -> list[Iterator]:
    """The answers of each rank of the group."""
    parts = [mine]
    if group.size() > 1:
        parts = [None] * group.size()
        torch.distributed.all_gather_object(parts, mine, group=group)
    return [iter(part) for part in parts]
