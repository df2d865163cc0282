"""Answers from servers that speak OpenAI's protocol: the original model as vLLM, SGLang or a provider serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config.generate import SamplingConfig
from ..data.chat_tokenizer import ChatTokenizer
from ..data.records import Message
from ..errors import UserError, cut_short
from ..runtime.openai_server import NoAnswer, OpenAIServer, brief, chat_text, choice_of, text_of, usage_of
from ..strict_json import is_int
from .server_pool import FLAGS, ServerPool

_TELL = {"return_token_ids": True}
"""vLLM's and SGLang's; a server that knows OpenAI's fields alone may refuse it."""
_PROBE = {"max_tokens": 1, "temperature": 0, **_TELL}


@dataclass(frozen=True)
class Served:
    """A question for a server."""

    messages: list[Message]
    """The conversation so far."""
    prompt_ids: list[int]
    """The same as our tokenizer and template write it."""
    stream_id: int
    """With the seed it fixes the answer's seed."""


@dataclass(frozen=True)
class ServedAnswer:
    """What came back."""

    text: str
    """Without the tokens that end it."""
    response_ids: list[int] | None
    """Sampled tokens, the end token included if there is one; None: the server does not tell."""
    finish_reason: str
    """`stop` or `length`."""


def server_command(length: int) -> str:
    """What starts a server that answers as the model itself would: no defaults of its generation_config."""
    return (
        f"vllm serve MODEL --max-model-len {length} --generation-config vllm (or python -m sglang.launch_server "
        f"--model-path MODEL --context-length {length} --sampling-defaults openai)"
    )


