"""What kernels/bench.py compares: one class per way to compute the experts, with the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn import functional as F

from zeda_kernels import experts, kernel_call
from zeda_kernels.expert_table import ExpertTable
from zeda_megatron.ops.grouped_mlp import grouped_mlp, lay_side_by_side, stacked


@dataclass(frozen=True)
class Shape:
    """Experts of one layer."""

    experts: int
    picks: int
    hidden: int
    width: int


class Inputs:
    """Random rows and weights of one case."""

    def __init__(self, device: str, shape: Shape, counts: torch.Tensor):
        self.shape, self.counts = shape, counts
        rows = int(counts.sum())

        def draw(*size: int, grad: bool = True) -> torch.Tensor:
            return (torch.randn(*size, device=device) * 0.1).bfloat16().requires_grad_(grad)

        self.ends = counts.cumsum(0).to(torch.int32).to(device)
        self.device_counts = counts.to(device)
        self.x, self.probs = draw(rows, shape.hidden), torch.rand(rows, device=device, requires_grad=True)
        # As a layer keeps them.
        self.fc1 = ExpertTable(draw(2 * shape.width, shape.hidden) for _ in range(shape.experts))
        self.fc2 = ExpertTable(draw(shape.hidden, shape.width) for _ in range(shape.experts))
        for weights in (self.fc1, self.fc2):
            lay_side_by_side(weights)
        self.dy, self.dout = draw(rows, 2 * shape.width, grad=False), draw(rows, shape.hidden, grad=False)
        self.main = [torch.zeros(2 * shape.width, shape.hidden, device=device) for _ in range(shape.experts)]

    def layer(self, backend: str) -> torch.Tensor:
        if backend == "kernels":  # as `grouped_mlp` calls them where they are installed
            ends = self.device_counts.cumsum(0).to(torch.int32)
            return experts.mlp(self.x, self.probs, ends, self.fc1, self.fc2)
        return grouped_mlp(self.x, self.probs, self.device_counts, self.fc1, self.fc2, backend)

    def forward_and_backward(self, backend: str) -> None:
        wanted = [self.x, self.probs, *self.fc1, *self.fc2]
        torch.autograd.grad(self.layer(backend), wanted, self.dout, materialize_grads=True)


class Own:
    """torch.ops.zeda: the kernels on a GPU, their reference on the CPU."""

    name = "kernels"

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.rows = experts.rows_on(inputs.x)

    def runs(self) -> dict[str, Callable]:
        i = self.inputs
        return {
            "forward": _quiet(lambda: self.rows.grouped_mm(i.x, i.fc1, i.ends)),
            "dgrad": _quiet(lambda: self.rows.grouped_dgrad(i.dy, i.fc1, i.ends)),
            "wgrad": _quiet(lambda: self.rows.grouped_wgrad_(i.main, i.dy, i.x, i.ends, True)),
            "fc1": _quiet(lambda: self.rows.moe_fc1(i.x, i.fc1, i.probs, i.ends)),
            "act": _quiet(lambda: self.rows.moe_act(i.x, i.fc1, i.probs, i.ends)),
            "layer": _quiet(lambda: i.layer("kernels")),
            "layer_backward": lambda: i.forward_and_backward("kernels"),
        }


class Unfused:
    """The same product and activation as `Own`, each a kernel of its own: what the fused fc1 replaces."""

    name = "unfused"

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.rows = experts.rows_on(inputs.x)

    def runs(self) -> dict[str, Callable]:
        i, rows = self.inputs, self.rows
        return {"fc1": _quiet(lambda: rows.swiglu(rows.grouped_mm(i.x, i.fc1, i.ends), i.probs, i.ends))}


class GroupedMm:
    """torch's own. Its weight gradient is bfloat16 and is added to the float32 one in a second pass. `layer` is what
    this project runs without kernels."""

    name = "grouped_mm"

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.stacked = stacked(inputs.fc1).detach()
        self.main = torch.zeros(self.stacked.shape, device=self.stacked.device)

    def _fc1(self) -> torch.Tensor:
        gate, up = F.grouped_mm(self.inputs.x, self.stacked.transpose(1, 2), offs=self.inputs.ends).chunk(
            2, -1
        )
        return (F.silu(gate) * up * self.inputs.probs[:, None]).bfloat16()

    def runs(self) -> dict[str, Callable]:
        i = self.inputs
        return {
            "forward": _quiet(lambda: F.grouped_mm(i.x, self.stacked.transpose(1, 2), offs=i.ends)),
            "dgrad": _quiet(lambda: F.grouped_mm(i.dy, self.stacked, offs=i.ends)),
            "wgrad": _quiet(lambda: self.main.add_(F.grouped_mm(i.dy.T, i.x, offs=i.ends))),
            "fc1": _quiet(self._fc1),
            "layer": _quiet(lambda: i.layer("grouped_mm")),
            "layer_backward": lambda: i.forward_and_backward("grouped_mm"),
        }


class Triton:
    """A plain Triton grouped GEMM, forward only."""

    name = "triton"

    def __init__(self, inputs: Inputs):
        from triton_grouped import grouped_mm

        self.inputs, self.run = inputs, grouped_mm
        self.stacked = stacked(inputs.fc1).detach()

    def runs(self) -> dict[str, Callable]:
        i = self.inputs
        return {"forward": _quiet(lambda: self.run(i.x, self.stacked, i.ends))}


class TransformerEngine:
    """Its GroupedLinear, which takes the counts on the host; the activation is torch's."""

    name = "te"

    def __init__(self, inputs: Inputs):
        from transformer_engine.pytorch import GroupedLinear

        shape = inputs.shape
        self.inputs, self.splits = inputs, inputs.counts.tolist()
        kind = {"bias": False, "params_dtype": torch.bfloat16, "device": inputs.x.device}
        self.fc1 = GroupedLinear(shape.experts, shape.hidden, 2 * shape.width, **kind)
        self.fc2 = GroupedLinear(shape.experts, shape.width, shape.hidden, **kind)

    def _fc1(self) -> torch.Tensor:
        gate, up = self.fc1(self.inputs.x, self.splits).chunk(2, dim=-1)
        return (F.silu(gate) * up * self.inputs.probs[:, None]).bfloat16()

    def _layer(self) -> torch.Tensor:
        return self.fc2(self._fc1(), self.splits)

    def _both(self) -> None:
        wanted = [self.inputs.x, self.inputs.probs, *self.fc1.parameters(), *self.fc2.parameters()]
        torch.autograd.grad(self._layer(), wanted, self.inputs.dout, allow_unused=True)

    def runs(self) -> dict[str, Callable]:
        return {
            "forward": _quiet(lambda: self.fc1(self.inputs.x, self.splits)),
            "fc1": _quiet(self._fc1),
            "layer": _quiet(self._layer),
            "layer_backward": self._both,
        }


def _quiet(run: Callable) -> Callable:
    """Without gradients."""

    def call():
        with torch.no_grad():
            run()

    return call


KINDS = (Own, Unfused, GroupedMm, Triton, TransformerEngine)
BACKENDS = tuple(kind.name for kind in KINDS)


def backends(
    device: str, shape: Shape, counts: torch.Tensor, names: list[str] | None = None
) -> tuple[list, dict[str, str]]:
    """Those of these names (default: all) that run here, on one set of inputs; and why the others do not."""
    inputs = Inputs(device, shape, counts)
    own = kernel_call.why_not(inputs.x.device, torch.bfloat16) if device == "cuda" else None
    reasons = {Own: own, Unfused: own}
    reasons |= {Triton: _lacks("triton", device), TransformerEngine: _lacks("transformer_engine", device)}
    wanted = [kind for kind in KINDS if names is None or kind.name in names]
    found = [kind(inputs) for kind in wanted if reasons.get(kind) is None]
    return found, {kind.name: reasons[kind] for kind in wanted if reasons.get(kind)}


def _lacks(package: str, device: str) -> str | None:
    if device != "cuda":
        return "needs a GPU"
    return None if find_spec(package) else f"{package} is not installed"
