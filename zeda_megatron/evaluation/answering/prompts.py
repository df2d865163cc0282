"""Questions as a model's own chat template asks them, and its answers as text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ...data.records import Message
from ...data.tokenizers import ChatTokenizer

THINK, END = "<think>", "</think>"


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
