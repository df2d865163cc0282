"""Generation on the Megatron model itself: KV cache, prompts of any lengths, continuous refilling."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from ..errors import UserError
from ..moe.replay import recorded_picks, recording
from ..moe.stats import stats_aside
from ..runtime.process_groups import device
from .kv_slots import KVSlots
from .rollout import Generation
from .sampling import Sampler, SamplingConfig

SLACK = 64
"""Columns of the cache beyond the longest answer: so seldom must it be moved."""


class BuiltinEngine:
    """Answers prompts with a Megatron GPTModel.

    Works under data, expert and tensor parallelism. Expert-parallel ranks must call `generate` equally often
    (with an empty list where they have no prompts left): their all-to-alls meet.

    Args:
        model: a bare model chunk that holds the whole pipeline.
        stop_ids: token ids that end an answer.
        pad_id: fed where a row has nothing to say.
        max_length: longest prompt plus answer.
        vocab_size: ids from here on are never sampled: an embedding may have rows that no tokenizer knows.
        slots: answers under way at a time; the next prompt takes the place of one that has ended. None: all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stop_ids: set[int],
        pad_id: int,
        max_length: int,
        vocab_size: int | None = None,
        slots: int | None = None,
    ):
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise UserError(
                "generation needs --pipeline-model-parallel-size 1; use tensor or expert parallelism"
            )
        if parallel_state.get_context_parallel_world_size() > 1:
            raise UserError("generation needs --context-parallel-size 1")
        ranks = parallel_state.get_expert_model_parallel_world_size()
        if ranks > 1 and model.config.moe_token_dispatcher_type == "allgather":
            raise UserError(
                "--moe-token-dispatcher-type allgather wants equally many tokens on all expert-parallel ranks, "
                "which generation has not: use alltoall"
            )
        self.model, self.stop_ids, self.pad_id, self.max_length = model, stop_ids, pad_id, max_length
        self.vocab_size, self.slots = vocab_size, slots

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        record_routing: bool = False,
    ) -> list[Generation]:
        """Answer prompts (lists of token ids, each shorter than `max_length`); see `RolloutEngine`."""
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_length:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens does not fit a context of {self.max_length}"
                )
        record = recording(self.model) if record_routing else nullcontext()
        with _answering(self.model), stats_aside(self.model), record:
            return _Answers(self, prompts, sampling, stream_ids, record_routing).run()


