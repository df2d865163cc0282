"""Generation on the Megatron model itself: batched, with KV cache, prompts of different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext

from ..errors import UserError
from ..runtime.process_groups import device
from .sampling import Sampler, SamplingConfig


@dataclass(frozen=True)
class Generation:
    """One sampled answer."""

    response_ids: list[int]
    """Sampled tokens, the end token included if there is one."""
    logprobs: list[float]
    """Log-probability of each under the sampling distribution."""
    finish_reason: str
    """`stop`: the model ended its answer. `length`: it was cut off."""


class RolloutEngine(Protocol):
    """Something that answers prompts."""

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, stream_ids: list[int]
    ) -> list[Generation]: ...


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
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stop_ids: set[int],
        pad_id: int,
        max_length: int,
        vocab_size: int | None = None,
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
        self.vocab_size = vocab_size

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, stream_ids: list[int]
    ) -> list[Generation]:
        """Answer a batch of prompts (lists of token ids, each shorter than `max_length`)."""
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_length:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens does not fit a context of {self.max_length}"
                )
        batch = _Batch(prompts or [[self.pad_id]], sampling, stream_ids or [0], self, empty=not prompts)
        was_training, parallel = self.model.training, _SequenceParallelOff(self.model)
        self.model.eval()
        returned, self.model.return_hidden = self.model.return_hidden, False
        try:
            with parallel:
                batch.run(self.model)
        finally:
            self.model.train(was_training)
            self.model.return_hidden = returned
        return batch.generations() if prompts else []


class _Batch:
    """State of one batch. Rows run in step; a row whose prompt is longer is fed its own prompt first."""

    def __init__(self, prompts, sampling: SamplingConfig, stream_ids, engine: BuiltinEngine, empty: bool):
        self.prompts, self.engine = prompts, engine
        self.limits = [min(len(p) + sampling.max_new_tokens, engine.max_length) for p in prompts]
        longest = max(self.limits)
        self.tokens_BS = torch.full((len(prompts), longest), engine.pad_id, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        self.open = [not empty] * len(prompts)
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.reasons = ["length"] * len(prompts)
        self.sampler = Sampler(sampling, stream_ids, device())
        self.context = StaticInferenceContext(len(prompts), longest)

    def run(self, model) -> None:
        start, end = 0, min(len(p) for p in self.prompts)
        while True:
            logits_BV = self._forward(model, start, end)
            self._extend(logits_BV, end)
            if not _any_rank(any(self.open)):
                return
            if not any(self.open):  # another expert-parallel rank goes on: keep it company with one token
                self.context.sequence_len_offset = start = 0
                end = 1
                continue
            start, end = end, end + 1

    def _forward(self, model, start: int, end: int) -> torch.Tensor:
        """Logits [B, V] behind position end-1."""
        tokens = self.tokens_BS[:, start:end].to(device())
        positions = torch.arange(start, end, device=tokens.device).expand(tokens.shape[0], -1)
        self.context.sequence_len_offset = start
        if start > 0:
            self.context.enable_decode_mode()
        else:
            self.context.enable_prefill_mode()
        logits = model(tokens, positions, None, inference_context=self.context, runtime_gather_output=True)
        return logits[:, -1, : self.engine.vocab_size]

    def _extend(self, logits_BV: torch.Tensor, at: int) -> None:
        """Fill position `at`: from the prompt, or sampled."""
        rows = [row for row, prompt in enumerate(self.prompts) if self.open[row] and len(prompt) <= at]
        if not rows:
            return
        tokens, logprobs = self.sampler(logits_BV, rows)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:  # equal in theory; one ulp of difference must not split the ranks
            torch.distributed.broadcast(
                tokens, parallel_state.get_tensor_model_parallel_src_rank(), group=group
            )
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            self.tokens_BS[row, at] = token
            self.logprobs[row].append(logprob)
            if token in self.engine.stop_ids:
                self.reasons[row], self.open[row] = "stop", False
            elif at + 1 >= self.limits[row]:
                self.open[row] = False

    def generations(self) -> list[Generation]:
        made = []
        for row, prompt in enumerate(self.prompts):
            count = len(self.logprobs[row])
            ids = self.tokens_BS[row, len(prompt) : len(prompt) + count].tolist()
            made.append(Generation(ids, self.logprobs[row], self.reasons[row]))
        return made


def _any_rank(flag: bool) -> bool:
    """True if any expert-parallel rank says so."""
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() == 1:
        return flag
    tensor = torch.tensor([int(flag)], device=device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(tensor.item())


class _SequenceParallelOff:
    """Sequence parallelism off while generating: one new token cannot be split over tensor-parallel ranks."""

    NAMES = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")

    def __init__(self, model: torch.nn.Module):
        self.places = [
            (holder, name, getattr(holder, name))
            for module in model.modules()
            for holder in (module, getattr(module, "config", None))
            for name in self.NAMES
            if hasattr(holder, name)
        ]

    def __enter__(self) -> None:
        for holder, name, _ in self.places:
            setattr(holder, name, False)

    def __exit__(self, *exception) -> None:
        for holder, name, value in self.places:
            setattr(holder, name, value)
