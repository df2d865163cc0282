"""Passes of the static model over rows, whose experts' outputs and their effects are handed to sinks."""

from __future__ import annotations

import torch


class WatchedPasses:
    """Runs rows through a model with the zero experts masked.

    Args:
        layers: MoE layers to watch, by number.
        effect: also run backward from the answers, so that sinks learn what each expert's output does to them.
        on_row: called before every row.
    """

    def __init__(self, model, layers: dict, vocab_size: int, effect: bool, on_row):
        self.model, self.layers, self.vocab_size = model, layers, vocab_size
        self.effect, self.on_row = effect, on_row

    def run(
        self, rows: list, sinks: dict, floors: dict[int, float], sensitivities: dict | None = None
    ) -> None:
        """Watch the layers that have a sink; see `fit.paired_fit.watch_experts` and `watch_effects`."""
        from ..moe.router_dials import zero_mask
        from .paired_fit import watch_effects, watch_experts

        # Gradients flow from the embedding on; no parameter keeps one.
        embedding = self.model.embedding.word_embeddings.weight.requires_grad_(self.effect)
        watch = (
            watch_effects(self.layers, sinks, floors, sensitivities)
            if self.effect
            else watch_experts(self.layers, sinks)
        )
        with zero_mask(self.model), watch, torch.set_grad_enabled(self.effect):
            for row in rows:
                hidden = self.forward(self.model, row)
                if self.effect:
                    torch.autograd.grad(self._answers(hidden, row), embedding)
        self.model.requires_grad_(False)

    def forward(self, model, row) -> torch.Tensor:
        """Hidden states of a row."""
        from ..distill.passes import forward_model

        self.on_row()
        return forward_model(model, row)

    def _answers(self, hidden: torch.Tensor, row) -> torch.Tensor:
        """Minus the log-probability of the row's response tokens."""
        from ..distill.losses import LossConfig
        from ..distill.passes import row_loss

        return row_loss(self.model, row, hidden, None, LossConfig("ce"), self.vocab_size)[0]
