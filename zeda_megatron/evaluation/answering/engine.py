"""What answers questions: a model in transformers, in Megatron, or behind a server.

And what engines share: the hash of a model's folder, and questions as the model's own chat template asks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...checkpoint.folders import TRACKER, tracked
from ...config.generate import SamplingConfig
from ...data.records import Message
from ...data.tokenizers import ChatTokenizer
from ...models.hf_config import adapted_steps_of, zero_experts_of
from ...runtime.openai_server import END, THINK


@dataclass(frozen=True)
class Request:
    """One answer to be made."""

    messages: list[Message]
    stream: int
    """With the seed of the sampling it fixes the answer's random numbers, from 0 to 2**31 - 1."""
    name: str = ""
    """For error messages."""


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    """Decoded, thinking included, without the end token. It begins with `<think>` where the prompt opened the
    thinking."""
    tokens: int
    """Generated tokens, the end token included."""
    prompt_tokens: int
    finish: str
    """`stop`, or `length` when it was cut off."""
    zero_share: float | None = None
    """Routed slots of prompt and answer that chose a zero expert (or that a rule skipped), of all routed slots."""


@dataclass(frozen=True)
class Origin:
    """What an arm is, whatever it is called: its model's own files tell."""

    zero_experts: bool | None = None
    """Whether it answers with zero experts; None: nobody knows (a server's)."""
    adapted_steps: int | None = None
    """Steps that it has been distilled for, 0: an original; None: nobody knows."""

    @classmethod
    def of_config(cls, config: dict[str, Any] | None) -> Origin:
        """What a config.json tells. Raises `UserError` for keys that make no sense."""
        if config is None:
            return cls()
        return cls(bool(zero_experts_of(config).num_zero_experts), adapted_steps_of(config))


@dataclass(frozen=True)
class About:
    """What is known of the model that answers."""

    model: str
    """Folder or address."""
    config: dict[str, Any] | None = None
    """Its HF config, for FLOP counts."""
    fingerprint: str = ""
    """Hash over the weights: another model is another run."""
    head_flops: float = 0.0
    """Heads of paired zero experts, as a share of the static model's expert FLOPs."""
    stand_in_flops: float = 0.0
    """A stand-in of paired zero experts, as a share of its expert's FLOPs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides its answers: pick rule, dial, type of numbers."""
    origin: Origin = Origin()
    prompts: Callable[[list[list[Message]]], str] = field(default=lambda conversations: "", repr=False)
    """A hash over conversations as the model gets them: who changes the chat template, the tokenizer or the end tokens
    makes another run. Empty where a server keeps them to itself."""


class Engine(Protocol):
    """Answers requests. The same requests in the same group give the same answers."""

    about: About
    group: int
    """Answers made together. Groups are fixed by the order of the questions, so that a resumed run forms the same."""
    parallel: int
    """Groups under way at a time."""

    def answer(self, requests: list[Request], sampling: SamplingConfig) -> list[Answer]:
        """One answer per request, in their order; may be called from `parallel` threads."""
        ...

    def slots(self) -> tuple[int, int] | None:
        """(zero slots, routed slots) counted so far over all answers, where only such sums are known."""
        ...


def stream_of(benchmark: str, uid: str, sample: int) -> int:
    """The random stream of one answer: it depends on nothing but its name."""
    name = f"{benchmark}\0{uid}\0{sample}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1


_CHUNK, _CHUNKS = 1 << 16, 16
_WEIGHTS = (".safetensors", ".distcp", ".pt", ".bin")
_DESCRIBE = ("config.json", "zeda.json", "hf_config/config.json")


def fingerprint(folder: str | Path) -> str:
    """Hash over the config, names and sizes of the weight files, and parts of each (start, end, 16 places between).

    Weights that were trained further differ nearly everywhere, so samples of 64 KiB tell. Tokenizer and chat template
    are not in it: the hash over the prompts (`ChatPrompts.digest`) has them.
    """
    root, whole = Path(folder), hashlib.sha256()
    for name in _DESCRIBE:
        if (root / name).is_file():
            whole.update((root / name).read_bytes())
    if (root / TRACKER).is_file():
        whole.update((root / TRACKER).read_bytes())
        latest = tracked(root)
        root = latest if latest is not None and latest.is_dir() else root
    for file in sorted(path for path in root.rglob("*") if path.suffix in _WEIGHTS and path.is_file()):
        size = file.stat().st_size
        whole.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with file.open("rb") as stream:
            for place in range(_CHUNKS + 1):
                stream.seek(max(size - _CHUNK, 0) * place // _CHUNKS)
                whole.update(stream.read(_CHUNK))
    return whole.hexdigest()[:32]


class ChatPrompts:
    """A tokenizer and its template, as far as answering needs them.

    Args:
        tokenizer: of the model that answers.
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer

    def ids(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids."""
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True)

    def text(self, messages: list[Message], ids: Sequence[int]) -> str:
        """An answer's text. Where the template has opened the thinking, the mark stands before it: only so can a
        verifier see that it never ended."""
        answer = self.tokenizer.decode(ids)
        return f"{THINK}{answer}" if self.opened(messages) and not answer.startswith(THINK) else answer

    def opened(self, messages: list[Message]) -> bool:
        """Whether the prompt ends inside the thinking."""
        prompt = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        return prompt.rfind(THINK) > prompt.rfind(END)

    def digest(self, conversations: list[list[Message]]) -> str:
        """Hash over the token ids of all prompts, their text when decoded, and the end tokens: template, its variables,
        tokenizer, and the date if the template asks for it, all show in it."""
        whole = hashlib.sha256(repr(sorted(self.tokenizer.eos_ids)).encode())
        for messages in conversations:
            ids = self.ids(messages)
            whole.update(repr((ids, self.tokenizer.decode(ids))).encode())
        return whole.hexdigest()[:32]
