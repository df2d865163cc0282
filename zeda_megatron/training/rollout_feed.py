"""Stage 2's rows: prompts, answered by the student as it is now, packed for one optimizer step.

Tensors of routed experts change hands between ranks on the way, each sent only to those that need it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from megatron.core import parallel_state

from ..config.options import Options
from ..data.packing import EpochOrder, PackedBatch, PackedDataset, TokenSample, blank_row
from ..data.rows import filled_up, rank_part, split_over_context
from ..data.tokenizers import ChatTokenizer
from ..distill.answers import Answer, Asked, Generation, RolloutEngine, Round, roll_out
from ..runtime.agreement import from_rank0, on_rank0, rank
from ..runtime.process_groups import device, seconds_now
from ..runtime.terminal import told
from .build import Student, rollout_engine
from .feed import StepRows
from .kept_answers import KeptAnswers, student_id
from .stage0 import Question


@dataclass(frozen=True)
class AnswerRows:
    """How answers become rows."""

    seq_length: int
    """Tokens of a row."""
    pad_id: int
    """Token id of padding."""
    align: int = 1
    """Every sequence is padded to a multiple of this."""
    multiple: int = 1
    """The rows of a rank are a multiple of this: blank ones fill up."""
    train_truncated: bool = True
    """Whether answers that were cut off are learned from."""
    drawn: bool = False
    """Whether rows tell the log-probabilities that their answers were sampled with."""

    def learns(self, answer: Answer) -> bool:
        """Whether its tokens count in the loss."""
        return self.train_truncated or answer.finish_reason == "stop"

    def pack(self, answers: list[Answer], routing: Round | None = None) -> tuple[list[PackedBatch], float]:
        """This rank's rows (under context parallelism its part of them), equally many on every rank; all ranks call
        it with the same answers.

        Args:
            routing: the round that these answers are, if the rows shall carry its routed experts.

        Returns:
            The rows, and rows over rows with text on all ranks (`StepRows.padding_factor`).
        """
        samples = [
            TokenSample(
                answer.prompt_ids + answer.response_ids,
                [False] * len(answer.prompt_ids) + [self.learns(answer)] * len(answer.response_ids),
                answer.kind,
            )
            for answer in answers
        ]
        data = PackedDataset(samples, self.seq_length, self.pad_id, seed=0, align=self.align)
        numbers = [data.row_samples(row) for row in range(data.rows_in_epoch(0))]
        rows = [data[row] for row in rank_part(range(len(numbers)))]
        if self.drawn:
            rows = self._with_drawn(rows, numbers, answers)
        if routing is not None:
            lengths = [len(sample.tokens) for sample in samples]
            rows = self._with_picks(rows, numbers, lengths, routing)
        rows = filled_up(rows, len(numbers), blank_row(self.seq_length, self.pad_id), self.multiple)
        total = len(rows) * parallel_state.get_data_parallel_world_size()
        return split_over_context(rows), total / len(numbers)

    def _with_drawn(
        self, rows: list[PackedBatch], numbers: list[list[int]], answers: list[Answer]
    ) -> list[PackedBatch]:
        """Lay the log-probabilities where the sampled tokens are labels: one place before they are read."""
        made = []
        for row, group in zip(rows, rank_part(numbers), strict=True):
            drawn_S = torch.zeros(self.seq_length)
            for start, number in zip(row.cu_seqlens.tolist(), group):
                one = answers[number]
                first = start + len(one.prompt_ids) - 1
                drawn_S[first : first + len(one.logprobs)] = torch.tensor(one.logprobs)
            made.append(replace(row, drawn=drawn_S[None]))
        return made

    def _with_picks(
        self, rows: list[PackedBatch], numbers: list[list[int]], lengths: list[int], routing: Round
    ) -> list[PackedBatch]:
        """Lay the routed experts beside the tokens. An answer's last token was never fed: its picks are left open."""
        ranks = parallel_state.get_data_parallel_world_size()
        place = {number: row % ranks for row, group in enumerate(numbers) for number in group}
        inner, picks = routing.picks_shape, routing.picks
        if routing.home is not None:
            places = [place[i] for i in range(len(lengths))]
            shapes = [(length - 1, *inner) for length in lengths]
            picks = exchange(picks, routing.home, places, shapes, torch.int16)
        made = []
        for row, group in zip(rows, rank_part(numbers), strict=True):
            picks_SLK = torch.full((self.seq_length, *inner), -1, dtype=torch.int16)
            for start, number in zip(row.cu_seqlens.tolist(), group):
                picks_SLK[start : start + lengths[number] - 1] = picks[number]
            made.append(replace(row, picks=picks_SLK[None]))
        return made


def exchange(
    mine: dict[int, torch.Tensor],
    home: list[int],
    place: list[int],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> dict[int, torch.Tensor]:
    """Send numbered tensors from the ranks that have them to the ranks that need them; all ranks call it.

    Args:
        mine: number -> tensor, of those that this rank has.
        home: per number the rank that has it, among data- and context-parallel ranks.
        place: per number the data-parallel rank that needs it; all of its context-parallel ranks get it.
        shapes: per number its shape. dtype: of all.

    Returns:
        number -> tensor on the CPU, of those that this rank needs.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rank, ranks = group.rank(), group.size()
    size = parallel_state.get_context_parallel_world_size()  # they count fastest
    numbers = range(len(home))
    if ranks == 1:
        return {i: mine[i] for i in numbers}
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    sent = [[i for i in numbers if (home[i], place[i]) == (rank, other // size)] for other in range(ranks)]
    received = [
        [i for i in numbers if (home[i], place[i]) == (other, rank // size)] for other in range(ranks)
    ]
    # As bytes: not every backend knows small integers.
    parts = [mine[i].contiguous().view(torch.uint8).flatten() for some in sent for i in some]
    source = torch.cat([torch.empty(0, dtype=torch.uint8), *parts]).to(device())
    lengths, wanted = ([sum(sizes[i] for i in some) for some in groups] for groups in (sent, received))
    target = torch.empty(sum(wanted), dtype=torch.uint8, device=source.device)
    torch.distributed.all_to_all_single(target, source, wanted, lengths, group=group)
    order = [i for some in received for i in some]
    pieces = target.cpu().split([sizes[i] for i in order])
    return {i: piece.clone().view(dtype).view(shapes[i]) for i, piece in zip(order, pieces, strict=True)}


CALIBRATION_ROUNDS = 8
"""At most so many rounds of rollouts give the rows on which a threshold is set."""


@dataclass(frozen=True)
class _Opened:
    """A round that is on its way."""

    asked: list[Asked]
    """Its questions."""
    version: int
    """Updates that the student had had."""
    known: dict[int, Generation]
    """Answers that need nobody, by stream id."""
    student: str
    """Its id, where answers are kept."""

    @property
    def missing(self) -> list[Asked]:
        """Questions without an answer."""
        return [one for one in self.asked if one.stream_id not in self.known]

    def told(self, new: list[Answer]) -> list[Answer]:
        """All answers, with those to `missing`."""
        rest, answers = iter(new), []
        for one in self.asked:
            made = self.known.get(one.stream_id)
            answers.append(next(rest) if made is None else Answer.of(one, made, self.version))
        return answers


class RolloutFeed:
    """Answers sampled from the student a moment ago.

    Its state is small: how many prompts were taken, how many answers were begun (every answer has a random stream of
    its own, so that number is the sampler's state), and the answers that no step has trained on yet.

    Attributes:
        prompts: prompts taken so far, over all epochs. answers: answers begun so far.
        pending: answers that wait for their step.
        vocab_size: ids that can be sampled; the loss compares the distribution that answers come from.
    """

    def __init__(
        self, options: Options, questions: list[Question], student: Student, tokenizer: ChatTokenizer
    ):
        self.options, self.questions, self.size = options, questions, len(questions)
        generate, length = options.generate, options.data.seq_length
        self.tokenizer_fingerprint = tokenizer.fingerprint()
        longest = min(student.arch.max_position_embeddings, length)
        self.order = EpochOrder(len(questions), options.optimizer.seed)
        self.sampling = generate.sampling(options.optimizer.seed)
        self.vocab_size = min(tokenizer.vocab_size, student.arch.vocab_size)
        self.engine: RolloutEngine = rollout_engine(
            generate, student.chunks, student.arch, student.zero, tokenizer, longest, save=options.run.save
        )
        self._serves = generate.asks_servers
        self.packing = AnswerRows(
            length,
            tokenizer.pad_id,
            options.sequence_multiple,
            options.parallel.row_multiple,
            generate.truncated_answers == "train",
            options.loss().kind == "sampled_reverse_kl"
            and generate.lag(options.optimizer.global_batch_size) > 0,
        )
        config = student.chunks[0].config
        self.picks_shape = (config.num_layers, config.moe_router_topk)
        self._prompts_per_round = generate.prompts_per_round(options.optimizer.global_batch_size)
        self.prompts = self.answers = 0
        self.pending: list[Answer] = []
        self._ahead: _Opened | None = None
        self.chunks, save = student.chunks, options.run.save
        self._keeps = bool(save) and not generate.routing_replay  # picks are not on the disk
        self.kept = KeptAnswers(Path(save)) if self._keeps and rank() == 0 else None

    def next_rows(self, step: int) -> StepRows:
        """Rows of the next step's answers; rolls out first if there are too few."""
        started, count = seconds_now(), self.options.optimizer.global_batch_size
        routing = None
        if len(self.pending) < count:
            made = self._roll_out(step)
            self.pending = [*self.pending, *made.answers]
            routing = made if self.options.generate.routing_replay else None
        if self._wants_ahead(step):
            self._ask_ahead(step)
        now, self.pending = self.pending[:count], self.pending[count:]
        rows, padding_factor = self.packing.pack(now, routing)
        metrics = {
            "response_length": fmean(len(answer.response_ids) for answer in now),
            "truncated_share": fmean(answer.finish_reason == "length" for answer in now),
            "rollout_lag": float(max(step - answer.version for answer in now)),
            "consumed_prompts": float(self.prompts),
            "rollout_seconds": seconds_now() - started,
        }
        learned = [logp for answer in now if self.packing.learns(answer) for logp in answer.logprobs]
        if learned:
            metrics["rollout_logp"] = fmean(learned)
        return StepRows(rows, padding_factor, metrics)

    def calibration_rows(self, count: int) -> list[PackedBatch]:
        """Fresh answers, packed, until there are `count` rows of them or enough rounds were played."""
        self._collect_ahead()
        before = self.prompts, self.answers
        tokens, sample = 0, []
        for _ in range(CALIBRATION_ROUNDS):
            made = self._roll_out(step=0, keep=False).answers
            sample += made
            tokens += sum(len(answer.prompt_ids) + len(answer.response_ids) for answer in made)
            if tokens >= count * self.options.data.seq_length:
                break
        self.prompts, self.answers = before
        return self.packing.pack(sample)[0]

    def fingerprint(self) -> str:
        """Of prompts and sampling. The batch size of the engine may change: it only moves roundings."""
        generate = self.options.generate
        settings = asdict(self.sampling) | {
            "seq_length": self.options.data.seq_length,
            "round": [self._prompts_per_round, generate.samples_per_prompt],
            "truncated": generate.truncated_answers,
            "tokenizer": self.tokenizer_fingerprint,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for question in self.questions:
            digest.update(question.key.encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        self._collect_ahead()  # what is in a checkpoint is not asked twice
        if self._keeps:
            on_rank0(lambda: self.kept.forget())
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "pending": [asdict(answer) for answer in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts, self.answers = state["prompts"], state["answers"]
        self.pending = [Answer(**plain) for plain in state["pending"]]

    def _wants_ahead(self, step: int) -> bool:
        """Whether the next round is to be asked for now: this one has just begun, and steps will be left after it."""
        generate, size = self.options.generate, self.options.optimizer.global_batch_size
        if not generate.rollout_ahead or self._ahead:
            return False
        steps = len(self.pending) // size
        return steps <= generate.steps_per_round(size) and step + steps < self.options.optimizer.train_iters

    def _collect_ahead(self) -> None:
        if self._ahead:
            self.pending = [*self.pending, *self._roll_out(step=0).answers]

    def _ask_ahead(self, step: int) -> None:
        self._ahead = self._open(step)
        self._begin(self._ahead)

    def _roll_out(self, step: int, keep: bool = True) -> Round:
        """Answers to the next prompts, or to those that were asked ahead."""
        opened, begun = self._ahead or self._open(step, keep), self._ahead is not None
        self._ahead = None
        if not opened.missing:
            return Round(opened.told([]), None, {}, self.picks_shape)
        if self._serves and not begun:
            self._begin(opened)
        replay = self.options.generate.routing_replay
        made = roll_out(self.engine, opened.missing, self.sampling, opened.version, replay, self.picks_shape)
        if self._keeps and not self._serves:
            streams = [one.stream_id for one in opened.missing]
            on_rank0(lambda: self._keep(opened, zip(streams, made.answers, strict=True)))
        return replace(made, answers=opened.told(made.answers))

    def _open(self, step: int, keep: bool = True) -> _Opened:
        """Take the next prompts; some of them this student may have answered already, before the run was stopped."""
        asked, known, student = self._next_asked(), {}, ""
        if keep and self._keeps:
            if self.kept:
                student = student_id(self.chunks, self.fingerprint())
                known = self.kept.of(student, asked)
                if len(known) < len(asked) and not self._serves:
                    known = {}  # an engine rounds by what it answers together: a part of a round would not be the same
            known = from_rank0(known)
            if known and self.kept:
                told(f"{len(known)} of {len(asked)} answers are in {self.kept.path}")
        return _Opened(asked, step, known, student)

    def _begin(self, opened: _Opened) -> None:
        """Ask servers; what comes is kept at once."""
        missing = opened.missing
        prompts, streams = [one.prompt_ids for one in missing], [one.stream_id for one in missing]
        if missing:
            self.engine.begin(
                prompts, self.sampling, streams, lambda i, made: self._keep(opened, [(streams[i], made)])
            )

    def _keep(self, opened: _Opened, made: Iterable[tuple[int, Generation | Answer]]) -> None:
        if self.kept and opened.student:
            self.kept.keep(opened.student, opened.version, made)

    def _next_asked(self) -> list[Asked]:
        """Take the next prompts."""
        asked, first = [], self.prompts
        self.prompts += self._prompts_per_round
        for position in range(first, self.prompts):
            question = self.questions[self.order[position]]
            for _ in range(self.options.generate.samples_per_prompt):
                asked.append(Asked(question.ids, self.answers, question.prompt.kind))
                self.answers += 1
        return asked
