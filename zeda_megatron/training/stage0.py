"""Stage 0: the teacher answers prompts into the rollout file, one by one; a restart goes on where it stopped."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from ..config.generate import SamplingConfig
from ..config.options import Options
from ..data.prompts import load_prompts
from ..data.records import Prompt, Rollout
from ..data.tokenizers import ChatTokenizer
from ..distill.answers import RolloutEngine
from ..distill.served_answers import Served, Servers, server_command
from ..distill.server_pool import open_servers
from ..durable_file import write_atomically, writing
from ..errors import UserError, cut_short
from ..models.architecture import read_architecture
from ..models.load import load_weights
from ..moe.router_dials import set_dials
from ..regular_file import is_regular
from ..runtime.agreement import from_rank0, on_rank0, world_size
from ..runtime.lines_file import LinesFile
from ..runtime.terminal import ending, progress_bar, warn
from ..strict_json import read_json
from .build import (
    build_chunks,
    hf_folder,
    rollout_engine,
    run_tokenizer,
    teacher_id,
    teacher_source,
    zero_experts,
)
from .signals import StopRequest


@dataclass(frozen=True)
class Question:
    """One prompt that wants one answer."""

    key: str
    """Identity over restarts: hash of the messages, their occurrence and the sample number."""
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
    overlong: str = "error",
    say: Callable[[str], None] = lambda line: None,
) -> list[Question]:
    """All questions of the prompt files, or those of shard (i, n): of prompts i, i + n, i + 2n, ...

    A question has the same key, and so the same seed, however many shards there are, whatever is left out and whatever
    day the chat template writes: the key is made of the messages alone.

    Args:
        max_length: of the context; a prompt that leaves no room for an answer in it is overlong.
        overlong: `skip` leaves such prompts out and tells `say` how many.

    Raises:
        UserError: overlong prompts, all of them named; no prompt is left.
    """
    index, shards = shard
    questions, seen, long = [], {}, []
    number = 0
    for number, prompt in enumerate(load_prompts(files), 1):
        digest = hashlib.sha256(json.dumps(prompt.messages, sort_keys=True).encode()).hexdigest()[:16]
        occurrence = seen[digest] = seen.get(digest, -1) + 1
        if any(tokenizer.surely_longer(message["content"], max_length) for message in prompt.messages):
            long.append(f"{number} has far too many tokens")
            continue
        ids = tokenizer.chat_ids(prompt.messages, add_generation_prompt=True)
        if len(ids) >= max_length:
            long.append(f"{number} has {len(ids)} tokens")
            continue
        for sample in range(samples_per_prompt if (number - 1) % shards == index else 0):
            questions.append(Question(f"{digest}-{occurrence}-{sample}", prompt, ids))
    name = ", ".join(map(str, files))
    if long and overlong != "skip":
        others = (
            f" (so do {len(long) - 1} more: {cut_short(', '.join(long[1:]), 400)})" if len(long) > 1 else ""
        )
        raise UserError(
            f"{name} prompt {long[0]}; the context of {max_length} leaves no room for an answer{others}: shorten or "
            "remove it, or choose --overlong skip"
        )
    if long:
        say(
            f"{name}: {len(long)} of {number} prompts left out, as long as the context of {max_length} or longer"
        )
    if len(long) == number:
        raise UserError(f"{name}: no prompt is left, all are too long for a context of {max_length}")
    return questions


def begun_on(path: str | Path) -> datetime.date:
    """The day that a rollout file was begun on, which its other answers shall know too; today for a new one."""
    meta = _meta_of(path)
    if not is_regular(meta):
        return datetime.date.today()
    day = read_json(meta).get("day")
    try:
        return datetime.date.today() if day is None else datetime.date.fromisoformat(day)
    except (TypeError, ValueError):
        raise UserError(f'{meta}: "day" is not a date; repair it, or give another --rollout-path') from None


def _meta_of(path: str | Path) -> Path:
    return Path(f"{path}.meta.json")


class RolloutFile:
    """The jsonl file of answers. One process writes it.

    Beside it `<name>.meta.json` records what the answers were sampled with; a run with other settings refuses
    to append.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path = Path(path)
        self.meta = _meta_of(path)
        self.settings = settings
        self.answered: set[str] = set()

    def open(self) -> None:
        """Check settings, drop a torn last line, remember which questions are answered. Raises `UserError`."""
        with writing(f"--rollout-path {self.path}"):
            self._open()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if is_regular(self.path) and self.path.stat().st_size:
            if not is_regular(self.meta):
                raise UserError(
                    f"{self.path} exists but {self.meta.name} does not: give another --rollout-path"
                )
            before = read_json(self.meta)
            for name, value in self.settings.items():
                if before.get(name) != value:
                    was = cut_short(repr(before.get(name)))
                    raise UserError(
                        f"{self.path} was sampled with {name} = {was}, now it is {value!r}: "
                        "use the same, or give another --rollout-path"
                    )
        else:
            is_regular(self.meta)
            write_atomically(self.meta, json.dumps(self.settings, indent=2) + "\n")
        self.lines = LinesFile(
            self.path, "--rollout-path", _checked, itemgetter("key"), finite=False, ascii=False
        )
        self.answered = set(self.lines.lines)

    def append(self, lines: list[dict]) -> None:
        """Add answers and flush them to disk. Raises `UserError`; then none of them is there."""
        self.lines.append(lines)
        self.answered |= {line["key"] for line in lines}


