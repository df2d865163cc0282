"""From options to what feeds a run: tokenizer, files, packing."""

from __future__ import annotations

from megatron.core import parallel_state

from ..data.conversation import tokenize_rollouts
from ..data.packing import PackedDataset
from ..data.prompts import load_rollouts
from ..data.tokenizers import ChatTokenizer, load_tokenizer
from ..errors import UserError
from .feed import Feed, StoredFeed
from .options import Options
from .rollout_feed import RolloutFeed
from .setup import Student, hf_folder


def build_feed(options: Options, student: Student) -> Feed:
    """Stage 2: answers of the student to --data-path. Else the rollouts of --data-path. Equal on all ranks.

    Raises `UserError` naming file or flag.
    """
    tokenizer = _tokenizer(options, student)
    if options.model.stage == "2":
        return RolloutFeed(options, student, tokenizer)
    return StoredFeed(_dataset(options, tokenizer), options.optimizer.global_batch_size)


def _tokenizer(options: Options, student: Student) -> ChatTokenizer:
    data = options.data
    tokenizer = load_tokenizer(
        data.tokenizer_model or hf_folder(options.model), data.tokenizer_type, data.chat_template_file
    )
    if tokenizer.vocab_size > student.arch.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {student.arch.vocab_size} rows: "
            "give the tokenizer that belongs to the model with --tokenizer-model"
        )
    return tokenizer


def _dataset(options: Options, tokenizer: ChatTokenizer) -> PackedDataset:
    """Tokenise the rollouts and plan their packing."""
    data = options.data
    samples = tokenize_rollouts(
        load_rollouts(data.data_path), tokenizer, data.seq_length, data.overlong, ", ".join(data.data_path)
    )
    data_ranks = parallel_state.get_data_parallel_world_size()
    if options.optimizer.global_batch_size % data_ranks:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size} is not a multiple of the {data_ranks} "
            "data-parallel ranks"
        )
    stages = options.parallel.pipeline_model_parallel_size
    if options.parallel.virtual_stages and options.optimizer.global_batch_size // data_ranks % stages:
        raise UserError(
            f"--global-batch-size {options.optimizer.global_batch_size}: the interleaved schedule wants a multiple of "
            f"--pipeline-model-parallel-size {stages} rows on each of the {data_ranks} data-parallel ranks"
        )
    return PackedDataset(
        samples, data.seq_length, tokenizer.pad_id, options.optimizer.seed, options.sequence_multiple
    )
