"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoint.state import barrier
from ..errors import UserError


@contextmanager
def new_folder(path: str | Path, flag: str) -> Iterator[Path]:
    """`with new_folder(path, "--save") as staging: ...` fills a folder beside `path`, then puts it in its place.

    All processes enter; rank 0 makes and moves folders. What stood at `path` goes when its successor is whole;
    after an exception the staging folder goes instead. Raises `UserError` at once if it cannot be made.
    """
    path = Path(os.path.abspath(path))
    staging, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "replaced"))
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from error
    try:
        barrier()
        yield staging
        barrier()
        if first:
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(staging, path)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise
