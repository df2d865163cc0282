"""Stage 2's rows: prompts, answered by the student as it is now, packed for one optimizer step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ...config.options import Options
from ...data.packing import EpochOrder, PackedBatch
from ...data.tokenizers import ChatTokenizer
from ...distill.answers import Answer, Asked, Round, roll_out
from ...distill.rollout import RolloutEngine
from ...distill.stage0 import Question
from ...runtime.process_groups import seconds_now
from ..build import Student
from ..feed import StepRows
from .answer_rows import AnswerRows
from .choose import rollout_engine

CALIBRATION_ROUNDS = 8
"""At most so many rounds of rollouts give the rows on which a threshold is set."""


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
            generate, student.chunks, student.arch, student.zero, tokenizer, longest
        )
        self.packing = AnswerRows(
            length,
            tokenizer.pad_id,
            options.sequence_multiple,
            options.parallel.row_multiple,
            generate.truncated_answers == "train",
        )
        config = student.chunks[0].config
        self.picks_shape = (config.num_layers, config.moe_router_topk)
        self._prompts_per_round = generate.prompts_per_round(options.optimizer.global_batch_size)
        self.prompts = self.answers = 0
        self.pending: list[Answer] = []

    def next_rows(self, step: int) -> StepRows:
        """Rows of the next step's answers; rolls out first if there are too few."""
        started, count = seconds_now(), self.options.optimizer.global_batch_size
        routing = None
        if len(self.pending) < count:
            made = self._roll_out(step)
            self.pending = [*self.pending, *made.answers]
            routing = made if self.options.generate.routing_replay else None
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
        before = self.prompts, self.answers
        tokens, sample = 0, []
        for _ in range(CALIBRATION_ROUNDS):
            made = self._roll_out(step=0).answers
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
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "pending": [asdict(answer) for answer in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts, self.answers = state["prompts"], state["answers"]
        self.pending = [Answer(**plain) for plain in state["pending"]]

    def _roll_out(self, step: int) -> Round:
        """Take the next prompts and answer them all."""
        asked, first = [], self.prompts
        self.prompts += self._prompts_per_round
        for position in range(first, self.prompts):
            question = self.questions[self.order[position]]
            for _ in range(self.options.generate.samples_per_prompt):
                asked.append(Asked(question.ids, self.answers, question.prompt.kind))
                self.answers += 1
        replay = self.options.generate.routing_replay
        return roll_out(self.engine, asked, self.sampling, step, replay, self.picks_shape)
