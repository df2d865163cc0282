"""Options of answers: stage 0's by the teacher, stage 2's by the student. Each field is a flag and a YAML key."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ..errors import UserError
from .arguments import Amount, Count, Positive, Whole

ROLLOUT_ENGINES = ("builtin", "vllm", "openai")


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are sampled."""

    max_new_tokens: int = 256
    """Longest answer, the end token included."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is all."""
    seed: int = 1234
    """Seed of all random streams."""

    def __post_init__(self) -> None:
        for flag, ok in (
            (f"--max-new-tokens {self.max_new_tokens} must be at least 1", self.max_new_tokens >= 1),
            (f"--temperature {self.temperature} must not be negative", self.temperature >= 0),
            (f"--top-p {self.top_p} must be above 0 and at most 1", 0 < self.top_p <= 1),
            (f"--top-k {self.top_k} must not be negative", self.top_k >= 0),
        ):
            if not ok:
                raise UserError(flag)

    def seed_of(self, stream_id: int, bits: int = 63) -> int:
        """Seed of one answer's random stream, below 2**bits."""
        return (self.seed * 1_000_003 + stream_id) % 2**bits


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are sampled."""

    rollout_path: str | None = None
    """Stage 0: jsonl file that answers are appended to."""

    max_new_tokens: int = 256
    """Longest answer."""

    temperature: float = 1.0
    """0 is greedy (stage 0 only)."""

    top_p: float = 1.0
    """Nucleus sampling (stage 0 only)."""

    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is all (stage 0 only)."""

    num_shards: Count = 1
    """Stage 0: so many jobs share the prompts, each with a --rollout-path of its own; prompt i goes to shard i modulo
    this. Answers are those of one job that answers all."""

    shard_index: int = 0
    """Stage 0: which shard this job answers, from 0."""

    generate_batch_size: Count = 32
    """Answers under way at a time; the next prompt takes the place of one that has ended."""

    samples_per_prompt: Count = 1
    """Answers per prompt."""

    rollout_engine: Literal[ROLLOUT_ENGINES] = "builtin"
    """What samples answers: builtin (the model itself), vllm (in the training's processes; weights are handed over), or
    openai (servers: stage 0 any that speak OpenAI's protocol, stage 2 vLLM's, which get the student's weights)."""

    rollout_tensor_parallel_size: Count = 1
    """vllm: neighbouring processes that make up one engine; every engine answers prompts of its own."""

    rollout_url: list[str] | None = None
    """openai: addresses of servers that serve the same model, http://host:port/v1. OPENAI_API_KEY is their key."""

    rollout_model: str | None = None
    """openai: the name that they serve it under. Default: the only one they have."""

    rollout_api: Literal["tokens", "chat"] = "tokens"
    """openai: prompts go out as token ids (tokens: vLLM, SGLang), or as messages (chat: any provider)."""

    rollout_concurrency: Count = 64
    """openai: questions under way at each server."""

    rollout_timeout: Positive = 3600.0
    """openai: seconds to wait for one answer."""

    rollout_tries: Count = 6
    """openai: attempts at one answer while a server is busy or gone."""

    rollout_wait: Amount = 0.0
    """openai: seconds to wait for servers that are still starting."""

    rollout_weights: str | None = None
    """openai, stage 2: folder through which servers get weights; they see it under the same path. Default:
    rollout_weights in --save."""

    rollout_ahead: Whole = 0
    """openai, stage 2: 1 asks for the next round's answers while the student trains on this one's; they are of the
    student before that."""

    max_staleness: Whole | None = None
    """Stage 2: refuse settings under which answers may be more updates old than this."""

    rollout_batch_size: Whole = 0
    """Stage 2: prompts per round of rollouts. 0: as many as one step trains on, so every step has fresh answers."""

    truncated_answers: Literal["train", "mask"] = "train"
    """Stage 2: learn from answers that were cut off at --max-new-tokens too (train), or leave them out (mask)."""

    routing_replay: bool = False
    """Stage 2: the training pass takes the experts that the rollout took. Off: the built-in engine routes as training
    does, but for rounding."""

    def sampling(self, seed: int) -> SamplingConfig:
        """The sampler's settings."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_p, self.top_k, seed)

    @property
    def asks_servers(self) -> bool:
        """Answers come from elsewhere. In stage 0 no model runs in this process; in stage 2 the student does."""
        return self.rollout_engine == "openai"

    def validate(self, stage: str, global_batch_size: int) -> None:
        """Raise `UserError` naming the flag that cannot work."""
        self.sampling(0)
        if not 0 <= self.shard_index < self.num_shards:
            raise UserError(
                f"--shard-index {self.shard_index} must be from 0 to --num-shards - 1 ({self.num_shards - 1})"
            )
        if self.asks_servers:
            if not self.rollout_url:
                raise UserError(
                    "--rollout-url is missing: --rollout-engine openai asks servers (docs/on_policy.md)"
                )
        elif self.rollout_url:
            raise UserError("--rollout-url is for --rollout-engine openai")
        if self.rollout_ahead and not (stage == "2" and self.asks_servers):
            raise UserError(
                "--rollout-ahead is for stage 2 with servers (--rollout-engine openai): other engines answer on the "
                "devices that train"
            )
        if self.num_shards > 1 and stage != "0":
            raise UserError("--num-shards is for stage 0; --data-path takes the files of all shards")
        if self.rollout_engine == "vllm" and find_spec("vllm") is None:
            raise UserError(
                "--rollout-engine vllm needs vLLM, which is not installed here (docs/serving.md): use builtin"
            )
        if stage == "0" and not self.rollout_path:
            raise UserError("--rollout-path is missing: stage 0 appends its answers to that jsonl file")
        if stage == "2":
            self._validate_stage2(global_batch_size)
        elif self.routing_replay:
            raise UserError("--routing-replay is for stage 2: stored rollouts have no routed experts")

    def _validate_stage2(self, global_batch_size: int) -> None:
        if self.asks_servers and self.rollout_api != "tokens":
            raise UserError("--rollout-api chat is for stage 0: stage 2 asks in tokens")
        if self.asks_servers and self.routing_replay:
            raise UserError("--routing-replay: servers do not tell routed experts; use vllm or builtin")
        if self.rollout_ahead > 1:
            raise UserError(f"--rollout-ahead {self.rollout_ahead}: one round ahead is the most")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature} must be above 0: stage 2 samples")
        for flag, value, off in (("--top-p", self.top_p, 1.0), ("--top-k", self.top_k, 0)):
            if value != off:
                raise UserError(
                    f"{flag} {value} does not work in stage 2: the loss compares whole distributions, so answers must "
                    f"be sampled from the whole one; leave the flag out"
                )
        if not self.rollout_batch_size and global_batch_size % self.samples_per_prompt:
            raise UserError(
                f"--global-batch-size {global_batch_size} (answers per step) is not a multiple of "
                f"--samples-per-prompt {self.samples_per_prompt}"
            )
        answers = self.prompts_per_round(global_batch_size) * self.samples_per_prompt
        if answers % global_batch_size:
            raise UserError(
                f"--rollout-batch-size {self.rollout_batch_size} prompts give {answers} answers, which is not a "
                f"multiple of --global-batch-size {global_batch_size} (answers per step)"
            )
        if self.routing_replay and answers != global_batch_size:
            raise UserError(
                f"--routing-replay needs fresh answers for every step: --rollout-batch-size {self.rollout_batch_size} "
                "must be 0, or fill one --global-batch-size"
            )

        lag = self.lag(global_batch_size)
        if self.max_staleness is not None and lag > self.max_staleness:
            raise UserError(
                f"--max-staleness {self.max_staleness}: with --rollout-batch-size {self.rollout_batch_size} and "
                f"--rollout-ahead {self.rollout_ahead} answers are up to {lag} updates old"
            )

    def lag(self, global_batch_size: int) -> int:
        """Updates that the student has had since it gave the oldest answers that it trains on."""
        return self.steps_per_round(global_batch_size) * (1 + self.rollout_ahead) - 1

    def prompts_per_round(self, global_batch_size: int) -> int:
        """Prompts that one round of rollouts answers."""
        return self.rollout_batch_size or global_batch_size // self.samples_per_prompt

    def steps_per_round(self, global_batch_size: int) -> int:
        """Optimizer steps that one round of rollouts serves."""
        return self.prompts_per_round(global_batch_size) * self.samples_per_prompt // global_batch_size
