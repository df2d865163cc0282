"""What collectives of the expert-parallel ranks carry: a dispatch mode that sees them, backward passes too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

_c10d = torch.ops.c10d


@dataclass(frozen=True)
class Message:
    """One collective call, as this rank sees it."""

    operator: str
    """all_to_all, all_gather or reduce_scatter."""
    backward: bool
    """Called while gradients are computed."""
    shape: tuple[int, ...]
    """Of the tensor that was handed over."""
    bytes: int
    """Bytes that were handed over."""
    sent: int
    """Bytes of them that leave this rank (for all_gather: to all the others)."""


class Traffic(TorchDispatchMode):
    """`with Traffic([group]) as traffic: step()` fills `traffic.messages` with the calls on these groups.

    Nothing is patched: torch hands every operator to the mode before it runs. Raises `RuntimeError` for a
    collective on these groups that it cannot count.
    """

    def __init__(self, groups: list[ProcessGroup]):
        super().__init__()
        self.groups = groups
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func, args) -> None:
        group = next((g for g in map(_group, args) if g is not None and g in self.groups), None)
        if group is None:
            return
        if func is _c10d.alltoall_base_.default:
            tensor, splits = args[1], args[4]
            share_kept = _kept(splits, group)
            self._add("all_to_all", tensor, _bytes(tensor) * (1 - share_kept))
        elif func is _c10d._allgather_base_.default:
            self._add("all_gather", args[1], _bytes(args[1]) * (group.size() - 1))
        elif func is _c10d._reduce_scatter_base_.default:
            self._add("reduce_scatter", args[1], _bytes(args[1]) * (1 - 1 / group.size()))
        else:
            raise RuntimeError(f"{func} runs on an expert-parallel group and is not counted here")

    def _add(self, operator: str, tensor: torch.Tensor, sent: float) -> None:
        # Only inside autograd's engine is there a current graph task.
        backward = torch._C._current_graph_task_id() != -1
        shape, size = tuple(tensor.shape), _bytes(tensor)
        self.messages.append(Message(operator, backward, shape, size, round(sent)))


def _group(value) -> ProcessGroup | None:
    """The process group in an operator's argument."""
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return ProcessGroup.unbox(value)
    except RuntimeError:  # a ReduceOp
        return None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kept(splits: list[int], group: ProcessGroup) -> float:
    """Share of an all-to-all that stays on this rank; no splits means equal ones."""
    if not splits:
        return 1 / group.size()
    return splits[group.rank()] / max(sum(splits), 1)
