"""Ridge regressions of all experts of a layer, streaming: normal equations, their sum over ranks, their solution.

Memory: `sums_bytes` for the layers and experts of one pass: in the main one [H, H] float32 matrix per expert for a
head, 4 * H^2 bytes (16.8 MB at H = 2048, 2.1 GB for 128 experts), two for a stand-in. Besides, the float32 rows of one
expert in one forward pass, and while solving two or three float64 matrices [H, H]. What does not fit is fitted in
further passes over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..errors import UserError

_ROUNDING = 1e-6
"""Variance of an expert's input, relative to its mean square, that is taken for rounding."""


def sums_bytes(num_local_experts: int, hidden_size: int, outputs: int = 1) -> int:
    """Memory of the sums of one layer."""
    return 4 * num_local_experts * (hidden_size * (hidden_size + outputs + 3) + 2 * outputs + 4)


class RidgeSums:
    """Normal equations of some experts of one layer: `add` rows, `reduce` over ranks, `solve`.

    Inputs are taken relative to `shift`, the mean of an expert's first rows: then float32 is enough for the
    products, also for channels whose mean is far larger than their spread. Means are summed in float64.

    Args:
        outputs: numbers that a row is to predict.
    """

    def __init__(self, num_experts: int, hidden_size: int, device: torch.device, outputs: int = 1):
        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(num_experts, *shape, dtype=dtype, device=device)

        self.rows, self.count = zeros(dtype=torch.float64), zeros(dtype=torch.float64)
        """Rows, and the sum of their weights."""
        self.y = zeros(outputs, dtype=torch.float64)
        self.shift = zeros(hidden_size)
        self.x = zeros(hidden_size, dtype=torch.float64)
        self.xy, self.xx = zeros(hidden_size, outputs), zeros(hidden_size, hidden_size)

    def add(
        self,
        x_RH: torch.Tensor,
        y_R: torch.Tensor,
        expert_R: torch.Tensor,
        weight_R: torch.Tensor | None = None,
    ) -> None:
        """Rows sorted by expert: what is predicted is [R], or [R, outputs]; weights float32, 1 if there are none."""
        known = (self.rows > 0).tolist()
        parts = (x_RH, y_R) if weight_R is None else (x_RH, y_R, weight_R)
        for expert, (x, y, *weight) in per_expert(expert_R, len(known), *parts):
            x, y = x.float(), y.float().reshape(len(y), -1)
            if not known[expert]:
                self.shift[expert] = x.mean(0)
            x = x - self.shift[expert]
            self.rows[expert] += len(y)
            if weight:
                (weight,) = weight
                self.count[expert] += weight.sum(dtype=torch.float64)
                weighted, y = x * weight[:, None], y * weight[:, None]
            else:
                self.count[expert] += len(y)
                weighted = x
            self.y[expert] += y.sum(0, dtype=torch.float64)
            self.x[expert] += weighted.sum(0, dtype=torch.float64)
            self.xy[expert].addmm_(x.t(), y)
            self.xx[expert].addmm_(weighted.t(), x)

    def reduce(self, group) -> None:
        """Add up over the ranks that hold copies of these experts and saw other tokens.

        Each rank first moves its sums to the common mean; then they add up.
        """
        if group.size() == 1:
            return
        count, mean = self.count.clone(), self.x + self.count[:, None] * self.shift
        for part in (count, mean):
            torch.distributed.all_reduce(part, group=group)
        mean = (mean / count[:, None].clamp(min=1e-30)).float()
        move = mean - self.shift
        for expert, n in enumerate(self.count.tolist()):
            x, by = self.x[expert].float(), move[expert]
            self.xx[expert].addr_(x, by, alpha=-1).addr_(by, x, alpha=-1).addr_(by, by, alpha=n)
            torch.distributed.all_reduce(self.xx[expert], group=group)
        self.xy -= move[:, :, None] * self.y[:, None, :].float()
        self.x -= self.count[:, None] * move
        for part in (self.rows, self.y, self.x, self.xy):
            torch.distributed.all_reduce(part, group=group)
        self.count, self.shift = count, mean

    def means(self) -> torch.Tensor:
        """Of what is predicted, per expert [E, outputs] float64; 0 for experts without rows."""
        return self.y / self.count[:, None].clamp(min=1e-30)

    def constants(self) -> torch.Tensor:
        """Mean per expert [E] float32 of a single number; 0 for experts without rows."""
        return self.means()[:, 0].float()

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """U [E, H] and c [E], float32: least squares for a single number, with a penalty on U, none on c.

        The penalty is that of ridge * H extra rows of the expert's own input variance with answer 0. It does not
        grow with the data: an expert with far fewer rows than H keeps U near 0, hence its constant; one with far
        more is not held back. Raises `UserError` if it is too small to solve.
        """
        weight, constants = torch.zeros_like(self.shift), self.means()[:, 0]
        for expert, factor, answer_HO, mean in self._equations(ridge):
            solution = torch.cholesky_solve(answer_HO, factor)[:, 0]
            weight[expert] = solution
            constants[expert] -= solution @ mean
        return weight, constants.float()

    def solve_low_rank(self, ridge: float, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [E, r, H], B [E, outputs, r] and b [E, outputs], float32: B A x + b nearest to what is predicted, by the
        weighted squares that `solve` has, among all maps of that rank.

        Reduced-rank regression: B's columns span the strongest directions of what full-rank ridge predicts.
        """
        experts, hidden = self.shift.shape
        down, constants = self.shift.new_zeros(experts, rank, hidden), self.means()
        up = self.shift.new_zeros(experts, constants.shape[1], rank)
        for expert, factor, answer_HO, mean in self._equations(ridge):
            basis_OR = _strongest(answer_HO, factor, rank)
            down_RH = torch.cholesky_solve(answer_HO @ basis_OR, factor).t()
            down[expert, : len(down_RH)], up[expert, :, : len(down_RH)] = down_RH, basis_OR
            constants[expert] -= basis_OR @ (down_RH @ mean)
        return down, up, constants.float()

    def _equations(self, ridge: float) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(expert, Cholesky factor of its centred and penalised moments [H, H], moments with the outputs [H, outputs],
        mean of x [H]), all float64, of every expert with at least two rows."""
        for expert, rows in enumerate(self.rows.tolist()):
            n = float(self.count[expert])
            if rows < 2 or not n > 0:
                continue
            mean = self.x[expert] / n
            moments = self.xx[expert].double().addr_(mean, mean, alpha=-n)
            # An expert that always sees one input (the first token of every text) has no variance but rounding's.
            least = _ROUNDING * n * (mean + self.shift[expert]).square().sum()
            penalty = ridge * torch.maximum(moments.diagonal().sum(), least).clamp(min=1e-12) / rows
            moments.diagonal().add_(penalty)
            factor, failed = torch.linalg.cholesky_ex(moments)
            del moments
            if failed:
                raise UserError(f"--ridge {ridge} is too small for an expert with {rows:.0f} rows")
            answer = self.xy[expert].double() - mean[:, None] * self.y[expert]
            yield expert, factor, answer, mean + self.shift[expert]


def _strongest(answer_HO: torch.Tensor, factor: torch.Tensor, rank: int, rounds: int = 8) -> torch.Tensor:
    """Orthonormal [outputs, r]: the largest eigenvectors of answer^T (factor factor^T)^-1 answer, by subspace iteration
    from a fixed start, so that no matrix of [outputs, outputs] is made."""
    outputs = answer_HO.shape[1]
    width = min(rank + 8, outputs)
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(outputs, width, generator=start, dtype=torch.float64).to(answer_HO.device)
    for _ in range(rounds):
        basis = torch.linalg.qr(basis)[0]
        basis = answer_HO.t() @ torch.cholesky_solve(answer_HO @ basis, factor)
    return torch.linalg.svd(basis, full_matrices=False)[0][:, : min(rank, outputs)]


def fill_empty(values_N: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """Experts without rows get the mean over the other experts."""
    seen_N = count_N > 0
    return torch.where(seen_N, values_N, values_N[seen_N].mean() if seen_N.any() else 0.0)


class Explained:
    """How much of the variance over all routed rows of a layer a head explains, and its constants.

    Args:
        predict: local expert and x [R, H] -> what the head says, [R] float32.
        constant_E: the mean of each expert, float32.
    """

    def __init__(self, predict: Callable[[int, torch.Tensor], torch.Tensor], constant_E: torch.Tensor):
        self.predict, self.constant = predict, constant_E
        self.sums = torch.zeros(5, dtype=torch.float64, device=constant_E.device)
        """Rows, their sum and sum of squares, squared errors of the head and of the constants."""

    def add(self, x_RH: torch.Tensor, y_R: torch.Tensor, expert_R: torch.Tensor) -> None:
        """Rows sorted by expert."""
        for expert, (x, y) in per_expert(expert_R, len(self.constant), x_RH, y_R):
            error = y - self.predict(expert, x)
            parts = (torch.ones_like(y), y, y.square(), error.square(), (y - self.constant[expert]).square())
            self.sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def r2(self) -> tuple[float, float]:
        """R^2 of the head and of the constants."""
        count, y, yy, error, error_of_constants = self.sums.tolist()
        total = max(yy - y**2 / max(count, 1.0), 1e-12)
        return 1 - error / total, 1 - error_of_constants / total


def per_expert(
    expert_R: torch.Tensor, num_experts: int, *parts: torch.Tensor
) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Cut rows sorted by expert: (expert, its rows of each part) for every expert that has some."""
    counts = torch.bincount(expert_R, minlength=num_experts).tolist()
    for expert, (count, *mine) in enumerate(zip(counts, *(part.split(counts) for part in parts))):
        if count:
            yield expert, tuple(mine)
