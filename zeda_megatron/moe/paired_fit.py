"""Fitting the heads of paired zero experts: one ridge regression per expert on x, streaming.

What a head predicts, up to a constant (`watch_experts`):

- `norm`: log|E_i(x)|, how much the expert adds to the stream.
- `effect`: log of sqrt(z^2 + (f s |E_i(x)|)^2), z = g.E_i(x), g the gradient of the log-probability of an answer
  that the model itself sampled. The mean of (w_i z)^2 is the Fisher information along the pick: twice the KL
  divergence of the answers, to second order, if that pick alone is skipped. The second term is a floor: s is the
  layer's root mean square of z over that of |E_i(x)|. Without it a token whose answer is certain has no gradient,
  all its picks look idle, and skipping them all at once spoils the answer. Needs a backward pass, no residual norm.

Memory: per expert one [H, H] matrix of sums in float32, 4 * H^2 bytes (16.8 MB at H = 2048), for the layers of one
pass and the experts of this rank; while solving, three float64 matrices of that size. More layers than fit are
fitted in further passes over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes the rows of one pass: x [R, H], what is to be predicted [R], local expert [R]."""


def sums_bytes(num_local_experts: int, hidden_size: int) -> int:
    """Memory of the sums of one layer."""
    return 4 * num_local_experts * hidden_size * (hidden_size + 2)


class RidgeSums:
    """Normal equations of all local experts of one layer; `add` rows in any order, then `solve`."""

    def __init__(self, num_experts: int, hidden_size: int, device: torch.device):
        make = torch.zeros
        self.count = make(num_experts, dtype=torch.float64, device=device)
        self.y = make(num_experts, dtype=torch.float64, device=device)
        self.x = make(num_experts, hidden_size, dtype=torch.float64, device=device)
        self.xy = make(num_experts, hidden_size, dtype=torch.float32, device=device)
        self.xx = make(num_experts, hidden_size, hidden_size, dtype=torch.float32, device=device)

    def add(self, x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor) -> None:
        """Rows sorted by expert."""
        for expert, n in enumerate(torch.bincount(expert_R, minlength=len(self.count)).tolist()):
            x, x_RH = x_RH[:n].float(), x_RH[n:]
            y, y_R = y_R[:n].float(), y_R[n:]
            if n:
                self.count[expert] += n
                self.y[expert] += y.sum(dtype=torch.float64)
                self.x[expert] += x.sum(0, dtype=torch.float64)
                self.xy[expert].addmv_(x.t(), y)
                self.xx[expert].addmm_(x.t(), x)

    def reduce(self, group) -> None:
        """Add up over the ranks that hold copies of these experts and saw other tokens."""
        if group.size() > 1:
            for part in (self.count, self.y, self.x, self.xy, self.xx):
                torch.distributed.all_reduce(part, group=group)

    def constants(self) -> torch.Tensor:
        """Mean per expert [E] float64; experts without rows get the mean of all rows."""
        overall = self.y.sum() / self.count.sum().clamp(min=1)
        return torch.where(self.count > 0, self.y / self.count.clamp(min=1), overall)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U [E, H] and c [E], float32: least squares with a penalty on U, none on c.

        The penalty is `ridge` times the mean variance of the expert's inputs, per row: with few rows U shrinks
        towards 0, which leaves the constant.
        """
        constants = self.constants()
        weight = torch.zeros_like(self.x)
        for expert, n in enumerate(self.count.tolist()):
            if n < 2:
                continue
            mean = self.x[expert] / n
            covariance = self.xx[expert].double() / n - torch.outer(mean, mean)
            variance = covariance.diagonal().mean().clamp(min=1e-12)
            covariance.diagonal().add_(ridge * variance)
            moment = self.xy[expert].double() / n - mean * (self.y[expert] / n)
            factor = torch.linalg.cholesky(covariance)
            weight[expert] = torch.cholesky_solve(moment.unsqueeze(1), factor).squeeze(1)
            constants[expert] -= weight[expert] @ mean
        return weight.float(), constants.float()


@dataclass
class Explained:
    """How much of the variance over all routed rows of a layer a prediction explains."""

    count: float = 0.0
    """Rows."""
    y: float = 0.0
    """Sum of the values."""
    yy: float = 0.0
    """Sum of their squares."""
    error: float = 0.0
    """Sum of squared errors of the prediction."""
    error_of_constants: float = 0.0
    """The same for one constant per expert."""

    def add(self, y_R: torch.Tensor, predicted_R: torch.Tensor, constant_R: torch.Tensor) -> None:
        y_R = y_R.double()
        self.count += y_R.numel()
        self.y += float(y_R.sum())
        self.yy += float(y_R.square().sum())
        self.error += float((y_R - predicted_R).square().sum())
        self.error_of_constants += float((y_R - constant_R).square().sum())

    def r2(self) -> tuple[float, float]:
        """R^2 of the prediction and of the constants."""
        total = max(self.yy - self.y**2 / max(self.count, 1.0), 1e-12)
        return 1 - self.error / total, 1 - self.error_of_constants / total


def moe_layers(model: torch.nn.Module) -> dict[int, MoELayer]:
    """Layer number (from 1) -> MoE layer with paired zero experts."""
    found = {}
    for module in model.modules():
        if isinstance(module, MoELayer) and getattr(module.router, "paired", None) is not None:
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
            rows.hand_to(sinks[number], output[0].detach().float().norm(dim=-1))

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
            handle = layer.router.register_forward_hook(_silence_padding, with_kwargs=True)
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
        good_R = (self.weight_R > 0) & (size_R > 0)
        values_R = size_R[good_R].log() - self.weight_R[good_R].log()
        sink(self.x_RH[good_R], values_R, self.expert_R[good_R])


def _silence_padding(router, args, kwargs, output):
    probs_TN, map_TN = output
    mask = kwargs.get("padding_mask", args[1] if len(args) > 1 else None)
    padding_T = router._local_padding(mask, probs_TN.shape[0])
    return output if padding_T is None else (probs_TN.masked_fill(padding_T[:, None], 0.0), map_TN)
