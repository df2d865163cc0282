"""The zero share of each row of a batch that transformers generates."""

from __future__ import annotations

import torch


class RowShares:
    """Counts zero slots by row and position while a model of ours runs; a context manager.

    Args:
        model: a `ZeroExpertModel`, or any other model, which then has no zero slots.
        batch: rows.
    """

    def __init__(self, model, batch: int):
        self.batch = batch
        self.gates = [block.gate for block in model.moe_blocks()] if hasattr(model, "moe_blocks") else []
        self.counts_LBS: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.picks = 1

    def __enter__(self) -> RowShares:
        self.hooks = [gate.register_forward_hook(self._count(layer)) for layer, gate in enumerate(self.gates)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, layer: int):
        def hook(gate, _, output):
            ids_TK = output[2]
            self.picks = ids_TK.shape[1]
            zero_T = torch.zeros_like(ids_TK[:, 0]) if gate.dials.masked else (ids_TK >= gate.num_real).sum(1)
            self.counts_LBS[layer].append(zero_T.view(self.batch, -1))

        return hook

    def shares(self, prompt_lengths: list[int], answer_lengths: list[int]) -> list[float]:
        """Per row, over prompt and answer without the answer's last token, which was never fed.

        Prompts are padded on the left to the longest; what follows an answer's end does not count.
        """
        if not self.gates:
            return [0.0] * self.batch
        counts_LBS = torch.stack([torch.cat(steps, dim=1) for steps in self.counts_LBS]).cpu()
        longest, shares = max(prompt_lengths), []
        for row, (prompt, answer) in enumerate(zip(prompt_lengths, answer_lengths, strict=True)):
            fed = counts_LBS[:, row, longest - prompt : longest + max(answer - 1, 0)]
            shares.append(int(fed.sum()) / max(fed.numel() * self.picks, 1))
        return shares
