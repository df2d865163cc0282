"""What one line of a prompt or rollout file says, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, cut_short

Message = dict[str, str]
_MESSAGE_KEYS = ("role", "content", "reasoning_content")
_SHAREGPT_KEYS = ("from", "value")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names and the roles they mean."""
_CONVERSATIONS = ("messages", "conversations")
_ROLE = re.compile(r"[^\W\d][\w.-]{0,31}")
CUT_OFF = ("length", "max_tokens", "abort", "error", "content_filter")
"""Finish reasons of answers that did not come to their end, as servers name them."""
MAX_DEPTH = 100
"""Deepest nesting of a label."""


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

    @property
    def complete(self) -> bool:
        """Whether the response came to its end."""
        return self.finish_reason not in CUT_OFF

    def to_line(self) -> dict[str, Any]:
        """The JSON object of a rollout file; fields without a value are left out."""
        line: dict[str, Any] = {"messages": self.messages}
        for name in ("label", "kind", "prompt_ids", "response_ids", "finish_reason"):
            value = getattr(self, name)
            if value is not None and value != "":
                line[name] = value
        return line


def parse_prompt(line: Any, where: str) -> Prompt:
    """A line that asks: `{"prompt": text or messages, "label", "kind"}`, or a conversation (`parse_rollout`) without
    its answer. `where` opens the error message."""
    _expect_object(line, where)
    if isinstance(line.get("prompt"), str):
        line = line | {"prompt": [{"role": "user", "content": line["prompt"]}]}
    messages, key = _conversation(line, where, ("prompt", *_CONVERSATIONS))
    last = messages[-1]
    if last["role"] == "assistant":
        raise UserError(f'{where}: "{key}" ends with an assistant message; it must end before the answer')
    if not last["content"].strip():
        raise UserError(f"{where}: the prompt is empty")
    _refuse_tools(line, where)
    return Prompt(messages, _label(line, where), _optional_text(line, "kind", where) or "")


def parse_rollout(line: Any, where: str) -> Rollout:
    """A conversation: `{"messages": [{"role", "content"}, ...]}` or ShareGPT's `{"conversations": [{"from", "value"},
    ...]}`, optionally with token ids; `where` opens the error message."""
    _expect_object(line, where)
    messages, key = _conversation(line, where, _CONVERSATIONS)
    prompt_ids, response_ids = _ids(line, "prompt_ids", where), _ids(line, "response_ids", where)
    if (prompt_ids is None) != (response_ids is None):
        raise UserError(f'{where}: "prompt_ids" and "response_ids" must come together')
    if response_ids is None:
        _refuse_tools(line, where)
        if all(m["role"] != "assistant" for m in messages):
            raise UserError(f'{where}: "{key}" has no assistant message to learn from')
        for number, message in enumerate(messages, 1):
            said = message["content"] + message.get("reasoning_content", "")
            if message["role"] == "assistant" and not said.strip():
                raise UserError(f'{where}: message {number} of "{key}" is an answer without text')
    return Rollout(
        messages,
        _label(line, where),
        _optional_text(line, "kind", where) or "",
        prompt_ids,
        response_ids,
        _optional_text(line, "finish_reason", where),
    )


def _expect_object(line: Any, where: str) -> None:
    if not isinstance(line, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(line).__name__}")


def _conversation(line: dict, where: str, keys: tuple[str, ...]) -> tuple[list[Message], str]:
    """The conversation under the first of the keys that is there, and that key."""
    key = next((key for key in keys if line.get(key) is not None), None)
    if key is None:
        others = f'; "{keys[-2]}" and "{keys[-1]}" are read too' if len(keys) > 2 else ""
        found = cut_short(", ".join(sorted(line)) or "none")
        raise UserError(f'{where}: no key "{keys[0]}" (found {found}){others}')
    messages = _messages(line[key], where, key)
    system = line.get("system") if key == "conversations" else None
    if system is not None and not isinstance(system, str):
        raise UserError(f'{where}: "system" must be text')
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages, key


def _messages(value: Any, where: str, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: "{key}" must be a non-empty list of messages')
    return [_message(one, f'{where}: message {number} of "{key}"') for number, one in enumerate(value, 1)]


def _message(message: Any, here: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f'{here} must be an object with "role" and "content"')
    names = _SHAREGPT_KEYS if "from" in message and "role" not in message else _MESSAGE_KEYS
    for name in names[:2]:
        if not isinstance(message.get(name), str):
            raise UserError(f'{here} needs a text "{name}"')
    given = {name: text for name, text in message.items() if text is not None}
    for name in given:
        # Silently losing, say, tool calls would train on another conversation than the file shows.
        if name not in names:
            raise UserError(f'{here} has the key "{cut_short(name)}"; only {", ".join(names)} are read')
    if names is _SHAREGPT_KEYS:
        speaker = given["from"]
        if speaker not in _SPEAKERS:
            raise UserError(f'{here} is from "{cut_short(speaker)}"; known are {", ".join(_SPEAKERS)}')
        given = {"role": _SPEAKERS[speaker], "content": given["value"]}
    # Templates write the role beside their markers, so a marker in it would be one.
    if not _ROLE.fullmatch(given["role"]):
        raise UserError(
            f'{here}: "{cut_short(given["role"])}" is no role; one is a word such as user or assistant'
        )
    if not isinstance(given.get("reasoning_content", ""), str):
        raise UserError(f'{here}: "reasoning_content" must be text')
    return given


def _refuse_tools(line: dict, where: str) -> None:
    for name in ("tools", "functions"):
        if line.get(name):
            raise UserError(
                f'{where}: has "{name}", which are not shown to the model here; leave such lines out'
            )


def _label(line: dict, where: str) -> Any:
    """The label, whose nesting is bounded: it is written as JSON and read again."""
    level, depth = [line.get("label")], 0
    while level := [
        item
        for value in level
        if isinstance(value, dict | list)
        for item in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f'{where}: "label" is nested too deeply')
    return line.get("label")


def _ids(line: dict, key: str, where: str) -> list[int] | None:
    value = line.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < 2**31 for i in value):
        raise UserError(f'{where}: "{key}" must be a list of token ids (integers from 0 to 2**31 - 1)')
    return value


def _optional_text(line: dict, key: str, where: str) -> str | None:
    value = line.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be text, found {type(value).__name__}')
    return value
