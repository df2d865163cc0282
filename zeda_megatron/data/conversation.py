"""Conversations as tokens, with the response marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UserError
from .records import Message, Rollout
from .tokenizers import ChatTokenizer

OVERLONG = ("skip", "error", "truncate")


@dataclass(frozen=True)
class TokenSample:
    """One conversation, tokenised."""

    tokens: list[int]
    """Token ids, prompt and response."""
    is_response: list[bool]
    """Same length: True for tokens that the model wrote (and learns)."""
    kind: str = ""
    """Domain label, such as `prose`."""


def tokenize_conversation(
    messages: list[Message], tokenizer: ChatTokenizer, kind: str = "", complete: bool = True
) -> TokenSample:
    """Tokenise up to the last assistant message; the assistant's turns are the response.

    Prompt and response are tokenised apart, as in generation, where no token spans both: the result is what
    sampling this answer would have given. A turn runs from the end of its generation prompt to its end token.

    Templates may rewrite history (Qwen3's drops the thinking of earlier turns). An earlier turn that does not
    stand in the final text as the model would have written it is context, not response.

    Args:
        messages: the conversation; what follows the last assistant message is left out.
        tokenizer: gives the chat template.
        kind: domain label of the sample.
        complete: False for an answer that was cut off: then it gets no end token.

    Raises:
        UserError: no assistant message, or the template rewrites even the last turn.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("the conversation has no assistant message to learn from")
    messages = messages[: turns[-1] + 1]
    text = tokenizer.render_chat(messages, False)
    tokens: list[int] = []
    is_response: list[bool] = []
    done, open_end = 0, False
    for turn in turns:
        prompt = tokenizer.render_chat(messages[:turn], True)
        whole = text if turn == turns[-1] else tokenizer.render_chat(messages[: turn + 1], False)
        if not (text.startswith(whole) and whole.startswith(prompt) and len(prompt) >= done):
            continue
        context = tokenizer.encode(text[done : len(prompt)])
        answer = tokenizer.encode(text[len(prompt) : len(whole)])
        end = _response_end(answer, tokenizer)
        # Where a template closes no turn, the marker that opens the next one is the end token (GLM).
        ends_before = open_end and bool(context) and context[0] in tokenizer.eos_ids
        tokens += context + answer
        is_response += [ends_before and i == 0 for i in range(len(context))]
        is_response += [end is None or i < end for i in range(len(answer))]
        done, open_end = len(whole), end is None
    if done != len(text):
        raise UserError(
            "the chat template does not keep the prompt of the last answer as the beginning of the "
            "conversation: give another one with --chat-template-file"
        )
    if open_end and complete:
        tokens.append(_marker_after(messages, text, tokenizer))
        is_response.append(True)
    # Cut what the template writes after the answer, so that the sample ends where sampling would have.
    while tokens and not is_response[-1]:
        tokens.pop()
        is_response.pop()
    if not complete and tokens and tokens[-1] in tokenizer.eos_ids:
        tokens.pop()
        is_response.pop()
    return TokenSample(tokens, is_response, kind)


def _response_end(answer: list[int], tokenizer: ChatTokenizer) -> int | None:
    """Index after the last end token; what follows it (a newline, say) belongs to the template."""
    for index in range(len(answer) - 1, -1, -1):
        if answer[index] in tokenizer.eos_ids:
            return index + 1
    return None


def _marker_after(messages: list[Message], text: str, tokenizer: ChatTokenizer) -> int:
    """End token for a template that closes no turn: the marker of a next user turn, or the `eos_id`."""
    try:
        longer = tokenizer.render_chat([*messages, {"role": "user", "content": "x"}], False)
    except UserError:
        return tokenizer.eos_id
    following = tokenizer.encode(longer[len(text) :]) if longer.startswith(text) else []
    return following[0] if following and following[0] in tokenizer.eos_ids else tokenizer.eos_id


def tokenize_rollout(rollout: Rollout, tokenizer: ChatTokenizer) -> TokenSample:
    """One rollout: its token ids as they were sampled, or else its messages tokenised.

    Raises:
        UserError: an id outside the vocabulary, or a conversation that cannot be tokenised.
    """
    if rollout.prompt_ids is None or rollout.response_ids is None:
        complete = rollout.finish_reason != "length"
        return tokenize_conversation(rollout.messages, tokenizer, rollout.kind, complete)
    tokens = rollout.prompt_ids + rollout.response_ids
    if tokens and max(tokens) >= tokenizer.vocab_size:
        raise UserError(
            f"token id {max(tokens)} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}: "
            "the rollouts were made with another tokenizer"
        )
    is_response = [False] * len(rollout.prompt_ids) + [True] * len(rollout.response_ids)
    return TokenSample(tokens, is_response, rollout.kind)


def tokenize_rollouts(
    rollouts: Iterable[Rollout],
    tokenizer: ChatTokenizer,
    seq_length: int,
    overlong: str = "skip",
    source: str = "rollouts",
) -> Iterator[TokenSample]:
    """Samples of at most `seq_length` tokens that have something to learn, in order.

    Args:
        rollouts: as read by `load_rollouts`.
        tokenizer: of the model.
        seq_length: S, the length of a packed row.
        overlong: longer samples are left out (`skip`), cut at S (`truncate`), or stop the run (`error`).
        source: name of the file, for messages.

    Raises:
        UserError: naming `source` and the sample's number (from 1).
    """
    if overlong not in OVERLONG:
        raise UserError(f"--overlong {overlong!r} is unknown; choose one of {', '.join(OVERLONG)}")
    for number, rollout in enumerate(rollouts, 1):
        try:
            sample = tokenize_rollout(rollout, tokenizer)
        except UserError as error:
            raise UserError(f"{source} sample {number}: {error}") from error
        length = len(sample.tokens)
        if length > seq_length and overlong == "error":
            raise UserError(
                f"{source} sample {number} has {length} tokens, more than --seq-length {seq_length}: "
                "raise it, or choose --overlong skip or truncate"
            )
        if length > seq_length and overlong == "skip":
            continue
        sample = TokenSample(sample.tokens[:seq_length], sample.is_response[:seq_length], sample.kind)
        # The first token has no position that predicts it.
        if any(sample.is_response[1:]):
            yield sample
