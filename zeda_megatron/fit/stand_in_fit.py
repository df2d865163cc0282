"""What stand-ins are fitted to: the outputs of the picks that the heads skip, one regression per expert (`ridge`).

The skipped part of a layer's output is the sum over skipped picks of w_i * E_i(x); a stand-in answers w_i * S_i(x). So
S_i is fitted to E_i(x) on the rows of its expert that are skipped, each with weight w_i^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from ..moe.paired import PairedZeroExperts
from .paired_fit import WatchedPasses
from .ridge import RidgeSums, per_expert, sums_bytes


class StandInFit:
    """The stand-ins of all layers that have them.

    Args:
        ridge: as for the heads. max_bytes: for the sums of one pass.
        gather: puts the rows of all expert-parallel ranks together, in the experts' order.
        replicas: process group of the ranks that hold the same experts.
    """

    def __init__(
        self,
        layers: dict[int, MoELayer],
        passes: WatchedPasses,
        ridge: float,
        max_bytes: float,
        gather: Callable[[torch.Tensor], torch.Tensor],
        replicas,
    ):
        first = next(iter(layers.values()))
        self.layers, self.passes, self.ridge = layers, passes, ridge
        self.gather, self.replicas = gather, replicas
        self.experts, self.hidden = first.num_local_experts, first.config.hidden_size
        self.rank = first.router.zero.stand_in_rank
        inputs = self.hidden if self.rank else 1  # a constant needs no moments of x
        self.inputs, room = inputs, max_bytes / sums_bytes(1, inputs, self.hidden)
        self.plan = list(pass_plan(sorted(layers), self.experts, max(int(room), 1)))

    @torch.no_grad()
    def run(self, rows: list) -> None:
        """Fit and install all, in one pass over the rows for every entry of `plan`."""
        made = {}
        for wanted in self.plan:
            sums = {
                number: RidgeSums(last - first, self.inputs, self._device(), self.hidden)
                for number, (first, last) in wanted.items()
            }
            self.passes.run_outputs(rows, {n: self._sink(n, wanted[n][0], part) for n, part in sums.items()})
            for number, (_, last) in wanted.items():
                part = sums.pop(number)
                part.reduce(self.replicas)
                made.setdefault(number, []).append(self._solve(part))
                if last == self.experts:
                    self._install(number, made.pop(number))

    @torch.no_grad()
    def explained(self, rows: list, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[int, float]:
        """Per layer how much of what these rows' skipped picks would have given the stand-ins give: 1 - sum of
        w^2 |E - S|^2 / sum of w^2 |E|^2. `add_up`: over all ranks."""
        numbers = sorted(self.layers)
        table = torch.zeros(len(numbers), 2, dtype=torch.float64, device=self._device())
        self.passes.run_outputs(rows, {n: self._judge(n, table[i]) for i, n in enumerate(numbers)})
        return {
            n: 1 - error / max(whole, 1e-30) for n, (error, whole) in zip(numbers, add_up(table).tolist())
        }

    def _solve(self, sums: RidgeSums) -> tuple[torch.Tensor, ...]:
        if self.rank:
            return sums.solve_low_rank(self.ridge, self.rank)
        return (sums.means().float(),)

    def _install(self, number: int, chunks: list[tuple[torch.Tensor, ...]]) -> None:
        module = self.layers[number].router.zero_output
        names = ("down", "up", "constant") if self.rank else ("constant",)
        for name, parts in zip(names, zip(*chunks)):
            getattr(module, name).copy_(self.gather(torch.cat(parts)))

    def _sink(self, number: int, first: int, sums: RidgeSums):
        def take(x_RH, out_RH, expert_R, weight_R):
            chosen_R = (expert_R >= first) & (expert_R < first + len(sums.rows))
            chosen_R &= self._skipped(number, x_RH, expert_R, weight_R)
            x_RH = x_RH[chosen_R, : self.inputs]
            sums.add(x_RH, out_RH[chosen_R], expert_R[chosen_R] - first, weight_R[chosen_R].square())

        return take

    def _judge(self, number: int, found: torch.Tensor):
        module, own = self.layers[number].router.zero_output, self.layers[number].local_expert_indices

        def take(x_RH, out_RH, expert_R, weight_R):
            chosen_R = self._skipped(number, x_RH, expert_R, weight_R)
            rows = (part[chosen_R] for part in (x_RH, out_RH, weight_R))
            for expert, (x, out, weight) in per_expert(expert_R[chosen_R], self.experts, *rows):
                answer = module.constant[own[expert]].float()
                if self.rank:
                    answer = (
                        answer
                        + x.float()
                        @ module.down[own[expert]].float().t()
                        @ module.up[own[expert]].float().t()
                    )
                for place, error in enumerate((out.float() - answer, out.float())):
                    found[place] += (weight.square() * error.square().sum(1)).sum(dtype=torch.float64)

        return take

    def _skipped(self, number: int, x_RH, expert_R, weight_R) -> torch.Tensor:
        """Which rows the head and the threshold skip [R]."""
        layer = self.layers[number]
        head: PairedZeroExperts = layer.router.paired
        score_R = weight_R.clamp(min=1e-20).log() if "weight" in head.terms else torch.zeros_like(weight_R)
        if "head" in head.terms:
            parts = [
                head.predict(x, layer.local_expert_indices[expert])
                for expert, (x,) in per_expert(expert_R, self.experts, x_RH)
            ]
            score_R = score_R + torch.cat(parts) if parts else score_R
        return score_R < head.threshold

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).router.weight.device


def pass_plan(layers: list[int], experts: int, room: int) -> Iterator[dict[int, tuple[int, int]]]:
    """Which experts (first, last + 1) of which layers have their sums in each pass, at most `room` experts together."""
    wanted, used = {}, 0
    for number in layers:
        first = 0
        while first < experts:
            last = min(experts, first + room - used)
            wanted[number] = (first, last)
            used, first = used + last - first, last
            if used == room:
                yield wanted
                wanted, used = {}, 0
    if wanted:
        yield wanted
