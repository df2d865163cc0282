"""Conversations as tokens, with the response marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import UserError, cut_short
from .chat_tokenizer import PROBE, ChatTokenizer
from .records import Message, Rollout

OVERLONG = ("skip", "error", "truncate")
_EMPTY_THOUGHT = re.compile(r"<(\w+)></\1>")


@dataclass(frozen=True)
class TokenSample:
    """One conversation, tokenised."""

    tokens: list[int]
    """Token ids, prompt and response."""
    is_response: list[bool]
    """Same length: True for tokens that the model wrote (and learns)."""
    kind: str = ""
    """Domain label, such as `prose`."""


class CutOffThinking(UserError):
    """An answer that was cut off while thinking, and whose thought the template would close."""


def tokenize_conversation(
    messages: list[Message], tokenizer: ChatTokenizer, kind: str = "", complete: bool = True
) -> TokenSample:
    """Tokenise up to the last assistant message; the assistant's turns are the response.

    Prompt and response are tokenised apart, as in generation, where no token spans both: the result is what
    sampling this answer would have given. A turn runs from the end of its generation prompt to its end token.

    Templates may rewrite history (Qwen3's drops the thinking of earlier turns). An earlier turn that does not
    stand in the final text as the model would have written it is context, not response.

    An answer that was cut off while thinking, and whose thought the template would close, gives an empty sample.

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
        prompt, last = tokenizer.render_chat(messages[:turn], True), turn == turns[-1]
        whole = text if last else tokenizer.render_chat(messages[: turn + 1], False)
        if not (text.startswith(whole) and whole.startswith(prompt) and len(prompt) >= done):
            continue
        written = text[len(prompt) : len(whole)]
        if last:
            written = _said(written, messages[turn], complete)
            if written is None:
                return TokenSample([], [], kind)
        context = tokenizer.encode_after(text[:done], text[done : len(prompt)])
        answer = tokenizer.encode_after(prompt, written)
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


def _said(written: str, message: Message, complete: bool) -> str | None:
    """What of a rendered turn is learned: all of it, or of an answer that was cut off the part that the model said.

    None where the template ends a thought that the model did not end: it takes open thinking for the answer and puts
    the end of a thought before it.
    """
    content, thought = message["content"].strip(), message.get("reasoning_content", "")
    unclosed = content.startswith("<think>") and "</think>" not in content
    if complete and not unclosed:
        return written
    bare, said = "".join(written.split()), "".join(content.split())
    if thought.strip():
        # An answer follows the thought, so what stands between is the model's own.
        faithful = bool(said) and "".join(thought.split()) in bare
    else:
        added, found, _ = bare.partition(said) if said else ("", "", "")
        # Qwen3's template puts an empty thought before an answer that has none, cut off or not.
        faithful = bool(found) and (
            not added or (not unclosed and _EMPTY_THOUGHT.fullmatch(added) is not None)
        )
    if not faithful:
        return None
    end = written.rfind(content)
    return written if complete or end < 0 else written[: end + len(content)]


def _response_end(answer: list[int], tokenizer: ChatTokenizer) -> int | None:
    """Index behind the first end token, where sampling stops; what follows (a newline, say) is the template's."""
    return next((index + 1 for index, token in enumerate(answer) if token in tokenizer.eos_ids), None)


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
        CutOffThinking: only token ids could teach this answer.
    """
    if rollout.prompt_ids is None or rollout.response_ids is None:
        sample = tokenize_conversation(rollout.messages, tokenizer, rollout.kind, rollout.complete)
        if not sample.tokens:
            raise CutOffThinking(
                "the answer was cut off while thinking, and the chat template would close the thought: only token ids "
                "can teach it"
            )
        return sample
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
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[TokenSample]:
    """Samples of at most `seq_length` tokens that have something to learn, in order.

    Args:
        rollouts: as read by `load_rollouts`.
        tokenizer: of the model.
        seq_length: S, the length of a packed row.
        overlong: longer samples are left out (`skip`), cut at S (`truncate`), or stop the run (`error`).
        source: name of the file, for messages.
        say: gets a line for every reason why samples were left out.

    Raises:
        UserError: naming `source` and the sample's number (from 1).
    """
    if overlong not in OVERLONG:
        raise UserError(f"--overlong {overlong!r} is unknown; choose one of {', '.join(OVERLONG)}")
    count, long, thinking = 0, 0, 0
    for count, rollout in enumerate(rollouts, 1):
        here = f"{source} sample {count}"
        huge = overlong != "truncate" and _surely_longer(rollout, tokenizer, seq_length)
        try:
            sample = TokenSample([], []) if huge else tokenize_rollout(rollout, tokenizer)
        except CutOffThinking:
            thinking += 1
            continue
        except UserError as error:
            raise UserError(f"{here}: {error}") from error
        length = len(sample.tokens)
        if (huge or length > seq_length) and overlong == "error":
            raise UserError(
                f"{here} has {'far too many' if huge else length} tokens, more than --seq-length {seq_length}: raise "
                "it, or choose --overlong skip or truncate"
            )
        if (huge or length > seq_length) and overlong == "skip":
            long += 1
            continue
        sample = TokenSample(sample.tokens[:seq_length], sample.is_response[:seq_length], sample.kind)
        # The first token has no position that predicts it.
        if any(sample.is_response[1:]):
            yield sample
    if long:
        say(f"{source}: {long} of {count} conversations left out, longer than --seq-length {seq_length}")
    if thinking:
        say(
            f"{source}: {thinking} of {count} answers left out: cut off while thinking, without token ids, and the "
            "chat template would close the thought"
        )


def _surely_longer(rollout: Rollout, tokenizer: ChatTokenizer, limit: int) -> bool:
    """Whether a text need not be encoded to know that it is too long."""
    return rollout.response_ids is None and any(
        tokenizer.surely_longer(text, limit)
        for message in rollout.messages
        for name, text in message.items()
        if name != "role"
    )


def pieces_differ(rollouts: Iterable[Rollout], tokenizer: ChatTokenizer) -> str | None:
    """A line to say if some conversations, encoded in pieces, are not the text that the template wrote."""
    for rollout in (Rollout(PROBE), *rollouts):
        if rollout.response_ids is not None:
            continue
        try:
            sample = tokenize_conversation(rollout.messages, tokenizer)
            turns = [i for i, message in enumerate(rollout.messages) if message["role"] == "assistant"]
            whole = tokenizer.chat_ids(rollout.messages[: turns[-1] + 1], False)
        except UserError:
            continue  # whoever reads it for good says why
        if sample.tokens == whole[: len(sample.tokens)]:
            continue
        # A token that spans prompt and answer is no fault: sampling never gives it. The text must be the same.
        pieces, all_text = tokenizer.written_out(sample.tokens), tokenizer.written_out(whole)
        if not (all_text.startswith(pieces) or pieces.startswith(all_text.rstrip())):
            return (
                f"tokenizer {tokenizer.name}: a conversation encoded in pieces (prompt, answer) reads "
                f"{cut_short(pieces, 200)!r}, encoded as a whole {cut_short(all_text, 200)!r}: answers without token "
                "ids are learned as the former"
            )
    return None
