"""Writing checkpoints: in the foreground, or in a child process while training goes on.

Whoever writes, a checkpoint gets its name only when all ranks have written, in this order: files, `metadata.json`,
`integrity.json`, what describes it, rename, tracker, deletion of old ones.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from ..durable_file import sync, sync_all, write_atomically
from ..errors import UserError
from ..runtime.agreement import on_rank0, rank
from ..runtime.megatron_api import accepted, results_stay_here, write_or_say_why
from ..runtime.worker import end_with_parent, is_lost_peer
from .folders import TRACKER, is_complete, iteration_of, iterations, set_aside, tracked
from .integrity import note_own_files, seal


class CheckpointSaver:
    """Writes the checkpoints of one run. All processes call every method, in the same order.

    Args:
        root: folder that gets `iter_*` folders and the tracker.
        keep: keep only so many `iter_*` folders; 0 keeps all.
        background: `save` returns when the state is copied; `poll` or `finish` must be called later.
    """

    def __init__(self, root: str | Path, keep: int = 0, background: bool = False):
        self.root, self.keep, self.background = Path(root), keep, background
        self._queue = AsyncCallsQueue()
        end_with_parent()
        self._partial: Path | None = None

    def folder(self, iteration: int) -> Path:
        """Where the checkpoint of a step lives."""
        return self.root / f"iter_{iteration:07d}"

    def save(self, iteration: int, state: dict[str, Any], describe: Callable[[], None] | None = None) -> None:
        """Save a sharded state dict. An unfinished save is waited for first.

        `describe` writes what stands beside the checkpoint. Rank 0 calls it before the checkpoint gets its name: one
        that is there is there with all that describes it.

        Raises:
            UserError: it (or the one before) cannot be written; names --save.
        """
        self.finish()
        final = self.folder(iteration)
        with self.told():
            self._partial = self._make_partial(final)
            # Newer versions would rather write with another package.
            own = accepted(dist_checkpointing.save, async_strategy="mcore")
            with contextlib.nullcontext() if self.background else results_stay_here():
                request = dist_checkpointing.save(state, str(self._partial), async_sharded_save=True, **own)
            request = _noting_files(request, self._partial)
            request.add_finalize_fn(partial(self._publish, self._partial, final, describe))
            if self.background:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Publish a checkpoint that is being written in the background, if all ranks are done."""
        with self.told():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for the background and publish what it wrote."""
        with self.told():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def abandon(self) -> None:
        """Stop writing in the background. For this process alone: the others may be gone."""
        for call in self._queue.async_calls:
            process = getattr(call.async_caller, "process", None)
            if process is not None:
                process.kill()
                process.join()
        self._queue.async_calls.clear()
        self._discard()

    def tidy(self) -> None:
        """Finish what a run had still to delete when it was killed; for one that saves nothing more."""

        def clean() -> None:
            self._remove_left_overs()
            newest = tracked(self.root)
            if newest is not None and is_complete(newest):
                self._remove_surplus(newest)

        with self.told():
            on_rank0(clean)

    def _remove_left_overs(self) -> None:
        for left_over in (*self.root.glob(".iter_*.partial"), *self.root.glob(".iter_*.deleted")):
            shutil.rmtree(left_over, ignore_errors=True)

    def _make_partial(self, final: Path) -> Path:
        """A fresh hidden folder. Its name is new each time: a writer that outlived its run must not meet it."""

        def make() -> Path:
            self._remove_left_overs()
            folder = self.root / f".{final.name}.{secrets.token_hex(4)}.partial"
            folder.mkdir(parents=True)
            return folder

        return on_rank0(make)

    def _publish(self, written: Path, final: Path, describe: Callable[[], None] | None) -> None:
        """Give a complete checkpoint its name, then delete what is not to be kept."""

        def publish() -> None:
            seal(written)
            sync_all(written)
            if describe is not None:
                describe()
            replaced = set_aside(final) if final.exists() else None
            os.replace(written, final)
            sync(self.root)
            write_atomically(self.root / TRACKER, str(iteration_of(final)))
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
            self._remove_surplus(final)

        on_rank0(publish)
        self._partial = None

    def _remove_surplus(self, final: Path) -> None:
        for folder in self._surplus(final):
            shutil.rmtree(set_aside(folder), ignore_errors=True)

    def _surplus(self, final: Path) -> list[Path]:
        """Folders beyond `keep`: first later steps, which a run that went back has left behind, then the oldest."""
        if not self.keep:
            return []
        others = [folder for folder in iterations(self.root) if folder != final]
        later = [folder for folder in others if iteration_of(folder) > iteration_of(final)]
        earlier = [folder for folder in others if folder not in later]
        return (later + earlier)[: max(len(others) - (self.keep - 1), 0)]

    def _discard(self) -> None:
        if self._partial is not None and rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._partial = None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Failures to write in --save become one line; an unfinished checkpoint is removed."""
        try:
            yield
        except CheckpointException as error:  # only rank 0 is told what happened
            cause = next(iter(error.failures.values()), ("another rank says why",))[0]
        except (OSError, EOFError, RuntimeError, CheckpointingException) as error:
            if is_lost_peer(error):
                raise
            cause = error
        else:
            return
        self.abandon()
        reason = first_line(cause).removeprefix("Worker failure: ")
        raise UserError(
            f"--save {self.root}: cannot be written ({reason}); the last complete checkpoint there is unharmed"
        ) from (cause if isinstance(cause, BaseException) else None)


def first_line(error: object, text: str | None = None) -> str:
    """What an exception says, at most one line of it."""
    text = str(error).strip() if text is None else text
    return text.splitlines()[0][:300] if text else type(error).__name__


def _noting_files(request: AsyncRequest, folder: Path) -> AsyncRequest:
    """The same request, whose writer notes size and hash of its files when it has written them."""
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(async_fn=partial(_write_and_note, request.async_fn, folder, rank(), os.getpid()))


def _write_and_note(write: Callable, folder: Path, writer: int, run: int, *args, **kwargs) -> None:
    if os.getpid() != run:  # Ctrl-C is for the run, which then ends this process
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    write_or_say_why(write, *args, **kwargs)
    with contextlib.suppress(OSError):  # a failure to write is told elsewhere; `seal` hashes what has no note
        note_own_files(folder, writer)
