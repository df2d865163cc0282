"""A whole tiny world on disk: an HF model with tokenizer, its Megatron checkpoints, rollouts and prompts."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = "one two three red green blue cat dog bird runs sleeps eats the a and then 1 2 3 4 5 6 7 8 9".split()
MODEL = {"vocab_size": 272, "max_position_embeddings": 256}
"""Bytes, three markers and some rows of padding that no tokenizer knows."""


@dataclass(frozen=True)
class World:
    """Paths of everything."""

    hf: Path
    """Hugging Face folder: weights, config, byte tokenizer with a chat template."""
    static: Path
    """Megatron checkpoint without zero experts."""
    dynamic: Path
    """The same with 4 zero experts."""
    rollouts: Path
    """Conversations (jsonl)."""
    prompts: Path
    """Questions (jsonl)."""
    heldout: Path
    """Conversations that are in no rollout (jsonl)."""


def make_world(folder: Path, model=tiny.hf_model, **changes) -> World:
    """Write the files; `model` makes the Hugging Face model (`tiny.hf_model`, `tiny.glm_model`), `changes` are its
    config keys."""
    from zeda_megatron.convert.hf_to_megatron import hf_to_megatron

    files = ("rollouts.jsonl", "prompts.jsonl", "heldout.jsonl")
    world = World(*(folder / name for name in ("hf", "static", "dynamic", *files)))
    model(std=0.1, **(MODEL | changes)).save_pretrained(world.hf)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|pad|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    ).save_pretrained(world.hf)
    hf_to_megatron(world.hf, world.static)
    hf_to_megatron(world.hf, world.dynamic, num_zero_experts=4)
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    def conversations(number: int) -> str:
        rows = [{"role": "user", "content": text(draw.randint(1, 4))} for _ in range(number)]
        return "".join(
            json.dumps({"messages": [row, {"role": "assistant", "content": text(draw.randint(1, 12))}]})
            + "\n"
            for row in rows
        )

    world.rollouts.write_text(conversations(60))
    world.prompts.write_text(
        "".join(json.dumps({"prompt": text(i % 5 + 1), "label": i}) + "\n" for i in range(9))
    )
    world.heldout.write_text(conversations(20))
    return world


def options(world: World, *flags: str, **values):
    """Options of a stage 1 run of the dynamic model, or of stage 2; keyword arguments are fields.

    With `eval_rows` it is evaluated on the held-out conversations.
    """
    from zeda_megatron.config.arguments import parse
    from zeda_megatron.config.options import GROUPS, Options
    from zeda_megatron.training.main import check_machine

    fields = {
        "pretrained_checkpoint": world.dynamic,
        "data_path": world.rollouts,
        "seq_length": 128,
        "global_batch_size": 4,
        "train_iters": 6,
        "lr": 1e-2,
        "loss_chunk_tokens": 32,
    }
    if values.get("stage") == "2":
        fields |= {"data_path": world.prompts, "teacher_load": world.static, "max_new_tokens": 12}
    fields |= values
    if "eval_rows" in values:
        fields.setdefault("eval_data_path", world.heldout)
    argv = ["--no-progress", *flags]
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            argv += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    made = Options(**parse(argv, GROUPS))
    made.validate()
    check_machine(made)
    return made


def start(world: World, *flags: str, **values):
    """A `TrainingRun`, ready to go, in this process."""
    from zeda_megatron.training.loop import TrainingRun

    return TrainingRun(options(world, *flags, **values))


def fit(world: World, out: Path, **values) -> dict:
    """Fit paired zero experts to the static model, silent ones to norms unless fields of `FitOptions` say otherwise.
    Returns what fit.json says."""
    from zeda_megatron.config.fit import FitOptions
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.fit.run import HeadFit

    fields = {
        "pretrained_checkpoint": str(world.static),
        "data_path": [str(world.rollouts)],
        "save": str(out),
        "fit_target": "norm",
        "zero_experts_type": "zero",
        "fit_rows": 5,
        "held_out_rows": 2,
        "seq_length": 128,
    }
    made, alone = FitOptions(**fields | values), ParallelConfig()
    made.validate(alone)
    assert HeadFit(made, alone).run() == 0
    return json.loads((out / "fit.json").read_text())


def read_metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock or on the process."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "peak_memory_gib")
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in lines]


def tensors(value, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by path."""
    found = {}
    if torch.is_tensor(value):
        found[prefix] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            found |= tensors(item, f"{prefix}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            found |= tensors(item, f"{prefix}/{i}")
    return found


def parameters(run) -> dict[str, torch.Tensor]:
    """Copies of the weights of a run of one stage."""
    return {name: p.detach().clone() for name, p in run.student.chunks[0].named_parameters()}


def snapshot(run) -> dict[str, torch.Tensor]:
    """Copies of all weights and optimizer states of a run."""
    state = {
        "optimizer": run.optimizer.state_dict(),
        "model": [chunk.state_dict() for chunk in run.student.chunks],
    }
    return {name: tensor.detach().clone() for name, tensor in tensors(state).items()}


def run_on_pairs(world: World, seq_length: int, scope: str, **more):
    """A run with a strong group loss, and this rank's rows of four sequences of 64 tokens each.

    With seq_length 64 a row is one sequence, with 128 it holds two: what two data-parallel ranks see at a time.
    """
    from megatron.core import parallel_state

    from zeda_megatron.data.packing import PackedDataset, TokenSample

    draw = torch.Generator().manual_seed(0)
    samples = [
        TokenSample(torch.randint(0, 250, (64,), generator=draw).tolist(), [i >= first for i in range(64)])
        for first in (5, 60, 30, 1)
    ]
    rows = PackedDataset(samples, seq_length, pad_id=0, seed=1)
    values = {"group_loss_scope": scope, "moe_aux_loss_coeff": 20.0, "clip_grad": 0.0, "overlong": "skip"}
    run = start(world, seq_length=seq_length, **values, **more)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return run, [rows[i] for i in range(rank, 256 // seq_length, ranks)]


def given_out(student) -> dict[str, str]:
    """A hash of every weight that `LiveWeights` gives, by its Hugging Face name, in its order."""
    from zeda_megatron.models.live_weights import LiveWeights

    return {key: bits_of(part) for key, part in LiveWeights(student.chunks, student.arch).tensors()}


def bits_of(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def weight_hash(teacher) -> str:
    """SHA-256 over what a teacher computes with on this rank."""
    digest = hashlib.sha256()
    with teacher._in_place():
        for chunk in teacher.model_chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                if ".adapter." in name and not chunk.get_submodule(name.rsplit(".", 1)[0]).on:
                    continue
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
