"""What the heads of paired zero experts are fitted to, one ridge regression per expert on x (`ridge`).

What a head predicts, up to a constant (`watch_experts`):

- `norm`: log|E_i(x)|, how much the expert adds to the stream.
- `effect`: log of sqrt(z^2 + (f s |E_i(x)|)^2), z = g.E_i(x), g the gradient of the log-probability of an answer
  that the model itself sampled. The mean of (w_i z)^2 is the Fisher information along the pick: twice the KL
  divergence of the answers, to second order, if that pick alone is skipped. The second term is a floor: s is the
  layer's root mean square of z over that of |E_i(x)|. Without it a token whose answer is certain has no gradient,
  all its picks look idle, and skipping them all at once spoils the answer. Needs a backward pass, no residual norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from ..distill.losses import LossConfig
from ..distill.passes import forward_model, row_loss
from ..moe.router_dials import zero_mask

Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes the rows of one pass, sorted by expert: x [R, H], what is to be predicted [R] float32, local expert [R]."""

Outputs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""The same with what the experts give: x [R, H], E(x) [R, H], local expert [R], routing weight [R] float32."""


def moe_layers(model: torch.nn.Module) -> dict[int, MoELayer]:
    """Layer number (from 1) -> MoE layer of the decoder with paired zero experts."""
    found = {}
    for module in model.modules():
        if not isinstance(module, MoELayer) or getattr(module.router, "paired", None) is None:
            continue
        if not module.router.in_mtp_head:
            found[module.router.layer_number] = module
    return found


@dataclass
class Sensitivity:
    """How strongly answers react to what a layer adds: rms of z over rms of |E|, both with routing weights."""

    effect: float = 0.0
    """Sum of (w z)^2."""
    size: float = 0.0
    """Sum of (w |E|)^2."""

    def add(self, effect_R: torch.Tensor, size_R: torch.Tensor) -> None:
        self.effect += float(effect_R.double().square().sum())
        self.size += float(size_R.double().square().sum())

    def ratio(self) -> float:
        return (self.effect / self.size) ** 0.5 if self.size else 0.0


@contextmanager
def watch_experts(layers: dict[int, MoELayer], sinks: dict[int, Rows]) -> Iterator[None]:
    """Hand log|E(x)| of every pass's rows to the layer's sink. Padding is left out.

    An expert's output comes multiplied by the routing weight: |E(x)| = |output| / weight. Padding is told apart by
    a weight of 0, which the router is made to give it.
    """

    def reader(number):
        def read(_experts, args, output):
            rows = _Rows.of(args)
            rows.hand_to(
                sinks[number], torch.linalg.vector_norm(output[0].detach(), dim=-1, dtype=torch.float32)
            )

        return read

    with _hooks(layers, {number: reader(number) for number in sinks}):
        yield


@contextmanager
def watch_outputs(layers: dict[int, MoELayer], sinks: dict[int, Outputs]) -> Iterator[None]:
    """Hand what experts give to every pass's rows, without the routing weight, to the layer's sink. Padding is left
    out."""

    def reader(number):
        def read(_experts, args, output):
            rows, out_RH = _Rows.of(args), output[0].detach()
            good_R = rows.weight_R > 0
            parts = (rows.x_RH, out_RH, rows.expert_R, rows.weight_R)
            x_RH, out_RH, expert_R, weight_R = parts if good_R.all() else (part[good_R] for part in parts)
            sinks[number](x_RH, out_RH / weight_R[:, None], expert_R, weight_R)

        return read

    with _hooks(layers, {number: reader(number) for number in sinks}):
        yield


@contextmanager
def watch_effects(
    layers: dict[int, MoELayer],
    sinks: dict[int, Rows],
    floors: dict[int, float],
    sensitivities: dict[int, Sensitivity] | None = None,
) -> Iterator[None]:
    """Hand the log of every row's effect to the layer's sink, during the backward pass.

    Args:
        floors: per layer f * s (see above).
        sensitivities: filled if given.
    """

    def reader(number):
        def read(_experts, args, output):
            if not output[0].requires_grad:
                return
            rows, out_RH = _Rows.of(args), output[0].detach().float()

            def take(grad_RH):
                effect_R, size_R = (grad_RH.float() * out_RH).sum(-1), out_RH.norm(dim=-1)
                if sensitivities is not None:
                    good_R = rows.weight_R > 0
                    sensitivities[number].add(effect_R[good_R], size_R[good_R])
                rows.hand_to(sinks[number], torch.hypot(effect_R, floors[number] * size_R))

            output[0].register_hook(take)

        return read

    with _hooks(layers, {number: reader(number) for number in sinks}):
        yield


@contextmanager
def _hooks(layers: dict[int, MoELayer], readers: dict[int, Callable]) -> Iterator[None]:
    with ExitStack() as stack:
        for number, reader in readers.items():
            layer = layers[number]
            handle = layer.router.register_forward_hook(silence_padding, with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(layer.experts.register_forward_hook(reader).remove)
        yield


@dataclass(frozen=True)
class _Rows:
    x_RH: torch.Tensor
    expert_R: torch.Tensor
    weight_R: torch.Tensor

    @classmethod
    def of(cls, args) -> _Rows:
        """From the arguments of an expert module: rows sorted by expert, rows per expert, routing weights."""
        x_RH, counts_E, weight_R = args[:3]
        counts_E = torch.as_tensor(counts_E, device=x_RH.device)
        expert_R = torch.arange(len(counts_E), device=x_RH.device).repeat_interleave(counts_E)
        return cls(x_RH.detach(), expert_R, weight_R.detach().float().reshape(-1))

    def hand_to(self, sink: Rows, size_R: torch.Tensor) -> None:
        """`size_R` is of the weighted output; rows of weight or size 0 are left out."""
        good_R = (self.weight_R > 0) & (size_R > 0) & size_R.isfinite()
        rows = (self.x_RH, size_R.log() - self.weight_R.log(), self.expert_R)
        # Only padding costs a copy of the inputs.
        sink(*(rows if good_R.all() else (part[good_R] for part in rows)))


def silence_padding(router, args, kwargs, output):
    """Forward hook of a router: padding gets the weight 0."""
    probs_TN, map_TN = output
    mask = kwargs.get("padding_mask", args[1] if len(args) > 1 else None)
    padding_T = router._local_padding(mask, probs_TN.shape[0])
    return output if padding_T is None else (probs_TN.masked_fill(padding_T[:, None], 0.0), map_TN)


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

    @torch.no_grad()
    def run_outputs(self, rows: list, sinks: dict[int, Outputs]) -> None:
        """Watch what the experts of the layers that have a sink give; see `watch_outputs`."""
        with zero_mask(self.model), watch_outputs(self.layers, sinks):
            for row in rows:
                self.forward(self.model, row)

    def forward(self, model, row) -> torch.Tensor:
        """Hidden states of a row."""
        self.on_row()
        return forward_model(model, row)

    def _answers(self, hidden: torch.Tensor, row) -> torch.Tensor:
        """Minus the log-probability of the row's response tokens."""
        return row_loss(self.model, row, hidden, None, LossConfig("ce"), self.vocab_size)[0]
