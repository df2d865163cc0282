"""Kernels of the experts that another distribution brings, found by its entry point: this project's are in kernels/.

Nothing needs them: without one the experts run on the products of `grouped_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import torch

GROUP = "zeda_megatron.expert_kernels"
"""Group of the entry points, each an `ExpertKernels`."""
NOT_INSTALLED = "the kernels are not installed: pip install ./kernels (kernels/README.md)"


@dataclass(frozen=True)
class ExpertKernels:
    """What a distribution registers."""

    library: Callable[[], Path | None]
    """The file with the compiled kernels; None if they were not built. Raises `UserError`."""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """What keeps the kernels from running on a GPU, or None."""
    mlp: Callable[..., torch.Tensor]
    """rows [R, H], probs [R], inclusive ends [E] int32 on the rows' device, E fc1 [2F, H], E fc2 [H, F] -> [R, H], with
    its gradient; on the CPU by a reference."""
    keep: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    """A list of E weights that `mlp` takes in less time when it comes again."""


@cache
def find() -> ExpertKernels | None:
    """What is installed, looked up once. Raises `UserError` if it cannot be imported."""
    for point in entry_points(group=GROUP):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{point.value} cannot be imported ({error}): pip install ./kernels again"
            ) from error
    return None


def installed() -> ExpertKernels:
    """`find`, where there is no way without them: raises `UserError`."""
    found = find()
    if found is None:
        raise UserError(NOT_INSTALLED)
    return found


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps `mlp` from running there, or None."""
    found = find()
    if found is None:
        return NOT_INSTALLED
    return found.why_not(device, dtype) if device.type == "cuda" else None
