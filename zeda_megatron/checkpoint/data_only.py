"""Megatron's loader on anybody's checkpoint: it unpickles, so it is given nothing that could be more than data."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from .torch_dist_metadata import METADATA_NAME

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's own switches. Its planner asks for `weights_only=False` for what is no tensor; the first overrules that."""


@contextmanager
def data_only(folder: Path, index: Metadata) -> Iterator[Path]:
    """A stand-in for `folder` to load from: links to its files, and an index written anew.

    Args:
        index: of that folder, as `read_metadata` made it. The pickle in the folder is not opened again: what one reader
            found harmless may be code to another.
    """
    with tempfile.TemporaryDirectory(prefix="zeda-index-") as made, plain_objects():
        view = Path(made)
        for path in folder.iterdir():
            if path.name != METADATA_NAME:
                (view / path.name).symlink_to(path.absolute())
        with open(view / METADATA_NAME, "wb") as file:
            pickle.dump(index, file, protocol=4)
        yield view


@contextmanager
def plain_objects() -> Iterator[None]:
    """While this lasts, `torch.load` makes tensors and plain objects only, whatever its caller or the user asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
