"""Where Megatron-Core's versions differ, one function per difference; nothing here asks for a version number.

Run with 0.16.1 and 0.19.2: differences are told from what an object looks like.
"""

from __future__ import annotations

import inspect
import logging
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


def write_or_say_why(write: Callable, *args: Any, **kwargs: Any) -> None:
    """Call a checkpoint's writer, after which its queue (the last of `args`) holds the results or what went wrong.

    0.19's writer of several files asserts that none has failed: the queue then gets the kind of the error without its
    words, or nothing at all.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer

    if not hasattr(Writer, "write_preloaded_data_multithread"):
        write(*args, **kwargs)
        return
    stock, failures = Writer.write_preloaded_data, []

    def noting(*args: Any, **kwargs: Any):
        made = stock(*args, **kwargs)
        if isinstance(made[1], Exception):
            failures.append(made[1])
        return made

    logger = logging.getLogger(Writer.__module__)
    logger.disabled = True  # whoever takes from the queue tells it
    Writer.write_preloaded_data = staticmethod(noting)
    try:
        write(*args, **kwargs)
    except AssertionError:
        if not failures:
            raise
    else:
        if failures:
            args[-1].get()
    finally:
        logger.disabled = False
        Writer.write_preloaded_data = staticmethod(stock)
    if failures:
        args[-1].put(failures[0])


def forget_recorded_losses() -> None:
    """What routers record for Megatron's log has places for the layers of the first model in this process.

    A model with more layers then fails. 0.16 keeps a dict, 0.19 an object of a module of its own.
    """
    if find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()


def mend_latent_attention() -> None:
    """Let latent attention be built where Transformer Engine is missing, on CPU and GPU.

    0.16.1 takes the mock in the place of `TELinear` for the real one, and `isinstance` then fails.
    """
    from megatron.core.transformer import multi_latent_attention as module

    if not isinstance(getattr(module, "TELinear", None), type):
        module.HAVE_TE = False


def latent_parts(config, submodules) -> dict[str, Any]:
    """Norms and projections that latent attention is built of, where Megatron asks it for them (0.19 does).

    Left alone it puts a norm before queries that have no latents; the published models have none there, nor has 0.16.
    """
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

    resolver = QKNormConfigResolver(config, submodules)
    resolver.has_q_lora = True  # so it leaves them alone; what it finds for latents of queries is not built
    parts = resolver.resolve()
    if config.q_lora_rank is None:
        parts["linear_q_proj"] = submodules.linear_q_proj
    return parts


@contextmanager
def one_head(config) -> Iterator[None]:
    """For the time in which a head of multi-token prediction is built: 0.19 gives it its layer only if one is counted.

    Otherwise none is: Megatron would compute its own loss on them.
    """
    counted, config.mtp_num_layers = config.mtp_num_layers, 1
    try:
        yield
    finally:
        config.mtp_num_layers = counted


def name_layer_of_head(head) -> None:
    """The decoder layer of a `MultiTokenPredictionLayer` is its `transformer_layer`, as in checkpoints of all versions.

    0.19 calls the module `mtp_model_layer` and renames it while it saves; its schedules ask for that name.
    """
    if hasattr(head, "mtp_model_layer"):
        head.transformer_layer = head.mtp_model_layer
        del head.mtp_model_layer
        object.__setattr__(head, "mtp_model_layer", head.transformer_layer)  # no second module


def _keyword(spec, name: str):
    if isinstance(spec, partial):
        return spec.keywords.get(name)
    return getattr(spec, name, None)
