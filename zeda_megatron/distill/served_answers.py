"""Answers from servers that speak OpenAI's protocol: the original model as vLLM, SGLang or a provider serves it.

Every server has so many questions under way; whoever has ended one takes the next, so that no server waits for
another. A server that is gone leaves its questions to the others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.generate import GenerateOptions, SamplingConfig
from ..data.chat_tokenizer import ChatTokenizer
from ..data.records import Message
from ..errors import UserError, cut_short
from ..runtime.openai_server import NoAnswer, OpenAIServer, brief, chat_text, choice_of, text_of, usage_of
from ..strict_json import is_int

FLAGS = ("--rollout-url", "--rollout-model")
_TELL = {"return_token_ids": True}
"""vLLM's and SGLang's; a server that knows OpenAI's fields alone may refuse it."""
_PROBE = {"max_tokens": 1, "temperature": 0, **_TELL}
_PAUSE = 0.2
"""Seconds between two looks for something to do."""


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


def open_servers(options: GenerateOptions, length: int) -> list[OpenAIServer]:
    """The servers of --rollout-url, waited for as long as --rollout-wait says.

    Args:
        length: tokens of the longest prompt and its answer.

    Raises:
        UserError: nobody there, several models, or a context that is too short.
    """
    servers, until = [], time.monotonic() + options.rollout_wait
    for url in options.rollout_url:
        while True:
            try:
                server = OpenAIServer(
                    url,
                    options.rollout_model,
                    options.rollout_timeout,
                    tries=options.rollout_tries,
                    flags=FLAGS,
                )
                if options.rollout_model:
                    server.look_up()
                break
            except NoAnswer as error:
                if time.monotonic() >= until:
                    command = server_command(length)
                    raise UserError(f"{FLAGS[0]} {error}; start it: {command}") from None
                time.sleep(_PAUSE)
        servers.append(server)
    names = sorted({server.model for server in servers})
    if len(names) > 1:
        raise UserError(f"{FLAGS[0]}: these serve different models: {brief(', '.join(names))}")
    for server in servers:
        context = server.listed.get("max_model_len")
        if is_int(context) and context < length:
            raise UserError(
                f"{FLAGS[0]} {server.url}: has a context of {context}, prompt and answer may take {length}: "
                f"{server_command(length)}, or a smaller --max-new-tokens"
            )
    return servers


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
        self.alive, self.tokenizer, self.max_length = list(servers), tokenizer, max_length
        self.api, self.parallel, self.say = api, parallel, say
        self.ends = sorted(tokenizer.eos_ids)
        self.banned = {str(token): -100 for token in range(tokenizer.vocab_size, rows)}
        self._told = False
        self._plain: set[OpenAIServer] = set()

    def check(self, question: Served) -> None:
        """Raise `UserError` unless every server cuts the prompt into the tokens that our tokenizer gives.

        Of a chat, every answer is checked, where the server tells the prompt's tokens; here we learn whether it does.
        """
        for server in list(self.alive):
            try:
                self._check_chat(server, question) if self.api == "chat" else self._check(server, question)
            except NoAnswer as error:
                if failed := self._gone(server, error):
                    raise failed from None

    def _check_chat(self, server: OpenAIServer, question: Served) -> None:
        try:
            server.ask("/chat/completions", {"messages": question.messages, **_PROBE}, 1)
        except NoAnswer:
            raise
        except UserError:
            self._plain.add(server)

    def _check(self, server: OpenAIServer, question: Served) -> None:
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
        todo, done, over = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        for number in range(len(questions)):
            todo.put(number)

        def work(server: OpenAIServer) -> None:
            while not over.is_set() and server in self.alive:
                try:
                    number = todo.get(timeout=_PAUSE)
                except queue.Empty:
                    continue  # a server that is going may give one back
                try:
                    done.put((number, self._one(server, questions[number], sampling)))
                except NoAnswer as error:
                    todo.put(number)
                    done.put((server, error))
                except BaseException as error:
                    done.put((None, error))

        # One of each server after the other: few questions are shared out evenly.
        for _ in range(min(self.parallel, len(questions))):
            for server in self.alive:
                threading.Thread(target=work, args=[server], daemon=True).start()
        left = len(questions)
        try:
            while left:
                ready, failed = [], None
                for who, what in _waiting(done):
                    if isinstance(what, NoAnswer):
                        failed = self._gone(who, what) or failed
                    elif isinstance(what, BaseException):
                        failed = what
                    else:
                        ready.append((who, what))
                left -= len(ready)
                yield ready  # what has come is kept before anything ends the run
                if failed is not None:
                    raise failed
        finally:
            over.set()

    def _gone(self, server: OpenAIServer, error: NoAnswer) -> UserError | None:
        """Do without a server; an error if it was the last."""
        if server not in self.alive:
            return None  # another of its questions told
        self.alive = [one for one in self.alive if one is not server]
        if not self.alive:
            return UserError(f"{FLAGS[0]} {error}; no server is left, the same command goes on")
        self.say(f"{FLAGS[0]} {error}; {len(self.alive)} servers go on without it")
        return None

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


def _waiting(done: queue.SimpleQueue) -> Iterator[tuple[Any, Any]]:
    """All that is there, after a wait of a second at most."""
    try:
        yield done.get(timeout=1.0)
        while True:
            yield done.get_nowait()
    except queue.Empty:
        return


def _ids(where: str, choice: dict, name: str, said: dict | None = None) -> list[int] | None:
    """Token ids that a reply tells, in its choice or beside it."""
    found = choice.get(name)
    if found is None and said is not None:
        found = said.get(name)
    if found is None:
        return None
    if not (isinstance(found, list) and all(is_int(one) and one >= 0 for one in found)):
        raise UserError(f"{where}: {name} is no list of token ids: {brief(found)}")
    return found
