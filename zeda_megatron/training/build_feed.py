"""From options to what feeds a run: tokenizer, files, packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from ..config.options import Options
from ..data.chat_tokenizer import RUN_DAY
from ..data.packing import PackedDataset
from ..data.rows import training_rows
from ..data.tokenizers import ChatTokenizer
from ..errors import UserError
from ..models.architecture import Architecture, read_architecture
from ..runtime.terminal import warn
from .build import Student, hf_folder, run_tokenizer
from .feed import Feed, StoredFeed
from .rollout_feed import RolloutFeed
from .stage0 import make_questions


def prepare_feed(options: Options) -> Callable[[Student], Feed]:
    """Stage 2: answers of the student to --data-path. Else the rollouts of --data-path. Equal on all ranks.

    The files are read here, before a large model is built in vain; the student comes later.
    Raises `UserError` naming file or flag.
    """
    arch = read_architecture(hf_folder(options.model))
    tokenizer = _tokenizer(options, arch)
    if options.model.stage == "2":
        longest = min(arch.max_position_embeddings, options.data.seq_length)
        questions = make_questions(
            options.data.data_path, tokenizer, longest, overlong=options.data.overlong, say=warn
        )
        return lambda student: RolloutFeed(options, questions, student, tokenizer)
    feed = StoredFeed(_dataset(options, tokenizer), options.optimizer.global_batch_size)
    return lambda student: feed


def data_facts(options: Options, feed: Feed) -> dict[str, Any]:
    """What decides what a run is fed, by flag: to say what differs where `Feed.fingerprint` does."""
    data, generate = options.data, options.generate
    facts = {
        "--data-path conversations": feed.size,
        "--seq-length": data.seq_length,
        "--pad-seq-to-mult": options.sequence_multiple,
        "--overlong": data.overlong,
        "--seed": options.optimizer.seed,
    }
    if options.model.stage == "2":
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "samples_per_prompt", "truncated_answers")
        facts |= {"--" + name.replace("_", "-"): getattr(generate, name) for name in names}
        facts["--rollout-batch-size"] = generate.prompts_per_round(options.optimizer.global_batch_size)
    return facts


def what_differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`--lr was 1, is 2, --seed was ...`; empty if nothing that both know differs."""
    return ", ".join(
        f"{flag} was {before[flag]}, is {value}"
        for flag, value in now.items()
        if flag in before and before[flag] != value
    )


def _tokenizer(options: Options, arch: Architecture) -> ChatTokenizer:
    tokenizer = run_tokenizer(options, RUN_DAY)
    for line in tokenizer.notes:
        warn(line)
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {arch.vocab_size} rows: "
            "give the tokenizer that belongs to the model with --tokenizer-model"
        )
    return tokenizer


def _dataset(options: Options, tokenizer: ChatTokenizer) -> PackedDataset:
    """Tokenise the rollouts and plan their packing."""
    data = options.data
    data_ranks = parallel_state.get_data_parallel_world_size()
    if options.optimizer.global_batch_size % data_ranks:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size} is not a multiple of the {data_ranks} "
            "data-parallel ranks"
        )
    stages = options.parallel.row_multiple
    if options.optimizer.global_batch_size // data_ranks % stages:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size}: the interleaved schedule wants a multiple of "
            f"--pipeline-model-parallel-size {stages} rows on each of the {data_ranks} data-parallel ranks"
        )
    context_ranks = options.parallel.context_parallel_size
    return training_rows(data, context_ranks, options.optimizer.seed, tokenizer, warn)
