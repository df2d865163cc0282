"""Switches that the routers of all layers share: the zero mask, the pick rule, w, the dial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .pick_rules import PickRule
from .stats import routers


def set_zero_mask(model_chunks, on: bool) -> None:
    """Switch the zero experts of all layers off (True: the model is the static one) or on (False)."""
    for router in routers(model_chunks):
        router.zero_mask = on


def set_pick_rule(model_chunks, rule: PickRule | None) -> None:
    """Give all layers a pick rule, or take it away."""
    for router in routers(model_chunks):
        router.pick_rule = rule


def set_zero_weight(model_chunks, value: float) -> None:
    """Give the group loss of all layers this w."""
    for router in routers(model_chunks):
        router.zero_weight = value


def set_loss_factor(model_chunks, value: float) -> None:
    """Multiply the losses that all layers attach."""
    for router in routers(model_chunks):
        router.loss_factor = value


def set_logit_bias(model_chunks, value: float) -> None:
    """Add a number to the logits of shared zero experts in all layers: the compute dial."""
    for router in routers(model_chunks):
        router.zero_logit_bias = value


@contextmanager
def zero_mask(model_chunks, on: bool = True) -> Iterator[None]:
    """`with zero_mask(model): ...` runs the static model inside a dynamic one."""
    before = [(router, router.zero_mask, router.pick_rule) for router in routers(model_chunks)]
    set_zero_mask(model_chunks, on)
    if on:
        set_pick_rule(model_chunks, None)
    try:
        yield
    finally:
        for router, mask, rule in before:
            router.zero_mask, router.pick_rule = mask, rule


@contextmanager
def evaluating(model_chunks, **attributes) -> Iterator[None]:
    """`with evaluating(chunks, return_hidden=True): ...` runs in evaluation mode, with these attributes on each chunk.

    All is as before afterwards, whatever happens inside.
    """
    chunks = model_chunks if isinstance(model_chunks, (list, tuple)) else [model_chunks]
    before = [(chunk, chunk.training, {n: getattr(chunk, n) for n in attributes}) for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
            for name, value in attributes.items():
                setattr(chunk, name, value)
        yield
    finally:
        for chunk, training, values in before:
            chunk.train(training)
            for name, value in values.items():
                setattr(chunk, name, value)
