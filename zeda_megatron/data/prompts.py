"""Prompt and rollout files (JSON lines), read through HF `datasets`.

The authors' released files are read unchanged, `{"prompt", "label"}` and `{"messages"}`; so are OpenAI's
`{"messages"}` as prompts and ShareGPT's `{"conversations"}`. Every line is checked while it is read, so that a
bad one is named by its number; the checked lines then live in an Arrow file of the `datasets` cache
(memory-mapped, shared by the ranks of a node, reused until a file changes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import UserError
from .jsonl import open_lines, read_lines
from .records import Prompt, Rollout, parse_prompt, parse_rollout

T = TypeVar("T", Prompt, Rollout)
Paths = str | Path | Sequence[str | Path]

_RULES = 2
"""Counts the changes of what is accepted: what an older version checked is checked again."""
_TEXT = datasets.Value("string")
_MESSAGES = [{"role": _TEXT, "content": _TEXT, "reasoning_content": _TEXT}]
_IDS = [datasets.Value("int32")]
_FEATURES = {
    Prompt: datasets.Features({"messages": _MESSAGES, "label": _TEXT, "kind": _TEXT}),
    Rollout: datasets.Features(
        {
            "messages": _MESSAGES,
            "label": _TEXT,
            "kind": _TEXT,
            "prompt_ids": _IDS,
            "response_ids": _IDS,
            "finish_reason": _TEXT,
        }
    ),
}
_PARSERS: dict[type, Callable[[Any, str], Any]] = {Prompt: parse_prompt, Rollout: parse_rollout}


class Records(Sequence[T], Generic[T]):
    """Lines of one or several files as `Prompt` or `Rollout` objects, by index; made on access."""

    def __init__(self, dataset: datasets.Dataset, record_type: type[T]):
        self.dataset = dataset
        """The underlying HF dataset (labels are JSON text there: Arrow columns have one type)."""
        self.record_type = record_type

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._build(self.dataset[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._build, self.dataset)

    def _build(self, row: dict[str, Any]) -> T:
        row = dict(row)
        row["messages"] = [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]
        row["label"] = json.loads(row["label"])
        return self.record_type(**row)


def load_prompts(paths: Paths, cache_dir: str | Path | None = None) -> Records[Prompt]:
    """Read prompt files.

    Args:
        paths: one JSON-lines file (plain or gzipped), or several that are read one after the other.
        cache_dir: folder of the Arrow copy; default: that of HF `datasets` (`HF_DATASETS_CACHE`).

    Raises:
        UserError: no such file, nothing in it, or a bad line ("FILE line N: ...").
    """
    return _load(paths, Prompt, cache_dir)


def load_rollouts(paths: Paths, cache_dir: str | Path | None = None) -> Records[Rollout]:
    """Read rollout files; arguments and errors as in `load_prompts`."""
    return _load(paths, Rollout, cache_dir)


def _load(paths: Paths, record_type: type[T], cache_dir: str | Path | None) -> Records[T]:
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    # Size and time are part of what `datasets` hashes: a changed file is read anew, not taken from the cache.
    stamps = [_RULES]
    for file in files:
        with open_lines(file):
            status = Path(file).stat()
            stamps.append((str(Path(file).resolve()), status.st_size, status.st_mtime_ns))
    try:
        with _quiet():
            dataset = datasets.Dataset.from_generator(
                _rows,
                features=_FEATURES[record_type],
                cache_dir=str(cache_dir) if cache_dir else None,
                gen_kwargs={
                    "names": tuple(map(str, files)),
                    "stamps": tuple(stamps),
                    "record_type": record_type,
                },
            )
    except (DatasetGenerationError, OSError) as error:
        # `datasets` wraps what the generator raises, and what goes wrong while it writes.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{cache_dir or datasets.config.HF_DATASETS_CACHE}: the checked lines cannot be kept there "
            f"({cause.strerror or cause}); set HF_DATASETS_CACHE to a folder that can be written"
        ) from error
    return Records(dataset, record_type)


def _rows(names: tuple[str, ...], stamps: tuple, record_type: type) -> Iterator[dict[str, Any]]:
    """Checked lines in the columns of `_FEATURES`; `stamps` only serves the cache key."""
    parse = _PARSERS[record_type]
    for name in names:
        for where, value in read_lines(name):
            record = parse(value, where)
            row = {field: getattr(record, field) for field in _FEATURES[record_type]}
            row["messages"] = [{"reasoning_content": None} | m for m in record.messages]
            row["label"] = json.dumps(record.label, ensure_ascii=False)
            yield row


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of `datasets`: an error shall be the only line."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
