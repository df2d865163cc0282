"""Fitting the heads of paired zero experts: one ridge regression per expert on x, streaming.

What a head predicts, up to a constant (`watch_experts`):

- `norm`: log|E_i(x)|, how much the expert adds to the stream.
- `effect`: log of sqrt(z^2 + (f s |E_i(x)|)^2), z = g.E_i(x), g the gradient of the log-probability of an answer
  that the model itself sampled. The mean of (w_i z)^2 is the Fisher information along the pick: twice the KL
  divergence of the answers, to second order, if that pick alone is skipped. The second term is a floor: s is the
  layer's root mean square of z over that of |E_i(x)|. Without it a token whose answer is certain has no gradient,
  all its picks look idle, and skipping them all at once spoils the answer. Needs a backward pass, no residual norm.

Memory: `sums_bytes` for the layers of one pass and the experts of this rank: in the main one [H, H] float32 matrix
per expert, 4 * H^2 bytes (16.8 MB at H = 2048, 2.1 GB for 128 experts). Besides, the float32 rows of one expert in
one forward pass, and while solving two float64 matrices [H, H]. Layers that do not fit are fitted in further passes
over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from ..errors import UserError

Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes the rows of one pass, sorted by expert: x [R, H], what is to be predicted [R] float32, local expert [R]."""


def sums_bytes(num_local_experts: int, hidden_size: int) -> int:
    """Memory of the sums of one layer."""
    return 4 * num_local_experts * (hidden_size * (hidden_size + 4) + 4)


class RidgeSums:
    """Normal equations of all local experts of one layer: `add` rows, `reduce` over ranks, `solve`.

    Inputs are taken relative to `shift`, the mean of an expert's first rows: then float32 is enough for the
    products, also for channels whose mean is far larger than their spread. Means are summed in float64.
    """

    def __init__(self, num_experts: int, hidden_size: int, device: torch.device):
        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(num_experts, *shape, dtype=dtype, device=device)

        self.count, self.y = zeros(dtype=torch.float64), zeros(dtype=torch.float64)
        self.shift = zeros(hidden_size)
        self.x = zeros(hidden_size, dtype=torch.float64)
        self.xy, self.xx = zeros(hidden_size), zeros(hidden_size, hidden_size)

    def add(self, x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor) -> None:
        """Rows sorted by expert."""
        known = (self.count > 0).tolist()
        for expert, x, y in per_expert(x_RH, y_R, expert_R, len(known)):
            x = x.float()
            if not known[expert]:
                self.shift[expert] = x.mean(0)
            x = x - self.shift[expert]
            self.count[expert] += len(y)
            self.y[expert] += y.sum(dtype=torch.float64)
            self.x[expert] += x.sum(0, dtype=torch.float64)
            self.xy[expert].addmv_(x.t(), y)
            self.xx[expert].addmm_(x.t(), x)

    def reduce(self, group) -> None:
        """Add up over the ranks that hold copies of these experts and saw other tokens.

        Each rank first moves its sums to the common mean; then they add up.
        """
        if group.size() == 1:
            return
        count, mean = self.count.clone(), self.x + self.count[:, None] * self.shift
        for part in (count, mean):
            torch.distributed.all_reduce(part, group=group)
        mean = (mean / count[:, None].clamp(min=1)).float()
        move = mean - self.shift
        for expert, n in enumerate(self.count.tolist()):
            x, by = self.x[expert].float(), move[expert]
            self.xx[expert].addr_(x, by, alpha=-1).addr_(by, x, alpha=-1).addr_(by, by, alpha=n)
            torch.distributed.all_reduce(self.xx[expert], group=group)
        self.xy -= self.y[:, None].float() * move
        self.x -= self.count[:, None] * move
        for part in (self.y, self.x, self.xy):
            torch.distributed.all_reduce(part, group=group)
        self.count, self.shift = count, mean

    def constants(self) -> torch.Tensor:
        """Mean per expert [E] float32; 0 for experts without rows."""
        return (self.y / self.count.clamp(min=1)).float()

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U [E, H] and c [E], float32: least squares with a penalty on U, none on c.

        The penalty is that of ridge * H extra rows of the expert's own input variance with answer 0. It does not
        grow with the data: an expert with far fewer rows than H keeps U near 0, hence its constant; one with far
        more is not held back. Raises `UserError` if it is too small to solve.
        """
        constants = self.y / self.count.clamp(min=1)
        weight = torch.zeros_like(self.shift)
        for expert, n in enumerate(self.count.tolist()):
            if n < 2:
                continue
            mean = self.x[expert] / n
            moments = self.xx[expert].double().addr_(mean, mean, alpha=-n)
            penalty = ridge * moments.diagonal().sum().clamp(min=1e-12) / n
            moments.diagonal().add_(penalty)
            factor, failed = torch.linalg.cholesky_ex(moments)
            del moments
            if failed:
                raise UserError(f"--ridge {ridge} is too small for an expert with {n:.0f} rows")
            answer = self.xy[expert].double() - mean * self.y[expert]
            solution = torch.cholesky_solve(answer.unsqueeze(1), factor).squeeze(1)
            weight[expert] = solution
            constants[expert] -= solution @ (mean + self.shift[expert])
        return weight, constants.float()


def fill_empty(values_N: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Experts without rows get the mean over the other experts."""
    seen_N = count_N > 0
    return torch.where(seen_N, values_N, values_N[seen_N].mean() if seen_N.any() else 0.0)


