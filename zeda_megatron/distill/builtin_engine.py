"""Generation on the Megatron model itself: KV cache, prompts of any lengths, continuous refilling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from ..config.generate import SamplingConfig
from ..errors import UserError
from ..models.local_layers import SDPAttention
from ..moe.replay import recorded_picks, recording
from ..moe.stats import evaluating
from ..runtime.process_groups import device
from .answers import Deal, Generation, Sampler, check_prompts
from .kv_slots import KVSlots, SlotContext

_SPLIT = {
    "sequence_parallel": False,
    "reduce_scatter_embeddings": False,
    "scatter_to_sequence_parallel": False,
    "context_parallel_size": 1,
}
"""What splits sequences over ranks, in modules and their configs, and its value where nothing is split."""


class AnsweringPass:
    """Forward passes of one pipeline.

    All stages call the same methods in the same order; expert-parallel company needs no word between stages, because
    each stage decides alike.

    Args:
        chunks: bare model chunks of this pipeline rank, in order.
    """

    def __init__(self, chunks: list[torch.nn.Module]):
        self.chunks = chunks
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.stages: list[int] = torch.distributed.get_process_group_ranks(self.group)
        # Transformer Engine's attention splits what has no explicit mask.
        self.explicit = parallel_state.get_context_parallel_world_size() > 1

    def logits(self, tokens_BS: torch.Tensor, context, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Run all stages.

        Args:
            tokens_BS: int64 ids.
            context: Megatron's static inference context, of this rank's layers.
            hidden: bool [B, 1, Sq, Sk], True = must not be seen; None hides the future alone.

        Returns:
            On the last stage the logits [B, V] behind the last position, on the others None.
        """
        tokens_BS = tokens_BS.to(device())
        (B, S), last = tokens_BS.shape, len(self.stages) - 1
        if hidden is None and self.explicit:
            seen = context.sequence_len_offset + S
            hidden = torch.ones(1, 1, S, seen, dtype=torch.bool).triu(seen - S + 1)
        mask = None if hidden is None else hidden.to(tokens_BS.device)
        positions = torch.arange(S, device=tokens_BS.device).expand_as(tokens_BS)
        for chunk in self.chunks:
            if not chunk.pre_process:
                config = chunk.config
                shape = S, B, config.hidden_size
                received = torch.empty(shape, dtype=config.pipeline_dtype, device=tokens_BS.device)
                # The first stage gets the next group of layers from the last one.
                torch.distributed.recv(received, self.stages[self.stage - 1], group=self.group)
                chunk.set_input_tensor(received)
            output = chunk(tokens_BS, positions, mask, inference_context=context, runtime_gather_output=True)
            if chunk.post_process:
                return output[:, -1]
            following = self.stages[0 if self.stage == last else self.stage + 1]
            torch.distributed.send(output.contiguous(), following, group=self.group)
        return None

    def agree(
        self, drawn: tuple[torch.Tensor, torch.Tensor] | None, count: int
    ) -> tuple[list[int], list[float]]:
        """What the last stage has drawn, made known to all ranks of the model.

        Args:
            drawn: tokens [count] int64 and their log-probabilities [count] float32; None before the last stage.
        """
        if drawn is None:
            both_2B = torch.empty(2, count, dtype=torch.float64, device=device())
        else:
            both_2B = torch.stack([part.double() for part in drawn])  # exact, and one message
            group = parallel_state.get_tensor_model_parallel_group()
            if group.size() > 1:  # equal in theory; one ulp of difference must not split the ranks
                source = parallel_state.get_tensor_model_parallel_src_rank()
                torch.distributed.broadcast(both_2B, source, group=group)
        if len(self.stages) > 1:
            torch.distributed.broadcast(both_2B, self.stages[-1], group=self.group)
        tokens_B, logprobs_B = both_2B
        return tokens_B.long().tolist(), logprobs_B.tolist()


@contextmanager
def answering(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode, and no sequence or context parallelism: one new token cannot be split over ranks. All as before
    afterwards."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    changes = [
        (holder, name, value)
        for module in modules
        for holder in (module, getattr(module, "config", None))
        for name, value in _SPLIT.items()
        if hasattr(holder, name)
    ]
    # Their packed passes find the group again; RoPE keeps split and whole tables apart (`packed_seq`).
    changes += [(m, "cp_group", None) for m in modules if isinstance(m, (SDPAttention, RotaryEmbedding))]
    before = [getattr(holder, name) for holder, name, _ in changes]
    with evaluating(chunks):
        try:
            for holder, name, value in changes:
                setattr(holder, name, value)
            yield
        finally:
            for (holder, name, _), value in zip(changes, before, strict=True):
                setattr(holder, name, value)
            for chunk in chunks:
                chunk.set_input_tensor(None)