class Servers:
    """Asks servers for answers.

    Args:
        tokenizer: of the model, for prompts, the tokens that end an answer, and the comparison with the server's.
        max_length: of the context.
        rows: of the model's embedding; those beyond the tokenizer's ids are banned.
        api: `tokens`: prompts are sent as token ids, what comes back is tokens; `chat`: as messages, for servers that
            take nothing else.
        parallel: questions under way at each server.
        say: gets a line about a server that is gone, or that does not tell tokens.
    """

    def __init__(
        self,
        servers: Sequence[OpenAIServer],
        tokenizer: ChatTokenizer,
        max_length: int,
        rows: int,
        api: str,
        parallel: int,
        say: Callable[[str], None],
    ):
        self.pool = ServerPool(servers, parallel, say)
        self.tokenizer, self.max_length, self.api, self.say = tokenizer, max_length, api, say
        self.ends = sorted(tokenizer.eos_ids)
        self.banned = {str(token): -100 for token in range(tokenizer.vocab_size, rows)}
        self._told = False
        self._plain: set[OpenAIServer] = set()

    def check(self, question: Served) -> None:
        """Raise `UserError` unless every server cuts the prompt into the tokens that our tokenizer gives.

        Of a chat, every answer is checked, where the server tells the prompt's tokens; here we learn whether it does.
        """
        self.pool.each(partial(self._check_chat if self.api == "chat" else self._check, question))

    def _check_chat(self, question: Served, server: OpenAIServer) -> None:
        try:
            server.ask("/chat/completions", {"messages": question.messages, **_PROBE}, 1)
        except NoAnswer:
            raise
        except UserError:
            self._plain.add(server)

    def _check(self, question: Served, server: OpenAIServer) -> None:
        text = self.tokenizer.render_chat(question.messages, add_generation_prompt=True)
        where = f"{FLAGS[0]} {server.url}"
        try:
            said = server.ask("/completions", {"prompt": text, "add_special_tokens": False, **_PROBE}, 1)
        except NoAnswer:
            raise
        except UserError as error:
            raise UserError(f"{where}: takes no plain prompts ({error}); choose --rollout-api chat") from None
        choice, _ = choice_of(said, where)
        found, ours = _ids(where, choice, "prompt_token_ids", said), question.prompt_ids
        if found is not None:
            self._compare(where, found, ours)
        elif (count := usage_of(said, where)["prompt_tokens"]) not in (0, len(ours)):
            self._differs(where, count, len(ours))

    def answers(
        self, questions: Sequence[Served], sampling: SamplingConfig
    ) -> Iterator[list[tuple[int, ServedAnswer]]]:
        """Numbers of questions and their answers, as they come; now and then an empty list, so that the caller can
        look for a signal. Who stops listening leaves what is under way to itself."""
        return self.pool.share_out(
            len(questions), lambda server, number: self._one(server, questions[number], sampling)
        )

    def _one(self, server: OpenAIServer, question: Served, sampling: SamplingConfig) -> ServedAnswer:
        most = min(sampling.max_new_tokens, self.max_length - len(question.prompt_ids))
        order: dict[str, Any] = {
            "max_tokens": most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed_of(question.stream_id, bits=31),
        }
        where = f"{FLAGS[0]} {server.url}"
        if self.api == "chat":
            return self._from_chat(where, server, question, order, sampling, most)
        # Not OpenAI's: what an open server would else take from the model's generation_config.
        order |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        order |= {"prompt": question.prompt_ids, "stop_token_ids": self.ends, **_TELL}
        if self.banned:
            order["logit_bias"] = self.banned
        said = server.ask("/completions", order, most)
        choice, finish = choice_of(said, where)
        return self._made(where, choice, text_of(where, choice, "text"), finish)

    def _from_chat(self, where, server, question, order, sampling, most) -> ServedAnswer:
        order |= {"messages": question.messages}
        if sampling.top_k:
            order["top_k"] = sampling.top_k
        if self.tokenizer.template_args:
            order["chat_template_kwargs"] = self.tokenizer.template_args
        if server not in self._plain:
            order |= _TELL
        said = server.ask("/chat/completions", order, most)
        choice, finish = choice_of(said, where)
        found = _ids(where, choice, "prompt_token_ids", said)
        if found is not None:
            self._compare(where, found, question.prompt_ids)
        text, _ = chat_text(choice, finish, where)
        return self._made(where, choice, text, finish)

    def _made(self, where: str, choice: dict, text: str, finish: str) -> ServedAnswer:
        ids = _ids(where, choice, "token_ids")
        if ids is None:
            if not self._told:
                self._told = True
                self.say(
                    f"{where}: tells no token ids; training cuts the texts of its answers into tokens anew"
                )
            return ServedAnswer(text, None, finish)
        strange = next((i for i, token in enumerate(ids) if token >= self.tokenizer.vocab_size), None)
        if strange is not None:  # a row of the embedding that no text has, and that was not banned
            ids, finish = ids[:strange], "length"
        if finish == "stop" and (not ids or ids[-1] not in self.tokenizer.eos_ids):
            reason = choice.get("stop_reason")
            known = is_int(reason) and reason in self.tokenizer.eos_ids
            ids = [*ids, reason if known else self.tokenizer.eos_id]
        return ServedAnswer(self.tokenizer.decode(ids), ids, finish)

    def _compare(self, where: str, theirs: list[int], ours: list[int]) -> None:
        if theirs != ours:
            place = next((i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), None)
            if place is None:
                self._differs(where, len(theirs), len(ours))
            raise UserError(
                f"{where}: cuts a prompt into other tokens than we do (from token {place} on: "
                f"{self._shown(theirs, place)} in place of {self._shown(ours, place)}): another tokenizer or template?"
            )

    def _differs(self, where: str, theirs: int, ours: int) -> None:
        raise UserError(
            f"{where}: cuts a prompt into {theirs} tokens, we into {ours}: another tokenizer or template?"
        )

    def _shown(self, ids: list[int], place: int) -> str:
        return cut_short(repr(self.tokenizer.written_out(ids[place : place + 8])), 60)


def _ids(where: str, choice: dict, name: str, said: dict | None = None) -> list[int] | None:
    """Token ids that a reply tells, in its choice or beside it."""
    found = choice.get(name)
    if found is None and said is not None:
        found = said.get(name)
    if found is None:
        return None
    if not (isinstance(found, list) and all(is_int(one) and one >= 0 for one in found)):
        raise UserError(f"{where}: {name} is not a list of token ids: {brief(found)}")
    return found