class Explained:
    """How much of the variance over all routed rows of a layer a head explains, and its constants.

    Args: U [E, H], c [E] of the head and the mean log norms [E], for the local experts, float32.
    """

    def __init__(self, weight_EH: torch.Tensor, bias_E: torch.Tensor, constant_E: torch.Tensor):
        self.weight, self.bias, self.constant = weight_EH, bias_E, constant_E
        self.sums = torch.zeros(5, dtype=torch.float64, device=weight_EH.device)
        """Rows, their sum and sum of squares, squared errors of the head and of the constants."""

    def add(self, x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor) -> None:
        """Rows sorted by expert."""
        for expert, x, y in per_expert(x_RH, y_R, expert_R, len(self.bias)):
            error = y - torch.mv(x.float(), self.weight[expert]) - self.bias[expert]
            parts = (torch.ones_like(y), y, y.square(), error.square(), (y - self.constant[expert]).square())
            self.sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def r2(self) -> tuple[float, float]:
        """R^2 of the head and of the constants."""
        count, y, yy, error, error_of_constants = self.sums.tolist()
        total = max(yy - y**2 / max(count, 1.0), 1e-12)
        return 1 - error / total, 1 - error_of_constants / total


def per_expert(
    x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Cut rows sorted by expert: (expert, its x, its y) for every expert that has some."""
    counts = torch.bincount(expert_R, minlength=num_experts).tolist()
    for expert, (x, y) in enumerate(zip(x_RH.split(counts), y_R.split(counts))):
        if len(y):
            yield expert, x, y


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
            rows.hand_to(
                sinks[number], torch.linalg.vector_norm(output[0].detach(), dim=-1, dtype=torch.float32)
            )

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
        good_R = (self.weight_R > 0) & (size_R > 0) & size_R.isfinite()
        rows = (self.x_RH, size_R.log() - self.weight_R.log(), self.expert_R)
        # Only padding costs a copy of the inputs.
        sink(*(rows if good_R.all() else (part[good_R] for part in rows)))


def _silence_padding(router, args, kwargs, output):
    probs_TN, map_TN = output
    mask = kwargs.get("padding_mask", args[1] if len(args) > 1 else None)
    padding_T = router._local_padding(mask, probs_TN.shape[0])
    return output if padding_T is None else (probs_TN.masked_fill(padding_T[:, None], 0.0), map_TN)
