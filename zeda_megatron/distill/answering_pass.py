"""Passes of a model that answers: whole sequences on every rank, through all pipeline stages, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from ..models.local_layers import SDPAttention
from ..moe.stats import evaluating
from ..runtime.process_groups import device

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