def _checked(line: Any, where: str) -> dict[str, Any]:
    if not (isinstance(line, dict) and isinstance(line.get("key"), str)):
        raise UserError(f"{where}: not a line of stage 0; repair or move it")
    return line


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

    Prompts of similar length share a batch; those who get prompts of their own (`Deal`) take batches in turn.
    """
    rank0 = torch.distributed.get_rank() == 0
    todo = [[q.key for q in questions if q.key not in file.answered]] if rank0 else [None]
    torch.distributed.broadcast_object_list(todo, src=0)
    wanted = set(todo[0])
    pending = sorted((q for q in questions if q.key in wanted), key=lambda q: (len(q.ids), _stream(q), q.key))
    ranks, mine = engine.deal.places, engine.deal.place
    answered = 0
    with progress_bar(len(pending), "answer", "stage 0", progress) as bar:
        for start in range(0, len(pending), batch_size * ranks):
            batch = pending[start + mine * batch_size : start + (mine + 1) * batch_size]
            # About as many answers have ended elsewhere as here; what is on disk is counted behind every batch.
            goal = min(start + batch_size * ranks, len(pending))
            engine.on_answer = lambda goal=goal: bar.update(min(ranks, goal - bar.n))
            made = engine.generate([q.ids for q in batch], sampling, [_stream(q) for q in batch])
            lines = [_line(q, g, tokenizer) for q, g in zip(batch, made)] if engine.deal.speaks else []
            gathered = [None] * torch.distributed.get_world_size() if rank0 else None
            torch.distributed.gather_object(lines, gathered, dst=0)
            new = [line for part in gathered for line in part] if rank0 else []
            on_rank0(lambda new=new: file.append(new))
            answered += len(new)
            bar.update(answered - bar.n)
            if should_stop():
                break
    return answered


def ask_servers(
    questions: list[Question],
    servers: Servers,
    tokenizer: ChatTokenizer,
    sampling: SamplingConfig,
    file: RolloutFile,
    progress: bool = True,
    should_stop=lambda: False,
) -> int:
    """Have servers answer what is not answered yet, from one process. Every answer is on disk before the next ones are
    looked at. Returns how many were answered now."""
    pending = [q for q in questions if q.key not in file.answered]
    asked = [Served(q.prompt.messages, q.ids, _stream(q)) for q in pending]
    if not asked:
        return 0
    servers.check(asked[0])
    answered = 0
    with progress_bar(len(pending), "answer", "stage 0", progress) as bar:
        for made in servers.answers(asked, sampling):
            if made:
                file.append([_line(pending[number], answer, tokenizer) for number, answer in made])
            answered += len(made)
            bar.update(len(made))
            if should_stop():
                break
    return answered


def _stream(question: Question) -> int:
    """The random stream of its answer."""
    occurrence, sample = question.key.split("-")[1:]
    prompt = hashlib.sha256(json.dumps(question.ids).encode()).hexdigest()[:12]
    return int(prompt, 16) + int(occurrence) * 1_000_003 + int(sample)


def _line(question: Question, made, tokenizer: ChatTokenizer) -> dict:
    known = made.response_ids is not None
    text = tokenizer.decode(made.response_ids) if known else made.text
    rollout = Rollout(
        messages=[*question.prompt.messages, {"role": "assistant", "content": text}],
        label=question.prompt.label,
        kind=question.prompt.kind,
        prompt_ids=question.ids if known else None,
        response_ids=made.response_ids,
        finish_reason=made.finish_reason,
    )
    return {"key": question.key, **rollout.to_line()}


def sampling_settings(sampling: SamplingConfig, teacher: str) -> dict:
    """What must be equal for answers to stand in one file."""
    return {"teacher": teacher, **asdict(sampling)}


def prompt_settings(tokenizer: ChatTokenizer) -> dict:
    """The same of how prompts are written: tokenizer and template, and the day if the template writes it."""
    day = {"day": str(tokenizer.day)} if tokenizer.tells_the_day else {}
    return {"prompts_by": tokenizer.fingerprint()} | day


ROUND = 4
"""Prompts handed to the engine at a time, per slot: it refills slots from them; then their answers are written."""


def run_stage0(options: Options) -> int:
    """Answer all prompts of --data-path into --rollout-path. Returns the exit code."""
    generate = options.generate
    sampling = generate.sampling(options.optimizer.seed)
    if generate.asks_servers and world_size() > 1:
        raise UserError(
            "--rollout-engine openai asks from one process: start it without torchrun, or with one"
        )
    if not generate.asks_servers and not (
        options.distill.teacher_load or options.model.pretrained_checkpoint
    ):
        raise UserError("--pretrained-checkpoint is missing: stage 0 needs the teacher's weights")
    arch = read_architecture(hf_folder(options.model))
    rank0 = torch.distributed.get_rank() == 0
    tokenizer = run_tokenizer(options, from_rank0(begun_on(generate.rollout_path)))
    for line in tokenizer.notes:
        warn(line)
    questions = make_questions(
        options.data.data_path,
        tokenizer,
        arch.max_position_embeddings,
        generate.samples_per_prompt,
        (generate.shard_index, generate.num_shards),
        options.data.overlong,
        warn,
    )
    answer = _from_servers if generate.asks_servers else _from_weights
    with StopRequest() as stop:
        file, count = answer(options, arch, tokenizer, questions, sampling, stop.agreed)
    if rank0:
        left = sum(question.key not in file.answered for question in questions)
        start = options.model.pretrained_checkpoint
        begin = f" --pretrained-checkpoint {start}" if start else ""
        fit = f"zeda fit{begin} --data-path {file.path} --save DIR"
        then = "" if left else f"{fit}, or zeda train --stage 1 with the same flags"
        idle = "" if count or left else "nothing to do: "
        print(
            ending(f"{idle}{file.path}: {count} answers now, {len(file.answered)} in all, {left} left", then)
        )
        return options.run.stopped_exit_code if left else 0
    return 0


def _opened(
    options: Options, tokenizer: ChatTokenizer, sampling: SamplingConfig, teacher: str
) -> RolloutFile:
    generate = options.generate
    shard = f"{generate.shard_index} of {generate.num_shards}" if generate.num_shards > 1 else None
    settings = sampling_settings(sampling, teacher) | prompt_settings(tokenizer)
    file = RolloutFile(generate.rollout_path, settings | {"shard": shard})
    on_rank0(file.open)
    return file


def _from_servers(options, arch, tokenizer, questions, sampling, should_stop) -> tuple[RolloutFile, int]:
    """The teacher is a model that somebody serves; no weights are read here."""
    generate, context = options.generate, arch.max_position_embeddings
    longest = max((len(question.ids) for question in questions), default=0)
    length = min(longest + sampling.max_new_tokens, context)
    found = open_servers(generate, length, server_command(length))
    api, parallel = generate.rollout_api, generate.rollout_concurrency
    servers = Servers(found, tokenizer, context, arch.vocab_size, api, parallel, warn)
    file = _opened(options, tokenizer, sampling, f"served as {found[0].model}")
    progress = options.run.progress
    return file, ask_servers(questions, servers, tokenizer, sampling, file, progress, should_stop)


def _from_weights(options, arch, tokenizer, questions, sampling, should_stop) -> tuple[RolloutFile, int]:
    """The teacher is a checkpoint, run here on all ranks."""
    generate, source = options.generate, teacher_source(options)
    file = _opened(options, tokenizer, sampling, teacher_id(options))
    if from_rank0(all(question.key in file.answered for question in questions)):
        return file, 0  # without a look at the weights
    # Nothing is learned here, so a static checkpoint needs no word about the group loss.
    zero = replace(zero_experts(options.model, arch, source), group_loss_coeff=0.0)
    chunks = build_chunks(options, arch, zero)
    load_weights(chunks, source, "--pretrained-checkpoint", verify=options.run.verify_checkpoint)
    set_dials(chunks, zero_mask=True)  # the teacher is the static model
    engine = rollout_engine(
        generate, chunks, arch, zero, tokenizer, arch.max_position_embeddings, static=True
    )
    batch, progress = ROUND * generate.generate_batch_size, options.run.progress
    return file, answer_questions(questions, engine, tokenizer, sampling, file, batch, progress, should_stop)
