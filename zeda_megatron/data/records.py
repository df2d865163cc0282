"""What one line of a prompt or rollout file says, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError

Message = dict[str, str]
_MESSAGE_KEYS = ("role", "content", "reasoning_content")


@dataclass(frozen=True)
class Prompt:
    """A question to be answered by sampling."""

    messages: list[Message]
    """The conversation so far; the next turn is the model's."""
    label: Any = None
    """Reference answer, any JSON value."""
    kind: str = ""
    """Domain, such as `prose` or `number_sorting`."""


@dataclass(frozen=True)
class Rollout:
    """A conversation to learn from, usually one prompt and one sampled response."""

    messages: list[Message]
    """The whole conversation; training is on the assistant's turns."""
    label: Any = None
    """Reference answer, any JSON value."""
    kind: str = ""
    """Domain, such as `prose` or `number_sorting`."""
    prompt_ids: list[int] | None = None
    """Token ids that were fed; with `response_ids` they replace a new tokenisation of `messages`."""
    response_ids: list[int] | None = None
    """Token ids that were sampled, the end token included."""
    finish_reason: str | None = None
    """`stop`, or `length` when the response was cut off."""

    def to_line(self) -> dict[str, Any]:
        """The JSON object of a rollout file; fields without a value are left out."""
        line: dict[str, Any] = {"messages": self.messages}
        for name in ("label", "kind", "prompt_ids", "response_ids", "finish_reason"):
            value = getattr(self, name)
            if value is not None and value != "":
                line[name] = value
        return line


def parse_prompt(line: Any, where: str) -> Prompt:
    """A `{"prompt": text or messages, "label", "kind"}` object; `where` opens the error message."""
    _expect_object(line, where)
    if "prompt" not in line:
        raise UserError(f'{where}: no key "prompt" (found {_keys(line)})')
    prompt = line["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(prompt, where, "prompt")
    if messages[-1]["role"] == "assistant":
        raise UserError(f'{where}: "prompt" ends with an assistant message; it must end before the answer')
    return Prompt(messages, line.get("label"), _optional_text(line, "kind", where) or "")


def parse_rollout(line: Any, where: str) -> Rollout:
    """A `{"messages": [...]}` object, optionally with token ids; `where` opens the error message."""
    _expect_object(line, where)
    if "messages" not in line:
        raise UserError(f'{where}: no key "messages" (found {_keys(line)})')
    messages = _messages(line["messages"], where, "messages")
    prompt_ids, response_ids = _ids(line, "prompt_ids", where), _ids(line, "response_ids", where)
    if (prompt_ids is None) != (response_ids is None):
        raise UserError(f'{where}: "prompt_ids" and "response_ids" must come together')
    if response_ids is None and all(m["role"] != "assistant" for m in messages):
        raise UserError(f'{where}: "messages" has no assistant message to learn from')
    return Rollout(
        messages,
        line.get("label"),
        _optional_text(line, "kind", where) or "",
        prompt_ids,
        response_ids,
        _optional_text(line, "finish_reason", where),
    )


def _expect_object(line: Any, where: str) -> None:
    if not isinstance(line, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(line).__name__}")


def _keys(line: dict) -> str:
    return ", ".join(sorted(line)) or "none"


def _messages(value: Any, where: str, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "{key}" must be a non-empty list of messages')
    messages = []
    for number, message in enumerate(value, 1):
        here = f'{where}: message {number} of "{key}"'
        if not isinstance(message, dict):
            raise UserError(f'{here} must be an object with "role" and "content"')
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise UserError(f'{here} needs a text "{name}"')
        given = {name: text for name, text in message.items() if text is not None}
        for name in given:
            # Silently losing, say, tool calls would train on another conversation than the file shows.
            if name not in _MESSAGE_KEYS:
                raise UserError(f'{here} has the key "{name}"; only {", ".join(_MESSAGE_KEYS)} are read')
        if not isinstance(given.get("reasoning_content", ""), str):
            raise UserError(f'{here}: "reasoning_content" must be text')
        messages.append(given)
    return messages


def _ids(line: dict, key: str, where: str) -> list[int] | None:
    value = line.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
        raise UserError(f'{where}: "{key}" must be a list of token ids (integers from 0)')
    return value


def _optional_text(line: dict, key: str, where: str) -> str | None:
    value = line.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be text, found {type(value).__name__}')
    return value
