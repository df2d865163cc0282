"""Warnings of libraries that a user can do nothing about."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable


def quiet() -> None:
    """Silence what a user can do nothing about, and nothing else."""
    # Megatron warns about every optional package it does not find; `tools/doctor.py` tells that better.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Collectives that Megatron calls have a new name in PyTorch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Its checkpoints use PyTorch's older interface: three warnings at every save and load.
    for module in (r"megatron\.core\.dist_checkpointing", r"torch\.distributed\.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Newer ones advise every user of GPTModel to use another class.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_no_advice)
    # TensorBoard's writer fails in a thread of its own; it raises the same at the next call, which tells it in a line.
    if not isinstance(threading.excepthook, _ButTensorBoard):
        threading.excepthook = _ButTensorBoard(threading.excepthook)


class _ButTensorBoard:
    """The hook that was there before, for all other threads."""

    def __init__(self, others: Callable[[threading.ExceptHookArgs], object]):
        self.others = others

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self.others(args)


def _no_advice(record: logging.LogRecord) -> bool:
    return "IS DEPRECATED" not in record.getMessage()
