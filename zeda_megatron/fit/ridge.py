"""Ridge regressions of all experts of a layer, streaming: normal equations, their sum over ranks, their solution.

Memory: `sums_bytes` for the layers of one pass and the experts of this rank: in the main one [H, H] float32 matrix
per expert, 4 * H^2 bytes (16.8 MB at H = 2048, 2.1 GB for 128 experts). Besides, the float32 rows of one expert in
one forward pass, and while solving two float64 matrices [H, H]. Layers that do not fit are fitted in further passes
over the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UserError


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