class _Answers:
    """The answers under way and those to come."""

    def __init__(self, engine: BuiltinEngine, prompts, sampling: SamplingConfig, stream_ids, record: bool):
        self.engine, self.prompts, self.record = engine, prompts, record
        self.limits = [min(len(p) + sampling.max_new_tokens, engine.max_length) for p in prompts]
        # Neighbours in the queue have similar lengths, so a prefill has little padding.
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        count = max(min(engine.slots or len(prompts), len(prompts)), 1)
        self.answer_of: list[int | None] = [None] * count
        self.cache = KVSlots(count, max(self.limits, default=1) + SLACK)
        self.sampler = Sampler(sampling, stream_ids, device())
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.reasons = ["length"] * len(prompts)
        self.picks: list[list[torch.Tensor]] = [[] for _ in prompts]

    def run(self) -> list[Generation]:
        while True:
            wanted, busy = self._wanted(), self._busy()
            prefill, decode = _any_rank(bool(wanted), bool(busy))
            if prefill:
                self._prefill(wanted) if wanted else self._keep_company()
            elif decode:
                self._decode(busy) if busy else self._keep_company()
            else:
                break
        return [
            Generation(tokens, logprobs, reason, torch.cat(picks) if self.record else None)
            for tokens, logprobs, reason, picks in zip(
                self.tokens, self.logprobs, self.reasons, self.picks, strict=True
            )
        ]

    def _busy(self) -> list[int]:
        """Slots with an answer under way."""
        return [slot for slot, answer in enumerate(self.answer_of) if answer is not None]

    def _wanted(self) -> list[int]:
        """Free slots to fill now. A prefill is a pass of its own, so it waits until it serves several."""
        free = [slot for slot, answer in enumerate(self.answer_of) if answer is None]
        enough = len(free) >= min(max(len(self.answer_of) // 8, 1), len(self.queue))
        return free[: len(self.queue)] if enough else []

    def _prefill(self, slots: list[int]) -> None:
        answers = [self.queue.popleft() for _ in slots]
        prompts = [self.prompts[answer] for answer in answers]
        lengths, longest = [len(p) for p in prompts], max(map(len, prompts))
        # Prompts end together: padding stands on the left, where nobody looks.
        tokens_BS = torch.tensor([[self.engine.pad_id] * (longest - len(p)) + p for p in prompts])
        context = self.cache.prefill_context(slots, longest)
        logits_BV = self._forward(tokens_BS, context, _left_padding(lengths))
        self.cache.admit(slots, context, lengths)
        for slot, answer in zip(slots, answers, strict=True):
            self.answer_of[slot] = answer
        if self.record:
            picks = recorded_picks(self.engine.model).unflatten(0, (longest, len(prompts)))
            for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
                self.picks[answer].append(picks[longest - length :, row].cpu())
        self._extend(logits_BV, slots)

    def _decode(self, busy: list[int]) -> None:
        if not self.queue and len(busy) <= len(self.answer_of) // 2:
            self.cache.keep(busy)
            self.answer_of = [self.answer_of[slot] for slot in busy]
            busy = self._busy()
        free = [slot for slot, answer in enumerate(self.answer_of) if answer is None]
        hidden = self.cache.next_column(free)
        last = [self.engine.pad_id if a is None else self.tokens[a][-1] for a in self.answer_of]
        logits_BV = self._forward(torch.tensor(last)[:, None], self.cache.context, hidden)
        if self.record:
            picks = recorded_picks(self.engine.model).cpu()
            for slot in busy:
                self.picks[self.answer_of[slot]].append(picks[slot : slot + 1])
        self._extend(logits_BV[busy], busy)

    def _keep_company(self) -> None:
        """A pass for the sake of the other expert-parallel ranks."""
        self._forward(torch.tensor([[self.engine.pad_id]]), StaticInferenceContext(1, 1), None)

    def _forward(self, tokens_BS, context, hidden) -> torch.Tensor:
        """Logits [B, V] behind the last position."""
        tokens_BS = tokens_BS.to(device())
        mask = None if hidden is None else hidden.to(tokens_BS.device)
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        logits = self.engine.model(
            tokens_BS, positions, mask, inference_context=context, runtime_gather_output=True
        )
        return logits[:, -1, : self.engine.vocab_size]

    def _extend(self, logits_BV: torch.Tensor, slots: list[int]) -> None:
        """Sample the next token of the answers in these slots; logits are theirs, in this order."""
        answers = [self.answer_of[slot] for slot in slots]
        tokens, logprobs = self.sampler(logits_BV, answers)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:  # equal in theory; one ulp of difference must not split the ranks
            torch.distributed.broadcast(
                tokens, parallel_state.get_tensor_model_parallel_src_rank(), group=group
            )
        for slot, answer, token, logprob in zip(slots, answers, tokens.tolist(), logprobs.tolist()):
            self.tokens[answer].append(token)
            self.logprobs[answer].append(logprob)
            stopped = token in self.engine.stop_ids
            if stopped:
                self.reasons[answer] = "stop"
            if stopped or len(self.prompts[answer]) + len(self.tokens[answer]) >= self.limits[answer]:
                self.answer_of[slot] = None


def _left_padding(lengths: list[int]) -> torch.Tensor | None:
    """What prompts of these lengths, padded on the left, must not see: [B, 1, S, S], True = hidden; None without
    padding."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    place = torch.arange(longest)
    before = place < longest - torch.tensor(lengths)[:, None]
    hidden = before[:, None, None, :] | (place[None, :] > place[:, None])
    # Padding looks at itself: a softmax over nothing would be NaN.
    return hidden & ~torch.eye(longest, dtype=torch.bool)


def _any_rank(*flags: bool) -> list[bool]:
    """Which flags are set on any expert-parallel rank."""
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32, device=device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in tensor.tolist()]


_SPLIT = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


@contextmanager
def _answering(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, logits instead of hidden states, and no sequence parallelism: one new token cannot be split
    over tensor-parallel ranks."""
    places = [
        (holder, name, getattr(holder, name))
        for module in model.modules()
        for holder in (module, getattr(module, "config", None))
        for name in _SPLIT
        if hasattr(holder, name)
    ]
    training, returned = model.training, model.return_hidden
    model.eval()
    model.return_hidden = False
    for holder, name, _ in places:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name, value in places:
            setattr(holder, name, value)
        model.return_hidden = returned
        model.train(training)
