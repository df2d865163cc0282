"""Options of `zeda evaluate run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...config.arguments import Count, check_choices, require
from ...config.run import Watched
from ...data.jsonl import parse_line
from ...errors import UserError, cut_short
from .engine import Engine
from .run_folder import is_deep

ENGINES = ("transformers", "openai", "megatron")
_OF_ENGINES = {
    "dtype": ("transformers",),
    "served_model": ("openai",),
    "config_folder": ("openai",),
    "mask": ("megatron",),
    "moe_pick_rule": ("megatron",),
    "zero_dial": ("transformers", "megatron"),
    "paired_budget": ("megatron",),
    "calibration": ("megatron",),
}
"""Settings that not every engine has: given to another, they would change nothing without a word."""


@dataclass(frozen=True)
class RunOptions(Watched):
    """What is asked of which model, and where the answers go."""

    benchmarks: str | None = None
    """Names, comma-separated: gsm8k, humaneval, reasoning_gym:chain_sum, ...; `paper` is the paper's eleven,
    `out-of-domain` its other two (docs/evaluation.md lists all)."""

    model: str | None = None
    """Hugging Face folder, Megatron checkpoint, or the address of a server (http://host:port/v1)."""

    engine: str | None = None
    """transformers, openai or megatron. Default: openai for an address, megatron for a checkpoint of this project,
    transformers otherwise."""

    output: str | None = None
    """Folder for the answers. A run that was interrupted goes on there."""

    arm: str | None = None
    """Name of this model in reports. Default: the folder's name. The static model must be called `teacher`."""

    data: str | None = None
    """Folder with the benchmarks' files."""

    limit: Count | None = None
    """At most so many questions per benchmark."""

    samples: Count | None = None
    """Answers per question. Default: the paper's number for each benchmark."""

    max_new_tokens: int | None = None
    """Longest answer. Default: the paper's number for each benchmark."""

    temperature: float | None = None
    """Default: the paper's 0.6. 0 is greedy."""

    top_p: float | None = None
    """Default: the paper's 0.95."""

    top_k: int | None = None
    """Default: the paper's 20. 0 is all."""

    seed: int = 0
    """Seed of the answers and of made-up questions."""

    concurrency: Count = 8
    """Answers under way at a time."""

    chat_args: str | None = None
    """JSON object with variables for the chat template, such as '{"enable_thinking": true}'."""

    family_settings: str | None = None
    """JSON file with settings of reasoning-gym families."""

    dtype: str = "auto"
    """transformers: float32, bfloat16, ... or auto."""

    served_model: str | None = None
    """openai: name that the server knows. Default: its only one."""

    config_folder: str | None = None
    """openai: folder with the model's config.json, for FLOP counts."""

    mask: bool = False
    """megatron: mask the zero experts: the static model."""

    moe_pick_rule: str | None = None
    """megatron: topk=2, skip=0.4 or top_p=0.7; without a number tuned to --target-share on --calibration."""

    zero_dial: str | None = None
    """Compute dial: a number (transformers, megatron), or `auto`, tuned to --target-share (megatron)."""

    paired_budget: str = "model"
    """megatron, `--zero-dial auto`: one threshold (model) or one per layer (layer)."""

    target_share: float = 0.5
    """Zero share that a rule or the dial is tuned to."""

    calibration: str | None = None
    """Rollout file that rules and dial are tuned on."""

    seq_length: int = 2048
    """Tokens of a row of the calibration file."""

    allow_weak_sandbox: bool = False
    """Run model-written code although a wall of the sandbox is missing."""

    verify_workers: Count = 2
    """Programs judged at a time."""

    verify_again: bool = False
    """Judge all answers anew."""

    @property
    def chat_variables(self) -> dict[str, Any]:
        """`chat_args`, parsed."""
        value = parse_line((self.chat_args or "{}").encode("utf-8", "surrogateescape"), "--chat-args")
        if not isinstance(value, dict) or is_deep(value):
            raise UserError(
                f"--chat-args {cut_short(self.chat_args)}: expected a JSON object, not nested deeply"
            )
        return value

    def check(self) -> None:
        """Raise `UserError` for what is missing or out of range."""
        require(self, "benchmarks", "model", "output")
        check_choices(self)
        if self.engine not in (None, *ENGINES):
            raise UserError(f"--engine {self.engine} is unknown; choose one of {', '.join(ENGINES)}")
        name = engine_name(self)
        for field, engines in _OF_ENGINES.items():
            value, default = getattr(self, field), type(self).__dataclass_fields__[field].default
            if value != default and name not in engines:
                flag = "--" + field.replace("_", "-")
                raise UserError(
                    f"{flag} {value}: means nothing to --engine {name}, but to {', '.join(engines)}"
                )


def engine_name(options: RunOptions) -> str:
    """The engine that was asked for, or the one that fits the model."""
    from pathlib import Path

    if options.engine:
        return options.engine
    if options.model.startswith(("http://", "https://")):
        return "openai"
    return "megatron" if (Path(options.model) / "hf_config").is_dir() else "transformers"


@contextmanager
def open_engine(options: RunOptions) -> Iterator[Engine]:
    """The engine of these options, ready to answer."""
    name = engine_name(options)
    if name == "openai":
        from .openai_engine import OpenAIEngine

        yield OpenAIEngine(
            options.model,
            options.served_model,
            options.concurrency,
            options.config_folder,
            template_args=options.chat_variables,
        )
    elif name == "megatron":
        from ...runtime import process_groups
        from .megatron_engine import MegatronEngine

        with process_groups.started():
            yield MegatronEngine(options)
    else:
        from .transformers_engine import TransformersEngine

        dial = None
        if options.zero_dial is not None:
            try:
                dial = float(options.zero_dial)
            except ValueError:
                raise UserError(
                    f"--zero-dial {options.zero_dial}: transformers takes a number; auto is for --engine megatron"
                ) from None
        yield TransformersEngine(
            options.model, options.concurrency, options.dtype, dial, options.chat_variables
        )
