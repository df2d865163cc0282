"""A dial of its own for every request that a vLLM engine answers, and one for its thinking.

    vllm serve DIR --logits-processors zeda_megatron.serving.vllm.request_dials:RequestDials --no-enable-prefix-caching

A request says in `extra_args` of its sampling parameters (`vllm_xargs` of the OpenAI API) what is added to the model's
dial; more skips more:

    {"zce_dial": 0.7}
    {"zce_dial": 0.0, "zce_dial_thinking": 0.7, "zce_think_tokens": [151667, 151668]}

vLLM hands a layer the tokens of all requests in one batch. What it tells a logits processor is which request lies in
which place of the batch, and its parameters; this one leaves the logits alone and keeps the dials by place.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .settings import number

PLACE = "zeda.request_dials"
"""Where a forward pass finds them: among what vLLM keeps for its opaque operators."""
KEYS = ("zce_dial", "zce_dial_thinking", "zce_think_tokens")


class RequestDials(LogitsProcessor):
    """Dials by place in the batch.

    Thinking are the tokens after the one that begins it, up to and with the one that ends it; a prompt is read under
    the model's own dial if its request has a dial for thinking (as `zero_dial_by_phase` of the files for transformers).

    Attributes:
        of_tokens: float32 [tokens of the largest batch], what is added to the dial for every token of this pass.

    Raises:
        ValueError: with vLLM's settings some tokens would not be seen, or be computed under another dial.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        _refuse(vllm_config)
        places = vllm_config.scheduler_config.max_num_seqs + 1  # the last one: rows that are nobody's
        self.dial_P2 = torch.zeros(places, 2, device=device)
        self.marks_P2 = torch.full((places, 2), -1, dtype=torch.int64, device=device)
        self.own_P = torch.zeros(places, dtype=torch.int64, device=device)
        self.thinking_P = torch.zeros(places, dtype=torch.bool, device=device)
        self.of_tokens = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, device=device)
        vllm_config.compilation_config.static_forward_context[PLACE] = self

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """`ValueError` that names the key, if a request's dials make no sense."""
        _read(sampling_params)

    @staticmethod
    def added_to(dial: torch.Tensor, tokens: int) -> torch.Tensor:
        """[1] -> [1], or [T, 1] where requests have dials."""
        found = _found()
        return dial if found is None else dial + found.of_tokens[:tokens].unsqueeze(1)

    @staticmethod
    def see_batch(input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Before a pass over [T] tokens: find every token's dial. Nothing where requests have none. Positions are [T],
        or [3, T] of a model that sees, three times the same in text."""
        found = _found()
        metadata = get_forward_context().attn_metadata if found is not None else None
        if metadata:
            # Gated delta networks have metadata of another kind.
            starts = (getattr(one, "query_start_loc", None) for one in metadata.values())
            positions_T = positions[0] if positions.dim() == 2 else positions
            found._see(input_ids, positions_T, next(one for one in starts if one is not None))

    def _see(self, ids_T: torch.Tensor, positions_T: torch.Tensor, starts_R: torch.Tensor) -> None:
        requests, place_T = len(starts_R) - 1, torch.arange(len(ids_T), device=ids_T.device)
        owner_T = torch.searchsorted(starts_R[1:].to(place_T.dtype), place_T, right=True)
        row_T = torch.where(owner_T < requests, owner_T, len(self.own_P) - 1)
        begins_T, ends_T = (ids_T == self.marks_P2[row_T, side] for side in (0, 1))
        last_T = torch.where(begins_T | ends_T, place_T, -1).cummax(0).values
        start_T = starts_R[owner_T.clamp(max=requests)]
        after_T = torch.where(last_T >= start_T, begins_T[last_T.clamp(min=0)], self.thinking_P[row_T])
        before_T = torch.where(place_T == start_T, self.thinking_P[row_T], after_T.roll(1))
        dial_T = self.dial_P2[row_T, before_T.long()]
        self.of_tokens[: len(ids_T)] = torch.where(positions_T < self.own_P[row_T], 0.0, dial_T)
        self.thinking_P[:requests] = after_T[(starts_R[1:] - 1).long()]

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._set(place, 0.0, 0.0, None, 0)
        for place, params, prompt, _ in batch_update.added:
            self._set(place, *_read(params), len(prompt or ()))
        for source, target, direction in batch_update.moved:
            for rows in (self.dial_P2, self.marks_P2, self.own_P, self.thinking_P):
                kept = rows[target].clone()
                rows[target] = rows[source]
                if direction == MoveDirectionality.SWAP:
                    rows[source] = kept

    def _set(
        self, place: int, dial: float, thinking: float, marks: tuple[int, int] | None, prompt: int
    ) -> None:
        self.dial_P2[place] = self.dial_P2.new_tensor([dial, thinking])
        self.marks_P2[place] = self.marks_P2.new_tensor(marks or (-1, -1))
        self.own_P[place] = prompt if marks else 0
        self.thinking_P[place] = False

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def _found() -> RequestDials | None:
    return get_forward_context().no_compile_layers.get(PLACE) if is_forward_context_available() else None


def _read(params) -> tuple[float, float, tuple[int, int] | None]:
    """A request's dial, its dial while thinking, and the two tokens around that."""
    given = {key: value for key, value in (params.extra_args or {}).items() if key.startswith("zce_")}
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{key} is unknown; a request may set {', '.join(KEYS)}")
    marks = given.pop("zce_think_tokens", None)
    dial, thinking = (None if given.get(key) is None else number(key, given[key]) for key in KEYS[:2])
    if (thinking is None) != (marks is None):
        raise ValueError("zce_dial_thinking and zce_think_tokens (its first and its last token) go together")
    if marks is not None:
        whole = isinstance(marks, (list, tuple)) and all(type(mark) is int and mark >= 0 for mark in marks)
        if not whole or len(set(marks)) != 2:
            raise ValueError(f"zce_think_tokens {marks!r}: two token ids, of <think> and </think>")
    dial = dial or 0.0
    return dial, dial if thinking is None else thinking, None if marks is None else tuple(marks)


def _refuse(vllm_config: VllmConfig) -> None:
    parallel, graphs = vllm_config.parallel_config, vllm_config.compilation_config.cudagraph_mode
    for on, what in (
        (
            vllm_config.cache_config.enable_prefix_caching,
            "prefix caching (a cached prefix was computed under another dial): --no-enable-prefix-caching",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline stages: --pipeline-parallel-size 1"),
        (parallel.use_sequence_parallel_moe, "sequence-parallel MoE layers: one of tensor and data parallel"),
        (
            vllm_config.model_config.supports_multimodal_inputs,
            'pictures (the tokens are not told then): --limit-mm-per-prompt \'{"image": 0, "video": 0}\'',
        ),
        (parallel.enable_dbo, "two half batches at a time: without --enable-dbo"),
        (
            graphs is not None and graphs.has_full_cudagraphs(),
            'CUDA graphs of whole passes: --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\'',
        ),
    ):
        if on:
            raise ValueError(f"dials by request do not work with {what}")
