"""Answers of stage 2 since the last checkpoint, on disk: a run that was killed does not ask for them again.

Sampling is the larger part of a step. A resumed run takes the steps after its checkpoint once more, with the same
weights and random streams, so an answer that is known needs no engine. Known is only what these weights gave: every
line says whose it is.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint.folders import iteration_of, iterations
from ..distill.answers import Answer, Asked, Generation
from ..durable_file import append_whole, write_atomically, writing
from ..strict_json import is_int, is_number

NAME = "rollout_answers.jsonl"
SAMPLE = 4096
"""Numbers of each parameter that tell a student from another."""


def student_id(chunks: list[torch.nn.Module], settings: str) -> str:
    """Tells these weights (of this rank) under these settings of sampling from all others."""
    digest = hashlib.sha256(settings.encode())
    trained = [p.detach().flatten()[:SAMPLE] for c in chunks for p in c.parameters() if p.requires_grad]
    for dtype in sorted({part.dtype for part in trained}, key=str):
        numbers = torch.cat([part for part in trained if part.dtype == dtype])
        digest.update(numbers.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class KeptAnswers:
    """The file; on rank 0 alone.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self._lock = threading.Lock()
        self._there: dict[tuple[str, int], Generation] | None = None

    def of(self, student: str, asked: list[Asked]) -> dict[int, Generation]:
        """Those of these questions that this student has answered already, by stream id."""
        if self._there is None:
            self._there = self._read()
        found = {one.stream_id: self._there.get((student, one.stream_id)) for one in asked}
        return {stream: made for stream, made in found.items() if made is not None}

    def keep(self, student: str, version: int, made: Iterable[tuple[int, Generation | Answer]]) -> None:
        """Add answers with their stream ids, all in one write. May be called from any thread."""
        lines = [
            {
                "student": student,
                "version": version,
                "stream": stream_id,
                "ids": one.response_ids,
                "logprobs": one.logprobs,
                "finish": one.finish_reason,
            }
            for stream_id, one in made
        ]
        # The newline comes first: what a kill has cut off spoils no other line.
        text = "".join("\n" + json.dumps(line, separators=(",", ":")) for line in lines)
        with self._lock, writing(str(self.path)):
            append_whole(self.path, text.encode())

    def forget(self) -> None:
        """Drop what no checkpoint of the folder could ask for again."""
        kept = iterations(self.folder)
        if not kept or not self.path.exists():
            return
        first = iteration_of(kept[0])
        with self._lock, writing(str(self.path)):
            lines = self.path.read_text().splitlines(keepends=True)
            wanted = [line for line in lines if _version(line) >= first]
            if len(wanted) < len(lines):
                write_atomically(self.path, "".join(wanted))

    def _read(self) -> dict[tuple[str, int], Generation]:
        try:
            lines = self.path.read_text(errors="replace").splitlines()
        except OSError:
            return {}
        return dict(made for made in map(_answer, lines) if made is not None)


def _fields(line: str) -> dict | None:
    try:
        found = json.loads(line)
    except ValueError:  # cut off by a kill
        return None
    return found if isinstance(found, dict) else None


def _version(line: str) -> int:
    """-1 for a line that says none."""
    version = (_fields(line) or {}).get("version")
    return version if is_int(version) else -1


def _answer(line: str) -> tuple[tuple[str, int], Generation] | None:
    """What a line says; None for one that says nothing whole."""
    said = _fields(line) or {}
    ids, logprobs, finish = said.get("ids"), said.get("logprobs"), said.get("finish")
    whole = (
        isinstance(ids, list)
        and isinstance(logprobs, list)
        and 0 < len(ids) == len(logprobs)
        and all(is_int(one) and one >= 0 for one in ids)
        and all(is_number(one) for one in logprobs)
        and finish in ("stop", "length")
        and isinstance(said.get("student"), str)
        and is_int(said.get("stream"))
    )
    return ((said["student"], said["stream"]), Generation(ids, logprobs, finish)) if whole else None