SLACK = 64
"""Columns of the cache beyond the longest answer: so seldom must it be moved."""


class BuiltinEngine:
    """Answers prompts with a Megatron GPTModel, on every layout.

    Tensor-parallel ranks and pipeline stages get the same prompts; data- and context-parallel ranks may get different
    ones, and under expert parallelism must call `generate` equally often (with an empty list where there are no prompts
    left): their all-to-alls meet.

    Args:
        model: the bare model chunk of this pipeline rank, or a list of them (virtual stages).
        stop_ids: token ids that end an answer.
        pad_id: fed where a row has nothing to say.
        max_length: longest prompt plus answer.
        vocab_size: ids from here on are never sampled: an embedding may have rows that no tokenizer knows.
        slots: answers under way at a time; the next prompt takes the place of one that has ended. None: all.
        on_answer: called whenever an answer has ended.

    Raises:
        UserError: a dispatcher that generation cannot use.
    """

    def __init__(
        self,
        model: torch.nn.Module | list[torch.nn.Module],
        stop_ids: set[int],
        pad_id: int,
        max_length: int,
        vocab_size: int | None = None,
        slots: int | None = None,
        on_answer: Callable[[], Any] = lambda: None,
    ):
        self.chunks = list(model) if isinstance(model, (list, tuple)) else [model]
        self._refuse_allgather()
        self.stop_ids, self.pad_id, self.max_length = stop_ids, pad_id, max_length
        self.vocab_size, self.slots, self.on_answer = vocab_size, slots, on_answer
        self.deal = Deal.of_models()

    def _refuse_allgather(self) -> None:
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        experts = parallel_state.get_expert_model_parallel_world_size()
        # Ranks of one tensor-parallel group have the same tokens.
        strangers = experts > 1 or parallel_state.get_expert_tensor_parallel_world_size() > tensor
        if strangers and self.chunks[0].config.moe_token_dispatcher_type == "allgather":
            raise UserError(
                "--moe-token-dispatcher-type allgather needs the same number of tokens on all expert-parallel "
                "ranks, which answering does not have: use alltoall"
            )

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        record_routing: bool = False,
    ) -> list[Generation]:
        """Answer prompts (lists of token ids, each shorter than `max_length`); see `RolloutEngine`."""
        check_prompts(prompts, self.max_length)
        record = recording(self.chunks) if record_routing else nullcontext()
        with answering(self.chunks), record:
            return _Answers(self, prompts, sampling, stream_ids, record_routing).run()


class _Answers:
    """The answers under way and those to come."""

    def __init__(self, engine: BuiltinEngine, prompts, sampling: SamplingConfig, stream_ids, record: bool):
        self.engine, self.prompts, self.record = engine, prompts, record
        self.passes = AnsweringPass(engine.chunks)
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
        logits_BV = self.passes.logits(tokens_BS, context, _left_padding(lengths))
        self.cache.admit(slots, context, lengths)
        for slot, answer in zip(slots, answers, strict=True):
            self.answer_of[slot] = answer
        if self.record:
            picks = recorded_picks(self.engine.chunks, longest * len(prompts))
            picks = picks.unflatten(0, (longest, len(prompts)))
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
        logits_BV = self.passes.logits(torch.tensor(last)[:, None], self.cache.context, hidden)
        if self.record:
            picks = recorded_picks(self.engine.chunks, len(self.answer_of)).cpu()
            for slot in busy:
                self.picks[self.answer_of[slot]].append(picks[slot : slot + 1])
        self._extend(None if logits_BV is None else logits_BV[busy], busy)

    def _keep_company(self) -> None:
        """A pass for the sake of the ranks that share its experts."""
        self.passes.logits(torch.tensor([[self.engine.pad_id]]), SlotContext(1, 1), None)

    def _extend(self, logits_BV: torch.Tensor | None, slots: list[int]) -> None:
        """Sample the next token of the answers in these slots; the last stage has their logits, in this order."""
        answers, drawn = [self.answer_of[slot] for slot in slots], None
        if logits_BV is not None:
            drawn = self.sampler(logits_BV[:, : self.engine.vocab_size], answers)
        tokens, logprobs = self.passes.agree(drawn, len(answers))
        for slot, answer, token, logprob in zip(slots, answers, tokens, logprobs, strict=True):
            self.tokens[answer].append(token)
            self.logprobs[answer].append(logprob)
            stopped = token in self.engine.stop_ids
            if stopped:
                self.reasons[answer] = "stop"
            if stopped or len(self.prompts[answer]) + len(self.tokens[answer]) >= self.limits[answer]:
                self.answer_of[slot] = None
                self.engine.on_answer()


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
    """Which flags are set on any rank that the experts' tokens are exchanged with. Every pipeline stage finds the
    same: its ranks are those of the others, moved on."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32, device=device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in tensor.tolist()]
