"""Files written side by side by several threads, each hashed on its way, and not written again after a break.

Threads are enough: reading, hashing, copying and writing all leave Python's lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from tqdm import tqdm

from ..checkpoint.integrity import compare_file
from ..config.zero_experts import ZeroExpertConfig
from ..durable_file import write_atomically
from ..runtime.terminal import progress_bar
from ..runtime.whole_folder import Staging
from .bits import raw

TEMPORARY = ".unfinished"


class File(Protocol):
    """One file to be written."""

    name: str
    """Path below the folder."""

    nbytes: int
    """How long it will be, nearly."""


@dataclass(frozen=True)
class Written:
    """A finished file."""

    name: str
    """Path below the folder."""
    size: int
    """Bytes."""
    sha256: str
    """Hash of the file."""
    facts: Any
    """What the loop's body returned, as JSON: a later run gets it from a note."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    tensors: int
    """Tensors written (of the target's format)."""
    nbytes: int
    """Their size."""
    zero: ZeroExpertConfig
    """Zero experts of the result."""


class Stopped(Exception):
    """Another thread has failed; its reason is the one to tell."""


class FileStream:
    """What is written to: counts, hashes and reports every piece."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]):
        self._file, self._report, self._digest, self._size = file, report, hashlib.sha256(), 0
        self.failure: OSError | Stopped | None = None
        """Why nothing more was written: PyTorch's writer hides it behind an error of its own."""

    def write(self, data) -> int:
        """Append bytes (anything with a buffer)."""
        view = memoryview(data).cast("B")
        try:
            self._report(len(view))
            self._digest.update(view)
            self._file.write(view)
        except (OSError, Stopped) as error:
            self.failure = error
            raise
        self._size += len(view)
        return len(view)

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """Append the bytes of a tensor."""
        self.write(raw(tensor).numpy())

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Part of a file's interface; data go to disk when the file is done."""

    def finish(self) -> tuple[int, str]:
        """Put everything on the disk; returns size and SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._size, self._digest.hexdigest()


class FileWriter:
    """Writes all files of a folder that are not there yet.

    Args:
        staging: where to.
        files: what; the order decides which note belongs to which.
        workers: threads.
        title: of the progress bar.
        progress: show it.
    """

    def __init__(
        self, staging: Staging, files: Sequence[File], workers: int, title: str, progress: bool = True
    ):
        self._staging, self._files, self._workers = staging, files, workers
        self._title, self._progress = title, progress
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._bar: tqdm | None = None
        self._notes = [self._noted(number) for number in range(len(files))]
        self._tidy()

    def missing_bytes(self) -> int:
        """What is still to be written, nearly."""
        return sum(file.nbytes for file, note in zip(self._files, self._notes) if note is None)

    def run(self, write: Callable[[Any, FileStream], Any]) -> list[Written]:
        """Write what is missing, look at what is there; the results have the order of the files.

        Args:
            write: the loop's body. It gets a file and the stream to write it to, and returns facts about it as JSON;
                the same file must always get the same bytes.

        Raises:
            Whatever it first raised; the other threads are stopped.
        """
        total = sum(file.nbytes for file in self._files)
        with (
            progress_bar(total, "B", self._title, self._progress, unit_scale=True) as self._bar,
            ThreadPoolExecutor(self._workers, self._title) as pool,
        ):
            futures = [pool.submit(self._one, number, write) for number in range(len(self._files))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # after Ctrl-C too
                unfinished = not all(future.done() for future in futures)
                if unfinished:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
        return self._results(futures)

    @staticmethod
    def _results(futures: list[Future]) -> list[Written]:
        failures = [f.exception() for f in futures if not f.cancelled() and f.exception() is not None]
        reasons = [failure for failure in failures if not isinstance(failure, Stopped)]
        if reasons:
            raise reasons[0]
        return [future.result() for future in futures]

    def _one(self, number: int, write: Callable[[Any, FileStream], Any]) -> Written:
        try:
            self._report(0)
            return self._finished(number, write)
        except BaseException:
            self._stop.set()
            raise

    def _finished(self, number: int, write: Callable[[Any, FileStream], Any]) -> Written:
        file, note = self._files[number], self._notes[number]
        path = self._staging.work / file.name
        if note is not None and compare_file(path, note.size, note.sha256, "hash") is None:
            self._report(file.nbytes)
            return note
        with self._written(path) as stream:
            facts = write(file, stream)
            size, sha256 = stream.finish()
        done = Written(file.name, size, sha256, facts)
        write_atomically(self._note_path(number), json.dumps(vars(done)) + "\n")
        return done

    @contextlib.contextmanager
    def _written(self, path: Path) -> Iterator[FileStream]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY)
        with temporary.open("wb", buffering=1 << 20) as file:
            stream = FileStream(file, self._report)
            try:
                yield stream
            except Exception:
                if stream.failure is not None:
                    raise stream.failure from None
                raise
        os.replace(temporary, path)

    def _report(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._bar.update(nbytes)

    def _note_path(self, number: int) -> Path:
        return self._staging.notes / f"{number:05d}.json"

    def _noted(self, number: int) -> Written | None:
        try:
            done = Written(**json.loads(self._note_path(number).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        path = self._staging.work / done.name
        is_there = path.is_file() and path.stat().st_size == done.size
        return done if done.name == self._files[number].name and is_there else None

    def _tidy(self) -> None:
        """Remove whatever an earlier run has left besides finished files."""
        keep = {self._staging.work / note.name for note in self._notes if note is not None}
        for path in self._staging.work.rglob("*"):
            if path not in keep and not path.is_dir():
                path.unlink()
