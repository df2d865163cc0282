"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..durable_file import rename_durably, sync_all, writing
from .agreement import barrier, on_rank0, rank


@contextmanager
def new_folder(path: str | Path, flag: str) -> Iterator[Path]:
    """`with new_folder(path, "--save") as staging: ...` fills a folder beside `path`, then puts it in its place.

    All processes enter; rank 0 makes and moves folders. What stood at `path` goes when its successor is whole;
    after an exception the staging folder goes instead. Raises `UserError` on all ranks if a folder cannot be made or
    moved.
    """
    path = Path(os.path.abspath(path))
    staging, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "replaced"))

    def make() -> None:
        if old.exists() and not path.exists():  # killed between the two renames below
            os.replace(old, path)
        for left_over in (old, staging):
            if left_over.exists():
                shutil.rmtree(left_over)
        staging.mkdir(parents=True)

    def put_in_place() -> None:
        sync_all(staging)
        if path.exists():
            os.replace(path, old)
        rename_durably(staging, path)
        if old.exists():
            shutil.rmtree(old)

    try:
        _told(make, flag, path)
        yield staging
        barrier()
        _told(put_in_place, flag, path)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _told(do: Callable[[], None], flag: str, path: Path) -> None:
    with writing(f"{flag} {path}"):
        on_rank0(do)
