"""Fitting the heads of paired zero experts: one ridge regression per expert of log|E_i(x)| on x, streaming.

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
"""Takes the rows of one pass: x [R, H], log|E(x)| [R], local expert [R]."""


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
        """Mean log norm per expert [E] float64; experts without rows get the mean of all rows."""
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
    """How much of the variance of log|E(x)| over all routed rows of a layer a prediction explains."""

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


@contextmanager
def watch_experts(layers: dict[int, MoELayer], sinks: dict[int, Rows]) -> Iterator[None]:
    """Hand every pass's rows of the experts of these layers to the layer's sink. Padding is left out.

    An expert's output comes multiplied by the routing weight: |E(x)| = |output| / weight. Padding is told apart by
    a weight of 0, which the router is made to give it.
    """
    with ExitStack() as stack:
        for number, sink in sinks.items():
            layer = layers[number]
            handle = layer.router.register_forward_hook(_silence_padding, with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(layer.experts.register_forward_hook(_reader(sink)).remove)
        yield


def _silence_padding(router, args, kwargs, output):
    probs_TN, map_TN = output
    mask = kwargs.get("padding_mask", args[1] if len(args) > 1 else None)
    padding_T = router._local_padding(mask, probs_TN.shape[0])
    return output if padding_T is None else (probs_TN.masked_fill(padding_T[:, None], 0.0), map_TN)


def _reader(sink: Rows):
    def read(_experts, args, output):
        x_RH, counts_E, weight_R = args[:3]
        norm_R = output[0].detach().float().norm(dim=-1)
        weight_R = weight_R.detach().float().reshape(-1)
        counts_E = torch.as_tensor(counts_E, device=norm_R.device)
        expert_R = torch.arange(len(counts_E), device=norm_R.device).repeat_interleave(counts_E)
        good_R = (weight_R > 0) & (norm_R > 0)
        y_R = norm_R[good_R].log() - weight_R[good_R].log()
        sink(x_RH.detach()[good_R], y_R, expert_R[good_R])

    return read
