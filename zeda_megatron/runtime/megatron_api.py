"""Where Megatron-Core's versions differ, one function per difference; nothing here asks for a version number.

Run with 0.16.1 and 0.19.2: differences are told from what an object looks like.
"""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any


def accepted(function: Callable, **keywords: Any) -> dict[str, Any]:
    """Those keywords that a function takes: newer versions have more."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in known}


def moe_submodules(layer_spec):
    """The `MoESubmodules` of a transformer layer's spec; None for a dense layer.

    0.16 has a `ModuleSpec(MoELayer, submodules=...)` there, 0.19 a `functools.partial(MoELayer, submodules=...)`.
    """
    mlp = getattr(layer_spec.submodules, "mlp", None)
    submodules = _keyword(mlp, "submodules")
    return submodules if hasattr(submodules, "router") else None


def replace_experts(moe, stock: type, ours: type, **params: Any) -> bool:
    """Let `ours` take the place of `stock` experts in `MoESubmodules`; False if other experts are there.

    0.16 has a `ModuleSpec`, 0.19 a `functools.partial` of the class.
    """
    experts = moe.experts
    if isinstance(experts, partial):
        if experts.func is not stock:
            return False
        moe.experts = partial(ours, *experts.args, **{**experts.keywords, **params})
        return True
    if experts.module is not stock:
        return False
    experts.module, experts.params = ours, {**(experts.params or {}), **params}
    return True


@contextmanager
def results_stay_here() -> Iterator[None]:
    """For a checkpoint that this process waits for: its writer's results go through a queue of this process.

    Else each rank's first save starts a server for that queue, which takes seconds (it imports PyTorch), some hundred
    megabytes, and lives as long as the run. Only a writer that works in a child process needs it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    shared = getattr(module, "_results_queue", None)
    module._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        module._results_queue = shared


def mend_latent_attention() -> None:
    """Let latent attention be built where Transformer Engine is missing, on CPU and GPU.

    0.16.1 takes the mock in the place of `TELinear` for the real one, and `isinstance` then fails.
    """
    from megatron.core.transformer import multi_latent_attention as module

    if not isinstance(getattr(module, "TELinear", None), type):
        module.HAVE_TE = False


def queries_need_latents() -> bool:
    """Latent attention whose latents are normed must have latents of queries too.

    So in 0.19; 0.16 projects queries that have none without a norm, as the published models do.
    """
    return find_spec("megatron.core.transformer.mla_qk_norm_config") is not None


def _keyword(spec, name: str):
    if isinstance(spec, partial):
        return spec.keywords.get(name)
    return getattr(spec, name, None)
