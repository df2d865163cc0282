"""Stage 0: the teacher answers prompts. Answers are appended one by one; a restart goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from ..data.prompts import load_prompts
from ..data.records import Prompt, Rollout
from ..data.tokenizers import ChatTokenizer
from ..errors import UserError
from .rollout import RolloutEngine
from .sampling import SamplingConfig


@dataclass(frozen=True)
class Question:
    """One prompt that wants one answer."""

    key: str
    """Identity over restarts: hash of the prompt, its occurrence and the sample number."""
    prompt: Prompt
    """As read."""
    ids: list[int]
    """Token ids of the prompt, up to where the answer begins."""


def make_questions(
    files: list[str],
    tokenizer: ChatTokenizer,
    max_length: int,
    samples_per_prompt: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> list[Question]:
    """All questions of the prompt files, or those of shard (i, n): of prompts i, i + n, i + 2n, ...

    A question has the same key, and so the same seed, however many shards there are. Raises `UserError` for a prompt
    that leaves no room for an answer.
    """
    index, shards = shard
    questions, seen = [], {}
    for number, prompt in enumerate(load_prompts(files), 1):
        ids = tokenizer.chat_ids(prompt.messages, add_generation_prompt=True)
        if len(ids) >= max_length:
            raise UserError(
                f"{', '.join(files)} prompt {number} has {len(ids)} tokens; the context of {max_length} leaves no "
                "room for an answer: shorten or remove it"
            )
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
        occurrence = seen[digest] = seen.get(digest, -1) + 1
        for sample in range(samples_per_prompt if (number - 1) % shards == index else 0):
            questions.append(Question(f"{digest}-{occurrence}-{sample}", prompt, ids))
    return questions


class RolloutFile:
    """The jsonl file of answers. One process writes it.

    Beside it `<name>.meta.json` records what the answers were sampled with; a run with other settings refuses
    to append.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path = Path(path)
        self.meta = self.path.with_name(self.path.name + ".meta.json")
        self.settings = settings
        self.answered: set[str] = set()

    def open(self) -> None:
        """Check settings, drop a torn last line, remember which questions are answered."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self.path.stat().st_size:
            if not self.meta.is_file():
                raise UserError(
                    f"{self.path} exists but {self.meta.name} does not: give another --rollout-path"
                )
            before = self._settings_before()
            for name, value in self.settings.items():
                if before.get(name) != value:
                    raise UserError(
                        f"{self.path} was sampled with {name} = {before.get(name)!r}, now it is {value!r}: "
                        "use the same, or give another --rollout-path"
                    )
            self._read()
        else:
            self.meta.write_text(json.dumps(self.settings, indent=2) + "\n")

    def _settings_before(self) -> dict:
        try:
            before = json.loads(self.meta.read_text())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{self.meta}: not readable; repair it, or give another --rollout-path")
        return before

    def _read(self) -> None:
        with open(self.path, "rb+") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # the process died while writing this line
                try:
                    self.answered.add(json.loads(line)["key"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path} line {number}: not a line of stage 0; repair or move it"
                    ) from None
                whole += len(line)
            file.truncate(whole)

    def append(self, lines: list[dict]) -> None:
        """Add answers and flush them to disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.answered.add(line["key"])
            file.flush()
            os.fsync(file.fileno())


def answer_questions(
    questions: list[Question],
    engine: RolloutEngine,
    tokenizer: ChatTokenizer,
    sampling: SamplingConfig,
    file: RolloutFile,
    batch_size: int,
    progress: bool = True,
    should_stop=lambda: False,
) -> int:
    """Answer what is not answered yet; all processes call it. Returns how many were answered now.

    `batch_size`: prompts that the engine is given at a time; their answers are then on disk.

    Prompts of similar length share a batch; data- and context-parallel ranks take batches in turn.
    """
    rank0 = torch.distributed.get_rank() == 0
    todo = [[q.key for q in questions if q.key not in file.answered]] if rank0 else [None]
    torch.distributed.broadcast_object_list(todo, src=0)
    wanted = set(todo[0])
    pending = sorted((q for q in questions if q.key in wanted), key=lambda q: (len(q.ids), q.key))
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    mine = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    # The ranks of one model (tensor-parallel ones, pipeline stages) know the same answers.
    speaks = (
        parallel_state.get_tensor_model_parallel_rank()
        == parallel_state.get_pipeline_model_parallel_rank()
        == 0
    )
    answered = 0
    bar = tqdm(total=len(pending), unit="answer", file=sys.stderr, disable=not (rank0 and progress))
    for start in range(0, len(pending), batch_size * ranks):
        batch = pending[start + mine * batch_size : start + (mine + 1) * batch_size]
        made = engine.generate(
            [q.ids for q in batch], sampling, [int(q.key[:12], 16) + _sample(q) for q in batch]
        )
        lines = [_line(q, g, tokenizer) for q, g in zip(batch, made)] if speaks else []
        gathered = [None] * torch.distributed.get_world_size() if rank0 else None
        torch.distributed.gather_object(lines, gathered, dst=0)
        if rank0:
            new = [line for part in gathered for line in part]
            file.append(new)
            answered += len(new)
            bar.update(len(new))
        if should_stop():
            break
    bar.close()
    return answered


def _sample(question: Question) -> int:
    occurrence, sample = question.key.split("-")[1:]
    return int(occurrence) * 1_000_003 + int(sample)


def _line(question: Question, made, tokenizer: ChatTokenizer) -> dict:
    text = tokenizer.decode(made.response_ids)
    rollout = Rollout(
        messages=[*question.prompt.messages, {"role": "assistant", "content": text}],
        label=question.prompt.label,
        kind=question.prompt.kind,
        prompt_ids=question.ids,
        response_ids=made.response_ids,
        finish_reason=made.finish_reason,
    )
    return {"key": question.key, **rollout.to_line()}


def sampling_settings(sampling: SamplingConfig, teacher: str) -> dict:
    """What must be equal for answers to stand in one file."""
    return {"teacher": teacher, **asdict(sampling)}
